"""onnxruntime-genai: the graph that its builder writes, run by its own generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.running import Running

if TYPE_CHECKING:
    import numpy as np


def convert(checkpoint: Path, folder: Path, *, block_size: int = 32, accuracy_level: int = 4) -> None:
    """Write the builder's files, matrices in int4."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    where = ("", str(checkpoint), str(folder), "int4", "cpu", str(folder / "cache"))
    given = [f"block_size={block_size}", f"accuracy_level={accuracy_level}"]
    create_model(*where, **parse_extra_options(*where, given))


def load(folder: Path, checkpoint: Path, threads: int) -> Running:
    """A generator over the model."""
    return Genai(folder, threads)


class Genai(Running):
    def __init__(self, folder: Path, threads: int) -> None:
        import onnxruntime_genai

        self._lib = onnxruntime_genai
        config = json.loads((folder / "genai_config.json").read_text())
        super().__init__(vocab_size=config["model"]["vocab_size"])
        given = onnxruntime_genai.Config(str(folder))
        overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
        given.overlay(json.dumps(overlay))
        self._model = onnxruntime_genai.Model(given)
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=self.max_length, do_sample=False)
        self._generator = onnxruntime_genai.Generator(self._model, parameters)

    def _empty(self) -> None:
        if self._length:
            self._generator.rewind_to(0)

    def _run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        import numpy as np

        self._generator.append_tokens(tokens.astype(np.int32))
        return np.asarray(self._generator.get_logits(), np.float32)[:, -1]
