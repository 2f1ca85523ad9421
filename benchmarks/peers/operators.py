"""Where the time of our artifact goes, by operator, as ONNX Runtime's profiler sees it.

    python -m benchmarks.peers.operators MODEL THREADS        # prints JSON

A node's time is the median over the calls; profiling itself slows them a little.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.candidates import NEW_TOKENS, PROMPT

PROMPTS = 8


PRODUCT = "MatMulNBits"
"""The product with quantized weights, which is most of a step of decode."""


def product_bytes(model: Path) -> int:
    """Bytes of the weights, scales and zero points that the products of one step of decode read."""
    import onnx

    from pipeline.artifact import ONNX_FILE
    from pipeline.store.folder import read_folder

    artifact = read_folder(model)
    parts = artifact.manifest.components
    component = parts.get("decode") or next(iter(parts.values()))
    graph = onnx.load(artifact.locate(component.files[ONNX_FILE]), load_external_data=False).graph
    names = {name for node in graph.node if node.op_type == PRODUCT for name in node.input[1:]}
    return sum(ref.length for name, ref in component.tensors.items() if name in names)


def operator_times(model: Path, threads: int) -> dict[str, dict[str, float]]:
    """Seconds of a call by operator, for `prefill` and for `decode`."""
    found = {}
    for kind in ("prefill", "decode"):
        with tempfile.TemporaryDirectory(prefix="operators-") as folder:
            _run(model, threads, kind, Path(folder))
            profiles = [json.loads(file.read_text()) for file in Path(folder).glob("*.json")]
        nodes = [durations_of(profile) for profile in profiles]
        found[kind] = seconds_by_operator(_of_kind(nodes, kind))
    return found


def _run(model: Path, threads: int, kind: str, folder: Path) -> None:
    """Run prompts, and after the last of them tokens where `kind` is decode, with a profile in `folder`."""
    import numpy as np
    import onnxruntime as ort

    from pipeline.runtime import load_model

    plain = ort.SessionOptions

    class Profiled(plain):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.enable_profiling = True
            self.profile_file_prefix = str(folder / "profile")

    ort.SessionOptions = Profiled
    try:
        runner = load_model(model, threads=threads)
    finally:
        ort.SessionOptions = plain
    tokens = np.random.default_rng(0).integers(0, runner.vocab_size, (1, PROMPT + NEW_TOKENS))
    for _ in range(PROMPTS if kind == "prefill" else 1):
        runner.prefill(tokens[:, :PROMPT])
    if kind == "decode":
        for at in range(PROMPT, PROMPT + NEW_TOKENS):
            runner.decode(tokens[:, at : at + 1])
    del runner
    gc.collect()  # a session writes its profile when it goes


def durations_of(events: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Seconds of every call of each kernel, by (operator, node), from a profile of ONNX Runtime."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            found[event["args"]["op_name"], name].append(event["dur"] / 1e6)
    return dict(found)


def _of_kind(
    profiles: Iterable[Mapping[tuple[str, str], list[float]]], kind: str
) -> dict[tuple[str, str], list[float]]:
    """The nodes of the session that ran most: with two sessions, the one of this kind; its first call left out."""
    most = max(profiles, key=lambda nodes: max((len(times) for times in nodes.values()), default=0))
    return {node: times[1:] or times for node, times in most.items()}


def seconds_by_operator(nodes: Mapping[tuple[str, str], list[float]]) -> dict[str, float]:
    """The sum of the nodes' medians by operator, largest first."""
    found: dict[str, float] = defaultdict(float)
    for (operator, _), times in nodes.items():
        found[operator] += statistics.median(times)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps({"seconds": operator_times(folder, int(sys.argv[2])), "product_bytes": product_bytes(folder)}))
