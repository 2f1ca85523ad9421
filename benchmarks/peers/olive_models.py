"""Olive: its export and its block-wise quantization, run by ONNX Runtime with past and present bound."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.running import Running

if TYPE_CHECKING:
    import numpy as np


def convert(checkpoint: Path, folder: Path, *, block_size: int = 32, accuracy_level: int = 4) -> None:
    """Run Olive's workflow: OnnxConversion, then OnnxBlockWiseRtnQuantization to int4.

    Raises: RuntimeError where it leaves no model; Olive itself ends well after a pass that failed.
    """
    os.environ["CI"] = "1"  # else Olive sends usage data
    from olive.workflows import run

    run(
        {
            "input_model": {"type": "HfModel", "model_path": str(checkpoint), "task": "text-generation-with-past"},
            "passes": {
                "conversion": {"type": "OnnxConversion", "use_dynamo_exporter": True},
                "int4": {
                    "type": "OnnxBlockWiseRtnQuantization",
                    "block_size": block_size,
                    "accuracy_level": accuracy_level,
                },
            },
            "output_dir": str(folder / "out"),
            "cache_dir": str(folder / "cache"),
            "no_artifacts": True,
        }
    )
    _model_file(folder)


def _model_file(folder: Path) -> Path:
    found = sorted((folder / "out").rglob("*.onnx"))
    if len(found) != 1:
        raise RuntimeError(f"Olive left {len(found)} ONNX files, not one; its log says why")
    return found[0]


def load(folder: Path, checkpoint: Path, threads: int) -> Running:
    """A session of ONNX Runtime over the model."""
    return OrtSession(_model_file(folder), threads)


class OrtSession(Running):
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime as ort

        self._ort = ort
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        super().__init__(vocab_size=int(outputs[0].shape[-1]))
        self._names = {port.name for port in inputs}
        self._pasts = [port.name for port in inputs if "past" in port.name]
        self._shapes = {port.name: port.shape for port in inputs}
        self._presents = [port.name for port in outputs[1:]]
        self._logits = outputs[0].name
        self._past: list[Any] = []

    def _empty(self) -> None:
        import numpy as np

        nothing = [np.empty((1, self._shapes[name][1], 0, self._shapes[name][3]), np.float32) for name in self._pasts]
        self._past = [self._ort.OrtValue.ortvalue_from_numpy(array) for array in nothing]

    def _run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        import numpy as np

        length = tokens.shape[1]
        given = {
            "input_ids": np.ascontiguousarray(tokens),
            "attention_mask": np.ones((1, past + length), np.int64),
            "position_ids": np.arange(past, past + length)[None],
        }
        binding = self._session.io_binding()
        for name in self._names & given.keys():
            binding.bind_cpu_input(name, given[name])
        for name, value in zip(self._pasts, self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in (self._logits, *self._presents):
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        logits, *self._past = binding.get_outputs()  # in the order of binding
        return logits.numpy()[:, -1]
