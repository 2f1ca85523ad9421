"""Plans: keys change with what matters and with nothing else; what cannot run is said beforehand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import HostError, PipelineError, RecipeError
from pipeline.hardware import HardwareProfile, Host, describe_host, load_profile
from pipeline.hardware.host import Gpu
from pipeline.models import find_source
from pipeline.plan import Plan, make_plan, select_stages
from pipeline.plugin import Registry
from pipeline.recipe.load import recipe_from_text
from pipeline.store import Store

pytestmark = pytest.mark.usefixtures("plugins")

CHAIN = """
version: 1
name: x
model: {path: CHECKPOINT}
hardware: local
passes:
  - pass: mark
    value: 3
  - pass: write
  - pass: mark
    name: branch
    after: mark
"""


def plan(text: str, checkpoint: Path, store: Store, *overrides: str, **changes: Any) -> Plan:
    recipe = recipe_from_text(
        text.replace("CHECKPOINT", str(checkpoint)), file="r.yaml", folder=checkpoint, overrides=overrides
    )
    host: Host = changes.pop("host", describe_host())
    profile: HardwareProfile = changes.pop("profile", load_profile("local", host=host))
    source = find_source("path", str(checkpoint), relative_to=checkpoint, dtype=recipe.model.dtype)
    return make_plan(recipe, source=source, store=store, registry=Registry(), profile=profile, host=host, **changes)


def keys(made: Plan) -> dict[str, str]:
    return {stage.name: stage.key for stage in made.stages}


def test_a_first_plan_runs_everything(checkpoint: Path, store: Store) -> None:
    made = plan(CHAIN, checkpoint, store)
    assert [(s.name, s.parent, s.status) for s in made.stages] == [
        ("source", None, "will run"),
        ("mark", "source", "will run"),
        ("write", "mark", "will run"),
        ("branch", "mark", "will run"),
    ]


def test_the_same_recipe_has_the_same_keys(checkpoint: Path, store: Store) -> None:
    assert keys(plan(CHAIN, checkpoint, store)) == keys(plan(CHAIN, checkpoint, store))


def test_a_parameter_changes_the_keys_of_its_stage_and_of_those_made_from_it(checkpoint: Path, store: Store) -> None:
    before, after = (keys(plan(CHAIN, checkpoint, store, f"passes.mark.value={v}")) for v in (3, 4))
    assert {name for name in before if before[name] != after[name]} == {"mark", "write", "branch"}


def test_a_default_written_out_is_the_same_key(checkpoint: Path, store: Store) -> None:
    assert keys(plan(CHAIN, checkpoint, store)) == keys(plan(CHAIN, checkpoint, store, "passes.branch.value=1"))


def test_names_gates_and_the_workload_are_no_part_of_a_key(checkpoint: Path, store: Store) -> None:
    before = keys(plan(CHAIN, checkpoint, store))
    after = keys(plan(CHAIN, checkpoint, store, "name=other", "evaluate.budget_s=1", "passes.branch.name=renamed"))
    assert set(before.values()) == set(after.values())


def test_another_data_type_is_another_source(checkpoint: Path, store: Store) -> None:
    assert keys(plan(CHAIN, checkpoint, store)) != keys(plan(CHAIN, checkpoint, store, "model.dtype=float16"))


def test_a_change_of_the_engine_changes_every_key_but_the_sources(
    checkpoint: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(plan(CHAIN, checkpoint, store))
    monkeypatch.setattr("pipeline.plan.engine_digest", lambda: "another engine")
    after = keys(plan(CHAIN, checkpoint, store))
    assert {name for name in before if before[name] != after[name]} == {"mark", "write", "branch"}


def test_a_declared_facet_enters_the_key_and_an_undeclared_one_does_not(checkpoint: Path, store: Store) -> None:
    text = CHAIN.replace("pass: write", "pass: seeded")
    before, after = (keys(plan(text, checkpoint, store, f"seed={seed}")) for seed in (0, 1))
    assert {name for name in before if before[name] != after[name]} == {"seeded"}


def test_a_file_that_a_parameter_names_counts_by_its_contents(checkpoint: Path, store: Store, tmp_path: Path) -> None:
    text = CHAIN.replace("pass: write", "pass: reads\n    file: FILE")
    found = []
    for name, contents in (("a", "1"), ("b", "2"), ("b", "1")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "f").write_text(contents)
        os.utime(tmp_path / name / "f", ns=(len(found), len(found)))
        found.append(keys(plan(text.replace("FILE", str(tmp_path / name / "f")), checkpoint, store))["reads"])
    assert found[0] == found[2] != found[1]


def test_files_in_a_list_count_by_their_contents_too(checkpoint: Path, store: Store, tmp_path: Path) -> None:
    text = CHAIN.replace("pass: write", f"pass: reads_many\n    files: [{tmp_path / 'f'}]")
    found = []
    for tick, contents in enumerate(("1", "2", "1")):
        (tmp_path / "f").write_text(contents)
        os.utime(tmp_path / "f", ns=(tick, tick))
        found.append(keys(plan(text, checkpoint, store))["reads_many"])
    assert found[0] == found[2] != found[1]


def test_a_file_that_is_not_there_is_placed(checkpoint: Path, store: Store) -> None:
    text = CHAIN.replace("pass: write", "pass: reads\n    file: nowhere")
    with pytest.raises(RecipeError, match=r"r.yaml:10:5: file: .*nowhere does not exist"):
        plan(text, checkpoint, store)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("pass: write", "pass: wriet", r"r.yaml:9:5: unknown pass 'wriet'\n  did you mean 'write'"),
        ("value: 3", "valeu: 3", r"r.yaml:8:5: unknown key 'valeu'; did you mean 'value'"),
        ("value: 3", "value: 10", r"r.yaml:8:5: value should be less than or equal to 9; got 10"),
        ("value: 3", "value: '3'", r"r.yaml:8:5: value should be a valid integer; got \"3\""),
        ("pass: write", "pass: onnx_only", "takes onnx, and the stage 'mark' yields torch\n  put export_onnx before"),
    ],
)
def test_a_wrong_pass_or_parameter_is_placed(old: str, new: str, expected: str, checkpoint: Path, store: Store) -> None:
    with pytest.raises(RecipeError, match=expected):
        plan(CHAIN.replace(old, new), checkpoint, store)


def test_a_stage_that_needs_a_gpu_cannot_run_without_one(checkpoint: Path, store: Store) -> None:
    host = describe_host().model_copy(update={"gpus": ()})
    made = plan(CHAIN.replace("pass: write", "pass: needs_gpu"), checkpoint, store, host=host)
    assert made.stage("needs_gpu").status == "cannot run"
    with pytest.raises(HostError, match="needs_gpu: the pass 'needs_gpu' needs a CUDA GPU"):
        made.require_runnable()


def test_a_cuda_target_on_a_host_without_one_ends_the_plan(checkpoint: Path, store: Store) -> None:
    host = describe_host().model_copy(update={"gpus": ()})
    profile = load_profile("i7-1165g7").model_copy(update={"device": "cuda", "name": "gpu"})
    with pytest.raises(HostError, match="the profile gpu is a CUDA device and this host has none"):
        plan(CHAIN, checkpoint, store, host=host, profile=profile).require_runnable()


def test_execution_providers_that_are_not_there_stop_graphs_that_are_run_and_nothing_else(
    checkpoint: Path, store: Store
) -> None:
    gpu = Gpu(name="NVIDIA H200", memory_bytes=150 * 10**9, driver="1")
    host = describe_host().model_copy(update={"gpus": (gpu,), "execution_providers": ("CPUExecutionProvider",)})
    h200 = load_profile("h200")
    assert plan(CHAIN, checkpoint, store, host=host, profile=h200).obstacles == ()  # torch brings its own CUDA
    graph = CHAIN + "  - pass: bad_onnx\n    measure: MEASURE\n"
    assert plan(graph.replace("MEASURE", "false"), checkpoint, store, host=host, profile=h200).obstacles == ()
    with pytest.raises(HostError, match="lacks CUDAExecutionProvider, which the profile h200 names, to run bad_onnx;"):
        plan(graph.replace("MEASURE", "true"), checkpoint, store, host=host, profile=h200).require_runnable()
    able = host.model_copy(update={"execution_providers": ("CUDAExecutionProvider", "CPUExecutionProvider")})
    assert plan(graph.replace("MEASURE", "true"), checkpoint, store, host=able, profile=h200).obstacles == ()


def test_a_model_that_does_not_fit_into_memory_stops_unless_forced(checkpoint: Path, store: Store) -> None:
    host = describe_host().model_copy(update={"available_memory_bytes": 10})
    with pytest.raises(HostError, match="--force tries"):
        plan(CHAIN, checkpoint, store, host=host).require_runnable()
    plan(CHAIN, checkpoint, store, host=host, force=True).require_runnable()


def test_a_stage_that_is_never_run_need_not_fit_into_memory(store: Store) -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    text = f"""
version: 1
name: x
model: {{architecture: {json.dumps({"type": "llama", "vocab_size": 32000, **sizes})}, dtype: bfloat16}}
passes: [{{pass: export_onnx}}, {{pass: quantize_weights, bits: 4}}]
"""
    host = describe_host().model_copy(update={"available_memory_bytes": 22 * 10**9})
    profile = load_profile("local", host=host).model_copy(update={"memory_bytes": 24 * 10**9})

    def made(*overrides: str) -> Plan:
        recipe = recipe_from_text(text, file="r.yaml", folder=Path(), overrides=overrides)
        assert recipe.model.architecture is not None
        given = recipe.model.architecture.model_dump()
        source = find_source("architecture", "llama", relative_to=Path(), dtype="bfloat16", architecture=given)
        registry = Registry()
        return make_plan(recipe, source=source, store=store, registry=registry, profile=profile, host=host)

    def of_memory(plan: Plan) -> list[str]:  # the disk that the tests run on may be too small as well
        return [told for told in plan.obstacles if "of memory" in told]

    (told,) = of_memory(made())
    assert told.startswith("export_onnx: running it")
    assert any(note.startswith("export_onnx does not fit") for note in made().notes)
    without = made("passes.export_onnx.measure=false")
    assert of_memory(without) == []
    assert not any("does not fit" in note for note in without.notes)
    assert keys(without) == keys(made())


def test_other_cores_and_instructions_are_notes_and_stop_nothing(checkpoint: Path, store: Store) -> None:
    host = describe_host().model_copy(update={"physical_cores": 2, "instruction_sets": ("avx2",)})
    made = plan(CHAIN, checkpoint, store, host=host, profile=load_profile("i7-1165g7"))
    made.require_runnable()
    assert made.threads == 2
    assert any("4 cores, this host 2" in note for note in made.notes)
    assert any("lacks instruction sets" in note for note in made.notes)


def test_what_a_run_will_not_do_as_the_recipe_says_is_a_note(checkpoint: Path, store: Store) -> None:
    host = describe_host().model_copy(update={"physical_cores": 2})
    made = plan(CHAIN, checkpoint, store, "evaluate.threads=64", "evaluate.quality.window=100000", host=host)
    assert any(note.startswith("evaluate.threads is 64: this host has 2 cores") for note in made.notes)
    assert any(
        note.startswith("evaluate.quality.window is 100000: quality is scored in windows") for note in made.notes
    )


def test_a_gate_on_a_gpus_memory_is_refused_for_a_cpu(checkpoint: Path, store: Store) -> None:
    gates = 'gates: ["mark.device_peak_memory_bytes < 1e9"]\n'
    with pytest.raises(RecipeError, match=r"r.yaml:13:9: gate .* is a CPU, of which there is no device_peak"):
        plan(CHAIN + gates, checkpoint, store)


def test_a_facet_that_does_not_exist_is_refused(
    checkpoint: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry().load("seeded"), "depends_on", ("weather",))
    with pytest.raises(PipelineError, match="no context facet 'weather'"):
        plan(CHAIN.replace("pass: write", "pass: seeded"), checkpoint, store)


def chosen(**how: str) -> list[str]:
    text = CHAIN.replace("CHECKPOINT", "m")
    recipe = recipe_from_text(text, file="r.yaml", folder=Path())
    return [stage.name for stage in select_stages(recipe, **how)]


def test_until_takes_the_stages_listed_up_to_it() -> None:
    assert chosen(until="write") == ["mark", "write"]
    assert chosen(until="source") == []


def test_only_takes_a_stage_and_what_it_is_made_from() -> None:
    assert chosen(only="branch") == ["mark", "branch"]


def test_until_and_only_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        chosen(only="branch", until="write")


def test_a_stage_that_is_not_there_cannot_be_chosen() -> None:
    with pytest.raises(RecipeError, match="did you mean 'branch'"):
        chosen(only="brunch")


WHOLE = """
version: 1
name: x
model:
  architecture: {type: llama, hidden_size: 64, num_attention_heads: 4, intermediate_size: 96, num_hidden_layers: 2,
    vocab_size: 300, max_position_embeddings: 64}
hardware: local
passes:
  - pass: export_onnx
    cache: false
  - pass: onnxoptimizer
evaluate:
  workload: {forward: [[2, 16]]}
"""


def plan_of_architecture(store: Store, *overrides: str, text: str = WHOLE, **changes: Any) -> Plan:
    recipe = recipe_from_text(text, file="r.yaml", folder=Path(), overrides=overrides)
    host: Host = changes.pop("host", describe_host())
    assert recipe.model.architecture is not None
    source = find_source(
        "architecture", "llama", relative_to=Path(), architecture=recipe.model.architecture.model_dump()
    )
    profile: HardwareProfile = changes.pop("profile", load_profile("local", host=host))
    return make_plan(recipe, source=source, store=store, registry=Registry(), profile=profile, host=host, **changes)


def test_graphs_without_a_cache_go_with_whole_passes(store: Store) -> None:
    made = plan_of_architecture(store)
    memory = {stage.name: stage.predicted for stage in made.stages}
    assert all(found is not None and found.kv_cache_bytes == 0 for found in memory.values())


def test_a_stage_without_a_cache_is_refused_where_prompts_and_single_tokens_are_asked_for(store: Store) -> None:
    with pytest.raises(RecipeError, match="graph of the stage 'export_onnx' has no key-value cache") as caught:
        plan_of_architecture(store, "evaluate.workload={prompt_lengths: [16], new_tokens: 8}")
    assert "r.yaml:9" in str(caught.value)
    assert "forward" in str(caught.value)


PHASES = (
    WHOLE.partition("passes:")[0]
    + """passes:
  - pass: export_onnx
  - pass: quantize_weights
    name: int4
  - pass: split_phases
    inputs: {prefill: export_onnx, decode: int4}
evaluate:
  workload: {prompt_lengths: [16], new_tokens: 8}
"""
)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("prefill: export_onnx, ", "", r"r.yaml:13:5: split_phases: its `inputs` lacks prefill\n  write `inputs: "),
        ("prefill:", "prefil:", r"r.yaml:13:5: split_phases: .* lacks prefill and has prefil, which it does not read"),
        ("prefill: export_onnx", "prefill: source", r"inputs.prefill takes an ONNX graph, and .*'source' yields torch"),
        ("decode: int4", "decode: export_onnx", r"it comes after 'int4', which is neither .*\n  write `after: export_"),
    ],
)
def test_stages_that_a_pass_cannot_read_are_refused_before_anything_runs(
    old: str, new: str, expected: str, store: Store
) -> None:
    with pytest.raises(RecipeError, match=expected):
        plan_of_architecture(store, text=PHASES.replace(old, new))


def test_memory_is_foreseen_of_all_models_that_a_pass_reads(store: Store) -> None:
    made = plan_of_architecture(store, text=PHASES)
    memory = {stage.name: stage.predicted for stage in made.stages}
    one, other, both = (memory[name] for name in ("export_onnx", "int4", "split_phases"))
    assert one is not None
    assert other is not None
    assert both is not None
    assert both.weights_bytes >= one.weights_bytes + other.weights_bytes * 0.9
    assert both.mapped_bytes < one.mapped_bytes + other.mapped_bytes
    assert made.stage("split_phases").writes_bytes == 0


def test_whole_passes_may_not_be_longer_than_the_model(store: Store) -> None:
    with pytest.raises(RecipeError, match="a sequence of 65 tokens takes as many positions; the model has 64"):
        plan_of_architecture(store, "evaluate.workload.forward=[[1, 8], [1, 65]]")


def test_a_batch_that_does_not_fit_into_memory_is_told_with_the_numbers_unless_forced(store: Store) -> None:
    host = describe_host().model_copy(update={"available_memory_bytes": 64 * 10**9})
    assert not plan_of_architecture(store, host=host).obstacles
    batch = "evaluate.workload.forward=[[1000000, 64]]"
    with pytest.raises(
        HostError, match=r"running it with a batch of 1000000 and 64 tokens each takes about .* GB .* has 64\.0 GB free"
    ):
        plan_of_architecture(store, batch, host=host).require_runnable()
    plan_of_architecture(store, batch, host=host, force=True).require_runnable()


def test_on_a_gpu_it_is_the_gpus_memory_that_running_has_to_fit_into(store: Store) -> None:
    gpu = Gpu(name="Some GPU", memory_bytes=8 * 10**9, driver="1")
    host = describe_host().model_copy(update={"gpus": (gpu,), "available_memory_bytes": 10**15})
    profile = load_profile("local", host=describe_host()).model_copy(update={"device": "cuda", "name": "gpu"})
    made = plan_of_architecture(store, "evaluate.workload.forward=[[100000, 64]]", host=host, profile=profile)
    assert any("Some GPU has 8.0 GB; --force tries" in obstacle for obstacle in made.obstacles)


# Orders that passes declare


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            "[{pass: export_onnx}, {pass: quantize_weights, name: int4}, {pass: equalize_channels}]",
            r"r\.yaml:6:\d+: equalize_channels: equalize_channels has to come before quantize_weights "
            r"\(stage 'int4'\): it scales float weights",
        ),
        (
            "[{pass: export_onnx}, {pass: compile_onnxruntime}, {pass: join_products, name: j}]",
            r"j: join_products cannot come after compile_onnxruntime: the weights that it packs",
        ),
        (
            "[{pass: export_onnx}, {pass: quantize_dynamic}, {pass: onnxoptimizer}, "
            "{pass: equalize_channels, name: e}]",
            r"e: equalize_channels has to come before quantize_dynamic",
        ),
    ],
)
def test_an_order_that_a_pass_rules_out_is_refused_with_the_reason(
    checkpoint: Path, store: Store, passes: str, message: str
) -> None:
    text = CHAIN.partition("passes:")[0] + f"passes: {passes}\n"
    with pytest.raises(RecipeError, match=message) as caught:
        plan(text, checkpoint, store)
    assert "branch off before it" in str(caught.value)


def test_another_branch_is_no_order(checkpoint: Path, store: Store) -> None:
    passes = "[{pass: export_onnx}, {pass: quantize_weights}, {pass: equalize_channels, after: export_onnx}]"
    plan(CHAIN.partition("passes:")[0] + f"passes: {passes}\n", checkpoint, store)


def test_an_input_is_an_earlier_stage_like_a_parent(
    checkpoint: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CHAIN + "  - pass: combine\n    after: branch\n    inputs: {other: write}\n"
    plan(text, checkpoint, store)
    monkeypatch.setattr(Registry().load("combine"), "comes_before", {"write": "of a whim"})
    with pytest.raises(RecipeError, match="combine has to come before write: of a whim"):
        plan(text, checkpoint, store)
