"""Tiny random models, saved as a user's checkpoint is, and the artifacts that passes make of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import Artifact, Pass, PassContext
from pipeline.models.source import find_source, source_artifact
from pipeline.store.folder import materialize
from pipeline.store.store import Store
from pipeline.store.writer import OutputWriter

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""A small decoder with two query heads for each key-value head, in the names that most configurations share."""


FACETS = {
    "seed": 0,
    "threads": 1,
    "calibration_text": " ".join(f"w{i * i % 277}" for i in range(1500)),
}
"""What the passes of these tests are told that declare it. The text is of the words that `give_words` gives a model."""


class Bench:
    """A store, and passes run against it without the engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.written: dict[str, list[str]] = {}  # artifact -> digests of the files that the pass wrote
        self._count = 0

    def new_folder(self, name: str) -> Path:
        self._count += 1
        folder = self.folder / f"{self._count}-{name}"
        folder.mkdir(parents=True)
        return folder

    def checkpoint(self, config: Any, dtype: str = "float32", **saving: Any) -> Path:
        """Save a random model of that configuration and return its folder. Equal configurations are equal models."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.normal_(centre, 0.15)
        folder = self.new_folder("checkpoint")
        model.to(getattr(torch, dtype)).save_pretrained(folder, **saving)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    def source(self, folder: Path) -> Artifact:
        return source_artifact(find_source("path", str(folder), relative_to=folder), self.store)

    def run(self, cls: type[Pass], artifact: Artifact, *, device: str = "cpu", **params: Any) -> Artifact:
        """Run a pass for a target with that device, and publish what it made."""
        staging = self.new_folder(cls.name)
        values = cls.Params(**params)
        facets = {name: {**FACETS, "profile.device": device}[name] for name in cls.facets(values)}
        made = cls().run(artifact, values, PassContext(output=OutputWriter(staging), facets=facets))
        self.written[made.digest] = [path.name for path in (staging / "blobs").iterdir()]
        return self.store.publish(staging, made.manifest)

    def adopt(self, folder: Path) -> Artifact:
        """The artifact that another bench's `leave` left in a folder, in this one's store."""
        left = json.loads((folder / "left.json").read_text())
        found = Store(folder / "store").artifact(left["digest"])
        assert found is not None
        staging = self.new_folder("adopted")
        (staging / "blobs").mkdir()
        for _, entry in found.manifest.entries():
            if entry.path is None:
                shutil.copyfile(found.locate(entry), staging / "blobs" / entry.digest)
        self.written[found.digest] = left["written"]
        return self.store.publish(staging, found.manifest)

    def leave(self, artifact: Artifact) -> None:
        """Say in this bench's folder which artifact it is there for."""
        left = {"digest": artifact.digest, "written": self.written[artifact.digest]}
        (self.folder / "left.json").write_text(json.dumps(left))

    def session(self, artifact: Artifact) -> Any:
        """A plain ONNX Runtime session of the artifact's ordinary copy."""
        import onnxruntime

        folder = self.new_folder("copy") / "model"
        materialize(artifact, folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def give_words(folder: Path) -> None:
    """Put a tokenizer of the words w0 … w299 beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def exported(bench: Bench, config: Any, dtype: str = "float32") -> Artifact:
    """A random model of that configuration with a tokenizer, as an ONNX graph."""
    from passes.export.export_onnx import ExportOnnx

    folder = bench.checkpoint(config, dtype)
    give_words(folder)
    return bench.run(ExportOnnx, bench.source(folder), verify=False)


MakeOnce = Callable[[str, Callable[[Path], object]], Path]
Once = Callable[[str, Callable[[Bench], Artifact]], Artifact]


@pytest.fixture(scope="session")
def once(bench: Bench, make_once: MakeOnce) -> Once:
    """An artifact that is made once for all test processes, on a bench of its own; each has it in its own store."""

    def made(name: str, make: Callable[[Bench], Artifact]) -> Artifact:
        def leave(folder: Path) -> None:
            own = Bench(folder)
            own.leave(make(own))

        return bench.adopt(make_once(name, leave))

    return made


@pytest.fixture(scope="session")
def reading_llama(once: Once) -> Artifact:
    """A Llama in bfloat16 with a head and a tokenizer of its own, two query heads for each key-value head, as ONNX."""
    from transformers import LlamaConfig

    return once("reading-llama", lambda bench: exported(bench, LlamaConfig(**SIZES), "bfloat16"))


@pytest.fixture(scope="session", params=["llama_mha", "llama_tied", "qwen2"])
def family(once: Once, request: pytest.FixtureRequest) -> Artifact:
    """Families that differ in what lies around their products: many heads, a shared table, biases. As ONNX."""

    def make(bench: Bench) -> Artifact:
        from transformers import LlamaConfig, Qwen2Config

        if request.param == "llama_mha":
            return exported(bench, LlamaConfig(**SIZES | {"num_key_value_heads": 4}))
        if request.param == "llama_tied":
            return exported(bench, LlamaConfig(**SIZES, tie_word_embeddings=True))
        return exported(bench, Qwen2Config(**SIZES, tie_word_embeddings=True), "bfloat16")

    return once(f"family-{request.param}", make)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def llama_folder(make_once: MakeOnce) -> Path:
    """A Llama in bfloat16 whose head is its embedding."""

    def save(folder: Path) -> None:
        from transformers import LlamaConfig

        made = Bench(folder).checkpoint(LlamaConfig(**SIZES, tie_word_embeddings=True), "bfloat16")
        made.rename(folder / "model")

    return make_once("llama", save) / "model"


@pytest.fixture(scope="session")
def llama(bench: Bench, llama_folder: Path) -> Artifact:
    return bench.source(llama_folder)


@pytest.fixture(scope="session")
def exported_llama(once: Once, llama_folder: Path) -> Artifact:
    from passes.export.export_onnx import ExportOnnx

    return once("exported-llama", lambda bench: bench.run(ExportOnnx, bench.source(llama_folder)))


@pytest.fixture(scope="session")
def logits_of(bench: Bench) -> Callable[..., np.ndarray]:
    """Logits [B, S, V] of a causal LM artifact for tokens [B, S], and a mask [B, S] of what is no padding."""

    def logits(artifact: Artifact, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        return Decoder(bench.session(artifact), artifact).step(tokens, mask)

    return logits


class Decoder:
    """A causal LM session and its key-value cache."""

    def __init__(self, session: Any, artifact: Artifact) -> None:
        cache = artifact.interface.cache
        assert cache is not None
        self.session = session
        self.roles = artifact.interface
        self.empty = np.zeros((1, cache.kv_heads, 0, cache.head_dim), np.float32)
        self.past: dict[str, np.ndarray] = {}
        self.mask: np.ndarray | None = None

    def step(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        batch = len(tokens)
        mask = np.ones(tokens.shape, np.int64) if mask is None else mask
        total = mask if self.mask is None else np.concatenate([self.mask, mask], axis=1)
        positions = np.maximum(total.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :]
        inputs = self.roles.inputs
        feeds = {inputs["tokens"]: tokens, inputs["mask"]: total, inputs["positions"]: positions}
        for role, name in inputs.items():
            if role.startswith("past."):
                feeds[name] = self.past.get(role, self.empty.repeat(batch, axis=0))
        roles, names = zip(*self.roles.outputs.items(), strict=True)
        results = dict(zip(roles, self.session.run(list(names), feeds), strict=True))
        self.past = {role.replace("present", "past"): array for role, array in results.items() if role != "logits"}
        self.mask = total
        return results["logits"]


@pytest.fixture(scope="session")
def decoder(bench: Bench) -> Callable[[Artifact], Decoder]:
    return lambda artifact: Decoder(bench.session(artifact), artifact)


@pytest.fixture
def graph_artifact(bench: Bench) -> Callable[..., Artifact]:
    """An ONNX artifact of a graph in ONNX's text form, with these arrays as its initializers."""

    def publish(text: str, **initializers: np.ndarray) -> Artifact:
        import onnx
        import onnx_ir

        from pipeline import Interface, Manifest, save_onnx

        model = onnx.parser.parse_model(text)
        model.graph.initializer.extend(onnx.numpy_helper.from_array(a, name) for name, a in initializers.items())
        staging = bench.new_folder("graph")
        like = Artifact(Manifest(format="onnx", components={}, interface=Interface(task="forward")), bench.store.blobs)
        made = save_onnx(onnx_ir.from_proto(model), OutputWriter(staging), like=like)
        return bench.store.publish(staging, made.manifest)

    return publish
