"""PyTorch with transformers: eager, or compiled with a static cache as transformers recommends it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.running import Running

if TYPE_CHECKING:
    import numpy as np


def convert(checkpoint: Path, folder: Path, *, dtype: str) -> None:
    """Write the checkpoint in another data type."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).save_pretrained(folder)


def load(folder: Path, checkpoint: Path, threads: int, *, dtype: str, compiled: bool = False) -> Running:
    """The model of `folder`, where it was converted, else of the checkpoint."""
    source = folder if (folder / "config.json").exists() else checkpoint
    return Torch(source, threads, dtype, compiled=compiled)


class Torch(Running):
    def __init__(self, source: Path, threads: int, dtype: str, *, compiled: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval().requires_grad_(False)
        super().__init__(vocab_size=self._model.config.vocab_size)
        self._compiled = compiled
        self._cache: Any = None
        if compiled:
            self._model.forward = torch.compile(self._model.forward)

    @property
    def compilations(self) -> int:
        """Graphs that this process has compiled."""
        if not self._compiled:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def compile_shapes(self, batch: int, prompt: int) -> None:
        """Compile what prompts of that length and the single tokens after them need."""
        import numpy as np

        if not self._compiled:
            return
        self.prefill(np.zeros((batch, prompt), np.int64))
        for _ in range(3):  # whatever the next one finds that the first did not
            self.decode(np.zeros((batch, 1), np.int64))

    def _empty(self) -> None:
        from transformers import DynamicCache, StaticCache

        if not self._compiled:
            self._cache = DynamicCache(config=self._model.config)
        elif self._cache is None:
            self._cache = StaticCache(config=self._model.config, max_cache_len=self.max_length)
        else:
            self._cache.reset()

    def _run(self, tokens: np.ndarray, past: int) -> np.ndarray:
        import torch

        length = tokens.shape[1]
        with torch.no_grad():  # compiled code may not write into the cache as tensors of inference_mode
            found = self._model(
                input_ids=torch.from_numpy(tokens),
                position_ids=torch.arange(past, past + length)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return found.logits[:, -1].float().numpy()
