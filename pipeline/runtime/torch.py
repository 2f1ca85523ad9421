"""Runs a Hugging Face checkpoint with PyTorch."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.artifact import Artifact
from pipeline.errors import HostError, PipelineError
from pipeline.runtime.protocol import ExecutionSpec
from pipeline.runtime.sequence import Sequence, as_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
LEAST_SHARE = 0.9
"""Of the parameters that a config describes, what the weights must hold; the rest is left to the check by name."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


class TorchRunner:
    """A causal language model of transformers, in eval mode, with a DynamicCache.

    Weights whose data type does not change stay mapped from their files.

    Raises: PipelineError where the checkpoint does not load; HostError where its device is not there.
    """

    version: ClassVar[str] = f"1 torch {version('torch')} transformers {version('transformers')}"

    def __init__(self, artifact: Artifact, spec: ExecutionSpec) -> None:
        import torch

        if spec.device not in ("cpu", "cuda"):
            raise PipelineError(f"the torch runner knows the devices cpu and cuda, not {spec.device!r}")
        if spec.device == "cuda" and not torch.cuda.is_available():
            raise HostError("the stage asks for device cuda, and torch finds none")
        if spec.options:
            raise PipelineError(f"the torch runner has no options; it was given {', '.join(sorted(spec.options))}")
        torch.set_num_threads(spec.threads)
        self._device = spec.device
        self._model = _load(artifact).eval().requires_grad_(False).to(spec.device)
        config = self._model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        limit = artifact.interface.max_length or getattr(config, "max_position_embeddings", None)
        if limit is None:
            raise PipelineError("neither the artifact's interface nor its config.json says how long a sequence may be")
        self.max_length = int(limit)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._sequence = Sequence(self.max_length)
        self._cache: Any = None

    @staticmethod
    def import_libraries(artifact: Artifact) -> None:
        """Import all that loading needs, so that a load time does not count it.

        Raises: PipelineError where the checkpoint is too small for its config: transformers would spend minutes and
        gigabytes on random values for what is missing before it says so.
        """
        import torch
        from transformers import AutoModelForCausalLM

        with checkpoint_folder(artifact) as folder, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_config(folder), trust_remote_code=False)
        model.tie_weights()
        tensors = {n: t for part in artifact.manifest.components.values() for n, t in part.tensors.items()}
        for name, parameter in model.named_parameters():
            if name in tensors and tensors[name].shape != tuple(parameter.shape):
                raise PipelineError(
                    f"config.json describes {name} as {list(parameter.shape)} and the weights hold it as "
                    f"{list(tensors[name].shape)}"
                )
        described = sum(parameter.numel() for parameter in model.parameters())  # tied ones count once
        held = sum(prod(t.shape) for t in tensors.values())
        if held < described * LEAST_SHARE:
            raise PipelineError(f"config.json describes {described:,} parameters and the weights hold {held:,}")

    def prefill(self, tokens: ArrayLike) -> np.ndarray:
        """Empty the cache, process a prompt [B, S], and return the last position's logits [B, V]."""
        ids = as_tokens(tokens)
        batch, length = self._sequence.check_prompt(ids)
        self.reset()
        logits = self._forward(ids, keep=1)[:, -1]
        self._sequence.extend(batch, length)
        return logits

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """Append one token a sequence, [B, 1], and return its logits [B, V]."""
        ids = as_tokens(tokens)
        batch = self._sequence.check_step(ids)
        logits = self._forward(ids, keep=1)[:, -1]
        self._sequence.extend(batch, 1)
        return logits

    def score(self, tokens: ArrayLike) -> Iterator[np.ndarray]:
        """Logits of all positions of [B, S] from an empty cache, in order, in chunks [B, C, V]."""
        ids = as_tokens(tokens)
        batch, length = self._sequence.check_prompt(ids)
        self.reset()
        step = self._sequence.chunk_length(batch, self.vocab_size)
        for begin in range(0, length, step):
            part = ids[:, begin : begin + step]
            logits = self._forward(part, keep=0)
            self._sequence.extend(batch, part.shape[1])
            yield logits
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self._cache = None
        self._sequence.reset()

    def _forward(self, tokens: np.ndarray, *, keep: int) -> np.ndarray:
        """Logits [B, C, V] of these tokens after what the cache holds; the last `keep`, or all where it is 0."""
        import numpy as np
        import torch
        from transformers import DynamicCache

        if self._cache is None:
            self._cache = DynamicCache(config=self._model.config)
        extra = {"logits_to_keep": keep} if self._takes_logits_to_keep else {}
        with torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(tokens)).to(self._device)
            output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, **extra)
            # the copy to the host waits for the device
            logits: np.ndarray = output.logits.to(torch.float32).cpu().numpy()
        return logits


def _load(artifact: Artifact) -> Any:
    from transformers import AutoModelForCausalLM

    if artifact.manifest.transforms:
        names = ", ".join(str(t.get("transform", t)) for t in artifact.manifest.transforms)
        raise PipelineError(f"the torch runner does not know the transforms of this artifact: {names}")
    dtype = artifact.manifest.execution.get("dtype", "auto")
    if dtype not in DTYPES:
        raise PipelineError(f"unknown dtype {dtype!r}; the torch runner knows {', '.join(DTYPES)}")
    with checkpoint_folder(artifact) as folder:
        try:
            model, notes = AutoModelForCausalLM.from_pretrained(
                folder,
                config=_config(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
            raise PipelineError(f"transformers cannot load the checkpoint: {error}") from error
    if missing := sorted(notes["missing_keys"]):
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise PipelineError(f"the checkpoint lacks {len(missing)} of the model's tensors: {shown}")
    return model


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise PipelineError(f"transformers cannot read config.json: {error}") from error


@contextmanager
def checkpoint_folder(artifact: Artifact) -> Iterator[Path]:
    """A folder as `from_pretrained` expects it: symbolic links to the artifact's files under their own names.

    Where the weights have another name than transformers looks for, an index says which file holds which tensor.
    Mapped files outlive the folder.
    """
    component = artifact.component
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        folder = Path(name)
        for file, entry in {**artifact.manifest.files, **component.files}.items():
            link = folder / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(artifact.locate(entry).absolute())
        if not (folder / WEIGHTS).exists() and not (folder / WEIGHTS_INDEX).exists():
            places = {tensor: ref.file for tensor, ref in component.tensors.items()}
            (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
        yield folder
