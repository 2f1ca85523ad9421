"""Where quality fell: layers are found in graphs and modules, matched, and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import fused_llama
import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from passes.export.export_onnx import ExportOnnx
from passes.quantize.quantize_weights import QuantizeWeights
from pipeline import Artifact, Pass, PassContext, load_onnx, new_tensor, save_onnx
from pipeline.artifact import CacheLayout, Interface
from pipeline.errors import PipelineError, StageError
from pipeline.measure import layers
from pipeline.measure.layers import (
    JUMP,
    LayerDifference,
    LayersMeasurement,
    LayersWork,
    answer_layers,
    first_layer,
    measure_layers,
    most_layer,
)
from pipeline.measure.process import StageToMeasure
from pipeline.measure.worker import Session
from pipeline.runtime import ExecutionSpec
from pipeline.runtime.layer_outputs import Place, open_layers
from pipeline.runtime.onnx_layers import find_joints, watch_layers
from pipeline.store import Store
from pipeline.store.writer import OutputWriter

IDS = np.random.default_rng(0).integers(0, tiny_models.VOCABULARY, 200).tolist()


class InProcess:
    """A worker without a process, which counts what it is asked."""

    asked: ClassVar[list[str]] = []

    def __init__(self, name: str, spec: ExecutionSpec, log: Path) -> None:
        self.pid = 0
        self.name = name

    def prepare(self, artifact: Artifact) -> None: ...
    def wait_until_prepared(self) -> None: ...
    def load(self, artifact: Artifact) -> dict[str, Any]:
        raise NotImplementedError

    def forget_compiled(self, artifact: Artifact) -> None: ...
    def close(self) -> None: ...

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        self.asked.append(self.name)
        try:
            return Session().answer({"request": request, **fields})
        except PipelineError as error:
            raise StageError(error.message) from error


class Workshop:
    """A store, and passes run against it without the engine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, Store(folder / "store")

    def publish(self, make: Callable[[OutputWriter], Artifact]) -> Artifact:
        staging = Path(self.folder / f"staging-{len(list(self.folder.iterdir()))}")
        staging.mkdir()
        return self.store.publish(staging, make(OutputWriter(staging)).manifest)

    def run(self, cls: type[Pass], artifact: Artifact, **params: Any) -> Artifact:
        values = cls.Params(**params)
        return self.publish(lambda output: cls().run(artifact, values, PassContext(output=output, facets={})))

    def with_weights(self, artifact: Artifact, change: Callable[[str, np.ndarray], np.ndarray | None]) -> Artifact:
        """The same graph with other weights, where `change` gives some."""

        def make(output: OutputWriter) -> Artifact:
            model = load_onnx(artifact)
            for name, value in model.graph.initializers.items():
                assert value.const_value is not None
                changed = change(name, value.const_value.numpy())
                if changed is not None:
                    value.const_value = new_tensor(output, name, changed)
            return save_onnx(model, output, like=artifact)

        return self.publish(make)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="module")
def source(workshop: Workshop) -> Artifact:
    from pipeline.models.source import find_source, source_artifact

    folder = tiny_models.save_llama(workshop.folder / "llama")
    return source_artifact(find_source("path", str(folder), relative_to=folder), workshop.store)


@pytest.fixture(scope="module")
def exported(workshop: Workshop, source: Artifact) -> Artifact:
    return workshop.run(ExportOnnx, source, verify=False)


@pytest.fixture(scope="module")
def broken(workshop: Workshop, exported: Artifact) -> Artifact:
    """The second of two layers has its weights upside down."""

    def turn(name: str, array: np.ndarray) -> np.ndarray | None:
        return array[::-1].copy() if "layers.1." in name and "proj" in name else None

    return workshop.with_weights(exported, turn)


@pytest.fixture(scope="module")
def first_int4(workshop: Workshop, exported: Artifact) -> Artifact:
    """Only the first of two layers is quantized."""
    return workshop.run(QuantizeWeights, exported, block_size=16, head="keep", exclude=["*layers.1.*"])


def stage(name: str, artifact: Artifact) -> StageToMeasure:
    return StageToMeasure(name, artifact, ExecutionSpec())


def compare(artifact: Artifact, reference: Artifact, ids: Sequence[int] = IDS) -> LayersMeasurement:
    pair = stage("stage", artifact), stage("reference", reference)
    return measure_layers([pair], ids=ids, logs=Path("logs"), start_worker=InProcess)


def errors(found: LayersMeasurement) -> dict[str, float | None]:
    return {layer.layer: layer.relative_error for layer in found.stages["stage"].layers}


def added(found: LayersMeasurement) -> dict[str, float | None]:
    return {layer.layer: layer.added for layer in found.stages["stage"].layers}


# Comparing


def test_an_export_is_matched_with_its_checkpoint_layer_by_layer_and_does_not_diverge(
    source: Artifact, exported: Artifact
) -> None:
    found = compare(exported, source).stages["stage"]
    assert [layer.layer for layer in found.layers] == ["embedding", "layer 0", "layer 1", "head"]
    assert found.matched == (2, 2)
    assert found.tokens == 192
    assert all(layer.relative_error is not None and layer.relative_error < 1e-5 for layer in found.layers)
    assert all(layer.added is not None and layer.added < 1e-5 for layer in found.layers)
    assert found.first is None
    assert found.layers[1].attention is not None
    assert found.layers[1].mlp is not None


def test_a_broken_layer_is_named_and_those_before_it_are_not(exported: Artifact, broken: Artifact) -> None:
    found = compare(broken, exported)
    assert (found.stages["stage"].first, found.stages["stage"].most) == ("layer 1", "layer 1")
    assert errors(found)["layer 0"] == 0.0
    assert errors(found)["layer 1"] > 0.5  # type: ignore[operator]
    assert added(found)["head"] == 0.0


def test_a_broken_layer_is_found_against_torch_as_well(source: Artifact, broken: Artifact) -> None:
    found = compare(broken, source).stages["stage"]
    assert (found.first, found.most) == ("layer 1", "layer 1")


def test_a_checkpoint_is_fed_like_a_graph(source: Artifact, broken: Artifact) -> None:
    found = compare(source, broken)
    assert (found.stages["stage"].first, found.stages["stage"].most) == ("layer 1", "layer 1")
    alone = added(found)
    assert alone["head"] < 1e-5  # type: ignore[operator]
    assert errors(found)["head"] > 0.1  # type: ignore[operator]


def test_errors_that_later_layers_pass_on_are_not_theirs(exported: Artifact, first_int4: Artifact) -> None:
    found = compare(first_int4, exported)
    assert (found.stages["stage"].first, found.stages["stage"].most) == ("layer 0", "layer 0")
    assert errors(found)["layer 1"] > 0.01  # type: ignore[operator]
    assert added(found) == {"embedding": 0.0, "layer 0": errors(found)["layer 0"], "layer 1": 0.0, "head": 0.0}


def test_each_half_of_a_layer_has_an_error_of_its_own(workshop: Workshop, exported: Artifact) -> None:
    def turn(name: str, array: np.ndarray) -> np.ndarray | None:
        return array[::-1].copy() if "layers.0.mlp.down" in name else None

    layer = compare(workshop.with_weights(exported, turn), exported).stages["stage"].layers[1]
    assert layer.attention == 0.0
    assert layer.mlp is not None
    assert layer.mlp > 0.5


def test_a_broken_head_is_told_from_the_layers(workshop: Workshop, exported: Artifact) -> None:
    found = compare(
        workshop.with_weights(exported, lambda name, array: array[::-1].copy() if "lm_head" in name else None), exported
    )
    assert (found.stages["stage"].first, found.stages["stage"].most) == ("head", "head")
    assert errors(found)["layer 1"] == 0.0


def test_a_layer_that_gives_no_numbers_is_first_and_most(workshop: Workshop, exported: Artifact) -> None:
    def spoil(name: str, array: np.ndarray) -> np.ndarray | None:
        return np.full_like(array, np.nan) if "layers.1.mlp.up" in name else None

    found = compare(workshop.with_weights(exported, spoil), exported)
    assert (found.stages["stage"].first, found.stages["stage"].most) == ("layer 1", "layer 1")
    assert errors(found)["layer 1"] is None


def test_a_copy_has_no_layer_that_diverged(exported: Artifact) -> None:
    found = compare(exported, exported).stages["stage"]
    assert (found.first, found.most) == (None, None)


def test_a_reference_runs_once_for_all_its_stages(
    exported: Artifact, broken: Artifact, first_int4: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InProcess, "asked", [])
    reference = stage("reference", exported)
    pairs = [(stage("broken", broken), reference), (stage("int4", first_int4), reference)]
    found = measure_layers(pairs, ids=IDS, logs=Path("logs"), start_worker=InProcess)
    assert InProcess.asked == ["reference", "broken", "int4"]
    assert set(found.stages) == {"broken", "int4"}


def test_what_is_found_of_a_pair_does_not_depend_on_who_is_compared_beside_it(
    exported: Artifact, broken: Artifact, first_int4: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = first_int4.interface.model_copy(update={"max_length": 8})
    short = Artifact(first_int4.manifest.model_copy(update={"interface": interface}), first_int4.blobs)
    reference = stage("reference", exported)
    monkeypatch.setattr(InProcess, "asked", [])
    pairs = [(stage("stage", broken), reference), (stage("short", short), reference)]
    found = measure_layers(pairs, ids=IDS, logs=Path("logs"), start_worker=InProcess)
    assert found.stages["stage"] == compare(broken, exported).stages["stage"]
    assert found.stages["short"].tokens == layers.PASSAGES * 8
    assert InProcess.asked[:4] == ["reference", "stage", "reference", "short"]


def test_what_the_reference_leaves_on_disk_is_capped(
    exported: Artifact, broken: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "KEPT_BYTES", 1)
    found = compare(broken, exported).stages["stage"]
    assert found.tokens == 48  # one passage, as long as the model takes
    assert found.first == "layer 1"


def test_a_model_of_another_width_has_a_reason(exported: Artifact, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny_models.save_llama(tmp_path / "wide"))
    config.hidden_size = 64
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    other = tiny_models.torch_artifact(tmp_path / "wide")
    assert compare(other, exported).reasons["stage"] == (
        "none of the reference's 2 layers is found in it with the same width"
    )


def test_a_graph_without_a_residual_stream_has_a_reason(exported: Artifact, tmp_path: Path) -> None:
    odd = tiny_models.onnx_artifact(tmp_path / "odd")
    assert "no residual stream" in compare(odd, exported).reasons["stage"]
    assert "the layers of its reference are not known" in compare(exported, odd).reasons["stage"]


def test_a_compiled_checkpoint_has_a_reason(source: Artifact) -> None:
    execution = {**source.manifest.execution, "compile": {}}
    compiled = Artifact(source.manifest.model_copy(update={"execution": execution}), source.blobs)
    with pytest.raises(PipelineError, match="fuses across its layers"):
        open_layers(compiled, ExecutionSpec())


def test_a_text_shorter_than_a_passage_is_a_short_passage(exported: Artifact, broken: Artifact) -> None:
    found = compare(broken, exported, IDS[:20]).stages["stage"]
    assert (found.tokens, found.first) == (20, "layer 1")


def test_a_format_whose_runner_shows_no_layers_is_told(source: Artifact) -> None:
    other = Artifact(source.manifest.model_copy(update={"format": "unheard_of"}), source.blobs)
    with pytest.raises(PipelineError, match="does not show the layers"):
        open_layers(other, ExecutionSpec())


def test_logits_of_a_large_vocabulary_are_thinned_out(
    exported: Artifact, broken: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(layers, "LOGITS", 10)
    np.save(tmp_path / "tokens.npy", np.array(IDS[:48]).reshape(1, 48))
    work = LayersWork(tokens=str(tmp_path / "tokens.npy"), folder=str(tmp_path), is_reference=True)
    answer_layers(exported, ExecutionSpec(), work)
    assert (tmp_path / "head.output.f32").stat().st_size == 48 * 10 * 4
    answer = answer_layers(broken, ExecutionSpec(), work.model_copy(update={"is_reference": False}))
    assert answer["layers"][-1]["relative_error"] > 0.1


@pytest.mark.slow
def test_real_workers_compare_in_processes_of_their_own(exported: Artifact, broken: Artifact, tmp_path: Path) -> None:
    pair = stage("broken", broken), stage("exported", exported)
    found = measure_layers([pair], ids=IDS, logs=tmp_path)
    assert found.reasons == {}
    assert found.stages["broken"].first == "layer 1"


def test_a_token_whose_reference_is_zero_is_wholly_wrong_and_still_a_number() -> None:
    difference, expected = (
        np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 5.0]]),
        np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 10.0]]),
    )
    assert layers._by_token(difference, expected).tolist() == [1.0, 0.0, 0.5]
    assert np.isnan(layers._by_token(np.array([[np.nan, 1.0]]), np.zeros((1, 2)))).all()


# Fused graphs, and two of them


@pytest.fixture(scope="module")
def fused_source(workshop: Workshop) -> Artifact:
    return tiny_models.torch_artifact(fused_llama.save_checkpoint(workshop.folder / "checkpoint"))


@pytest.fixture(scope="module")
def fused(workshop: Workshop, fused_source: Artifact) -> Artifact:
    made = fused_llama.fused_llama(workshop.folder / "fused", fused_source.blobs)
    return workshop.publish(lambda output: made)  # in the store of those that are made of it


@pytest.fixture(scope="module")
def fused_int4(workshop: Workshop, fused: Artifact) -> Artifact:
    return workshop.run(QuantizeWeights, fused, block_size=16, head="keep", exclude=["*layers.0.*"])


def test_a_fused_graph_is_matched_with_its_checkpoint_layer_by_layer(fused_source: Artifact, fused: Artifact) -> None:
    """The sums are outputs of norms, some of which nobody took, and the last layer works on the last positions."""
    found = compare(fused, fused_source).stages["stage"]
    assert [layer.layer for layer in found.layers] == ["embedding", "layer 0", "layer 1", "head"]
    assert all(layer.relative_error is not None and layer.relative_error < 1e-5 for layer in found.layers)
    assert all(layer.added is not None and layer.added < 1e-5 for layer in found.layers)
    assert all(layer.attention is not None and layer.mlp is not None for layer in found.layers[1:3])
    assert found.component is None


def test_a_quantized_layer_of_a_fused_graph_is_named(
    fused_source: Artifact, fused: Artifact, fused_int4: Artifact
) -> None:
    for reference in (fused_source, fused):
        found = compare(fused_int4, reference)
        assert (found.stages["stage"].first, found.stages["stage"].most) == ("layer 1", "layer 1")
        assert added(found)["head"] < 1e-5  # type: ignore[operator]


@pytest.mark.parametrize("worse", ["prefill", "decode"])
def test_of_two_graphs_the_worse_one_is_told(fused: Artifact, fused_int4: Artifact, worse: str) -> None:
    pair = (fused_int4, fused) if worse == "prefill" else (fused, fused_int4)
    found = compare(fused_llama.two_phases(*pair), fused).stages["stage"]
    assert (found.component, found.first, found.reference_component) == (worse, "layer 1", None)
    assert found == compare(fused_int4, fused).stages["stage"].model_copy(update={"component": worse})


def test_a_reference_of_two_graphs_is_taken_by_the_one_of_the_same_name_or_the_one_for_prompts(
    fused: Artifact, fused_int4: Artifact
) -> None:
    both = fused_llama.two_phases(fused, fused_int4)
    same = compare(both, both).stages["stage"]
    assert (same.component, same.reference_component, same.first) == ("prefill", "prefill", None)
    single = compare(fused_int4, both).stages["stage"]
    assert (single.component, single.reference_component, single.first) == (None, "prefill", "layer 1")


def test_a_reference_whose_graphs_have_other_names_is_a_reason(fused: Artifact) -> None:
    parts = {"encoder": fused.component, "decoder": fused.component}
    pair = Artifact(fused.manifest.model_copy(update={"components": parts}), fused.blobs)
    assert compare(fused, pair).reasons["stage"] == "which component of reference runs a prompt is not known"


# Which layer is first, and which most


def differences(*found: float | None, own: Sequence[float | None] = ()) -> list[LayerDifference]:
    names = ["embedding", *(f"layer {i}" for i in range(len(found) - 2)), "head"]
    padded = [*own, *[None] * (len(found) - len(own))]
    return [LayerDifference(layer=n, relative_error=e, added=a) for n, e, a in zip(names, found, padded, strict=True)]


@pytest.mark.parametrize(
    ("found", "first"),
    [
        ((0.0, 0.0, 0.0, 0.0), None),
        ((0.0, 0.016, 0.018, 0.019), None),  # rounding
        ((0.0, 0.05, 0.06, 0.1), "layer 0"),
        ((0.0, 0.008, 0.014, 0.022, 0.5, 0.5), "layer 3"),  # a jump, after what rounding did
        ((0.0, 0.009, 0.016, 0.03, 0.05), "layer 2"),  # it only grows: the first beyond the floor
        ((0.02, 0.03, 0.03, 0.03), "embedding"),
        ((0.0, 0.001, 0.001, 0.4), "head"),
        ((0.0, 0.001, None, None), "layer 1"),
    ],
)
def test_an_error_begins_where_it_jumps_or_passes_the_floor(found: tuple[float | None, ...], first: str | None) -> None:
    assert first_layer(differences(*found)) == first


@pytest.mark.parametrize(
    ("found", "own", "most"),
    [
        ((0.0, 0.1, 0.3, 0.4), (0.0, 0.1, 0.05, 0.02), "layer 0"),
        ((0.0, 0.1, 0.3, 0.4), (), "layer 1"),  # nothing was fed: where it grew most
        ((0.0, 0.1, 0.3, 0.9), (0.0, 0.0, 0.0, 0.2), "head"),
        ((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), None),
        ((0.0, None, 0.3, 0.4), (0.0, 0.1, 0.9, 0.0), "layer 0"),
    ],
)
def test_most_is_the_layer_with_the_largest_error_of_its_own(
    found: tuple[float | None, ...], own: tuple[float, ...], most: str | None
) -> None:
    assert most_layer(differences(*found, own=own)) == most


@given(st.lists(st.floats(0, 2), min_size=3, max_size=30))
def test_first_and_most_are_among_the_layers_whatever_the_errors(found: list[float]) -> None:
    given = differences(*found)
    names = {layer.layer for layer in given} | {None}
    assert {first_layer(given), most_layer(given)} <= names


@given(st.lists(st.floats(0, 0.005), min_size=3, max_size=30), st.data())
def test_a_jump_over_rounding_is_always_found(found: list[float], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(found) - 1))
    found[at:] = [max(found) * JUMP + 0.02] * (len(found) - at)
    assert first_layer(differences(*found)) == differences(*found)[at].layer


# Finding layers in graphs


def graph_of(text: str) -> Any:
    import onnx

    return onnx.parser.parse_graph(text)


FUSED = """
fused (int64[1,S] tokens, float[1,2,T,4] pk0, float[1,2,T,4] pv0, float[1,2,T,4] pk1, float[1,2,T,4] pv1)
 => (float[1,S,9] logits, float[1,2,U,4] k0, float[1,2,U,4] v0, float[1,2,U,4] k1, float[1,2,U,4] v1)
{
  size = Shape(tokens)
  x = Gather(table, tokens)
  n0 = SimplifiedLayerNormalization(x, g)
  q0 = MatMul(n0, wqkv)
  a0, k0, v0 = GroupQueryAttention(q0, none, none, pk0, pv0, size, size)
  o0 = MatMul(a0, wo)
  n1, m1, i1, s1 = SkipSimplifiedLayerNormalization(x, o0, g)
  u0 = MatMul(n1, wu)
  t0 = Sigmoid(u0)
  gated0 = Mul(u0, t0)
  d0 = MatMul(gated0, wd)
  n2, m2, i2, s2 = SkipSimplifiedLayerNormalization(s1, d0, g)
  q1 = MatMul(n2, wqkv)
  a1, k1, v1 = GroupQueryAttention(q1, none, none, pk1, pv1, size, size)
  o1 = MatMul(a1, wo)
  n3, m3, i3, s3 = SkipSimplifiedLayerNormalization(s2, o1, g)
  u1 = MatMul(n3, wu)
  t1 = Sigmoid(u1)
  gated1 = Mul(u1, t1)
  d1 = MatMul(gated1, wd)
  n4 = SkipSimplifiedLayerNormalization(s3, d1, g)
  logits = MatMul(n4, head)
}
"""

TWO_LAYERS = Interface(
    inputs={
        "tokens": "tokens",
        **{f"past.{part}[{layer}]": f"p{part}{layer}" for part in "kv" for layer in range(2)},
    },
    outputs={"logits": "logits"},
    cache=CacheLayout(layers=2, kv_heads=2, head_dim=4),
)


def test_fused_norms_are_the_joints_of_a_fused_graph_and_the_last_is_made_to_give_its_sum() -> None:
    graph = graph_of(FUSED)
    assert watch_layers(graph, TWO_LAYERS) == {
        Place("embedding"): "x",
        Place("layer 0", "attention"): "o0",
        Place("layer 0", "mlp"): "d0",
        Place("layer 0"): "s2",
        Place("layer 1", "attention"): "o1",
        Place("layer 1", "mlp"): "d1",
        Place("layer 1"): "n4.sum",
        Place("head"): "logits",
    }
    assert list(graph.node[-2].output) == ["n4", "", "", "n4.sum"]
    assert {"s2", "n4.sum", "o0"} <= {output.name for output in graph.output}


PARALLEL = """
parallel (int64[1,S] tokens, float[1,S,8] pk0, float[1,S,8] pk1) => (float[1,S,9] logits)
{
  e = Gather(table, tokens)
  x = Mul(e, scale)
  n0 = LayerNormalization(x, g)
  k0 = Concat<axis=1>(pk0, n0)
  a0 = Softmax(k0)
  m0 = Relu(n0)
  both0 = Add(a0, m0)
  c0 = Cast<to=1>(both0)
  s0 = Add(c0, x)
  n1 = LayerNormalization(s0, g)
  k1 = Concat<axis=1>(pk1, n1)
  a1 = Softmax(k1)
  m1 = Relu(n1)
  both1 = Add(a1, m1)
  s1 = Add(both1, s0)
  logits = MatMul(s1, head)
}
"""


def test_a_parallel_residual_has_one_joint_for_each_layer_whose_halves_are_not_told_apart() -> None:
    inputs = {"tokens": "tokens", "past.k[0]": "pk0", "past.k[1]": "pk1"}
    interface = TWO_LAYERS.model_copy(update={"inputs": inputs})
    assert watch_layers(graph_of(PARALLEL), interface) == {
        Place("embedding"): "x",
        Place("layer 0"): "s0",
        Place("layer 1"): "s1",
        Place("head"): "logits",
    }


PLAIN = """
plain (int64[1,S] tokens) => (float[1,S,9] logits)
{
  x = Gather(table, tokens)
  n0 = Softmax(x)
  s0 = Add(x, n0)
  n1 = Relu(s0)
  s1 = Add(n1, s0)
  biased = Add(s1, bias)
  logits = MatMul(biased, head)
}
"""


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"layer 0 attention": "n0", "layer 0 mlp": "n1", "layer 0 output": "s1"}),
        (2, {"layer 0 output": "s0", "layer 1 output": "s1"}),
    ],
)
def test_without_a_cache_the_configuration_says_how_many_layers_there_are(count: int, expected: dict[str, str]) -> None:
    interface = Interface(inputs={"tokens": "tokens"}, outputs={"logits": "logits"})
    found = watch_layers(graph_of(PLAIN), interface, count)
    assert {f"{p.layer} {p.part}": name for p, name in found.items() if p.is_layer} == expected


@pytest.mark.parametrize("count", [3, None])
def test_without_a_cache_and_a_fitting_configuration_layers_are_not_guessed(count: int | None) -> None:
    interface = Interface(inputs={"tokens": "tokens"}, outputs={"logits": "logits"})
    with pytest.raises(PipelineError, match="no key-value cache to tell its layers by, and 2 sums"):
        watch_layers(graph_of(PLAIN), interface, count)


def test_a_bias_and_sums_inside_a_block_are_no_joints() -> None:
    interface = Interface(inputs={"tokens": "tokens"}, outputs={"logits": "logits"})
    assert [joint.stream for joint in find_joints(graph_of(PLAIN), interface)] == ["x", "s0"]
    interface = TWO_LAYERS.model_copy(update={"inputs": {"tokens": "tokens"}})
    assert [joint.stream for joint in find_joints(graph_of(PARALLEL), interface)] == ["x", "s0"]


# Feeding graphs

SEPARATE = """
  s{i} = Add(x{i}, a{i})
  n{i} = SimplifiedLayerNormalization<axis=-1, epsilon=0.00001>(s{i}, g)
  m{i} = MatMul(n{i}, wm{i})
  x{j} = Add(s{i}, m{i})
  n{j}a = SimplifiedLayerNormalization<axis=-1, epsilon=0.00001>(x{j}, g)
"""

JOINED = """
  n{i}, u{i}, v{i}, s{i} = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.00001>(x{i}, a{i}, g)
  m{i} = MatMul(n{i}, wm{i})
  n{j}a, u{j}a, v{j}a, x{j} = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.00001>(s{i}, m{i}, g)
"""

CENTRED = JOINED.replace("Simplified", "").replace(", g)", ", g, b)")


def two_layers(workshop: Workshop, block: str, *, broken: str = "", simplified: bool = True) -> Artifact:
    """A model of two layers, its sums and norms written as `block`; the weight `broken` has its rows turned round."""
    import onnx
    import onnx_ir

    from pipeline import Interface, Manifest

    draw = np.random.default_rng(0)
    shapes = {"table": (64, 8), "g": (8,), "b": (8,), "head": (8, 64)}
    shapes |= {f"{kind}{i}": (8, 8) for kind in ("wa", "wm") for i in range(2)}
    weights = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if broken:
        weights[broken] = weights[broken][::-1].copy()
    first = "SimplifiedLayerNormalization" if simplified else "LayerNormalization"
    beta = "" if simplified else ", b"
    layers_text = "".join(f"a{i} = MatMul(n{i}a, wa{i})" + block.format(i=i, j=i + 1) for i in range(2))
    text = f"""<ir_version: 10, opset_import: ["": 18, "com.microsoft": 1]>
    two (int64[B,S] tokens) => (float[B,S,64] logits) {{
      x0 = Gather(table, tokens)
      n0a = {first}<axis=-1, epsilon=0.00001>(x0, g{beta})
      {layers_text}
      logits = MatMul(n2a, head)
    }}"""
    model = onnx.parser.parse_model(text)
    given = {name for node in model.graph.node for name in node.input}
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items() if name in given]
    model.graph.initializer.extend(tensors)
    interface = Interface(
        inputs={"tokens": "tokens"}, outputs={"logits": "logits"}, vocab_size=64, max_length=tiny_models.MAX_LENGTH
    )

    def make(output: OutputWriter) -> Artifact:
        files = {"config.json": output.file("config.json", b'{"num_hidden_layers": 2}')}
        like = Artifact(Manifest(format="onnx", components={}, files=files, interface=interface), workshop.store.blobs)
        return save_onnx(onnx_ir.from_proto(model), output, like=like)

    return workshop.publish(make)


def test_a_fused_graph_is_matched_with_the_plain_one_and_fed_alike(workshop: Workshop) -> None:
    found = compare(two_layers(workshop, JOINED), two_layers(workshop, SEPARATE))
    assert found.reasons == {}
    assert found.stages["stage"].matched == (2, 2)
    assert all(error is not None and error < 1e-5 for error in (*errors(found).values(), *added(found).values()))


@pytest.mark.parametrize(("block", "simplified"), [(JOINED, True), (CENTRED, False)])
@pytest.mark.parametrize(("weight", "layer"), [("wa0", "layer 0"), ("wm0", "layer 0"), ("wa1", "layer 1")])
def test_a_fused_norm_is_fed_and_not_only_the_sum(
    block: str, simplified: bool, weight: str, layer: str, workshop: Workshop
) -> None:
    sound, wrong = (two_layers(workshop, block, broken=name, simplified=simplified) for name in ("", weight))
    found = compare(wrong, sound)
    assert (found.stages["stage"].first, found.stages["stage"].most) == (layer, layer)
    assert [name for name, error in added(found).items() if error is None or error > 1e-5] == [layer]
