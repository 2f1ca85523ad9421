"""Olive's passes: what each takes, yields and needs, read from a file of the installed package. Olive is not imported.

The file says which packages a pass wants; what it does not say, and which passes work on something that no artifact
here holds, is written down below, as found by reading and running version 0.13.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline import FurtherPass, HostError, missing_packages

DISTRIBUTION = "olive-ai"
CONFIG = "olive_config.json"

EXPORTS = frozenset({"OnnxConversion", "ModelBuilder", "MobiusBuilder", "OptimumConversion"})
"""Passes among those for ONNX that take a torch model."""

ADAPTERS = "trains or handles adapters beside a model, which no artifact here holds"
ATTRIBUTES = "changes no model: it notes something for a later pass of Olive, which no artifact here holds"
OPENVINO = "works on OpenVINO's format, which no artifact here has"
QNN = "works with Qualcomm's SDK and for its NPU, and yields what no artifact here holds"
SEVERAL = "takes or yields several models, which no artifact here holds for Olive"

UNFIT: dict[str, str] = {
    **dict.fromkeys(
        ("DoRA", "LoHa", "LoKr", "LoRA", "LoftQ", "QLoRA", "ExtractAdapters", "MergeAdapterWeights"), ADAPTERS
    ),
    **dict.fromkeys(("CaptureSplitInfo", "CaptureLayerAnnotations", "SelectiveMixedPrecision"), ATTRIBUTES),
    **dict.fromkeys(
        (
            "OpenVINOConversion",
            "OpenVINOEncapsulation",
            "OpenVINOIoUpdate",
            "OpenVINOOptimumConversion",
            "OpenVINOQuantization",
            "OpenVINOQuantizationWithAccuracy",
            "OpenVINOWeightCompression",
        ),
        OPENVINO,
    ),
    **dict.fromkeys(
        (
            "EPContextBinaryGenerator",
            "QNNContextBinaryGenerator",
            "QNNConversion",
            "QNNModelLibGenerator",
            "QairtEncapsulation",
            "QairtGenAIBuilder",
            "QairtMHA2SHA",
            "QairtPipelinePass",
            "QairtPreparation",
        ),
        QNN,
    ),
    **dict.fromkeys(("ComposeOnnxModels", "OptimumMerging", "SplitModel", "StaticLLM"), SEVERAL),
    "OnnxDiscrepancyCheck": "changes no model: it compares it with another",
    "OrtSessionParamsTuning": "changes no model: it searches settings of a session; compile_onnxruntime is ours",
    "SDLoRA": "takes a diffusion pipeline",
    "SpinQuant": "downloads the text that it trains its rotations on, and takes no other",
    "VitisGenerateModelLLM": "needs AMD's package model_generate, which pip cannot install",
    "VitisGenerateModelSD": "needs AMD's package model_generate, which pip cannot install",
}
"""Passes that no stage can run, and why."""

FURTHER_PACKAGES: dict[str, tuple[str, ...]] = {
    "ModelBuilder": ("onnxruntime-genai<0.15.2",),  # from that on the builder asks for arguments that Olive lacks
    "SliceGPT": ("slicegpt",),
}
"""What the file does not say."""

GPU_ONLY = frozenset({"NVModelOptQuantization", "AutoAWQQuantizer", "GptqQuantizer", "GptqModel"})
"""Passes whose libraries compute on a CUDA GPU only."""


@dataclass(frozen=True)
class OliveType:
    """One of Olive's passes."""

    name: str
    module: str
    takes: str
    yields: str
    packages: tuple[str, ...]
    """What pip has to install."""
    unfit: str | None
    """Why no stage can run it, wherever."""
    device: str

    @property
    def lacking(self) -> str:
        """Why it cannot run here; empty where it can. A GPU is looked for when a plan is made."""
        if self.unfit is not None:
            return self.unfit
        if missing := missing_packages(self.packages):
            return "pip install " + " ".join(f"'{name}'" if "<" in name or ">" in name else name for name in missing)
        return ""


def olive_version() -> str:
    """Raises: HostError where Olive is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        raise HostError("Olive is not installed", hint="pip install olive-ai") from None


@cache
def olive_types() -> dict[str, OliveType]:
    """Name -> pass, in alphabetical order.

    Raises: HostError where Olive is not installed, or its file of passes is not there.
    """
    olive_version()
    spec = importlib.util.find_spec("olive")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((file for folder in folders if (file := Path(folder) / CONFIG).is_file()), None)
    if path is None:
        raise HostError(f"the installed Olive has no {CONFIG}", hint="pip install --force-reinstall olive-ai")
    config = json.loads(path.read_text(encoding="utf-8"))
    found = [_described(entry, config.get("extra_dependencies", {})) for entry in config["passes"].values()]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name.lower())}


def _described(entry: dict[str, Any], extras: dict[str, list[str]]) -> OliveType:
    module, _, name = entry["module_path"].rpartition(".")
    packages = [p for extra in entry.get("extra_dependencies", ()) for p in extras.get(extra, [extra])]
    packages += [*entry.get("module_dependencies", ()), *FURTHER_PACKAGES.get(name, ())]
    family = module.split(".")[2]  # olive.passes.FAMILY.…
    takes = "torch" if family == "pytorch" or name in EXPORTS else "diffusers" if family == "diffusers" else "onnx"
    unfit = UNFIT.get(name)
    return OliveType(
        name=name,
        module=module,
        takes=takes,
        yields="–" if unfit is not None else "torch" if family == "pytorch" else "onnx",
        packages=tuple(dict.fromkeys(packages)),
        unfit=unfit,
        device="cuda" if name in GPU_ONLY else "any",
    )


def entries(named: str | None = None) -> Iterable[FurtherPass]:
    """What `pipeline passes list --olive` shows; with `named`, that pass alone, with its parameters."""
    from passes.olive.parameters import in_words

    for entry in olive_types().values():
        if named not in (None, entry.name):
            continue
        needs = entry.lacking
        if not needs and entry.device == "cuda":
            needs = "a CUDA GPU"
        yield FurtherPass(
            name=entry.name,
            takes=entry.takes,
            yields=entry.yields,
            runs_here=not needs,
            needs=needs,
            parameters=None if named is None else in_words(entry.name),
        )
