"""The untouched model: found, checked, and described as an artifact that references the files where they lie."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.artifact import MAIN_COMPONENT, Artifact, Component, FileEntry, Interface, Manifest, TensorRef
from pipeline.errors import HostError, PipelineError, RecipeError, did_you_mean
from pipeline.models.safetensors import read_header
from pipeline.store import Store

BUILTIN = Path(__file__).parent / "builtin"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")

Kind = Literal["builtin", "path", "huggingface"]


@dataclass(frozen=True)
class Source:
    """A model that was found: its folder and its files by name."""

    kind: Kind
    name: str
    folder: Path
    dtype: str
    files: tuple[str, ...]
    max_length: int | None
    revision: str | None = None

    def __str__(self) -> str:
        at = f" at {self.revision}" if self.revision else ""
        return f"{self.kind}: {self.name}{at}"


def builtin_names() -> list[str]:
    """The models that ship with the package."""
    return sorted(p.parent.name for p in BUILTIN.glob("*/config.json"))


def evaluation_text(name: str = "llama2-tiny") -> Path:
    """The held-out text that ships with the package: no built-in model was trained on it."""
    return BUILTIN / name / "held_out.txt"


def calibration_text(name: str = "llama2-tiny") -> Path:
    """Text to calibrate with; it shares no document with the held-out text."""
    return BUILTIN / name / "calibration.txt"


def find_source(
    kind: Kind, name: str, *, relative_to: Path, revision: str | None = None, dtype: str = "auto", download: bool = True
) -> Source:
    """Find a model's files.

    `relative_to` is the folder that a relative `path` starts from. `download` allows the hub's files to be fetched;
    without it only those already in the hub's cache are found.

    Raises: RecipeError where there is no such model or it is not usable; HostError where it cannot be fetched.
    """
    if kind == "builtin":
        if name not in builtin_names():
            raise RecipeError(
                f"unknown built-in model {name!r}", hint=did_you_mean(name, builtin_names(), noun="built-in models")
            )
        folder = BUILTIN / name
    elif kind == "path":
        folder = (relative_to / Path(name).expanduser()).resolve()
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise RecipeError(f"model path {folder} {what}", hint="give the folder that holds config.json and weights")
    else:
        folder = _hub_snapshot(name, revision, download=download)
        revision = folder.name
    config = _read_config(folder)
    weights = _weight_files(folder)
    for weight in weights:
        try:
            read_header((folder / weight).resolve())
        except PipelineError as error:
            raise RecipeError(error.message) from None
    companions = [name for name in COMPANIONS if (folder / name).is_file()]
    return Source(
        kind=kind,
        name=name,
        folder=folder,
        dtype=_resolve_dtype(dtype, config, folder / weights[0]),
        files=(*companions, *weights),
        max_length=config.get("text_config", config).get("max_position_embeddings"),
        revision=revision if kind == "huggingface" else None,
    )


def source_artifact(source: Source, store: Store) -> Artifact:
    """The model as an artifact of format torch. Nothing is copied.

    Raises: RecipeError where config and weights do not fit together; PipelineError where a weight file is damaged.
    """
    config = _read_config(source.folder)
    entries = {name: store.reference(source.folder / name) for name in source.files}
    tensors: dict[str, TensorRef] = {}
    for name, entry in entries.items():
        if name.endswith(".safetensors"):
            header = read_header(Path(str(entry.path)))
            tensors |= {key: ref.model_copy(update={"file": name}) for key, ref in header.items()}
    text = config.get("text_config", config)
    manifest = Manifest(
        format="torch",
        components={MAIN_COMPONENT: Component(format="torch", files=_pick(entries, weights=True), tensors=tensors)},
        files=_pick(entries, weights=False),
        interface=Interface(
            task="causal-lm", vocab_size=text.get("vocab_size"), max_length=text.get("max_position_embeddings")
        ),
        execution={"dtype": source.dtype},
    )
    return Artifact(manifest, store.blobs)


def _pick(entries: dict[str, FileEntry], *, weights: bool) -> dict[str, FileEntry]:
    return {name: entry for name, entry in entries.items() if name.endswith(".safetensors") == weights}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{folder} holds no config.json", hint="a model folder is what save_pretrained() of transformers writes"
        ) from None
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{path} is not a JSON object")
    architectures = config.get("architectures") or []
    if architectures and not any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        raise RecipeError(
            f"{path}: {', '.join(architectures)} is not a causal language model", hint="only causal LMs are supported"
        )
    return config


def _weight_files(folder: Path) -> list[str]:
    index = folder / INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise RecipeError(f"{index} is damaged") from None
        if strange := [name for name in shards if Path(name).name != name]:
            raise RecipeError(f"{index} names a file outside its folder: {strange[0]}")
        if missing := [name for name in shards if not (folder / name).is_file()]:
            raise RecipeError(f"{folder} lacks {len(missing)} of {len(shards)} weight files: {', '.join(missing)}")
        return shards
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if found:
        return found
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        raise RecipeError(
            f"{folder} holds its weights in {pickles[0]}, a pickle that can run code when it is opened",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)",
        )
    raise RecipeError(f"{folder} holds no weights", hint="expected model.safetensors, or shards and their index")


def _resolve_dtype(asked: str, config: dict[str, Any], weights: Path) -> str:
    if asked != "auto":
        return asked
    stated = config.get("dtype") or config.get("torch_dtype")
    if isinstance(stated, str):
        return stated
    counted = Counter(ref.dtype for ref in read_header(weights.resolve()).values())
    return counted.most_common(1)[0][0] if counted else "float32"


def _hub_snapshot(name: str, revision: str | None, *, download: bool) -> Path:
    """Folder of the hub's snapshot, from its cache where it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [*COMPANIONS, "*.safetensors", INDEX]
    try:
        try:
            found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
            _read_config(found)
            _weight_files(found)
            return found
        except (LocalEntryNotFoundError, RecipeError):  # not there, or a download that was interrupted
            if not download:
                raise
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise HostError(
            f"the model {name!r} is gated", hint="accept its licence on its page, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise RecipeError(f"the model {name!r} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise RecipeError(
            f"there is no model {name!r} on the hub, or it is private", hint="a private one needs `hf auth login`"
        ) from None
    except HFValidationError as error:
        raise RecipeError(f"{name!r} is not a hub id (OWNER/NAME): {error}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        why = "is not in the local cache" if not download else "is not in the local cache and the hub cannot be reached"
        raise HostError(
            f"the model {name!r} {why} ({type(error).__name__})",
            hint="`pipeline run` downloads it"
            if not download
            else "download it where there is a network, and give its folder: model: {path: FOLDER}",
        ) from None
