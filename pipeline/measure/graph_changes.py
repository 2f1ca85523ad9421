"""What differs between two graphs, by place: most layers of a model change alike, so one of them shows the pattern."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline.measure.fingerprint import Place, is_default
from pipeline.measure.graph_match import Match, Nodes, match_graphs
from pipeline.measure.graph_weights import dtype_name
from pipeline.measure.visible import visible
from pipeline.report.schema import Region, RegionNode

if TYPE_CHECKING:
    import onnx_ir as ir

MOST_NODES = 40
"""Nodes that a region shows, those before and after counted once."""

MOST_ATTRIBUTES = 4
SHORT = 24
"""Characters of an attribute's value that are shown."""

LAYER = re.compile(r"(?P<stem>[A-Za-z_][A-Za-z_0-9./]*?)[./\[](?P<index>\d+)(?=[./\]]|$)")
"""A numbered part of a name: model.layers.3.mlp is layer 3 of model.layers."""

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata in which torch's exporter writes the modules that a node comes from."""

OUTSIDE = ""
"""The place of what belongs to no layer."""

TELLING = frozenset({"bits", "block_size", "perm", "to"})
"""Attributes that come first."""

IMPLIED = frozenset({"K", "N"})
"""Attributes that the weights' shapes say."""

Change = Literal["gone", "new", "rewired"]

Layer = str | None
"""The name of a layer; OUTSIDE; None: nothing tells."""


@dataclass(frozen=True)
class Changes:
    """The changed nodes of one place, as numbers of the match's graphs."""

    place: str
    gone: tuple[int, ...]
    new: tuple[int, ...]
    rewired: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return len(self.gone) + len(self.new) + len(self.rewired)


@dataclass(frozen=True)
class Alike:
    """Places that changed alike."""

    places: tuple[str, ...]
    shown: Changes
    """Of the first of them."""
    gone: dict[str, int]
    """Nodes of one place that are gone, by operator."""
    new: dict[str, int]
    rewired: int


@dataclass(frozen=True)
class GraphChanges:
    """Everything that differs between two graphs, the places that most are alike first."""

    match: Match
    opsets: Mapping[str, int]
    groups: tuple[Alike, ...]


def changes_of(before: ir.Model, after: ir.Model, known: Mapping[Place, Hashable] | None = None) -> GraphChanges:
    """What differs between two graphs; `known` are the weights that both have, equal for equal bytes."""
    match = match_graphs(before.graph, after.graph, known)
    groups: dict[Any, list[Changes]] = defaultdict(list)
    opsets = after.graph.opset_imports
    for changes in _by_place(match):
        groups[_pattern(match, changes, opsets)].append(changes)
    alike = [
        Alike(
            places=tuple(changes.place for changes in group),
            shown=group[0],
            gone=_operators(match.before, group[0].gone),
            new=_operators(match.after, group[0].new),
            rewired=len(group[0].rewired),
        )
        for group in groups.values()
    ]
    alike.sort(key=lambda a: (a.places[0] == OUTSIDE, -len(a.places), -a.shown.count))
    return GraphChanges(match, opsets, tuple(alike))


def region(changes: GraphChanges, group: Alike) -> Region:
    """The first of the places that changed alike, with one neighbour each way."""
    match = changes.match
    shown = group.shown
    gone, new = _first(shown.gone, shown.new)
    pairs = dict(shown.rewired[: max(0, MOST_NODES - len(gone) - len(new))])
    left_out = shown.count - len(gone) - len(new) - len(pairs)
    neighbours = _neighbours(match, gone, new, pairs)
    kept = dict(list(neighbours.items())[: max(0, MOST_NODES - len(gone) - len(new) - len(pairs))])
    both = {**kept, **pairs}
    before, after = sorted({*gone, *both}), sorted({*new, *both.values()})
    old_ids = {number: number for number in before}
    new_ids = {number: match.backward.get(number, len(match.before) + number) for number in after}
    were: dict[int, Change] = {**dict.fromkeys(gone, "gone"), **dict.fromkeys(pairs, "rewired")}
    are: dict[int, Change] = {**dict.fromkeys(new, "new"), **dict.fromkeys(pairs.values(), "rewired")}
    return Region(
        where=shown.place or "outside the layers",
        alike=len(group.places),
        before=_rows(match.before, old_ids, were, changes.opsets),
        after=_rows(match.after, new_ids, are, changes.opsets),
        left_out=left_out,
    )


def operator_of(node: ir.Node) -> str:
    """Its operator; one of another domain than ONNX's own with that: com.microsoft.MatMulNBits."""
    return visible(f"{node.domain}.{node.op_type}" if node.domain else str(node.op_type))


def _operators(nodes: Nodes, numbers: Iterable[int]) -> dict[str, int]:
    return dict(sorted(Counter(operator_of(nodes.nodes[number]) for number in numbers).items()))


def _by_place(match: Match) -> list[Changes]:
    """The changed nodes by layer; where no layer is known, by what hangs together."""
    gone, new, rewired = match.gone, match.new, match.rewired
    if not (gone or new or rewired):
        return []
    old_layers = _layers(match.before)
    new_layers = _layers(match.after, {now: old_layers[was] for was, now in match.forward.items()})
    places: dict[str, tuple[list[int], list[int], list[tuple[int, int]]]] = defaultdict(lambda: ([], [], []))
    if not any(layers[n] for layers, numbers in ((old_layers, gone), (new_layers, new)) for n in numbers):
        old_layers, new_layers = _connected(match, gone, new)
    for number in gone:
        places[old_layers[number] or OUTSIDE][0].append(number)
    for number in new:
        places[new_layers[number] or OUTSIDE][1].append(number)
    for pair in rewired:
        places[old_layers[pair[0]] or OUTSIDE][2].append(pair)
    stems = {place.partition(" (")[2] for place in places if place.startswith("layer ")}
    found = [
        Changes(place.partition(" (")[0] if len(stems) == 1 else place, tuple(a), tuple(b), tuple(c))
        for place, (a, b, c) in places.items()
    ]
    return sorted(found, key=lambda c: _natural(c.place))


def _natural(name: str) -> list[Any]:
    """Layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _layers(nodes: Nodes, given: Mapping[int, Layer] | None = None) -> list[Layer]:
    """The layer of each node: what is `given`, else by its own names, else that of the last it is computed from."""
    layers: list[Layer] = []
    for number, node in enumerate(nodes.nodes):
        layer = (given or {}).get(number)
        if layer is None:
            layer = _own_layer(node)
        if layer is None:
            sources = [source[0] for source in nodes.sources[number] if source is not None and source[0] >= 0]
            layer = next((layers[s] for s in sorted(sources, reverse=True) if layers[s] is not None), None)
        layers.append(layer)
    return layers


def _own_layer(node: ir.Node) -> Layer:
    """By the modules in its metadata, else by its weights' names, else by its own where that is a path of modules."""
    scopes = node.metadata_props.get(SCOPES)
    names = [scopes] if scopes else [str(v.name) for v in node.inputs if v is not None and v.is_initializer()]
    if not scopes and (node.name or "").startswith("/"):
        names.append(str(node.name))
    for name in names:
        for part in reversed(re.findall(r"[\w.\[\]/]+", name)):
            if found := LAYER.match(part.strip("/")):
                return f"layer {found['index']} ({found['stem'].replace('/', '.')})"
    return OUTSIDE if any("." in name or name.startswith("/") for name in names) else None


def _connected(match: Match, gone: Sequence[int], new: Sequence[int]) -> tuple[list[Layer], list[Layer]]:
    """The changed nodes that hang together, directly or by a matched node between them, as parts 1, 2 …"""
    offset = len(match.before)
    parent: dict[int, int] = {}

    def root(number: int) -> int:
        while parent.setdefault(number, number) != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for numbers, nodes, back, shift in (
        (gone, match.before, None, 0),
        (new, match.after, match.backward, offset),
    ):
        changed = set(numbers)
        for number in numbers:
            around = [source[0] for source in nodes.sources[number] if source is not None and source[0] >= 0]
            around += [user for _, user, _ in nodes.users[number]]
            for other in around:
                name = other + shift if other in changed or back is None else back[other]
                parent[root(number + shift)] = root(name)
    order = {r: place for place, r in enumerate(dict.fromkeys(root(n) for n in [*gone, *(n + offset for n in new)]), 1)}
    old: list[Layer] = [None] * len(match.before)
    after: list[Layer] = [None] * len(match.after)
    for number in gone:
        old[number] = f"part {order[root(number)]} of the graph"
    for number in new:
        after[number] = f"part {order[root(number + offset)]} of the graph"
    return old, after


def _pattern(match: Match, changes: Changes, opsets: Mapping[str, int]) -> Any:
    """What makes two places alike: the changed nodes' operators, attributes and weights' shapes, before and after."""
    return (
        changes.place == OUTSIDE,
        tuple(sorted(_row_text(match.before.nodes[n], opsets) for n in changes.gone)),
        tuple(sorted(_row_text(match.after.nodes[n], opsets) for n in changes.new)),
        tuple(sorted(_row_text(match.before.nodes[n], opsets) for n, _ in changes.rewired)),
    )


def _first(gone: Sequence[int], new: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    """As many of both as are shown; where there are too many, each side gets its share."""
    total = len(gone) + len(new)
    if total <= MOST_NODES:
        return gone, new
    share = round(MOST_NODES * len(gone) / total)
    return gone[:share], new[: MOST_NODES - share]


def _neighbours(match: Match, gone: Sequence[int], new: Sequence[int], pairs: Mapping[int, int]) -> dict[int, int]:
    """Matched nodes next to the changed ones, in the order of computation before."""
    found = {}
    for numbers, nodes, names in ((gone, match.before, None), (new, match.after, match.backward)):
        for number in numbers:
            around = [source[0] for source in nodes.sources[number] if source is not None and source[0] >= 0]
            around += [user for _, user, _ in nodes.users[number]]
            for other in around:
                old = other if names is None else names.get(other)
                if old in match.forward and old not in pairs:
                    found[old] = match.forward[old]
    for old, now in pairs.items():  # what they took from, before and now
        sources = [s[0] for s in match.before.sources[old] if s is not None and s[0] >= 0]
        sources += [match.backward[s[0]] for s in match.after.sources[now] if s is not None and s[0] in match.backward]
        found |= {s: match.forward[s] for s in sources if s in match.forward and s not in pairs}
    return dict(sorted(found.items()))


def _rows(
    nodes: Nodes, ids: Mapping[int, int], changed: Mapping[int, Change], opsets: Mapping[str, int]
) -> tuple[RegionNode, ...]:
    """The shown nodes, each as soon after those that it takes from as can be."""
    rows = []
    for number in _reading_order(nodes, ids):
        sources = [source[0] for source in nodes.sources[number] if source is not None]
        node = nodes.nodes[number]
        rows.append(
            RegionNode(
                id=ids[number],
                operator=operator_of(node),
                detail=_detail(node, opsets, attributes=number in changed),
                change=changed.get(number, "kept"),
                inputs=tuple(dict.fromkeys(ids[s] for s in sources if s in ids)),
            )
        )
    return tuple(rows)


def _reading_order(nodes: Nodes, shown: Iterable[int]) -> list[int]:
    """From the inputs to the outputs, along one branch after the other; weights come right before who reads them."""
    chosen = set(shown)
    taken = {n: [s[0] for s in nodes.sources[n] if s is not None and s[0] in chosen] for n in sorted(chosen)}
    read = {source for sources in taken.values() for source in sources}
    order: dict[int, None] = {}
    waiting = [(number, False) for number in reversed(taken) if number not in read]
    while waiting:
        number, ready = waiting.pop()
        if ready:
            order[number] = None
        elif number not in order:
            waiting.append((number, True))
            waiting.extend((source, False) for source in reversed(taken[number]) if source not in order)
    return list(order)


def _row_text(node: ir.Node, opsets: Mapping[str, int]) -> str:
    return f"{operator_of(node)} {_detail(node, opsets)}"


def _detail(node: ir.Node, opsets: Mapping[str, int], *, attributes: bool = True) -> str:
    """Those of its first attributes that are no defaults, and its weights' data types and shapes."""
    weights = []
    for value in node.inputs:
        tensor = value.const_value if value is not None and value.is_initializer() else None
        if tensor is not None and len(tensor.shape):
            sizes = "×".join(str(size) for size in tensor.shape)
            weights.append(f"{dtype_name(tensor.dtype)}[{sizes}]")
    if not attributes:
        return " ".join(weights)
    told = [
        visible(f"{name}={_value(node, attribute)}")
        for name, attribute in sorted(node.attributes.items(), key=lambda item: (item[0] not in TELLING, item[0]))
        if name not in IMPLIED and not is_default(node, attribute, opsets)
    ]
    return " ".join([*told[:MOST_ATTRIBUTES], *weights])


def _value(node: ir.Node, attribute: ir.Attr) -> str:
    import onnx_ir as ir

    if (node.op_type, attribute.name) == ("Cast", "to"):
        return dtype_name(ir.DataType(attribute.as_int()))
    if attribute.type in (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return attribute.type.name.lower()
    values = attribute.value if isinstance(attribute.value, tuple | list) else [attribute.value]
    text = ",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
    return text if len(text) <= SHORT else text[: SHORT - 1] + "…"
