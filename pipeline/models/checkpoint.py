"""A model folder as transformers saves it: its configuration, its weights, and whether the two go together."""

from __future__ import annotations

import json
import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from pipeline.artifact import TensorRef
from pipeline.errors import PipelineError, RecipeError, nearest
from pipeline.models.safetensors import read_header
from pipeline.models.transformers_index import causal_language_models, configurations, is_known

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
MODEL = "model.safetensors"
INDEX = f"{MODEL}.index.json"
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.safetensors$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CODE = "*.py"

LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Names that configurations have for the same thing, the usual one first."""

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in)\.weight$")
EXTRA_LAYERS = "num_nextn_predict_layers"
"""Layers after the last that predict further tokens: in the weights, not in the model that transformers builds."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises: RecipeError where it is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path} nests its values too deeply to be read") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path} is not a JSON object")
    return data


def read_config(folder: Path, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """config.json of a causal language model.

    Raises: RecipeError where there is none, it is another kind of model, or one that needs code of its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        graphs = sorted(p.name for p in folder.glob("*.onnx"))
        raise RecipeError(
            f"{folder} holds no config.json",
            hint=f"it holds {graphs[0]}: give that file, model: {{onnx: FILE}}"
            if graphs
            else "a model folder is what save_pretrained() of transformers writes",
        )
    config = read_json(path)
    check_config(str(path), config, trust_remote_code=trust_remote_code)
    return config


def check_config(path: str, config: dict[str, Any], *, trust_remote_code: bool) -> None:
    """Raises: RecipeError where the configuration, which messages call `path`, is of no model that can be used."""
    _check_code(path, config, trust_remote_code=trust_remote_code)
    _check_kind(path, config)


def _check_code(path: str, config: dict[str, Any], *, trust_remote_code: bool) -> None:
    kind = config.get("model_type")
    if trust_remote_code or is_known(str(kind)) or not configurations():
        return
    if "auto_map" in config:
        raise RecipeError(
            f"{path}: transformers has no architecture {kind!r}; the model brings Python code of its own",
            hint="read its .py files; `trust_remote_code: true` under `model:` runs them",
        )
    if kind is not None:
        near = nearest(str(kind), causal_language_models())
        raise RecipeError(
            f"{path}: the installed transformers has no architecture {kind!r}",
            hint=f"did you mean {near!r}?" if near else "a newer transformers may have it",
        )


def _check_kind(path: str, config: dict[str, Any]) -> None:
    hint = "only causal language models (decoders) are supported"
    architectures = config.get("architectures") or []
    if architectures and not any(str(a).endswith(("ForCausalLM", "LMHeadModel")) for a in architectures):
        raise RecipeError(f"{path}: {', '.join(map(str, architectures))} is not a causal language model", hint=hint)
    kind = config.get("model_type")
    if not architectures and kind in configurations() and kind not in causal_language_models():
        raise RecipeError(f"{path}: the architecture {kind!r} is not a causal language model", hint=hint)
    if config.get("is_encoder_decoder"):
        raise RecipeError(f"{path}: an encoder-decoder is not a causal language model", hint=hint)


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files in the folder, from its index where there is one.

    Raises: RecipeError where one is missing, or the weights are pickled.
    """
    index = folder / INDEX
    if index.is_file():
        shards = sorted(set(_weight_map(index).values()))
        if strange := [name for name in shards if Path(str(name)).name != name]:
            raise RecipeError(f"{index} names a file outside its folder: {strange[0]}")
        _check_complete(folder, shards, len(shards))
        return shards
    found = sorted(p.name for p in folder.glob("*.safetensors"))
    if MODEL in found:
        return [MODEL]
    if found:
        if shard := SHARD.search(found[0]):
            of = int(shard[1])
            names = [re.sub(r"-\d+-of-", f"-{i:05}-of-", found[0]) for i in range(1, of + 1)]
            _check_complete(folder, names, of)
        return found
    if pickles := sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES):
        raise RecipeError(
            f"{folder} holds its weights in {pickles[0]}, a pickle that can run code when it is opened",
            hint="convert it where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)",
        )
    if graphs := sorted(str(p.relative_to(folder)) for p in [*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")]):
        raise RecipeError(
            f"{folder} holds no weights for PyTorch", hint=f"it holds {graphs[0]}: model: {{onnx: {graphs[0]}}}"
        )
    raise RecipeError(f"{folder} holds no weights", hint="expected model.safetensors, or shards and their index")


def _weight_map(index: Path) -> dict[str, str]:
    """Name of each tensor -> the shard that holds it, as the index says.

    Raises: RecipeError where it does not.
    """
    try:
        told = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(shard) for tensor, shard in told.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise RecipeError(f"{index} is damaged") from None


def check_index(folder: Path, tensors: dict[str, TensorRef]) -> None:
    """Compare the index, where there is one, with the tensors that the shards hold.

    Raises: RecipeError where no shard holds a tensor that the index lists.
    """
    index = folder / INDEX
    if not index.is_file():
        return
    told = _weight_map(index)
    lacking = [name for name in told if name not in tensors]
    if lacking:
        raise RecipeError(
            f"{folder}: {INDEX} lists {len(told)} tensors, of which {len(lacking)} are missing: "
            f"{told[lacking[0]]} holds no {lacking[0]!r}",
            hint="the shards are of different models, or one was not written to its end: copy them again",
        )


def _check_complete(folder: Path, shards: list[str], of: int) -> None:
    if missing := [name for name in shards if not (folder / name).is_file()]:
        raise RecipeError(
            f"{folder} lacks {len(missing)} of {of} weight files: {', '.join(missing[:4])}",
            hint="copy or download the missing files into the folder",
        )


def read_weights(folder: Path, files: list[str]) -> dict[str, TensorRef]:
    """Name -> place of every tensor in the weight files.

    Raises: RecipeError where a file is damaged.
    """
    tensors: dict[str, TensorRef] = {}
    for name in files:
        try:
            header = read_header((folder / name).resolve())
        except PipelineError as error:
            raise RecipeError(error.message) from None
        tensors |= {key: ref.model_copy(update={"file": name}) for key, ref in header.items()}
    return tensors


def check_weights(folder: Path, config: dict[str, Any], tensors: dict[str, TensorRef]) -> None:
    """Compare what the configuration and the weights say of the model's size, without building the model.

    Raises: RecipeError where they are of different models.
    """
    text = config.get("text_config", config)
    layers = layer_count(text)
    held = {int(match[1]) for name in tensors if (match := LAYER.search(name))}
    if layers is not None and held:
        missing = sorted(set(range(layers)) - held)
        extra = max(held) + 1 - layers - (text.get(EXTRA_LAYERS) or 0)
        if missing or extra > 0:
            raise RecipeError(
                f"{folder}: config.json describes {layers} layers and the weights hold {len(held)}"
                + (f"; layer {missing[0]} is missing" if missing else ""),
                hint="config.json and the weights are of different models, or a weight file is missing from the index",
            )
    vocabulary = text.get("vocab_size")
    for name, ref in tensors.items():
        if isinstance(vocabulary, int) and EMBEDDING.search(name) and ref.shape and ref.shape[0] != vocabulary:
            raise RecipeError(
                f"{folder}: config.json says vocab_size {vocabulary} and {name} has {ref.shape[0]} rows",
                hint="config.json and the weights are of different models",
            )


def resolve_dtype(asked: str, config: dict[str, Any], tensors: dict[str, TensorRef]) -> str:
    """The data type to load in: what was asked for, else the configuration's, else the weights' own."""
    if asked != "auto":
        return asked
    stated = config.get("dtype") or config.get("torch_dtype")
    if isinstance(stated, str):
        return stated
    counted = Counter(ref.dtype for ref in tensors.values())
    return counted.most_common(1)[0][0] if counted else "float32"


def code_files(folder: Path) -> list[str]:
    """The Python files that a model brings; all of them, for one may import another."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(CODE) if path.is_file())


def check_code_files(folder: Path, config: dict[str, Any]) -> None:
    """Look for the files of the classes that the configuration names, without reading them.

    Raises: RecipeError where one is missing, or lies in another repository.
    """
    for name, classes in (config.get("auto_map") or {}).items():
        for place in classes if isinstance(classes, list) else [classes]:
            if not isinstance(place, str) or not name.startswith(("AutoConfig", "AutoModel")):
                continue
            if "--" in place:
                raise RecipeError(
                    f"{folder}: {name} lies in another repository, {place.partition('--')[0]}",
                    hint="download its .py files into the folder and take the repository out of auto_map",
                )
            file = f"{place.rpartition('.')[0].replace('.', '/')}.py"
            if not (folder / file).is_file():
                raise RecipeError(f"{folder} lacks {file}, which auto_map names for {name}")


def max_length(config: dict[str, Any]) -> int | None:
    """Positions that a model of this configuration takes; None where it does not say."""
    text = config.get("text_config", config)
    return next((text[name] for name in LENGTHS if isinstance(text.get(name), int) and text[name] > 0), None)


def layer_count(text: dict[str, Any]) -> int | None:
    return next((text[name] for name in LAYERS if isinstance(text.get(name), int)), None)


def head_size(text: dict[str, Any]) -> int | None:
    """Size of an attention head; None where the configuration does not say."""
    if isinstance(text.get("head_dim"), int):
        return int(text["head_dim"])
    width, heads = text.get("hidden_size") or text.get("n_embd"), text.get("num_attention_heads") or text.get("n_head")
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def parameter_count(tensors: dict[str, TensorRef]) -> int:
    return sum(prod(ref.shape) for ref in tensors.values())
