"""The difference of two stages in words: as text for a terminal, and as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.diff import Diff, Group
from pipeline.report.effects import component_facts
from pipeline.report.figures import megabytes
from pipeline.report.graph_drawing import STYLE, as_text, draw

REPORT_STYLE = Path(__file__).parent / "report" / "templates" / "report.css"
"""The report's own: its colours, light and dark."""

OUTSIDE = "outside the layers"


class Fact(NamedTuple):
    """One thing that differs: what, and how."""

    what: str
    how: str


def diff_as_text(diff: Diff) -> str:
    """For a terminal."""
    lines = [f"{diff.stages[0]} -> {diff.stages[1]} of {diff.run}", headline(diff), ""]
    told = facts(diff)
    width = max((len(fact.what) for fact in told), default=0)
    lines += [f"  {fact.what:<{width}}  {fact.how}" for fact in told]
    for group in diff.groups:
        lines += ["", f"{places_in_words(group)}: {group_in_words(group)}"]
        if group.region is not None:
            lines += as_text(group.region).split("\n")[1:]
    return "\n".join(lines).rstrip()


def diff_as_html(diff: Diff) -> str:
    """A page of its own. Every text of a model is escaped."""
    rows = "".join(f"<tr><th>{escape(f.what)}</th><td>{escape(f.how)}</td></tr>" for f in facts(diff))
    parts = []
    for group in diff.groups:
        title = f"<h3>{escape(places_in_words(group))}</h3><p class='small'>{escape(group_in_words(group))}</p>"
        parts.append(f"<div class='panel'>{title}{draw(group.region) if group.region else ''}</div>")
    first, second = map(escape, diff.stages)
    table = f"<div class='panel'><table>{rows}</table></div>" if rows else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{first} → {second}</title><style>{REPORT_STYLE.read_text(encoding='utf-8')}\n{STYLE}\n"
        ".facts th { text-align: left; white-space: nowrap; vertical-align: top; padding: 3px 18px 3px 0; }\n"
        ".facts td { padding: 3px 0; }</style></head>"
        f"<body><div class='top'><h1>{first} → {second}</h1><p class='lead'>{escape(headline(diff))}</p>"
        f"<p class='where'>run {escape(diff.run)}</p></div><main class='facts'>{table}{''.join(parts)}</main>"
        "</body></html>\n"
    )


def headline(diff: Diff) -> str:
    """What kind of difference it is, in a sentence."""
    effect = diff.effect
    if diff.equal:
        return "They do not differ, but perhaps in names and in where their bytes lie."
    if diff.other_weights_stored:
        return "The same graph with the same weights; one keeps weights that no node reads, or some twice."
    if effect.kind == "conversion":
        return f"Another format: {diff.formats[0]} became {diff.formats[1]}."
    if _has_other_components(diff):
        return _other_components(diff)
    if effect.kind == "weights" and effect.weights_quantized:
        done, of = effect.weights_quantized
        return f"Other weights: {done:,} of {of:,} quantized."
    words = {
        "weights": "Other weights.",
        "graph": "Another graph." if effect.nodes and effect.nodes[1] is not None else "Another configuration.",
        "execution": "The same model, to be loaded in another way.",
        "none": "The same graph and weights; what is around them differs.",
    }
    return words[effect.kind]


def _has_other_components(diff: Diff) -> bool:
    return any(part.is_new or part.is_gone for part in diff.effect.components)


def _other_components(diff: Diff) -> str:
    """Which components came or went, and which of them are what the other stage is."""
    first, second = diff.stages
    parts = diff.effect.components
    came, went = [part.name for part in parts if part.is_new], [part.name for part in parts if part.is_gone]
    owner, other, names = (second, first, came) if came else (first, second, went)
    same = [part.name for part in parts if part.kind == "none" and part.name in names]
    told = [f"{owner} has the components {_and(names)}"]
    if came and went:
        told.append(f"{other} has {_and(went)}")
    if same:
        told.append(f"{_and(same)} {'is' if len(same) == 1 else 'are'} what {other} is")
    return f"Other components: {'; '.join(told)}."


def _and(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def facts(diff: Diff) -> list[Fact]:
    """What differs, without the nodes by place."""
    return list(_facts(diff))


def places_in_words(group: Group) -> str:
    """Which layers, runs of them joined: layers 0-21, 22 alike."""
    named = [place for place in group.places if place]
    text = _ranges(named) if named else OUTSIDE
    if len(group.places) > 1:
        text += f" ({len(group.places)} alike)"
    return text if group.component == "model" else f"{group.component}: {text}"


def group_in_words(group: Group) -> str:
    """Nodes gone and new, of one place."""
    words = []
    for sign, counts in (("-", group.gone), ("+", group.new)):
        words += [f"{sign}{count} {operator}" for operator, count in counts.items()]
    if group.rewired:
        words.append(f"{group.rewired} take other values")
    return ", ".join(words)


def _facts(diff: Diff) -> Iterator[Fact]:
    effect = diff.effect
    if diff.formats[0] != diff.formats[1]:
        yield Fact("format", _pair(diff.formats))
    if diff.size.size_bytes[0] != diff.size.size_bytes[1]:
        yield Fact("size", _sizes(diff.size.size_bytes))
    if diff.size.weights_bytes[0] != diff.size.weights_bytes[1]:
        yield Fact("weights", _sizes(diff.size.weights_bytes))
    if diff.weights and diff.weights[0]:
        yield Fact("new bytes", f"of {diff.weights[0]:,} of {diff.weights[1]:,} tensors")
    if effect.weights_quantized:
        yield Fact("quantized", "{:,} of {:,} weights".format(*effect.weights_quantized))
    if effect.weights_changed and effect.weights_changed[0]:
        yield Fact("tensors", "{:,} of {:,} with other bytes".format(*effect.weights_changed))
    if effect.parameters and effect.parameters[0] != effect.parameters[1]:
        yield Fact("parameters", "{:,} -> {:,}".format(*effect.parameters))
    yield from _counts("data type", effect.data_types)
    if effect.nodes and effect.nodes[0] != effect.nodes[1]:
        yield Fact("nodes", _pair(effect.nodes))
    one_only = any(part.is_gone for part in effect.components) and not any(part.is_new for part in effect.components)
    for part in effect.components:  # those of the first stage, where the second has a single one
        owner, other = diff.stages if one_only else diff.stages[::-1]
        yield Fact(f"component {part.name} of {owner}", component_facts(part, other))
    if effect.kind == "conversion":  # one of the two has no graph: what the other consists of
        there = sorted(
            ((max(pair), name) for name, pair in effect.operators.items()), key=lambda one: (-one[0], one[1])
        )
        if there:
            yield Fact("operators", ", ".join(f"{count:,} {name}" for count, name in there))
    elif _has_other_components(diff):  # most of them double
        if effect.operators:
            told = (f"{old:,} -> {new:,} {name}" for name, (old, new) in effect.operators.items())
            yield Fact("operators", ", ".join(told))
    else:
        yield from _counts("", effect.operators)
    yield from _counts("module", effect.modules)
    for slow in effect.slow_nodes:
        yield Fact(f"slow in {diff.stages[1]}", f"{slow.count:,} {slow.operator}: {slow.reason}")
    if diff.transforms is not None:
        yield Fact("transforms", f"{_json(diff.transforms[0])} -> {_json(diff.transforms[1])}")
    for what in ("interface", "execution", "configuration"):
        found: Mapping[str, tuple[Any, Any]] = getattr(diff, what)
        for path, count in Counter(_unnumbered(path) for path in found).items():
            first = min((p for p in found if _unnumbered(p) == path), key=lambda p: (len(p), p))  # 2 before 10
            old, new = found[first]
            alike = f" and {count - 1} alike" if count > 1 else ""
            yield Fact(f"{what}.{first}{alike}", f"{_json(old)} -> {_json(new)}")


def _counts(kind: str, counts: Mapping[str, tuple[int, int]]) -> Iterator[Fact]:
    for name, pair in counts.items():
        yield Fact(f"{kind} {name}".strip(), "{:,} -> {:,}".format(*pair))


def _unnumbered(path: str) -> str:
    """The roles past.k[0], past.k[1] … are told together."""
    return re.sub(r"\[\d+\]", "[]", path)


def _pair(pair: Sequence[Any]) -> str:
    return " -> ".join("-" if one is None else str(one) for one in pair)


def _sizes(pair: tuple[int, int]) -> str:
    return f"{megabytes(pair[0])} -> {megabytes(pair[1])}"


def _json(value: Any) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)


def _ranges(places: Sequence[str]) -> str:
    """Places that count up joined: layers 0-3, 5."""
    numbered = [re.fullmatch(r"layer (\d+)( \(.*\))?", place) for place in places]
    if not all(numbered) or len({match[2] for match in numbered if match}) > 1:
        return ", ".join(places)
    runs: list[list[int]] = []
    for match in numbered:
        number = int(match[1]) if match else 0
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    stem = (numbered[0][2] if numbered[0] else "") or ""
    return f"layer{'s' if len(places) > 1 else ''} {text}{stem}"
