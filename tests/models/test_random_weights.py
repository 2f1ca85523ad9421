"""Random weights are the architecture's own, depend on the seed and the names alone, and are streamed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.artifact import Artifact, Interface, Manifest
from pipeline.errors import PipelineError
from pipeline.execute import StageResult, execute
from pipeline.hardware import describe_host, load_profile
from pipeline.measure.judging import judge
from pipeline.measure.quality import QualityFigures, RatioInterval, seeded_tokens
from pipeline.models import find_source, source_artifact
from pipeline.models.random_weights import build_config, draw_model
from pipeline.plan import Plan, make_plan
from pipeline.plugin import Registry
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.load import recipe_from_text
from pipeline.recipe.schema import Thresholds
from pipeline.run import run
from pipeline.runtime import ExecutionSpec
from pipeline.runtime.torch import TorchRunner
from pipeline.store import Store
from pipeline.store.folder import materialize
from pipeline.store.writer import OutputWriter

LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 48}


def draw(folder: Path, kind: str = "llama", seed: int = 0, dtype: str = "float32", **config: Any) -> Artifact:
    """Draw in this process, and put the blobs where an artifact looks for them."""
    fields = {**(LLAMA if kind == "llama" else GPT2 if kind == "gpt2" else {}), **config}
    params = {"architecture": {"type": kind, "seed": seed, "config": fields}, "dtype": dtype}
    store = Store(folder / "store")
    with store.staging() as staging:
        made = draw_model(params, OutputWriter(staging), lambda fraction, message: None, store.blobs)
        return store.publish(staging, made.manifest)


def weights_of(artifact: Artifact) -> dict[str, np.ndarray]:
    return {name: np.array(artifact.tensor(name)) for name in artifact.component.tensors}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_file_is_a_checkpoint_that_transformers_loads(kind: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    artifact = draw(tmp_path, kind)
    materialize(artifact, tmp_path / "copy")
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        expected = model(torch.tensor([[1, 2, 3]])).logits[:, -1].numpy()
    TorchRunner.import_libraries(artifact)
    got = TorchRunner(artifact, ExecutionSpec()).prefill([[1, 2, 3]])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert config["model_type"] == kind
    assert config["architectures"] == [type(model).__name__]
    assert find_source("path", str(tmp_path / "copy"), relative_to=Path()).max_length == 48


def test_values_are_those_that_the_architecture_starts_from(tmp_path: Path) -> None:
    """Spread and constants of every tensor, against a model that transformers initialises whole."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {**GPT2, "n_embd": 128, "vocab_size": 512}
    reference = dict(GPT2LMHeadModel(GPT2Config(**sizes)).named_parameters())
    drawn = weights_of(draw(tmp_path, "gpt2", n_embd=128, vocab_size=512))
    assert {name: w.shape for name, w in drawn.items()} == {n: tuple(p.shape) for n, p in reference.items()}
    for name, weight in drawn.items():
        expected = reference[name].detach()
        if torch.unique(expected).numel() == 1:
            np.testing.assert_array_equal(weight, expected.numpy())
        else:
            assert weight.std() == pytest.approx(float(expected.std()), rel=0.1), name
    # the matrix that ends a residual branch is narrower the deeper the model: its layer sets it, not its own module
    assert drawn["transformer.h.0.attn.c_proj.weight"].std() == pytest.approx(0.02 / 2, rel=0.1)


def test_a_seed_means_the_same_values_and_another_seed_others(tmp_path: Path) -> None:
    assert draw(tmp_path / "a").digest == draw(tmp_path / "b").digest
    one, other = weights_of(draw(tmp_path / "a")), weights_of(draw(tmp_path / "c", seed=1))
    same = [name for name in one if np.array_equal(one[name], other[name])]
    assert same == [name for name in one if "norm" in name]


def test_a_module_gets_the_same_values_in_a_deeper_model(tmp_path: Path) -> None:
    small, deep = weights_of(draw(tmp_path / "a")), weights_of(draw(tmp_path / "b", num_hidden_layers=4))
    assert len(deep) > len(small)
    for name, weight in small.items():
        np.testing.assert_array_equal(weight, deep[name])
    layers = [deep[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(4)]
    assert not any(np.array_equal(layers[0], layer) for layer in layers[1:])


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    untied, tied = draw(tmp_path / "a"), draw(tmp_path / "b", tie_word_embeddings=True)
    assert set(untied.component.tensors) - set(tied.component.tensors) == {"lm_head.weight"}
    TorchRunner.import_libraries(tied)
    logits = TorchRunner(tied, ExecutionSpec()).prefill([[1, 2]])
    assert np.isfinite(logits).all()


def test_the_data_type_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    artifact = draw(tmp_path, dtype="bfloat16")
    assert {ref.dtype for ref in artifact.component.tensors.values()} == {"bfloat16"}
    assert artifact.manifest.execution == {"dtype": "bfloat16"}
    assert artifact.read_json("config.json")["dtype"] == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma", "phi", "gpt_neox", "opt", "mixtral", "bloom"])
def test_other_architectures_are_drawn_whole(kind: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    if kind == "opt":
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 48}
    elif kind == "bloom":
        sizes = {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64}
    else:
        sizes |= {"intermediate_size": 48, "max_position_embeddings": 48}
    if kind in ("mixtral", "mistral", "qwen2", "gemma"):
        sizes["num_key_value_heads"] = 2
    if kind == "gemma":
        sizes["head_dim"] = 8
    artifact = draw(tmp_path, kind, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    assert all(np.isfinite(w.astype(np.float32)).all() for w in weights_of(artifact).values())
    materialize(artifact, tmp_path / "copy")
    from transformers import AutoModelForCausalLM

    _, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", output_loading_info=True)
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]


@pytest.mark.slow
def test_memory_is_that_of_the_largest_part(tmp_path: Path) -> None:
    """Drawing 400 MB in float32 takes far less than that beyond what the libraries take."""
    code = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pipeline.models.random_weights import build_config, build_model, draw_model
from pipeline.store.writer import OutputWriter
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def draw(layers, folder):
    sizes = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, vocab_size=256)
    config = dict(sizes, num_hidden_layers=layers)
    params = dict(architecture=dict(type="llama", seed=0, config=config), dtype="float32")
    made = draw_model(params, OutputWriter(Path(folder)), lambda f, m: None, Path(folder))
    return made.manifest.weights_bytes
draw(1, {str(tmp_path / "a")!r})
before = peak()
written = draw(24, {str(tmp_path / "b")!r})
print(written, peak() - before)
"""
    # the allocator gives freed blocks back at once: what is left is what the code holds, not what the heap keeps
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    written, grown = map(int, done.stdout.split())
    assert written > 400e6
    assert grown < 0.1 * written


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"hidden_size": 30}, r"hidden size \(30\) is not a multiple of the number of attention heads \(4\)"),
        ({"hidden_act": "nonsense"}, "cannot build this llama model: KeyError 'nonsense'"),
    ],
)
def test_wrong_values_are_told(config: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=why):
        draw(tmp_path, **config)


def test_unknown_fields_are_told_by_the_configuration_itself() -> None:
    with pytest.raises(PipelineError, match="has no field 'hiden_size'"):
        build_config("llama", {"hiden_size": 3})


# In a recipe


def recipe_of(model: str, **more: str) -> Recipe:
    rest = "".join(f"{key}: {value}\n" for key, value in more.items())
    return recipe_from_text(f"version: 1\nname: x\nmodel: {model}\n{rest}", file="x.yaml", folder=Path())


def plan_of(recipe: Recipe, store: Store) -> Plan:
    model = recipe.model
    assert model.architecture is not None
    source = find_source(
        "architecture",
        model.source,
        relative_to=Path(),
        dtype=model.dtype,
        architecture=model.architecture.model_dump(),
    )
    host = describe_host()
    return make_plan(
        recipe, source=source, store=store, registry=Registry(), profile=load_profile("local", host=host), host=host
    )


def text_of(**config: Any) -> str:
    return json.dumps({"architecture": {"type": "llama", **LLAMA, **config}})


SHORT = "{workload: {prompt_lengths: [8], new_tokens: 4}, quality: {window: 16, stride: 8, tokens: 100}, budget_s: 1}"


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("{architecture: {type: lama}}", "no causal language model of type 'lama'"),
        ("{architecture: {type: bart_large}}", "no causal language model of type 'bart_large'"),
        ("{architecture: {type: llama, hiden_size: 3}}", "did you mean 'hidden_size'?"),
        ("{architecture: {type: llama, dtype: float16}}", "`model.dtype` says it"),
        ("{architecture: {hidden_size: 3}}", "the key 'type' is missing"),
        ("{architecture: {type: llama, seed: -1}}", "model.architecture.seed"),
        ("{architecture: {type: llama}, builtin: llama2-tiny}", "exactly one of"),
        ("{architecture: {type: llama}, revision: main}", "revision goes with huggingface only"),
    ],
)
def test_mistakes_are_found_without_transformers(model: str, why: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"version: 1\nname: x\nmodel: {model}\n")
    code = f"""
import sys
from pipeline.errors import RecipeError
from pipeline.recipe import load_recipe
from pipeline.resolve import plan_recipe
try:
    plan_recipe(load_recipe({str(file)!r}))
except RecipeError as error:
    print(error)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert why in done.stdout
    assert f"{file}:3:" in done.stdout


def test_the_key_holds_the_config_the_seed_and_the_data_type(store: Store) -> None:
    def key(**config: Any) -> str:
        return plan_of(recipe_of(text_of(**config), evaluate=SHORT), store).stage("source").key

    assert key() == key()
    assert len({key(), key(seed=1), key(hidden_size=64)}) == 3
    half = recipe_of(json.dumps({**json.loads(text_of()), "dtype": "bfloat16"}), evaluate=SHORT)
    assert plan_of(half, store).stage("source").key != key()
    ingredients = plan_of(recipe_of(text_of(), evaluate=SHORT), store).stage("source").ingredients
    assert set(ingredients["libraries"]) == {"torch", "transformers"}


def run_stages(recipe: Recipe, store: Store) -> dict[str, StageResult]:
    model = recipe.model
    assert model.architecture is not None
    source = find_source("architecture", "llama", relative_to=Path(), architecture=model.architecture.model_dump())
    return execute(plan_of(recipe, store), source=source, store=store)


@pytest.mark.slow
def test_a_worker_draws_them_once(store: Store) -> None:
    recipe = recipe_of(text_of(), evaluate=SHORT)
    result = run_stages(recipe, store)["source"]
    assert result.status == "ran", result.reason
    assert result.cost.peak_memory_bytes
    assert run_stages(recipe, store)["source"].status == "cached"
    assert plan_of(recipe, store).stage("source").status == "cached"
    artifact = store.artifact(str(result.artifact))
    assert artifact is not None
    assert artifact.manifest.lineage is not None
    assert artifact.manifest.lineage.parents == ()
    assert load_file(artifact.locate(artifact.component.files["model.safetensors"]))["model.norm.weight"].shape == (32,)


@pytest.mark.slow
def test_a_configuration_that_is_refused_fails_its_stage(store: Store) -> None:
    result = run_stages(recipe_of(text_of(hidden_size=30), evaluate=SHORT), store)["source"]
    assert result.status == "failed"
    assert "is not a multiple of the number of attention heads" in str(result.reason)


def test_an_architecture_is_never_described_without_its_weights(store: Store) -> None:
    source = find_source("architecture", "llama", relative_to=Path(), architecture={"type": "llama"})
    with pytest.raises(ValueError, match="are yet to be drawn"):
        source_artifact(source, store)


# What their quality means


def verdict(top1: float | None, kl: float | None, ratio: float = 1.0, *, identical: bool = False) -> str:
    interval = RatioInterval(ratio=ratio, low=ratio, high=ratio)
    figures = QualityFigures(
        perplexity_ratio=interval,
        kl_divergence=kl,
        top1_agreement=top1,
        max_abs_logit_error=0.0,
        first_divergence=None,
        identical=identical,
    )
    return judge(figures, Thresholds(), random_weights=True).verdict


def test_the_verdict_rests_on_agreement() -> None:
    assert verdict(1.0, 0.0, identical=True) == "identical"
    assert verdict(0.999, 0.001) == "equivalent"
    assert verdict(0.8, 0.0001) == "degraded"
    assert verdict(1.0, 0.5) == "degraded"
    assert verdict(0.01, 0.0001) == "broken"  # by perplexity and divergence this would be equivalent
    assert verdict(None, None) == "broken"
    assert verdict(0.8, 0.0001, ratio=3.0) == "degraded"


def test_tokens_are_drawn_evenly_from_the_vocabulary(tmp_path: Path) -> None:
    artifact = Artifact(Manifest(format="torch", components={}, interface=Interface(vocab_size=10)), tmp_path)
    tokens = seeded_tokens(artifact, 5000, 0)
    assert np.bincount(tokens, minlength=10).min() > 400
    assert tokens == seeded_tokens(artifact, 5000, 0)
    assert tokens != seeded_tokens(artifact, 5000, 1)
    nothing = Artifact(Manifest(format="torch", components={}, interface=Interface()), tmp_path)
    with pytest.raises(PipelineError, match="how large its vocabulary is"):
        seeded_tokens(nothing, 3, 0)


@pytest.mark.slow
@pytest.mark.usefixtures("measured_briefly")
def test_a_run_compares_its_stages_and_says_what_that_means(
    tmp_path: Path, probed_store: Callable[[Path], Store]
) -> None:
    store = probed_store(tmp_path / "store")
    passes = "[{pass: export_onnx}, {pass: quantize_weights, bits: 8, block_size: 32}]"
    file = tmp_path / "x.yaml"
    file.write_text(f"version: 1\nname: x\nmodel: {text_of()}\npasses: {passes}\nevaluate: {SHORT}\n")
    done = run(load_recipe(file), store=store, runs=tmp_path / "runs")
    report = done.report
    assert done.exit_code == 0
    assert report.model is not None
    assert report.model.random_weights
    assert report.model.source == "architecture: llama"
    assert any("perplexity means nothing" in note for note in report.notes)
    exported = report.stage("export_onnx").quality
    assert exported is not None
    assert exported.vs_baseline is not None
    assert exported.vs_baseline.verdict in {"identical", "equivalent"}
    assert exported.vs_baseline.top1_agreement == 1.0
    again = load_recipe(done.folder / "recipe.yaml")
    assert plan_of(again, store).stage("source").status == "cached"
