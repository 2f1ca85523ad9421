"""A first recipe for a model: complete, commented, and fitting what is known of the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import yaml

from pipeline.errors import HostError, RecipeError, did_you_mean
from pipeline.models import builtin_names, find_source
from pipeline.models.checkpoint import (
    check_config,
    layer_count,
    max_length,
    parameter_count,
    read_config,
    read_weights,
)
from pipeline.models.hub import hub_config
from pipeline.models.onnx_header import read_onnx_header
from pipeline.models.source import Kind
from pipeline.plugin import Registry

SCHEMA_FILE = "recipe.schema.json"
PROMPT, NEW_TOKENS, WINDOW = 128, 64, 512
"""Tokens that a workload and a quality window have where the model takes so many."""

QUANTIZED = frozenset(
    {"MatMulNBits", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul", "GatherBlockQuantized"}
)
"""Operators that tell that a graph's weights are quantized."""

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True)
class ModelFacts:
    """What a recipe's author should know of the model; None where it is not known yet."""

    kind: Kind
    name: str
    """As a recipe says it: a name, an id, or a path from the recipe's folder."""
    format: str = "torch"
    parameters: int | None = None
    layers: int | None = None
    weights_bytes: int | None = None
    dtype: str | None = None
    max_length: int | None = None
    has_tokenizer: bool = True
    downloaded: bool = True
    quantized: bool = False
    """An ONNX graph whose weights are of 8 bits or fewer already."""


def describe_model(given: str, *, relative_to: Path, recipe_folder: Path) -> ModelFacts:
    """Find out what `given` is: a folder, an ONNX file, a built-in model or a hub id.

    What lies on the disk goes before names. Paths start at `relative_to`.

    Raises: RecipeError where it is none of these or cannot be used; HostError where the hub cannot be reached.
    """
    path = relative_to / Path(given).expanduser()
    if path.is_dir():
        if (graph := _only_graph(path)) is not None:
            return _found("onnx", _path_from(graph, recipe_folder), recipe_folder)
        return _found("path", _path_from(path, recipe_folder), recipe_folder)
    if path.is_file() or path.suffix == ".onnx":
        if path.suffix != ".onnx":
            raise RecipeError(f"{path} is neither a model folder nor an .onnx file")
        return _found("onnx", _path_from(path, recipe_folder), recipe_folder)
    if given in builtin_names():
        return _found("builtin", given, recipe_folder)
    if not HUB_ID.match(given) or given.startswith(("./", "../")):
        raise RecipeError(
            f"{given!r} is no folder, no .onnx file, no built-in model and no hub id (OWNER/NAME)",
            hint=did_you_mean(given, builtin_names(), noun="built-in models"),
        )
    try:
        return _found("huggingface", given, recipe_folder)
    except HostError:  # not in the hub's cache: its configuration alone says enough
        config = hub_config(given)
        check_config(f"{given}: config.json", config, trust_remote_code=False)
        text = config.get("text_config", config)
        return ModelFacts(
            kind="huggingface",
            name=given,
            layers=layer_count(text),
            max_length=max_length(config),
            downloaded=False,
        )


def _only_graph(folder: Path) -> Path | None:
    """The ONNX file of a folder that holds one and no weights for PyTorch."""
    if any(folder.glob("*.safetensors")):
        return None
    graphs = [*folder.glob("*.onnx"), *folder.glob("onnx/*.onnx")]
    return graphs[0] if len(graphs) == 1 else None


def _found(kind: Kind, name: str, folder: Path) -> ModelFacts:
    source = find_source(kind, name, relative_to=folder, download=False)
    if source.graph is not None:
        header = read_onnx_header(source.folder / source.graph)
        layers: int | None = sum(value.name.endswith(".key") for value in header.inputs)
        parameters = None if header.operators & QUANTIZED else header.parameters  # packed: no one can tell
        quantized = bool(header.operators & QUANTIZED)
    else:
        quantized = False
        config = read_config(source.folder)
        layers = layer_count(config.get("text_config", config))
        parameters = parameter_count(read_weights(source.folder, list(source.weights)))
    return ModelFacts(
        kind=kind,
        name=name,
        format=source.format,
        parameters=parameters,
        layers=layers,
        weights_bytes=source.weights_bytes,
        dtype=source.dtype,
        max_length=source.max_length,
        has_tokenizer=source.has_tokenizer,
        quantized=quantized,
    )


def _path_from(path: Path, folder: Path) -> str:
    """The path as a recipe in `folder` says it: relative where it lies below, else absolute."""
    whole = path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()
    try:
        return str(whole.relative_to(folder.resolve()))
    except ValueError:
        return str(whole)


def recipe_name(facts: ModelFacts) -> str:
    """A name that a recipe may have, from the model's."""
    path = Path(facts.name)
    base = path.name
    if facts.kind == "onnx":
        base = path.parent.name if path.stem == "model" and path.parent.name not in ("", "onnx") else path.stem
        base = path.parent.parent.name or path.stem if path.stem == "model" and path.parent.name == "onnx" else base
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-._")
    return name.lower() if name else "model"


def starter_recipe(facts: ModelFacts, *, name: str, hardware: str, registry: Registry) -> str:
    """The text of a recipe that `pipeline plan` accepts, each part with what it does and what else is possible."""
    torch = facts.format == "torch"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# {_summary(facts)}",
        "# `pipeline plan` says what a run would do, `pipeline run` does it and reports on every stage.",
        "version: 1",
        *_yaml({"name": name}),
        "",
        "# Where the model comes from. Others: builtin, path, huggingface (with revision), onnx, architecture.",
        "model:",
        *_indented(_yaml({facts.kind: facts.name})),
    ]
    if torch:
        lines.append("  # dtype: bfloat16    # to load and measure the source in; default: the checkpoint's own")
    lines += [
        "",
        "# The machine to optimize for: local is this one; `pipeline hardware` lists profiles of others.",
        *_yaml({"hardware": hardware}),
        "",
        "# Each pass takes the model of the one before, or of the stage that `after` names: that makes a branch.",
        "passes: []" if facts.quantized else "passes:",
    ]
    if facts.quantized:
        lines += ["  # Its weights are quantized already.", *_other_passes(facts.format, registry), ""]
        return "\n".join([*lines, *_evaluation(facts)]).rstrip("\n") + "\n"
    if torch:
        lines.append(
            "  - pass: export_onnx             # PyTorch to an ONNX graph; copies no weights, checks the result"
        )
    lines += [
        "  - pass: quantize_weights        # 8 bits a weight: half of float16, hardly any loss",
        "    name: int8",
        "    bits: 8",
        "    block_size: 32",
        "  - pass: quantize_weights        # 4 bits: smaller and faster in decoding, at some loss",
        "    name: int4",
        f"    after: {'export_onnx' if torch else 'source'}",
        "    bits: 4",
        "    block_size: 32                # 128 is smaller and often faster, 16 closer to the original",
        *_other_passes(facts.format, registry),
        "",
        "# The stage whose model lands in runs/NAME/latest/model; without this, the last one that is not broken.",
        "export: int4",
        "",
        *_evaluation(facts),
        *_gates(facts),
    ]
    return "\n".join(lines) + "\n"


def _summary(facts: ModelFacts) -> str:
    said = []
    if facts.parameters:
        said.append(f"{_count(facts.parameters)} parameters")
    if facts.layers:
        said.append(f"{facts.layers} layers")
    if facts.weights_bytes:
        said.append(f"{_size(facts.weights_bytes)} of {facts.dtype or ''} weights".replace("  ", " "))
    if facts.max_length:
        said.append(f"up to {facts.max_length} positions")
    if not facts.downloaded:
        said.append("not downloaded yet: `pipeline run` does")
    return f"{_one_line(facts.name)}: {', '.join(said) or 'of unknown size'}."


def _evaluation(facts: ModelFacts) -> list[str]:
    limit = facts.max_length or PROMPT + NEW_TOKENS
    prompt = max(1, min(PROMPT, limit // 2))
    new = max(1, min(NEW_TOKENS, limit - prompt))
    window = max(2, min(WINDOW, facts.max_length or WINDOW))
    lines = [
        "evaluate:",
        "  baseline: source              # what every stage is compared with",
        "  budget_s: 60                  # seconds for the speed of all stages together; more narrows the intervals",
        "  # What is timed: each prompt length with each batch size, e.g. prompt_lengths: [128, 1024].",
        f"  workload: {{prompt_lengths: [{prompt}], new_tokens: {new}, batch_sizes: [1]}}",
    ]
    if facts.has_tokenizer:
        lines += [
            "  # What quality is measured on: builtin is English text; better is a text file of what the model is for.",
            f"  quality: {{text: builtin, window: {window}, stride: {window // 2}, tokens: 20000}}",
        ]
    else:
        lines += [
            "  # The model has no tokenizer.json: its quality on text cannot be measured before one lies beside it.",
            f"  # quality: {{text: builtin, window: {window}, stride: {window // 2}, tokens: 20000}}",
        ]
    return [*lines, ""]


def _gates(facts: ModelFacts) -> list[str]:
    quality = ["int8.perplexity_ratio <= 1.02", "int4.perplexity_ratio <= 1.15"] if facts.has_tokenizer else []
    other = ["int4.decode_speedup >= 1.2", "int4.top1_agreement >= 0.9", "int4.size_bytes <= 4e9"]
    return [
        "# Conditions on the report, STAGE.METRIC OP NUMBER: where one fails, the exit code is 1.",
        "gates:" if quality else "gates: []",
        *(f"  - {gate}" for gate in quality),
        *(f"  # - {gate}" for gate in other),
    ]


def _other_passes(format: str, registry: Registry) -> list[str]:
    """The installed passes that could stand in the list, as comments."""
    lines = []
    for name in registry.names():
        if name in ("export_onnx", "quantize_weights"):
            continue
        try:
            found = registry.load(name)
        except RecipeError:  # one that cannot be imported; `pipeline passes` says why
            continue
        takes = set(getattr(found, "accepts", ()))
        if takes and not takes & {format, "onnx"}:
            continue
        summary = shorten(_one_line(found.summary()), 118 - 37, placeholder=" …")
        lines.append(f"  # - pass: {name:<24} # {summary}")
    return (
        ["  # Others that are installed; `pipeline passes show NAME` lists their parameters:", *lines] if lines else []
    )


def _yaml(value: dict[str, Any]) -> list[str]:
    """Lines of YAML; strings that would mean something else are quoted."""
    return yaml.safe_dump(value, allow_unicode=True, width=10**9, sort_keys=False).rstrip("\n").split("\n")


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _one_line(text: str) -> str:
    """A text that cannot leave the comment that it stands in."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _count(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"


def _size(number: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number} bytes"
