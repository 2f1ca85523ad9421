"""The layers of a transformers model, seen by hooks on its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from pipeline.errors import PipelineError
from pipeline.runtime.layer_outputs import EMBEDDING, HEAD, Place, Stream, Take
from pipeline.runtime.protocol import ExecutionSpec
from pipeline.runtime.torch import Execution, TorchRunner

if TYPE_CHECKING:
    import numpy as np

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")

AGREEMENT = 0.05
"""What attention and feed-forward part give, taken together, is what the layer adds, but for this share: else a norm or
a factor lies between, and what they add is not seen."""


class TorchLayers:
    """A model whose decoder layers are watched.

    Raises: PipelineError where the model has no list of as many layers as its configuration says, is compiled, or does
    not load.
    """

    def __init__(self, artifact: Artifact, spec: ExecutionSpec, *, fed: bool = False) -> None:
        if Execution.of(artifact).compilation is not None:
            raise PipelineError("torch.compile fuses across its layers, so that what lies between them cannot be seen")
        self._runner = TorchRunner(artifact, spec)
        self._fed = fed
        self._take: Take = _nothing
        self._stream: Stream | None = None
        self._parts: dict[str, Any] = {}
        layers = list(_decoder_layers(self._runner.model))
        for index, layer in enumerate(layers):
            self._watch(index, layer, is_last=index == len(layers) - 1)
        self._runner.model.register_forward_hook(lambda module, given, output: self._see(Place(HEAD), output.logits))

    def run(self, tokens: np.ndarray, take: Take, stream: Stream | None = None) -> None:
        """One pass over a sequence [S] from an empty cache; `take` is called in the order of the model.

        What is fed takes the place of what enters each layer, and of what leaves the last.
        """
        assert self._fed == (stream is not None)
        self._take, self._stream = take, stream
        try:
            self._runner.forward(tokens[None])
        finally:
            self._take, self._stream = _nothing, None

    def _watch(self, index: int, layer: Any, *, is_last: bool) -> None:
        def enters(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
            hidden = given[0] if given else named["hidden_states"]
            if index == 0:
                self._see(Place(EMBEDDING), hidden)
            hidden = self._fed_for(Place.in_layer(index - 1) if index else Place(EMBEDDING), hidden)
            self._parts = {"stream": hidden}
            return ((hidden, *given[1:]), named) if given else (given, {**named, "hidden_states": hidden})

        def leaves(module: Any, given: tuple[Any, ...], output: Any) -> Any:
            hidden = _tensor(output)
            if self._parts_are_all(hidden):
                self._see(Place.in_layer(index, "attention"), self._parts["attention"])
                self._see(Place.in_layer(index, "mlp"), self._parts["mlp"])
            self._see(Place.in_layer(index), hidden)
            self._parts = {}
            if not is_last:
                return output
            hidden = self._fed_for(Place.in_layer(index), hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        def keeps(part: str) -> Any:
            def keep(module: Any, given: tuple[Any, ...], output: Any) -> None:
                self._parts[part] = _tensor(output)

            return keep

        layer.register_forward_pre_hook(enters, with_kwargs=True)
        layer.register_forward_hook(leaves)
        for part, names in (("attention", ATTENTION), ("mlp", MLP)):
            module = next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
            if module is not None:
                module.register_forward_hook(keeps(part))

    def _parts_are_all(self, hidden: Any) -> bool:
        """Whether the layer added what its two parts gave and no more."""
        if len(self._parts) != 3:
            return False
        stream, attention, mlp = (self._parts[part].float() for part in ("stream", "attention", "mlp"))
        if not stream.shape == attention.shape == mlp.shape:
            return False
        added = hidden.float() - stream
        return bool((added - attention - mlp).norm() <= AGREEMENT * added.norm())

    def _fed_for(self, place: Place, hidden: Any) -> Any:
        """What the stream has for the place in the data type of the model; without a stream, what is there."""
        import torch

        if self._stream is None:
            return hidden
        return torch.tensor(self._stream(place), dtype=hidden.dtype, device=hidden.device)[None]

    def _see(self, place: Place, value: Any) -> None:
        import torch

        self._take(place, value[0].to(torch.float32).cpu().numpy())


def _nothing(place: Place, values: np.ndarray) -> None:
    pass


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _decoder_layers(model: Any) -> Any:
    """The list of decoder layers."""
    import torch

    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise PipelineError(f"its model has no list of the {count} layers that its configuration names")
