"""The calibration text as the data that an Olive pass asks for; Olive by itself would download some."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from passes.quantize.calibration import calibration_tokens
from pipeline import Artifact, PassContext

if TYPE_CHECKING:
    import numpy as np

DATASET = "pipeline_calibration_text"


def calibration_data(artifact: Artifact, context: PassContext, *, samples: int, length: int) -> dict[str, Any]:
    """A configuration of Olive's for pieces of the calibration text, each a batch of one.

    Raises: PipelineError where the model has no tokenizer or another model's, or the text is too short.
    """
    from olive.data.registry import Registry
    from torch.utils.data import Dataset

    class Pieces(Dataset):  # type: ignore[misc]
        """(what the model is fed, nothing to compare with) by index."""

        def __init__(self, tokens: np.ndarray) -> None:
            self._tokens = tokens  # [pieces, length]

        def __len__(self) -> int:
            return len(self._tokens)

        def __getitem__(self, index: int) -> tuple[dict[str, Any], int]:
            if index >= len(self):
                raise IndexError(index)
            return _fed(artifact, self._tokens[index]), 0

    pieces = Pieces(calibration_tokens(artifact, context, samples=samples, length=length))
    Registry.register_dataset(DATASET)(lambda **_: pieces)
    return {"name": "calibration", "load_dataset_config": {"type": DATASET}}


def _fed(artifact: Artifact, tokens: np.ndarray) -> dict[str, Any]:
    """The inputs for one piece [S], without the batch's dimension: by transformers' names, or by the graph's."""
    import torch

    interface = artifact.interface
    ids = torch.from_numpy(tokens.copy())
    if artifact.format == "torch":
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given = {"tokens": ids, "mask": torch.ones_like(ids), "positions": torch.arange(len(ids))}
    fed = {interface.inputs[role]: value for role, value in given.items() if role in interface.inputs}
    if interface.logits_to_keep is not None:
        fed[interface.logits_to_keep] = torch.tensor(1)
    if (cache := interface.cache) is not None:
        empty = torch.empty((cache.kv_heads, 0, cache.head_dim), dtype=getattr(torch, cache.dtype))
        fed |= {name: empty for role, name in interface.inputs.items() if role.startswith("past.")}
    return fed
