"""Outlier channels in random weights: a few channels of every norm's output become large, and nothing else changes.

In trained models a few channels of the hidden state are tens of times as large as the others, and what rounds
activations to 8 bits has to cope with them. Random weights have none. Here the gain of a norm is multiplied by a factor
in some channels, and the columns of the products that read these channels are divided by it: in exact arithmetic the
model computes what it did before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError, RecipeError

if TYPE_CHECKING:
    import torch

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Family:
    """Norms that multiply by a gain, each with the products that read its output. Nothing else may read it."""

    layers: str = "model.layers"
    of_a_layer: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", ATTENTION),
        ("post_attention_layernorm", GATED_MLP),
    )
    last: tuple[str, str] = ("model.norm", "lm_head")


PACKED = (("input_layernorm", ("self_attn.qkv_proj",)), ("post_attention_layernorm", ("mlp.gate_up_proj",)))

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "phi3": Family(of_a_layer=PACKED),
}
"""model_type -> where outliers go. Of other architectures it is not known what reads a norm's output."""


@dataclass(frozen=True)
class Outliers:
    """How many channels of each norm, and by which factors at least and at most."""

    share: float
    low: float
    high: float

    def factors(self, width: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
        """Factors [width], 1 in all channels but a share of them, one at least; exact in `dtype`."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        count = max(1, round(self.share * width))
        chosen = torch.randperm(width, generator=generator)[:count]
        factors = torch.ones(width)
        factors[chosen] = self.low + (self.high - self.low) * torch.rand(count, generator=generator)
        return factors.to(dtype)


def check_family(kind: str) -> None:
    """Raises: RecipeError where it is not known of this architecture what reads a norm's output."""
    if kind not in FAMILIES:
        raise RecipeError(
            f"outlier_channels: it is not known which products of {kind!r} read the output of its norms",
            hint=f"known: {', '.join(FAMILIES)}",
        )


def norms_behind(model: Any, kind: str) -> dict[str, str]:
    """The weight of each norm and of each product that reads its output -> that norm's weight, by their names.

    The last norm is left out where the head is the embedding: to divide its columns would change the embedding.

    Raises: PipelineError where the model has not the modules that its family has.
    """
    found: dict[str, str] = {}
    for norm, readers in _pairs(model, FAMILIES[kind]):
        for module in (norm, *readers):
            try:
                model.get_submodule(module)
            except AttributeError:
                raise PipelineError(f"outlier_channels: this {kind} model has no {module!r}") from None
            found[f"{module}.weight"] = f"{norm}.weight"
    return found


def _pairs(model: Any, family: Family) -> Iterator[tuple[str, tuple[str, ...]]]:
    for layer in range(len(model.get_submodule(family.layers))):
        for norm, readers in family.of_a_layer:
            path = f"{family.layers}.{layer}."
            yield path + norm, tuple(path + reader for reader in readers)
    norm, head = family.last
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        yield norm, (head,)


def put_outliers(weight: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiply a norm's gain [D] by `factors` [D], or divide by them the columns of a product [N, D] that reads it."""
    import torch

    with torch.no_grad():
        if weight.ndim == 1:
            weight.mul_(factors)
        else:
            chosen = factors != 1
            weight[:, chosen] /= factors[chosen]
