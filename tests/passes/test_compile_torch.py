"""compile_torch: what it writes into the artifact, what it refuses, and that what is compiled computes the same."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from passes.compile import compile_torch
from passes.compile.compile_torch import CompileTorch, static_length
from pipeline import Artifact, HostError, PipelineError
from pipeline.hardware.host import find_gpus
from pipeline.measure.effect import compare_artifacts

needs_gpu = pytest.mark.skipif(not find_gpus(), reason="needs a CUDA GPU")
needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")


class TestTheArtifact:
    def test_differs_in_how_it_is_executed_and_in_nothing_else(self, bench, llama):
        made = bench.run(CompileTorch, llama, verify=False, cache="static")
        assert made.manifest.execution == {
            **llama.manifest.execution,
            "compile": {"mode": "default", "dynamic": None, "fullgraph": False},
            "cache": "static",
            "max_length": 64,
        }
        assert made.manifest.components == llama.manifest.components
        assert bench.written[made.digest] == []
        assert compare_artifacts(llama, made).kind == "execution"

    def test_says_how_long_a_sequence_its_cache_takes(self, bench, llama):
        made = bench.run(CompileTorch, llama, verify=False, cache="static", max_length=40)
        assert made.interface.max_length == 40

    def test_with_a_growing_cache_takes_what_the_model_takes(self, bench, llama):
        made = bench.run(CompileTorch, llama, verify=False)
        assert made.interface == llama.interface
        assert made.manifest.execution["cache"] == "dynamic"
        assert "max_length" not in made.manifest.execution

    def test_is_as_long_as_the_model_again_when_another_cache_replaces_a_short_one(self, bench, llama):
        short = bench.run(CompileTorch, llama, verify=False, cache="static", max_length=16)
        growing = bench.run(CompileTorch, short, verify=False)
        assert growing.interface == llama.interface
        longer = bench.run(CompileTorch, short, verify=False, cache="static", max_length=32)
        assert longer.interface.max_length == 32

    def test_keeps_what_else_was_said_of_its_execution(self, bench, llama):
        execution = {**llama.manifest.execution, "trust_remote_code": False}
        before = Artifact(llama.manifest.model_copy(update={"execution": execution}), llama.blobs)
        made = bench.run(CompileTorch, before, verify=False, dtype="float32", mode="max-autotune-no-cudagraphs")
        assert made.manifest.execution["trust_remote_code"] is False
        assert made.manifest.execution["dtype"] == "float32"
        assert made.manifest.execution["compile"]["mode"] == "max-autotune-no-cudagraphs"


class TestParameters:
    @pytest.mark.parametrize(
        ("params", "message"),
        [
            ({"cache": "dynamic", "max_length": 64}, "max_length is the size of a static cache"),
            ({"cache": "dynamic", "dynamic": False}, "would compile every token anew; use `cache: static`"),
            ({"cache": "dynamic", "mode": "reduce-overhead"}, "records CUDA graphs, whose shapes are fixed"),
            ({"cache": "dynamic", "mode": "max-autotune"}, "it needs `cache: static`"),
            ({"mode": "fast"}, "'default', 'reduce-overhead', 'max-autotune'"),
            ({"max_length": 1}, "greater than or equal to 2"),
        ],
    )
    def test_that_exclude_each_other_are_refused_before_anything_runs(self, params, message):
        with pytest.raises(ValidationError, match=message):
            CompileTorch.Params(**params)

    def test_ask_for_a_compiler(self):
        assert CompileTorch.requirements(CompileTorch.Params()).programs == ("g++|clang++",)

    def test_more_positions_than_the_model_has_are_refused(self, bench, llama):
        with pytest.raises(PipelineError, match="max_length is 100 and the model has 64 positions"):
            bench.run(CompileTorch, llama, verify=False, cache="static", max_length=100)

    @pytest.mark.parametrize(
        ("wanted", "longest", "length"),
        [(None, 64, 64), (None, 131072, 1024), (None, None, 1024), (4096, 131072, 4096)],
    )
    def test_a_static_cache_has_the_models_length_unless_that_is_very_long(self, wanted, longest, length):
        assert static_length(wanted, longest) == length

    def test_cuda_graphs_on_a_cpu_are_said_to_do_nothing(self, bench, llama, caplog):
        said = "on a CPU, mode reduce-overhead does what it would do without CUDA graphs"
        bench.run(CompileTorch, llama, device="cuda", verify=False, cache="static", mode="reduce-overhead")
        assert said not in caplog.text
        bench.run(CompileTorch, llama, device="cpu", verify=False, cache="static", mode="reduce-overhead")
        assert said in caplog.text

    def test_the_device_that_it_is_compiled_on_is_the_profiles_and_enters_the_key(self):
        assert CompileTorch.depends_on == ("profile.device",)


@pytest.fixture(scope="module")
def shallow(bench: Any, llama: Artifact, put_toolchain: Callable[[Path], None]) -> Artifact:
    """The model with one layer, which compiles in half the time of two; its kernels go where the artifact lies."""
    from transformers import LlamaConfig

    if not (bench.store.root / "compiled").exists():
        put_toolchain(bench.store.root)
    config = LlamaConfig(**{**llama.read_json("config.json"), "num_hidden_layers": 1})
    return bench.source(bench.checkpoint(config, "bfloat16"))


@needs_compiler
@pytest.mark.slow
class TestVerification:
    @pytest.fixture(autouse=True)
    def fresh(self, bench: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        import torch

        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(bench.folder))  # the runner sets it: put back afterwards
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("params", [{}, {"cache": "static", "dtype": "float32", "fullgraph": True}])
    def test_compiles_and_compares_and_leaves_the_kernels_for_the_measurement(
        self, bench, shallow, caplog, params: dict[str, Any]
    ):
        caplog.set_level(logging.INFO)
        bench.run(CompileTorch, shallow, **params)
        assert "2 graphs compiled, 0 graph breaks" in caplog.text
        for phase in ("prefill", "decode", "score"):
            assert f"{phase}: largest error" in caplog.text
        kernels = [path for path in bench.store.root.glob("compiled/*/*/*.so") if "toolchain" not in path.parts]
        assert kernels

    def test_refuses_a_model_that_computes_something_else(self, bench, shallow, monkeypatch):
        monkeypatch.setitem(compile_torch.TOLERANCES, "bfloat16", 1e-9)
        with pytest.raises(PipelineError, match=r"differs from the uncompiled one in its prefill logits by 0\.\d+"):
            bench.run(CompileTorch, shallow)

    def test_tells_where_torch_left_the_graph_and_fullgraph_refuses_it(self, bench, shallow, monkeypatch, caplog):
        import torch
        from transformers.models.llama.modeling_llama import LlamaMLP

        forward = LlamaMLP.forward

        def broken(self: Any, x: Any) -> Any:
            torch._dynamo.graph_break()
            return forward(self, x)

        monkeypatch.setattr(LlamaMLP, "forward", broken)
        caplog.set_level(logging.INFO)
        bench.run(CompileTorch, shallow)
        assert "graph break, " in caplog.text
        torch._dynamo.reset()  # stages have processes of their own
        with pytest.raises(PipelineError, match="torch cannot compile the model for tokens") as caught:
            bench.run(CompileTorch, shallow, fullgraph=True)
        assert "fullgraph: false" in str(caught.value)

    @pytest.mark.skipif(bool(find_gpus()), reason="this host has a CUDA GPU")
    def test_a_gpu_is_what_it_compiles_for_where_the_profile_says_so(self, bench, llama):
        with pytest.raises(HostError, match="the stage asks for device cuda"):
            bench.run(CompileTorch, llama, device="cuda")

    @needs_gpu
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_compiles_for_a_gpu_and_compares_there(self, bench, llama, caplog, cache: str):
        caplog.set_level(logging.INFO)
        bench.run(CompileTorch, llama, device="cuda", cache=cache)
        assert "2 graphs compiled, 0 graph breaks" in caplog.text
        assert len(list(bench.store.root.glob("compiled/*/triton/**/*.cubin"))) > 0

    @needs_gpu
    def test_cuda_graphs_are_recorded_of_a_static_cache(self, bench, llama, caplog):
        caplog.set_level(logging.INFO)
        bench.run(CompileTorch, llama, device="cuda", cache="static", mode="reduce-overhead")
        assert "2 graphs compiled, 0 graph breaks" in caplog.text
        assert "no CUDA graph" not in caplog.text
