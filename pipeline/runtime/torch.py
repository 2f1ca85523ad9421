"""Runs a Hugging Face checkpoint with PyTorch."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points, version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError

from pipeline.artifact import Artifact, Frozen
from pipeline.errors import HostError, PipelineError
from pipeline.runtime import compile_cache
from pipeline.runtime.protocol import ExecutionSpec
from pipeline.runtime.sequence import Sequence, as_tokens
from pipeline.runtime.transforms import apply_transforms

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    from pipeline.runtime.layer_outputs import LayerOutputs

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
LEAST_SHARE = 0.9
"""Of the parameters that a config describes, what the weights must hold; the rest is left to the check by name."""

QUANTIZERS = "pipeline.quantizers"
"""Entry points by `quant_method` of a config.json: functions that register a method with transformers."""

DTYPES = ("auto", "float32", "bfloat16", "float16")


RECOMPILE_LIMIT = 64
"""Graphs of one function. Torch would run further shapes uncompiled; here they are an error."""

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Compilation(Frozen):
    """How torch.compile is called on the model without its head."""

    mode: CompileMode = "default"
    dynamic: bool | None = Field(
        None,
        description="None: prompts of all lengths share a graph, single tokens have one; True: batches share them; "
        "False: one for every shape",
    )
    fullgraph: bool = False


class Execution(Frozen):
    """What this runner reads of a manifest's `execution` block, besides the data type."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    compilation: Compilation | None = Field(None, alias="compile")
    cache: Literal["dynamic", "static"] = "dynamic"
    max_length: int | None = Field(None, ge=2, description="positions of a static cache; None: as many as the model's")

    @classmethod
    def of(cls, artifact: Artifact) -> Execution:
        """Raises: PipelineError where the block says what this runner does not know."""
        try:
            return cls.model_validate(artifact.manifest.execution)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise PipelineError(f"the artifact's execution block: {where}: {first['msg']}") from error


class TorchRunner:
    """A causal language model of transformers, in eval mode; compiled, and with a static cache, as its artifact says.

    Weights whose data type does not change stay mapped from their files. What is compiled is the model without its
    head, so that the last position's logits and those of all positions come from the same graph; it is compiled when a
    shape is first met, which `compile_shapes` does beforehand.

    Raises: PipelineError where the checkpoint does not load; HostError where its device is not there.
    """

    has_cache: ClassVar[bool] = True
    version: ClassVar[str] = f"2 torch {version('torch')} transformers {version('transformers')}"

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
        execution = Execution.of(artifact)
        self._compilation = execution.compilation
        if self._compilation is not None:
            folder = compile_cache.artifact_cache(artifact, threads=spec.threads, version=self.version)
            compile_cache.use(folder, device=spec.device, threads=spec.threads)
        self._model = _load(artifact).eval().requires_grad_(False).to(spec.device)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        config = self._model.config.get_text_config()
        self.vocab_size = int(config.vocab_size)
        limit = artifact.interface.max_length or getattr(config, "max_position_embeddings", None)
        if limit is None:
            raise PipelineError("neither the artifact's interface nor its config.json says how long a sequence may be")
        self.max_length = int(limit)
        self._static_cache = execution.cache == "static"
        if self._static_cache and execution.max_length is not None:
            self.max_length = min(self.max_length, execution.max_length)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._sequence = Sequence(self.max_length)
        self._cache: Any = None
        self._static_caches: dict[int, Any] = {}  # by batch: each is allocated once
        self._compile_errors: tuple[type[Exception], ...] = ()
        if self._compilation is not None:
            self._compile_errors = _compile(self._model, self._compilation)
        if spec.device == "cuda":
            torch.cuda.synchronize()  # the weights have arrived: that is what loading takes
            torch.cuda.reset_peak_memory_stats()  # loading is no inference

    @staticmethod
    def import_libraries(artifact: Artifact) -> None:
        """Import all that loading needs, so that a load time does not count it.

        Raises: PipelineError where the checkpoint is too small for its config: transformers would spend minutes and
        gigabytes on random values for what is missing before it says so.
        """
        import torch
        from transformers import AutoModelForCausalLM

        prepare_quantizer(artifact)
        with checkpoint_folder(artifact) as folder, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_config(folder, artifact), trust_remote_code=trusts_code(artifact))
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
        if held < described * LEAST_SHARE and quantization_method(artifact) is None:  # packed weights are fewer
            raise PipelineError(f"config.json describes {described:,} parameters and the weights hold {held:,}")
        if Execution.of(artifact).compilation is not None:
            compile_cache.prepare_toolchain(compile_cache.compile_cache_root(artifact))

    @classmethod
    def forget_compiled(cls, artifact: Artifact, spec: ExecutionSpec) -> bool:
        """Drop what earlier processes compiled of the artifact, so that the next load is cold; whether any was."""
        if Execution.of(artifact).compilation is None:
            return False
        return compile_cache.forget(compile_cache.artifact_cache(artifact, threads=spec.threads, version=cls.version))

    @property
    def device_peak_memory_bytes(self) -> int | None:
        """The most that torch's allocator has held on the GPU since the model was loaded, with its weights.

        None on a CPU.
        """
        if self._device != "cuda":
            return None
        import torch

        return int(torch.cuda.max_memory_allocated())

    @property
    def compilations(self) -> int:
        """Graphs that this process has compiled: where it grows during a call, the call's time says nothing."""
        if self._compilation is None:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def compile_shapes(self, batch: int, prompt: int) -> None:
        """Compile what prompts [batch, prompt] and the single tokens after them need; nothing without `compile`.

        Raises: PipelineError where they are longer than the model takes, or torch cannot compile it.
        """
        import numpy as np

        if self._compilation is None:
            return
        self.prefill(np.zeros((batch, prompt), np.int64))
        for _ in range(min(2, self.max_length - prompt)):  # whatever the second finds that the first did not
            self.decode(np.zeros((batch, 1), np.int64))
        self.reset()

    @staticmethod
    def layers(artifact: Artifact, spec: ExecutionSpec, *, fed: bool = False) -> LayerOutputs:
        """The artifact, loaded so that it shows what lies between its layers, or is fed there.

        Raises: PipelineError where its layers cannot be seen, or it does not load.
        """
        from pipeline.runtime.torch_layers import TorchLayers

        return TorchLayers(artifact, spec, fed=fed)

    @property
    def model(self) -> Any:
        """The module of transformers."""
        return self._model

    def forward(self, tokens: ArrayLike) -> np.ndarray:
        """Compute the logits of all positions of [B, S], keep nothing, and return the last position's, [B, V]."""
        ids = as_tokens(tokens)
        self._sequence.check_prompt(ids)
        self.reset()
        logits: np.ndarray = _on_host(self._logits(ids, keep=0, cached=False)[:, -1])
        return logits

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
        return _on_host(self._logits(tokens, keep=keep, cached=True))

    def _logits(self, tokens: np.ndarray, *, keep: int, cached: bool) -> Any:
        """The same as a tensor on the device; `cached` says whether there is a cache at all."""
        import torch

        if cached and self._cache is None:
            self._cache = self._empty_cache(len(tokens))
        extra = {"logits_to_keep": keep} if self._takes_logits_to_keep else {}
        with torch.inference_mode():
            # a copy: a slice of one row has the strides of the whole, for which torch would compile again
            ids = torch.from_numpy(tokens.copy()).to(self._device)
            if self._compilation is not None and self._compilation.dynamic is None:
                self._mark_lengths(ids)
            try:
                output = self._model(input_ids=ids, past_key_values=self._cache, use_cache=cached, **extra)
            except self._compile_errors as error:
                assert self._compilation is not None
                lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
                raise PipelineError(
                    f"torch cannot compile the model for tokens {list(ids.shape)}: {lines[0]}",
                    hint="`fullgraph: false` lets torch leave parts uncompiled"
                    if self._compilation.fullgraph
                    else None,
                ) from error
            return output.logits

    def _empty_cache(self, batch: int) -> Any:
        """A cache without positions. A static one is allocated once for each batch and emptied after that."""
        import torch
        from transformers import DynamicCache, StaticCache

        if not self._static_cache:
            return DynamicCache(config=self._model.config)
        cache = self._static_caches.get(batch)
        if cache is None:
            cache = StaticCache(config=self._model.config, max_cache_len=self.max_length)
            # one token, uncompiled, shows each layer the shapes that it has to keep
            with torch.compiler.set_stance("force_eager"), torch.no_grad():
                token = torch.zeros((batch, 1), dtype=torch.int64, device=self._device)
                self._model(input_ids=token, past_key_values=cache, use_cache=True)
            self._static_caches[batch] = cache
        cache.reset()
        return cache

    def _mark_lengths(self, ids: Any) -> None:
        """Tell torch that the length of a prompt, and of a cache that grows, is not to be taken for a constant."""
        import torch

        if ids.shape[1] > 1:
            torch._dynamo.maybe_mark_dynamic(ids, 1)
        if not self._static_cache and self._cache is not None:
            for layer in self._cache.layers:
                for name in ("keys", "values"):
                    tensor = getattr(layer, name, None)
                    if tensor is not None and tensor.dim() == 4:  # [B, H, T, D]
                        tensor = _in_order(tensor)
                        setattr(layer, name, tensor)
                        torch._dynamo.maybe_mark_dynamic(tensor, 2)


def _compile(model: Any, how: Compilation) -> tuple[type[Exception], ...]:
    """Have the model without its head compiled when it is first called; the errors by which torch says it cannot."""
    import torch
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model.base_model.compile(mode=how.mode, dynamic=how.dynamic, fullgraph=how.fullgraph)
    return TorchDynamoException, FailOnRecompileLimitHit


def _on_host(logits: Any) -> np.ndarray:
    """The tensor as float32 in the host's memory. The copy waits for the device."""
    import torch

    with torch.inference_mode():
        array: np.ndarray = logits.to(torch.float32).cpu().numpy()
    return array


def _in_order(tensor: Any) -> Any:
    """The tensor with the strides of its shape: what a prompt leaves is transposed, what a token appends to is not.

    Torch would compile the first token after a prompt by itself.
    """
    import torch

    strides = tuple(prod(tensor.shape[i + 1 :]) for i in range(tensor.dim()))
    return tensor if tensor.stride() == strides else tensor.clone(memory_format=torch.contiguous_format)


def _load(artifact: Artifact) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = artifact.manifest.execution.get("dtype", "auto")
    if dtype not in DTYPES:
        raise PipelineError(f"unknown dtype {dtype!r}; the torch runner knows {', '.join(DTYPES)}")
    prepare_quantizer(artifact)
    with checkpoint_folder(artifact) as folder:
        try:
            model, notes = AutoModelForCausalLM.from_pretrained(
                folder,
                config=_config(folder, artifact),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=trusts_code(artifact),
                use_safetensors=True,
                output_loading_info=True,
            )
        except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
            raise PipelineError(f"transformers cannot load the checkpoint: {error}") from error
    if missing := sorted(notes["missing_keys"]):
        shown = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise PipelineError(f"the checkpoint lacks {len(missing)} of the model's tensors: {shown}")
    apply_transforms(model.eval(), artifact)
    return model


def quantization_method(artifact: Artifact) -> str | None:
    """How config.json says that the weights are quantized; None where they are not."""
    settings = artifact.read_json("config.json").get("quantization_config")
    return str(settings.get("quant_method")) if isinstance(settings, dict) else None


def prepare_quantizer(artifact: Artifact) -> None:
    """Have the package that knows how the weights are quantized, if one says so, tell transformers of it."""
    method = quantization_method(artifact)
    for point in entry_points(group=QUANTIZERS, name=method) if method is not None else ():
        point.load()()


def trusts_code(artifact: Artifact) -> bool:
    """Whether the recipe lets the Python files that the model brings run."""
    return bool(artifact.manifest.execution.get("trust_remote_code", False))


def _config(folder: Path, artifact: Artifact) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusts_code(artifact))
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
        folder = Path(name) / "model"  # transformers keeps copies of a model's code by this name
        folder.mkdir()
        for file, entry in {**artifact.manifest.files, **component.files}.items():
            link = folder / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(artifact.locate(entry).absolute())
        if not (folder / WEIGHTS).exists() and not (folder / WEIGHTS_INDEX).exists():
            places = {tensor: ref.file for tensor, ref in component.tensors.items()}
            (folder / WEIGHTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
        yield folder
