"""Write what the documentation says of keys, passes, profiles and metrics, and the JSON Schemas, from the code.

    python tools/write_docs.py            write them
    python tools/write_docs.py --check    exit with 1 where one is not what would be written

A page is written by hand but for its blocks, `<!-- begin NAME -->` to `<!-- end NAME -->`, which are made here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pipeline.hardware import HardwareProfile, load_profile
from pipeline.hardware.profile import profile_names
from pipeline.models.outlier_channels import FAMILIES
from pipeline.passes_catalogue import Parameter, PassDescription, describe_fields, describe_pass
from pipeline.plugin import PASSES, RESERVED, Pass, PassParams, Registry, Requires
from pipeline.recipe.json_schema import group_json_schema, recipe_json_schema
from pipeline.recipe.library import shipped_groups, shipped_recipes
from pipeline.recipe.parsing import parse, to_yaml
from pipeline.recipe.schema import (
    COMPARISONS,
    Architecture,
    Entry,
    Evaluation,
    GroupEntry,
    GroupFile,
    Model,
    OutlierChannels,
    Quality,
    RecipeFile,
    Workload,
)
from pipeline.recipe.tree import plain
from pipeline.report.gates import METRICS, SELECTORS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RECIPES = ROOT / "recipes"


def main(arguments: Sequence[str]) -> int:
    registry = built_in_passes()
    blocks = {name: make(registry) for name, make in BLOCKS.items()}
    wanted = {page: filled(page, blocks) for page in (DOCS / "recipe.md", DOCS / "passes.md", DOCS / "hardware.md")}
    wanted[RECIPES / "recipe.schema.json"] = as_json(recipe_json_schema(registry))
    wanted[RECIPES / "group.schema.json"] = as_json(group_json_schema(registry))
    stale = [page for page, text in wanted.items() if not page.exists() or page.read_text(encoding="utf-8") != text]
    for page in stale:
        if "--check" in arguments:
            print(f"{page.relative_to(ROOT)} is stale; run `python tools/write_docs.py`")
        else:
            page.write_text(wanted[page], encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return int(bool(stale) and "--check" in arguments)


def built_in_passes() -> Registry:
    """The passes of this repository, without those that other packages have installed here."""
    return Registry([point for point in entry_points(group=PASSES) if point.module.partition(".")[0] == "passes"])


def filled(page: Path, blocks: dict[str, str]) -> str:
    """The page's text with every block made anew."""

    def block(match: re.Match[str]) -> str:
        begin, end = f"<!-- begin {match['name']} -->", f"<!-- end {match['name']} -->"
        text = blocks[match["name"]]
        return f"{begin}\n{text}\n{end}" if "\n" in match["old"] else f"{begin}{text}{end}"

    text = page.read_text(encoding="utf-8")
    return re.sub(r"<!-- begin (?P<name>[a-z-]+) -->(?P<old>.*?)<!-- end (?P=name) -->", block, text, flags=re.DOTALL)


def as_json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


# --- tables ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """`text` as code, whatever backticks it has."""
    return f"`{text}`" if "`" not in text else f"`` {text} ``"


def sentence(text: str) -> str:
    """`text` on one line, safe in a table's cell."""
    return " ".join(text.split()).replace("<", "&lt;").replace("*", "\\*")


def fields(*models: type[BaseModel], see: dict[str, str] | None = None) -> str:
    """The keys of the models. `see` maps a key that is described elsewhere to the heading of that place."""
    return parameters([p for model in models for p in describe_fields(model)], see or {})


def parameters(described: Iterable[Parameter], see: dict[str, str]) -> str:
    rows = []
    for p in described:
        if p.name in see:
            elsewhere = f"see [{see[p.name]}](#{anchor(see[p.name])})"
            what = sentence("; ".join(filter(None, (p.description, elsewhere))))
            rows.append((code(p.name), kind(p), default(p), what))
        else:
            rows.append((code(p.name), kind(p), default(p), sentence(p.description)))
    return table(("key", "type", "default", "what it says"), rows)


def kind(described: Parameter) -> str:
    text = described.type.replace(">=", "≥").replace("<=", "≤")
    words = [word for word in text.split(" | ") if word != "null"]
    return " | ".join(code(w) if w.startswith('"') or w[:1].isdigit() else w for w in words)


def default(described: Parameter) -> str:
    if described.default == "required":
        return "**required**"
    if described.default in {"null", '""', "[]", "{}"}:
        return "–"
    return code(described.default) if len(described.default) <= 40 else "its own defaults"


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- the recipe ------------------------------------------------------------------------------------------------------


def shipped(files: dict[str, Path], *, about_stages: bool) -> str:
    rows = []
    for name, file in sorted(files.items()):
        if not file.resolve().is_relative_to(ROOT):
            continue
        node = parse(file.read_text(encoding="utf-8"), str(file))
        data: dict[str, Any] = plain(node)[0] if node is not None else {}
        link = f"[{name}](../{file.resolve().relative_to(ROOT)})"
        entries = [entry.get("name") or entry.get("pass") or entry.get("group") for entry in data.get("passes", ())]
        rows.append((link, sentence(data.get("description", "")), ", ".join(map(code, entries)) or "those of its base"))
    return table(("name", "what it does", "stages" if about_stages else "passes"), rows)


def metrics(_: Registry) -> str:
    rows = [(code(name), sentence(m.description), "yes" if m.by_point else "") for name, m in METRICS.items()]
    return table(("metric", "what it is", "per workload point"), rows)


# --- the passes ------------------------------------------------------------------------------------------------------


def passes(registry: Registry) -> str:
    described = [describe_pass(registry, name) for name in registry.names()]
    if broken := [f"{d.name}: {d.problem}" for d in described if d.problem is not None]:
        raise SystemExit("a pass cannot be imported, so it cannot be described: " + "; ".join(broken))
    rows = [
        (f"[{d.name}](#{d.name})", ", ".join(d.accepts), d.produces or "", sentence(d.summary.rstrip(".")))
        for d in described
    ]
    sections = [section(d, registry.load(d.name)) for d in described]
    return "\n\n".join([table(("pass", "takes", "yields", "what it does"), rows), *sections])


def section(d: PassDescription, found: type[Pass]) -> str:
    parts = [f"## {d.name}", d.documentation]
    facts = [f"Takes {' or '.join(d.accepts)}, yields {d.produces}."]
    if needs := requirements(found):
        facts.append(f"Needs {needs}.")
    enters = [f"its version, {d.version}"]
    if d.libraries:
        enters.append(f"the versions of {', '.join(d.libraries)}")
    if d.depends_on:
        enters.append(f"{', '.join(map(code, d.depends_on))} of the context")
    for choice, params in choices(found):
        if more := [name for name in found.facets(params) if name not in d.depends_on]:
            enters.append(f"with {choice} {', '.join(map(code, more))}")
    facts.append(f"Into its key enter {'; '.join(enters)}.")
    if not d.deterministic:
        facts.append("Two runs of it differ; the first stored result stands.")
    parts.append(" ".join(facts))
    parts.append(parameters(d.parameters, {}) if d.parameters else "It has no parameters.")
    parts.append(f"```yaml\n{example(d, found)}```")
    return "\n\n".join(parts)


def requirements(found: type[Pass]) -> str:
    """What the host must have, in words; parameters may ask for more."""
    always = needs_in_words(found.requires)
    special = [
        f"with {choice} {words}"
        for choice, params in choices(found)
        if (words := needs_in_words(found.requirements(params))) not in {"", always}
    ]
    return "; ".join(filter(None, [always, *special]))


def needs_in_words(needs: Requires) -> str:
    words = []
    if needs.device != "any":
        words.append({"cpu": "a CPU", "cuda": "a CUDA GPU"}[needs.device])
    if needs.providers:
        words.append(f"ONNX Runtime's {', '.join(needs.providers)}")
    if needs.instruction_sets:
        words.append(f"the instruction sets {', '.join(needs.instruction_sets)}")
    if needs.programs:
        words.append("the program " + " and ".join(p.replace("|", " or ") for p in needs.programs))
    if needs.packages:
        words.append(f"the package {' and '.join(needs.packages)}")
    return " and ".join(words)


def choices(found: type[Pass]) -> Iterable[tuple[str, PassParams]]:
    """The parameters with one of them at each of the values that it lists, the others at their defaults."""
    for name, field in found.Params.model_json_schema().get("properties", {}).items():
        for value in field.get("enum", [True] if field.get("type") == "boolean" else []):
            if value == field.get("default"):
                continue
            try:
                yield code(f"{name}: {value}"), found.Params.model_validate_json(json.dumps({name: value}))
            except ValueError:  # it needs company; such a pass says so in its descriptions
                continue


SHOWN = 3
"""Parameters in an example."""


def example(d: PassDescription, found: type[Pass]) -> str:
    """An entry of a recipe: required parameters and the first few others, with values that the pass accepts."""
    schema = found.Params.model_json_schema()
    entry: dict[str, Any] = {"pass": d.name}
    if found.roles:
        entry["inputs"] = dict.fromkeys(found.roles, "STAGE")
    for name in schema.get("required", ()):
        entry[name] = sample(schema["properties"][name], schema.get("$defs", {}))
    plain_defaults = {
        p.name: json.loads(p.default) for p in d.parameters if p.default not in {"required", "null", "[]", "{}", '""'}
    }
    fuller = {**entry, **dict(list(plain_defaults.items())[:SHOWN])}
    try:
        found.Params.model_validate_json(json.dumps({k: v for k, v in fuller.items() if k not in RESERVED}))
    except ValueError:  # some exclude each other when they are written out
        fuller = entry
    return to_yaml([fuller])


def sample(field: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """A value of a JSON Schema's type."""
    if "$ref" in field:
        return sample(definitions[field["$ref"].rpartition("/")[2]], definitions)
    for key in ("default", "const"):
        if key in field:
            return field[key]
    for key in ("examples", "enum"):
        if key in field:
            return field[key][0]
    if "anyOf" in field:
        return sample(field["anyOf"][0], definitions)
    if field.get("type") == "array":
        return [sample(field.get("items", {}), definitions)]
    numbers = {"integer", "number"}
    return field.get("minimum", 1) if field.get("type") in numbers else {"boolean": True}.get(field["type"], "…")


# --- the hardware ----------------------------------------------------------------------------------------------------


def profiles(_: Registry) -> str:
    found = [load_profile(name) for name in profile_names()]
    head = ("profile", "device", "model", "cores", "memory", "GB/s", "float32", "bfloat16", "float16", "int8")
    rows = [
        (
            f"[{p.name}](#{anchor(p.name)})",
            p.device,
            p.model,
            str(p.physical_cores or "–"),
            memory(p.memory_bytes),
            number(p.bandwidth_gb_per_s),
            *(peak(p, kind) for kind in ("float32", "bfloat16", "float16", "int8")),
        )
        for p in found
    ]
    note = "Arithmetic is in GFLOPS, or 10⁹ integer operations a second: dense, at the device's peak."
    return "\n\n".join([table(head, rows), note, *(map(profile_section, found))])


def profile_section(p: HardwareProfile) -> str:
    rows = []
    data = p.model_dump(mode="json", exclude={"name", "description", "device", "model", "sources"})
    for field, value in data.items():
        entries = value.items() if isinstance(value, dict) else [(None, value)]
        for inner, figure in entries:
            path = field if inner is None else f"{field}.{inner}"
            source = p.sources.get(path) or p.sources.get(field, "")
            if figure in (None, [], "") and not source:
                continue
            shown = "none" if figure is None else ", ".join(figure) if isinstance(figure, list) else number(figure)
            rows.append((code(path), shown, sentence(source)))
    head = f"## {p.name}\n\n{p.model}. {sentence(p.description)}"
    return f"{head}\n\n{table(('field', 'figure', 'source'), rows)}"


def memory(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**30:.4g} GiB"


def peak(p: HardwareProfile, data_type: Any) -> str:
    return "–" if data_type not in p.peak_gflops else number(p.peak_gflops[data_type], absent="none")


def number(value: Any, absent: str = "–") -> str:
    if value is None:
        return absent
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}" if isinstance(value, float) else str(value)


BLOCKS: dict[str, Callable[[Registry], str]] = {
    "recipe": lambda _: fields(
        RecipeFile,
        see={
            "model": "model",
            "passes": "An entry of passes",
            "evaluate": "evaluate",
            "gates": "gates",
            "extends": "extends",
            "matrix": "matrix",
        },
    ),
    "model": lambda _: fields(Model, see={"architecture": "model.architecture"}),
    "architecture": lambda _: fields(Architecture, see={"outlier_channels": "outlier_channels"}),
    "outlier-families": lambda _: ", ".join(map(code, FAMILIES)),
    "outlier-channels": lambda _: fields(OutlierChannels),
    "entry": lambda _: fields(Entry),
    "group-entry": lambda _: fields(GroupEntry),
    "group-file": lambda _: fields(GroupFile),
    "evaluate": lambda _: fields(Evaluation, see={"workload": "evaluate.workload", "quality": "evaluate.quality"}),
    "workload": lambda _: fields(Workload),
    "quality": lambda _: fields(Quality),
    "metrics": metrics,
    "selectors": lambda _: ", ".join(map(code, SELECTORS)),
    "comparisons": lambda _: " ".join(map(code, COMPARISONS)),
    "shipped-recipes": lambda _: shipped(shipped_recipes(), about_stages=True),
    "shipped-groups": lambda _: shipped(shipped_groups(), about_stages=False),
    "passes": passes,
    "profiles": profiles,
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
