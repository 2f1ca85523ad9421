"""Any pass of Microsoft's Olive as a stage."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from passes.olive.catalogue import OliveType, olive_types
from passes.olive.parameters import DATA, check_parameters, parameters_of
from pipeline import (
    Artifact,
    Example,
    Field,
    ModelSize,
    Pass,
    PassContext,
    PassParams,
    PipelineError,
    Prediction,
    Requires,
    did_you_mean,
)

OFFLINE = {
    "CI": "1",  # Olive sends no telemetry
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
"""Read when the libraries are imported."""

CALIBRATION = ("calibration_samples", "calibration_length")
WITHOUT_PAST = "text-generation"
HINTS = {
    "OnnxConversion": "with transformers 5, Olive 0.13 exports with `use_dynamo_exporter: true` and "
    "`task: text-generation`, which is a graph without a cache; export_onnx makes one with a cache",
    "OnnxDynamicQuantization": "ONNX Runtime's quantizer takes the operator Attention for another of that name: "
    "`op_types_to_quantize: [MatMul]` leaves it out",
}
"""What helps where a pass fails, as found by running it."""

SEED = "seed"
EXTERNAL = "save_as_external_data"
"""Ours to set where the recipe does not: by default some passes of Olive write graphs that name weights which they do
not bring along, and others hold the whole model in one message."""


class OlivePass(Pass):
    """Run one pass of Microsoft's Olive by its name, with its own parameters.

    `type` names it; every other key is a parameter of that pass, under Olive's name and checked strictly.
    `pipeline passes list --olive` shows which of them can run here and what the others need. A pass that calibrates
    reads pieces of the calibration text. What Olive made has to load and to run on a few tokens, else the stage fails;
    so it does where Olive logs a problem and gives the model back untouched.
    """

    name, version = "olive", 1
    accepts, produces = frozenset({"torch", "onnx"}), "onnx or torch"
    libraries = ("olive-ai", "onnx", "onnx-ir", "onnxoptimizer", "onnxruntime", "onnxscript", "torch", "transformers")
    depends_on = ("profile.device",)
    examples = (Example(params={"type": "OnnxPeepholeOptimizer"}),)

    class Params(PassParams):
        model_config = ConfigDict(extra="allow")

        type: str = Field(description="the name of Olive's pass", examples=["OnnxPeepholeOptimizer"])
        task: Literal["text-generation-with-past", "text-generation"] = Field(
            "text-generation-with-past",
            description="what Olive takes a torch model for: text-generation has no key-value cache",
        )
        calibration_samples: int = Field(32, ge=1, description="pieces of the calibration text, where it calibrates")
        calibration_length: int = Field(512, ge=2, description="tokens of each")

        @model_validator(mode="after")
        def _known(self) -> OlivePass.Params:
            types = olive_types()
            if self.type not in types:
                hint = did_you_mean(self.type, types, noun="Olive's passes")
                raise _wrong("type", f"Olive has no pass {self.type!r}; {hint}", self.type)
            if (why := types[self.type].unfit) is not None:
                raise _wrong("type", f"Olive's {self.type} cannot be a stage: it {why.removeprefix('it ')}", self.type)
            calibrates, takes_torch = self.data_parameter is not None, self.olive_type.takes == "torch"
            own = [*(CALIBRATION if calibrates else ()), *(("task",) if takes_torch else ())]
            check_parameters(self.type, self.given, own=own)
            if not calibrates and parameters_of(self.type):
                self._refuse(CALIBRATION, "does not calibrate")
            if not takes_torch:
                self._refuse(("task",), "takes a graph, and this is for passes that take a torch model")
            return self

        def _refuse(self, names: tuple[str, ...], why: str) -> None:
            """Refuse those of the parameters that are not at their defaults."""
            for name in names:
                value = getattr(self, name)
                if value != OlivePass.Params.model_fields[name].default:
                    raise _wrong(name, f"Olive's {self.type} {why}", value)

        @property
        def olive_type(self) -> OliveType:
            return olive_types()[self.type]

        @property
        def given(self) -> dict[str, Any]:
            """Olive's parameters."""
            return dict(self.model_extra or {})

        @property
        def data_parameter(self) -> str | None:
            """Olive's parameter for what to calibrate on; None where it does not calibrate."""
            return next((name for name in DATA if name in (parameters_of(self.type) or {})), None)

        @property
        def takes_our_seed(self) -> bool:
            return SEED in (parameters_of(self.type) or {}) and SEED not in self.given

        def accepts(self) -> frozenset[str]:
            return frozenset({self.olive_type.takes})

        def produces(self) -> str:
            return self.olive_type.yields

        def requires(self) -> Requires:
            cuda = self.olive_type.device == "cuda"
            return Requires(device="cuda" if cuda else "any", packages=self.olive_type.packages)

        def facets(self) -> tuple[str, ...]:
            if self.data_parameter is not None:
                return ("calibration_text", "profile.device", SEED)
            return ("profile.device", SEED) if self.takes_our_seed else ("profile.device",)

    @classmethod
    def predict(cls, params: Params, model: ModelSize) -> Prediction:
        """The format; what becomes of the weights is not foreseen."""
        cache = model.has_cache and not (params.task == WITHOUT_PAST and params.produces() == "onnx")
        return Prediction(model=model.model_copy(update={"format": params.produces(), "has_cache": cache}))

    def run(self, artifact: Artifact, params: Params, context: PassContext) -> Artifact:
        """Hand the model to Olive, run the pass, take over what it wrote, and try that out.

        Raises: PipelineError where Olive refuses the parameters, fails, gives the model back untouched, or writes
        what does not load or no artifact can hold.
        """
        from passes.olive.handing_over import artifact_of, handler_of
        from passes.olive.trial import try_out

        os.environ.update(OFFLINE)
        with context.output.scratch() as folder, _confined_to(folder), _warnings_of_olive() as warnings:
            context.progress(0.02, "importing Olive")
            runner = self._created(artifact, params, context, warnings)
            with handler_of(artifact, folder, task=params.task) as handler:
                given = Path(str(handler.model_path))
                context.progress(0.15, params.type)
                try:
                    made = runner.run(handler, str(folder / "output" / "model"))
                except PipelineError:
                    raise
                except Exception as error:  # whatever a pass of Olive raises is its failure, and ours
                    raise PipelineError(
                        f"Olive's {params.type} failed: {type(error).__name__}: {_shortened(error)}",
                        hint=HINTS.get(params.type) or _last(warnings),
                    ) from error
                if made is None or Path(str(made.model_path)) == given:
                    raise PipelineError(f"Olive's {params.type} gave the model back untouched", hint=_last(warnings))
                context.progress(0.8, "taking over what it wrote")
                try:
                    result, path = artifact_of(made, artifact, context)
                except FileNotFoundError as error:
                    raise PipelineError(
                        f"Olive's {params.type} wrote a model that lacks {Path(str(error.filename)).name}"
                    ) from error
            if result.format != params.produces():
                raise PipelineError(f"Olive's {params.type} yielded {result.format} where {params.produces()} was due")
            context.progress(0.9, "trying it out")
            if artifact.format == "torch" or result.format == "torch":
                from passes.olive.quantizer import register

                register()
            try:
                try_out(result, path, context)
            except PipelineError as error:
                raise PipelineError(error.message, hint=error.hint or HINTS.get(params.type)) from error
        return result

    @staticmethod
    def _created(artifact: Artifact, params: Params, context: PassContext, warnings: list[str]) -> Any:
        """Olive's pass with these parameters and defaults for the others."""
        from olive.hardware.accelerator import AcceleratorSpec, Device
        from olive.passes.olive_pass import create_pass_from_dict

        from passes.olive.calibration_data import calibration_data

        cuda = context.facet("profile.device") == "cuda"
        target = AcceleratorSpec(
            Device.GPU if cuda else Device.CPU, "CUDAExecutionProvider" if cuda else "CPUExecutionProvider"
        )
        config = params.given
        if params.takes_our_seed:
            config[SEED] = context.seed
        if artifact.format == "onnx" and EXTERNAL in (parameters_of(params.type) or {}):
            config.setdefault(EXTERNAL, True)
        if params.data_parameter is not None:
            config[params.data_parameter] = calibration_data(
                artifact, context, samples=params.calibration_samples, length=params.calibration_length
            )
            _seed_libraries(context.seed)
        found = getattr(import_module(params.olive_type.module), params.type)
        try:
            made = create_pass_from_dict(found, config, disable_search=True, accelerator_spec=target)
        except (ValueError, AssertionError) as error:  # pydantic's is a ValueError
            raise PipelineError(f"Olive's {params.type} refuses its parameters: {_shortened(error)}") from error
        if not found.validate_config(made.config, target):
            raise PipelineError(f"Olive's {params.type} refuses these parameters", hint=_last(warnings))
        return made


def _wrong(key: str, message: str, value: Any) -> ValidationError:
    error = PydanticCustomError("value_error", "{message}", {"message": message})
    return ValidationError.from_exception_data("Olive", [InitErrorDetails(type=error, loc=(key,), input=value)])


def _seed_libraries(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _confined_to(folder: Path) -> Iterator[None]:
    """Within, the working folder and that of temporary files lie in `folder`, so that nothing is left behind."""
    here, before = Path.cwd(), tempfile.tempdir
    for name in ("work", "tmp", "output"):
        (folder / name).mkdir()
    os.chdir(folder / "work")
    tempfile.tempdir = str(folder / "tmp")
    try:
        yield
    finally:
        os.chdir(here)
        tempfile.tempdir = before


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def _warnings_of_olive() -> Iterator[list[str]]:
    """What Olive logs meanwhile: it says why it did nothing, and goes on."""
    logger, collector = logging.getLogger("olive"), _Collector()
    logger.addHandler(collector)
    try:
        yield collector.said
    finally:
        logger.removeHandler(collector)


def _last(said: list[str]) -> str | None:
    return f"its last words: {' '.join(said[-1].split())[:300]}" if said else None


def _shortened(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
