"""Runs an ONNX graph of a causal language model with ONNX Runtime.

A graph whose cache may be extended where it lies (`CacheLayout.in_place`) appends to buffers that are past and present
at once. A model of two phases (`pipeline.runtime.phases`) has a graph for prompts and another for single tokens, in a
session each over the same cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.artifact import Artifact, Component
from pipeline.errors import PipelineError
from pipeline.runtime.kv_cache import CacheBuffers, empty_past
from pipeline.runtime.onnx_session import COMPILED_FILE as COMPILED_FILE  # noqa: PLC0414 - a public name of this module
from pipeline.runtime.onnx_session import (
    CUDA,
    OnnxSession,
    installed_version,
    open_session,
    ort_value,
    provider_of,
    require_provider,
)
from pipeline.runtime.phases import PREFILL, phases_of
from pipeline.runtime.protocol import ExecutionSpec
from pipeline.runtime.sequence import NO_CACHE, NO_CACHE_HINT, Sequence, as_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    from pipeline.runtime.layer_outputs import LayerOutputs


class OnnxRuntimeRunner:
    """One session over mapped weights, or one for prompts and another for single tokens, and one key-value cache.

    What a step presents is the next step's past, never copied by us; where the graph extends its cache in place, the
    buffers are copied only when they get too small. A graph without a cache is run whole: `forward` and `score` do,
    `prefill` and `decode` refuse. The interface names the tensors by role: inputs `tokens` and, where the graph has
    them, `mask` [B, past + S] and `positions` [B, S]; `past.k[i]` and `past.v[i]` [B, kv_heads, T, head_dim]; outputs
    `logits` [B, S, V], `present.k[i]` and `present.v[i]`. All integers are int64 unless the graph says int32.

    Of a model of two phases, the number of new tokens (sequences times tokens of each) decides which graph runs.

    Raises: PipelineError where a graph does not load or its interface is incomplete; HostError where the execution
    provider is not there.
    """

    version: ClassVar[str] = f"3 onnxruntime {installed_version()}"

    def __init__(self, artifact: Artifact, spec: ExecutionSpec) -> None:
        # importing ONNX Runtime starts a thread that sends usage data, unless this is set or it is imported already
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        provider = provider_of(spec)
        require_provider(provider)
        interface = artifact.interface
        if "tokens" not in interface.inputs or "logits" not in interface.outputs:
            raise PipelineError("the graph's interface names no input `tokens` or no output `logits`")
        cached = any(role.startswith(("past.", "present.")) for role in (*interface.inputs, *interface.outputs))
        if interface.max_length is None or (cached and interface.cache is None):
            raise PipelineError("the graph's interface has no cache layout or no max_length")
        self._inputs = interface.inputs
        self._layout = interface.cache
        self._logits_to_keep = interface.logits_to_keep
        self.has_cache = interface.cache is not None
        self.max_length = interface.max_length
        self._device = "cuda" if provider == CUDA else "cpu"
        layers = range(interface.cache.layers if interface.cache else 0)
        try:
            self._pasts = [interface.inputs[f"past.{part}[{i}]"] for i in layers for part in "kv"]
            self._presents = [interface.outputs[f"present.{part}[{i}]"] for i in layers for part in "kv"]
        except KeyError as missing:
            raise PipelineError(f"the graph's interface has no tensor for the role {missing}") from None

        self._phases = phases_of(artifact)
        parts = artifact.manifest.components if self._phases else {PREFILL: artifact.component}
        first, *others = parts
        with ThreadPoolExecutor(1) as beside:  # side by side, two take little more time than the slower one
            opening = {name: beside.submit(self._open, artifact, parts[name], spec, provider) for name in others}
            self._sessions = {first: self._open(artifact, parts[first], spec, provider)}
        self._sessions |= {name: session.result() for name, session in opening.items()}
        self.vocab_size = interface.vocab_size or self._sessions[PREFILL].vocabulary
        self._sequence = Sequence(self.max_length)
        self._keeps: dict[tuple[OnnxSession, int], Any] = {}
        self._past: list[Any] = []  # what the last step presented, where the cache is not extended in place
        self._buffers: CacheBuffers | None = None
        if interface.cache is not None and interface.cache.in_place:
            self._buffers = CacheBuffers(interface.cache, self.max_length, self._device)

    @staticmethod
    def import_libraries(artifact: Artifact) -> None:
        """Import all that loading needs, so that a load time does not count it."""
        import ml_dtypes  # noqa: F401
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401

    @staticmethod
    def layers(artifact: Artifact, spec: ExecutionSpec, *, fed: bool = False) -> LayerOutputs:
        """The artifact, loaded so that it shows what lies between its layers, or is fed there.

        Raises: PipelineError where no layers are found in its graph, or it does not load.
        """
        from pipeline.runtime.onnx_layers import OnnxLayers

        return OnnxLayers(artifact, spec, fed=fed)

    def values(
        self, tokens: ArrayLike, names: Iterable[str], given: Mapping[str, np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """These outputs of the graph as float32, after a pass over [B, S] from an empty cache, which keeps nothing.

        `given` are inputs of the graph that the interface does not name.
        """
        ids = as_tokens(tokens)
        batch, length = self._sequence.check_prompt(ids)
        self.reset()
        session = self._session_for(batch * length)
        feeds = self._feeds(session, ids, keep=length) | {
            name: ort_value(array) for name, array in (given or {}).items()
        }
        feeds |= zip(self._pasts, self._empty_past(batch), strict=True)
        try:
            found = session.values(list(names), feeds)
        except Exception as error:  # ONNX Runtime raises its own exceptions, which share no base
            raise PipelineError(f"ONNX Runtime failed on tokens {list(ids.shape)}: {error}") from error
        return [_positions(value, slice(None)) for value in found]

    def forward(self, tokens: ArrayLike) -> np.ndarray:
        """Compute the logits of all positions of [B, S], keep nothing, and return the last position's, [B, V]."""
        ids = as_tokens(tokens)
        _, length = self._sequence.check_prompt(ids)
        self.reset()
        logits = self._run(self._session_for(ids.size), ids, keep=length, cached=False)
        return _positions(logits, slice(-1, None))[:, -1]

    def prefill(self, tokens: ArrayLike) -> np.ndarray:
        """Empty the cache, process a prompt [B, S], and return the last position's logits [B, V].

        Raises: PipelineError where the graph has no cache.
        """
        self._require_cache()
        ids = as_tokens(tokens)
        batch, length = self._sequence.check_prompt(ids)
        self.reset()
        logits = self._run(self._session_for(ids.size), ids, keep=1)
        self._sequence.extend(batch, length)
        return _positions(logits, slice(-1, None))[:, -1]

    def decode(self, tokens: ArrayLike) -> np.ndarray:
        """Append one token a sequence, [B, 1], and return its logits [B, V].

        Raises: PipelineError where the graph has no cache.
        """
        self._require_cache()
        ids = as_tokens(tokens)
        batch = self._sequence.check_step(ids)
        logits = self._run(self._session_for(ids.size), ids, keep=1)
        self._sequence.extend(batch, 1)
        return _positions(logits, slice(-1, None))[:, -1]

    def score(self, tokens: ArrayLike) -> Iterator[np.ndarray]:
        """Logits of all positions of [B, S] from an empty cache, in order, in chunks [B, C, V].

        With B > 1 the positions run at once: GroupQueryAttention refuses several sequences of several tokens each
        after a past. Without a cache they do, too, and their logits are converted chunk by chunk.

        A model of two phases is scored as one sequence would use it, whatever the batch: the first half of the
        positions as a prompt, the others token by token.
        """
        import numpy as np

        ids = as_tokens(tokens)
        batch, length = self._sequence.check_prompt(ids)
        self.reset()
        step = self._sequence.chunk_length(batch, self.vocab_size)
        if not self.has_cache:
            logits = self._run(self._session_for(ids.size), ids, keep=length)
            for begin in range(0, length, step):
                yield _positions(logits, slice(begin, begin + step))
            return
        prompt = length if self._phases is None else max(1, length // 2)
        self._make_room(batch, length)
        whole, single = self._session_for(prompt), self._session_for(1)
        for part in _parts(ids[:, :prompt], step if batch == 1 else prompt):
            yield self._scored(whole, part)
        for part in _parts(ids[:, prompt:], step):
            yield np.concatenate([self._scored(single, token) for token in _parts(part, 1)], axis=1)
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self._past = []
        self._sequence.reset()

    def _open(self, artifact: Artifact, component: Component, spec: ExecutionSpec, provider: str) -> OnnxSession:
        session = OnnxSession(
            open_session(artifact, component, spec, provider),
            logits=artifact.interface.outputs["logits"],
            pasts=self._pasts,
            presents=self._presents,
            device=self._device,
        )
        unknown = set(session.types) - set(self._inputs.values()) - {self._logits_to_keep}
        if unknown:
            raise PipelineError(f"the interface gives no role to the graph's inputs {', '.join(sorted(unknown))}")
        return session

    def _session_for(self, new_tokens: int) -> OnnxSession:
        return self._sessions[PREFILL if self._phases is None else self._phases.component_for(new_tokens)]

    def _require_cache(self) -> None:
        if not self.has_cache:
            raise PipelineError(NO_CACHE, hint=NO_CACHE_HINT)

    def _scored(self, session: OnnxSession, tokens: np.ndarray) -> np.ndarray:
        """The logits [B, S, V] of all these tokens, which the cache keeps."""
        batch, length = tokens.shape
        logits = self._run(session, tokens, keep=length)
        self._sequence.extend(batch, length)
        return _positions(logits, slice(-length, None))

    def _run(self, session: OnnxSession, tokens: np.ndarray, *, keep: int, cached: bool = True) -> Any:
        """An OrtValue: the logits of these tokens after what the cache holds, at least of the last `keep`.

        What the tokens add to the cache is kept if `cached`. The logits have to be copied before the next run.
        """
        (batch, length), past = tokens.shape, self._sequence.length
        inputs = self._feeds(session, tokens, keep=keep)
        try:
            if self._buffers is not None and cached:
                self._make_room(batch, past + length)
                return session.run_in_place(inputs, self._buffers.values, (batch, length, keep))
            given = (self._past if cached else []) or self._empty_past(batch)
            logits, presents = session.run(inputs, given, keeps=cached)
        except Exception as error:  # ONNX Runtime raises its own exceptions, which share no base
            self.reset()
            self._unbind()
            raise PipelineError(f"ONNX Runtime failed on tokens {[batch, length]} after {past}: {error}") from error
        self._past = presents
        return logits

    def _make_room(self, batch: int, total: int) -> None:
        """See that the buffers of a cache that is extended in place hold so many positions."""
        if self._buffers is None or self._buffers.has_room(batch, total):
            return
        self._unbind()  # no session may keep the buffers of before
        self._buffers.make_room(batch, filled=self._sequence.length, total=total)

    def _unbind(self) -> None:
        for session in self._sessions.values():
            session.unbind()

    def _feeds(self, session: OnnxSession, tokens: np.ndarray, *, keep: int) -> dict[str, Any]:
        """OrtValues of the graph's inputs but its past, for these tokens after what the cache holds."""
        import numpy as np

        batch, length = tokens.shape
        past = self._sequence.length
        given = {self._inputs["tokens"]: tokens}
        if (mask := self._inputs.get("mask")) is not None:
            given[mask] = np.ones((batch, past + length), np.int64)
        if (positions := self._inputs.get("positions")) is not None:
            given[positions] = np.broadcast_to(np.arange(past, past + length), (batch, length))
        values = {name: ort_value(session.integers(name, array)) for name, array in given.items()}
        if self._logits_to_keep is not None:
            values[self._logits_to_keep] = self._kept(session, self._logits_to_keep, keep)
        return values

    def _kept(self, session: OnnxSession, name: str, keep: int) -> Any:
        """The same OrtValue for the same number, so that it need not be bound anew."""
        import numpy as np

        key = session, keep
        if key not in self._keeps:
            self._keeps[key] = ort_value(session.integers(name, np.full([1] * len(session.types[name][1]), keep)))
        return self._keeps[key]

    def _empty_past(self, batch: int) -> list[Any]:
        return [] if self._layout is None else empty_past(self._layout, batch)


def _parts(tokens: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """[B, S] in pieces of so many positions; the last may be shorter."""
    for begin in range(0, tokens.shape[1], length):
        yield tokens[:, begin : begin + length]


def _positions(logits: Any, part: slice) -> np.ndarray:
    """These positions of an OrtValue [B, S, V] on the host, copied as float32; the others are not copied."""
    import ctypes

    import numpy as np
    from onnx import helper

    dtype = helper.tensor_dtype_to_np_dtype(logits.element_type())
    memory = (ctypes.c_char * logits.tensor_size_in_bytes()).from_address(logits.data_ptr())
    view = np.frombuffer(memory, dtype).reshape(logits.shape())
    return view[:, part].astype(np.float32)
