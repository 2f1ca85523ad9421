"""Loading recipes: what is accepted, and what a person is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import RecipeError
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.load import recipe_from_text, shipped_recipes

HEAD = "version: 1\nname: x\nmodel: {builtin: llama2-tiny}\n"
CHAIN = HEAD + "passes:\n  - pass: a\n  - pass: b\n    bits: 4\n  - pass: b\n    name: c\n    after: a\n    bits: 8\n"


def read(text: str, *overrides: str) -> Recipe:
    return recipe_from_text(text, file="r.yaml", folder=Path(), overrides=overrides)


def complaint(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_stage_takes_the_artifact_of_the_entry_before_it_unless_it_says_after() -> None:
    stages = read(CHAIN).stages
    assert [(s.name, s.parent) for s in stages] == [("a", "source"), ("b", "a"), ("c", "a")]


def test_every_key_that_is_not_an_entrys_own_is_a_parameter() -> None:
    assert [s.params for s in read(CHAIN).stages] == [{}, {"bits": 4}, {"bits": 8}]


def test_defaults_are_those_of_the_documentation() -> None:
    recipe = read(HEAD)
    assert recipe.hardware == "local"
    assert recipe.evaluate.baseline == "source"
    assert recipe.evaluate.workload.prompt_lengths == [128]
    assert recipe.evaluate.quality.window == 512


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_is_valid_and_found_by_its_name(name: str) -> None:
    assert load_recipe(name).stage_names[0] == "source"


def test_a_misspelt_key_is_answered_with_its_place_and_the_nearest_name() -> None:
    message = complaint(HEAD + "pases: []\n")
    assert message.startswith("r.yaml:4:1: unknown key 'pases'; did you mean 'passes'?")


def test_a_misspelt_nested_key_is_answered_with_the_nearest_name_at_its_level() -> None:
    message = complaint(HEAD + "evaluate:\n  workload: {new_token: 3}\n")
    assert message.startswith("r.yaml:5:14: unknown key 'new_token'; did you mean 'new_tokens'?")


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    lines = complaint("version: 1\nname: x\nmodel: {builtn: y}\nevaluate: {budget_s: no}\n").splitlines()
    assert [line.split(": ")[0] for line in lines] == ["r.yaml:3:1", "r.yaml:3:9", "r.yaml:4:12"] or [
        line.split(": ")[0] for line in lines
    ] == ["r.yaml:3:9", "r.yaml:4:12"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1:1: the file is empty"),
        ("# only a comment\n", "r.yaml:1:1: the file is empty"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("a: [1\nb: 2\n", "r.yaml:2:2: not YAML"),
        ("a:\n\t- b\n", "r.yaml:2:1: a tab"),
        ("version: 7\nname: x\n", "r.yaml:1:1: this is a recipe of version 7; this program reads version 1"),
        ("name: a\nname: b\n", "r.yaml:2:1: the key 'name' stands twice"),
        ("1: a\n", "r.yaml:1:1: a key has to be text"),
        ("a: !!python/object/apply:os.system ['true']\n", "r.yaml:1:4: the tag"),
        ("a: !custom 3\n", "r.yaml:1:4: the tag !custom would build an object"),
        ("a: &a [*a]\n", "too many values, or itself"),
        ("a: !!binary aGVsbG8=\n", "would build an object"),
        ("a: !!timestamp 2020-01-01\n", "would build an object"),
        ("a: !!set {b}\n", "would build an object"),
        ("a: !!bool perhaps\n", "is not what its tag says"),
        ("a: !!int many\n", "is not what its tag says"),
        ("a: &a {x: 1}\nb: {<<: [*a, *a]}\n", "`<<` takes one mapping"),
        (HEAD + "passes: [{pass: My-Pass}]\n", "'My-Pass' cannot name a stage"),
        (HEAD + "gates: ['source.decode_tokens_per_s{bach: 1} > 1']\n", "did you mean 'batch'?"),
        (HEAD + "gates: ['source.decode_tokens_per_s{batch: one} > 1']\n", "batch should be a number"),
        (HEAD + "gates: ['source.size_bytes{batch: 1} > 1']\n", "has no workload points to select"),
        (
            HEAD + "gates: ['source.decode_tokens_per_s{batch: 7} > 1']\n",
            "it has batch: 1, prompt: 128, new_tokens: 64",
        ),
        (HEAD + "gates: ['source.prefill_latency_s{new_tokens: 64} < 1']\n", "the workload has no such point"),
        (HEAD + "gates: [source.forward_latency_s < 1]\n", "times prefill and decode, and forward_latency_s is of"),
        (HEAD + "gates: [source.decode_speedup >= 1.1]\n", "source is the baseline, with which decode_speedup"),
        (
            HEAD + "passes: [{pass: a, measure: false}]\ngates: [a.decode_speedup >= 1.1]\n",
            "r.yaml:5:9: gate 'a.decode_speedup >= 1.1': a is not to be measured",
        ),
        (
            HEAD + "passes: [{pass: a, measure: false}]\nevaluate: {baseline: a}\n",
            "evaluate.baseline: a is not to be measured, and the others are compared with it",
        ),
        (HEAD + "gates: [source.kl_divergence <= 1]\n", "source is the baseline, with which kl_divergence"),
        (HEAD + "gates: [source.decode_speedup_over_parent > 1]\n", "source was made from no other stage"),
        (HEAD + "gates: [source.weights_quantized >= 95]\n", "a share, which is never more than 1\n  0.95 is 95 %"),
        (
            HEAD + "evaluate: {workload: {forward: [[2, 64]]}}\ngates: [source.mbu > 0]\n",
            "the workload times forward, and mbu is of decode",
        ),
        (HEAD + "evaluate: {quality: {window: 8, stride: 8}}\n", "stride (8) has to be smaller than window (8)"),
        (HEAD + "seed: -1\n", "seed should be greater than or equal to 0; got -1"),
        (HEAD + "evaluate: {budget_s: '60'}\n", 'evaluate.budget_s should be a valid number; got "60"'),
        (HEAD + "evaluate: {workload: {batch_sizes: []}}\n", "batch_sizes"),
        (
            HEAD + "evaluate: {looks: [2]}\n",
            "r.yaml:4:20: evaluate.looks.0 should be greater than or equal to 3; got 2",
        ),
        (HEAD + "evaluate: {looks: [12, 12]}\n", "r.yaml:4:12: evaluate.looks: looks have to ascend"),
        (HEAD + "evaluate: {looks: [3, 4, 5, 6, 7]}\n", "evaluate.looks should have at most 4 items, not 5"),
        (HEAD + "evaluate: {workload: {batch_sizes: [1, 4, 1]}}\n", "batch_sizes: 1 stands twice"),
        (HEAD + "evaluate: {workload: {forward: [[1, 8], [1, 8]]}}\n", "forward: [1, 8] stands twice"),
        (HEAD + "passes: [export_onnx]\n", 'passes.0 should be a mapping, `key: value`; got "export_onnx"'),
        (HEAD + "gates: x\n", 'gates should be a list: `[…]`, or lines that begin with `- `; got "x"'),
        (HEAD + "passes:\n\t- pass: a\n", "r.yaml:5:1: a tab at the beginning of a line"),
        (HEAD + "gates: [source.size_bytes <= 7MB]\n", "'7MB' is no number; numbers have no unit"),
        (HEAD + "gates: [source.size_bytes =< 7]\n", "'=<' is none of >= <= > < =="),
        (HEAD + "evaluate: {quality: {window: 4, stride: 8}}\n", "stride (8) has to be smaller than window (4)"),
        (HEAD + "passes: [{name: a}]\n", "r.yaml:4:10: the key 'pass' is missing"),
        (HEAD + "passes: [{pass: a, name: Big}]\n", "passes.0.name should begin with a lower-case letter"),
        (HEAD + "passes: [{pass: a}, {pass: a}]\n", "two stages are named 'a'"),
        (HEAD + "passes: [{pass: source}]\n", "'source' is reserved"),
        (HEAD + "passes: [{pass: a, after: bb}, {pass: b}]\n", "r.yaml:4:20: a: the stage 'bb' is not there"),
        (HEAD + "passes: [{pass: a, after: b}, {pass: b}]\n", "the stage 'b' comes later in the list"),
        (HEAD + "passes: [{pass: a, inputs: {draft: q}}]\n", "a: the stage 'q' is not there"),
        (HEAD + "export: q\n", "r.yaml:4:1: export: there is no stage 'q'"),
        (HEAD + "evaluate: {baseline: q}\n", "evaluate.baseline: there is no stage 'q'"),
        (HEAD + "gates: [source.size_bytes]\n", "is not STAGE.METRIC OP NUMBER"),
        (HEAD + "gates: [q.size_bytes < 1]\n", "there is no stage 'q'"),
        (HEAD + "gates: [source.sise_bytes < 1]\n", "did you mean 'size_bytes'?"),
        ("version: 1\nname: x\nmodel: {}\n", "is needed; given: none"),
        ("version: 1\nname: x\nmodel: {builtin: a, path: b}\n", "given: builtin, path"),
        ("version: 1\nname: ../x\nmodel: {builtin: a}\n", "name should begin with a letter or digit"),
    ],
)
def test_a_wrong_recipe_is_refused_with_one_clear_message(text: str, expected: str) -> None:
    assert expected in complaint(text)


def test_a_value_that_may_be_a_number_or_a_list_is_told_once_what_is_wrong() -> None:
    assert complaint(HEAD + "evaluate: {workload: {new_tokens: 0}}\n") == (
        "r.yaml:4:23: evaluate.workload.new_tokens should be greater than or equal to 1; got 0"
    )


def test_a_gate_on_what_a_model_is_needs_no_measuring() -> None:
    passes = "passes: [{pass: a, measure: false}]\n"
    assert len(read(HEAD + passes + "gates: [a.size_bytes <= 1, a.conversion_s <= 2, a.nodes < 3]\n").gates) == 3


def test_aliases_of_aliases_do_not_fill_the_memory() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "too many values" in complaint("\n".join(levels))


def test_a_number_with_an_exponent_is_a_number() -> None:
    assert read(HEAD + "evaluate: {budget_s: 1e2}\n").evaluate.budget_s == 100


def test_a_date_stays_text() -> None:
    assert read(HEAD + "description: 2020-01-01\n").description == "2020-01-01"


def test_a_merge_key_brings_the_keys_that_the_mapping_lacks() -> None:
    text = HEAD + "passes:\n  - &q {pass: a, bits: 4, block: 32}\n  - {<<: *q, name: b, bits: 8}\n"
    assert read(text).stage("b").params == {"bits": 8, "block": 32}


def test_an_override_reaches_a_stage_by_its_name() -> None:
    assert read(CHAIN, "passes.c.bits=2").stage("c").params == {"bits": 2}


def test_an_overrides_value_is_yaml() -> None:
    recipe = read(HEAD, "evaluate.workload.prompt_lengths=[1, 2]", "evaluate.budget_s=3")
    assert recipe.evaluate.workload.prompt_lengths == [1, 2]
    assert recipe.evaluate.budget_s == 3


def test_setting_one_model_source_removes_the_others() -> None:
    model = read(HEAD, "model.path=/somewhere").model
    assert (model.kind, model.source, model.builtin) == ("path", "/somewhere", None)


def test_a_mistake_in_an_override_is_placed_in_the_override() -> None:
    assert complaint(CHAIN, "evaluate.budget_s=soon").startswith(
        "--set evaluate.budget_s=soon: evaluate.budget_s should be"
    )
    assert "did you mean 'evaluate'?" in complaint(CHAIN, "evalute.budget_s=3")


def test_an_override_of_a_stage_that_is_not_there_names_those_that_are() -> None:
    assert "no entry 'd' in passes" in complaint(CHAIN, "passes.d.bits=8")


def test_an_override_without_a_value_says_what_one_looks_like() -> None:
    assert "an override is KEY=VALUE" in complaint(CHAIN, "passes")


def test_a_recipe_that_is_not_there_is_answered_with_the_nearest_shipped_one() -> None:
    with pytest.raises(RecipeError, match="did you mean 'llama2-cpu'"):
        load_recipe("lama2-cpu")


def test_a_folder_for_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(file)


def test_a_gates_selector_is_read() -> None:
    workload = "evaluate: {workload: {batch_sizes: [1, 4], prompt_lengths: [16]}}\n"
    text = HEAD + workload + "gates: ['source.decode_tokens_per_s{batch: 4, prompt: 16} >= 1e3']\n"
    gate = read(text).parsed_gates[0]
    assert gate.selector == {"batch": "4", "prompt": "16"}
    assert gate.holds(1000)
    assert not gate.holds(999)
