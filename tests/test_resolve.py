"""Evaluation texts that cannot be used are told at plan time, with the place in the recipe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from pipeline.errors import RecipeError
from pipeline.recipe import load_recipe
from pipeline.resolve import plan_recipe
from pipeline.store import Store

RECIPE = """
version: 1
name: x
model: {path: model}
hardware: local
passes: []
evaluate:
  quality:
    text: text.txt
    window: 40
    stride: 20
    tokens: 200
  workload: {prompt_lengths: [8], new_tokens: 4}
"""


def write_model(folder: Path, *, words: int = 0) -> Path:
    """What looks like a model of 48 positions to a plan, with a tokenizer of so many words, and a recipe for it."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "vocab_size": 64}
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 48}))
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "model" / "model.safetensors")
    if words:
        tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "model" / "tokenizer.json"))
    (folder / "x.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("resolve"), words=64)


def refusal(home: Path, store: Store, text: str | bytes | None, *sets: str) -> RecipeError:
    file = home / "text.txt"
    file.unlink(missing_ok=True)
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        plan_recipe(load_recipe(home / "x.yaml", list(sets)), store=store)
    return caught.value


def words(count: int) -> str:
    return " ".join(f"w{i % 64}" for i in range(count))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "text.txt cannot be read: No such file"),
        ("", "text.txt is empty"),
        (" \n\t", "text.txt is empty"),
        (b"\xff\xfe\x00w", "text.txt is not UTF-8 text: invalid start byte at byte 0"),
        (b"w1 \xc3\xa9 w2\0w3", "text.txt is not text: byte 8 is zero"),
        (words(39), "text.txt gives 39 tokens, less than one window of 40"),
        ("w1", "text.txt gives 1 tokens, less than one window of 40"),
    ],
)
def test_a_text_that_cannot_be_scored_is_refused_with_its_place(
    text: str | bytes | None, message: str, home: Path, store: Store
) -> None:
    error = refusal(home, store, text)
    assert message in error.message
    assert "x.yaml:9:" in str(error)
    assert error.exit_code == 2


def test_a_short_text_says_what_window_would_do(home: Path, store: Store) -> None:
    assert "evaluate.quality.window to 39 at most" in str(refusal(home, store, words(39)).hint)
    assert "longer text" in str(refusal(home, store, "w1").hint)


def test_fewer_tokens_than_a_window_are_refused_where_they_are_asked_for(home: Path, store: Store) -> None:
    error = refusal(home, store, words(500), "evaluate.quality.tokens=39")
    assert "evaluate.quality.tokens=39: 39 tokens are to be scored, and a window has 40" in str(error)


@pytest.mark.parametrize(
    ("count", "sets"),
    [
        (40, []),
        (39, ["evaluate.quality.window=39"]),
        (48, ["evaluate.quality.window=64", "evaluate.quality.stride=8"]),  # the model takes no more than 48
    ],
)
def test_one_window_is_enough(count: int, sets: list[str], home: Path, store: Store) -> None:
    (home / "text.txt").write_text(words(count))
    assert plan_recipe(load_recipe(home / "x.yaml", sets), store=store).stages


def test_long_words_are_counted_and_not_guessed(home: Path, store: Store) -> None:
    text = words(20).replace(" ", " " * 100)
    assert len(text) > 40 * 32
    (home / "text.txt").write_text(text)
    plan_recipe(load_recipe(home / "x.yaml"), store=store)  # too long to be counted: measuring will tell
    assert "gives 20 tokens" in refusal(home, store, words(20).replace(" ", " " * 50)).message


def test_a_folder_is_no_text(home: Path, store: Store) -> None:
    assert "cannot be read: Is a directory" in refusal(home, store, None, "evaluate.quality.text=model").message


def test_a_model_without_a_tokenizer_has_nothing_to_count(tmp_path: Path, store: Store) -> None:
    write_model(tmp_path)
    (tmp_path / "text.txt").write_text("w1")
    assert plan_recipe(load_recipe(tmp_path / "x.yaml"), store=store).stages
