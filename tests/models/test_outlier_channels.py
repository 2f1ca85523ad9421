"""Outlier channels make activations that are hard to round, and change nothing of what a model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifact import Artifact
from pipeline.errors import RecipeError
from pipeline.models import find_source
from pipeline.models.outlier_channels import FAMILIES
from pipeline.models.random_weights import draw_model
from pipeline.recipe.load import recipe_from_text
from pipeline.store import Store
from pipeline.store.folder import materialize
from pipeline.store.writer import OutputWriter

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OUTLIERS = {"share": 0.05, "scale": [20.0, 60.0]}
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")


def draw(
    folder: Path,
    kind: str = "llama",
    *,
    outliers: dict[str, Any] | None,
    dtype: str = "float32",
    seed: int = 0,
    **config: Any,
) -> Artifact:
    architecture: dict[str, Any] = {"type": kind, "seed": seed, "config": {**SIZES, **config}}
    if outliers is not None:
        architecture["outlier_channels"] = outliers
    store = Store(folder / "store")
    with store.staging() as staging:
        params = {"architecture": architecture, "dtype": dtype}
        made = draw_model(params, OutputWriter(staging), lambda fraction, message: None, store.blobs)
        return store.publish(staging, made.manifest)


def loaded(artifact: Artifact, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    materialize(artifact, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def logits_and_spread(model: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Logits of a few tokens; and by norm, the largest channel of its output over the median one."""
    import torch

    spread: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, given: Any, output: Any) -> None:
            sizes = output.detach().abs().amax(dim=(0, 1))
            spread[name] = float(sizes.max() / sizes.median())

        return hook

    for name, module in model.named_modules():
        if name.endswith(NORMS):
            module.register_forward_hook(watch(name))
    with torch.inference_mode():
        return model(torch.arange(12).reshape(2, 6) + 3).logits.numpy(), spread


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_logits_are_those_of_the_model_without_and_every_norms_output_has_outliers(kind: str, tmp_path: Path) -> None:
    plain, smooth = logits_and_spread(loaded(draw(tmp_path / "a", kind, outliers=None), tmp_path / "plain"))
    logits, spread = logits_and_spread(loaded(draw(tmp_path / "b", kind, outliers=OUTLIERS), tmp_path / "scaled"))
    np.testing.assert_allclose(logits, plain, atol=2e-5 * float(plain.std()))
    assert len(spread) == 2 * SIZES["num_hidden_layers"] + 1
    assert max(smooth.values()) < 5
    assert min(spread.values()) > 15


def test_what_is_drawn_stays_and_only_a_share_of_the_channels_is_scaled(tmp_path: Path) -> None:
    plain, scaled = draw(tmp_path / "a", outliers=None), draw(tmp_path / "b", outliers=OUTLIERS)
    for name in plain.component.tensors:
        before, after = np.array(plain.tensor(name)), np.array(scaled.tensor(name))
        ratio = np.divide(after, before, out=np.ones_like(after), where=before != 0)
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            np.testing.assert_array_equal(after, before)
        elif before.ndim == 1:
            assert 20 <= ratio[ratio != 1].min() <= ratio.max() <= 60
            assert np.count_nonzero(ratio != 1) == round(0.05 * 64)
        else:
            changed = np.any(ratio != 1, axis=0)
            assert np.count_nonzero(changed) == round(0.05 * 64)
            assert 1 / 61 < ratio[:, changed].min() <= ratio[:, changed].max() < 1 / 19


def test_each_norm_has_outliers_of_its_own(tmp_path: Path) -> None:
    artifact = draw(tmp_path, outliers=OUTLIERS)
    gains = [np.array(artifact.tensor(name)) for name in artifact.component.tensors if "norm" in name]
    assert len({tuple(np.flatnonzero(gain != 1)) for gain in gains}) == len(gains)


def test_a_seed_means_the_same_bytes(tmp_path: Path) -> None:
    one, same, other = (
        draw(tmp_path / str(i), outliers=OUTLIERS, seed=seed).digest for i, seed in enumerate((0, 0, 1))
    )
    assert one == same != other


def test_a_norm_of_few_channels_has_one_outlier(tmp_path: Path) -> None:
    artifact = draw(tmp_path, outliers={"share": 0.001, "scale": [20.0, 20.0]})
    assert sorted(np.array(artifact.tensor("model.norm.weight")))[-2:] == [1.0, 20.0]


def test_the_last_norm_stays_where_the_head_is_the_embedding(tmp_path: Path) -> None:
    plain = draw(tmp_path / "a", outliers=None, tie_word_embeddings=True)
    scaled = draw(tmp_path / "b", outliers=OUTLIERS, tie_word_embeddings=True)
    np.testing.assert_array_equal(scaled.tensor("model.norm.weight"), 1)
    np.testing.assert_array_equal(scaled.tensor("model.embed_tokens.weight"), plain.tensor("model.embed_tokens.weight"))
    before, _ = logits_and_spread(loaded(plain, tmp_path / "plain"))
    after, spread = logits_and_spread(loaded(scaled, tmp_path / "scaled"))
    np.testing.assert_allclose(after, before, atol=2e-5 * float(before.std()))
    assert spread.pop("model.norm") < 5
    assert min(spread.values()) > 15


def test_in_bfloat16_the_gains_are_exact_and_logits_differ_by_rounding(tmp_path: Path) -> None:
    plain, scaled = (draw(tmp_path / str(o), outliers=o, dtype="bfloat16") for o in (None, OUTLIERS))
    before, _ = logits_and_spread(loaded(plain, tmp_path / "plain"))
    after, spread = logits_and_spread(loaded(scaled, tmp_path / "scaled"))
    assert float(np.abs(after - before).max()) < 0.02 * float(before.std())
    assert min(spread.values()) > 15


# In a recipe


def recipe_of(architecture: dict[str, Any]) -> Any:
    text = f"version: 1\nname: x\nmodel: {json.dumps({'architecture': architecture})}\n"
    return recipe_from_text(text, file="x.yaml", folder=Path())


def source_of(**architecture: Any) -> Any:
    given = recipe_of({**SIZES, **architecture}).model.architecture.model_dump()
    return find_source("architecture", given["type"], relative_to=Path(), architecture=given)


def test_a_recipe_says_how_many_and_how_large_and_an_empty_mapping_takes_the_defaults() -> None:
    source = source_of(type="llama", outlier_channels={"share": 0.01, "scale": [2, 3]})
    assert source.architecture["outlier_channels"] == {"share": 0.01, "scale": [2.0, 3.0]}
    defaults = source_of(type="llama", outlier_channels={})
    assert defaults.architecture["outlier_channels"] == {"share": 0.005, "scale": [20.0, 60.0]}
    assert "outlier_channels" not in source_of(type="llama").architecture


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"share": 0}, "model.architecture.outlier_channels.share should be greater than 0"),
        ({"scale": [60, 20]}, "the least factor comes first"),
        ({"scale": [0.5, 2]}, "should be greater than or equal to 1"),
        ({"scale": [20]}, "should have at least 2 item"),
        ({"shares": 0.1}, "unknown key 'shares'; did you mean 'share'?"),
    ],
)
def test_a_mistake_is_told_where_it_is(given: dict[str, Any], why: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of({"type": "llama", "outlier_channels": given})
    assert why in str(caught.value)
    assert str(caught.value).startswith("x.yaml:3:")


def test_an_architecture_of_which_it_is_not_known_is_refused() -> None:
    with pytest.raises(RecipeError, match="it is not known which products of 'gemma' read") as caught:
        source_of(type="gemma", outlier_channels={})
    assert "llama, mistral, qwen2" in str(caught.value.hint)
