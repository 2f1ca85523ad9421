"""Which nodes of two graphs are the same, whatever their names.

What is certain is matched first: nodes that compute the same from the graphs' inputs up, nodes that read the same
weights, nodes from which the outputs are computed alike. From matched nodes it goes on along the edges, to nodes that
are alike by themselves; and what lies between the same matched nodes is matched in order. What is left has no
counterpart.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.measure.fingerprint import GraphHash, Place, hash_of

if TYPE_CHECKING:
    import onnx_ir as ir

BRIDGES = 4
"""How often what lies between matched nodes is matched, and followed from there, at most."""

Source = tuple[int, int]
"""(node, output) that a value comes from; (-1, place) is an input of the graph."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of a graph in the order of computation, by number, and how they hang together."""

    nodes: tuple[ir.Node, ...]
    alone: tuple[bytes, ...]
    """Hash of each by itself: operator, attributes, weights' data types and shapes."""
    computed: tuple[bytes, ...]
    """Hash of each with all that it is computed from."""
    weights: tuple[Hashable, ...]
    """What is known of the weights that each reads; None: it reads none."""
    sources: tuple[tuple[Source | None, ...], ...]
    """Where each input of each node comes from; None: a weight, or nothing."""
    users: tuple[tuple[tuple[int, int, int], ...], ...]
    """Of each node: (its output, user, the user's input)."""
    given: tuple[tuple[tuple[int, int], ...], ...]
    """Of each input of the graph: (user, the user's input)."""
    outputs: tuple[Source | None, ...]
    """Where the graph's outputs come from."""

    def __len__(self) -> int:
        return len(self.nodes)


@dataclass
class Match:
    """Pairs of equal nodes, as numbers in `before` and `after`."""

    before: Nodes
    after: Nodes
    forward: dict[int, int] = field(default_factory=dict)
    backward: dict[int, int] = field(default_factory=dict)

    def add(self, old: int, new: int) -> None:
        self.forward[old] = new
        self.backward[new] = old

    @property
    def gone(self) -> list[int]:
        return [number for number in range(len(self.before)) if number not in self.forward]

    @property
    def new(self) -> list[int]:
        return [number for number in range(len(self.after)) if number not in self.backward]

    @property
    def rewired(self) -> list[tuple[int, int]]:
        """Pairs that take a matched node's result where they took another matched node's."""
        return [pair for pair in sorted(self.forward.items()) if self._is_rewired(*pair)]

    def _is_rewired(self, old: int, new: int) -> bool:
        return any(
            was is not None and now is not None and self._known(was, now) and not self._same(was, now)
            for was, now in zip(self.before.sources[old], self.after.sources[new], strict=False)
        )

    def _known(self, was: Source, now: Source) -> bool:
        return (was[0] < 0 or was[0] in self.forward) and (now[0] < 0 or now[0] in self.backward)

    def _same(self, was: Source, now: Source) -> bool:
        return was[1] == now[1] and (was[0] == now[0] if was[0] < 0 else self.forward[was[0]] == now[0])


def match_graphs(before: ir.Graph, after: ir.Graph, known: Mapping[Place, Hashable] | None = None) -> Match:
    """The nodes of two graphs that are the same; `known` are the weights that both have, equal for equal bytes."""
    match = Match(nodes_of(before, known), nodes_of(after, known))
    certain(match)
    waiting = deque(sorted(match.forward.items()))
    for place in range(min(len(before.inputs), len(after.inputs))):
        _pair_users(match, match.before.given[place], match.after.given[place], waiting)
    for was, now in zip(match.before.outputs, match.after.outputs, strict=False):
        _pair_sources(match, was, now, waiting)
    _follow(match, waiting)
    for _ in range(BRIDGES):
        if not _bridge(match, waiting):
            break
        _follow(match, waiting)
    return match


def nodes_of(graph: ir.Graph, known: Mapping[Place, Hashable] | None = None) -> Nodes:
    """The graph as numbers."""
    hashed = GraphHash(contents=False, known=known, opsets=graph.opset_imports)
    kinds = GraphHash(contents=False, opsets=graph.opset_imports)
    computed = hashed.nodes(graph, {})
    ordered = tuple(computed)
    at: dict[ir.Value, Source] = {
        output: (number, place) for number, node in enumerate(ordered) for place, output in enumerate(node.outputs)
    }
    at |= {value: (-1, place) for place, value in enumerate(graph.inputs)}
    sources = tuple(tuple(None if v is None else at.get(v) for v in node.inputs) for node in ordered)
    users: list[list[tuple[int, int, int]]] = [[] for _ in ordered]
    given: list[list[tuple[int, int]]] = [[] for _ in graph.inputs]
    for number, taken in enumerate(sources):
        for place, source in enumerate(taken):
            if source is None:
                continue
            if source[0] < 0:
                given[source[1]].append((number, place))
            else:
                users[source[0]].append((source[1], number, place))
    return Nodes(
        nodes=ordered,
        alone=tuple(kinds.alone(node) for node in ordered),
        computed=tuple(computed.values()),
        weights=tuple(_weights(node, known or {}) for node in ordered),
        sources=sources,
        users=tuple(map(tuple, users)),
        given=tuple(map(tuple, given)),
        outputs=tuple(at.get(value) for value in graph.outputs),
    )


def certain(match: Match) -> None:
    """Match what is computed alike, what reads weights that one node of each graph reads, and what leads out alike."""
    before, after = match.before, match.after
    _pair_alike(match, before.computed, after.computed, spare=True)
    weighty = [
        [None if w is None else (w, alone) for w, alone in zip(side.weights, side.alone, strict=True)]
        for side in (before, after)
    ]
    _pair_alike(match, *weighty, unique=True)
    _pair_alike(match, _leading(before), _leading(after), unique=True)


def _weights(node: ir.Node, known: Mapping[Place, Hashable]) -> Hashable:
    from pipeline.stored_tensor import StoredTensor

    found = []
    for value in node.inputs:
        tensor = value.const_value if value is not None else None
        if isinstance(tensor, StoredTensor) and tensor.entry is not None:
            place = (tensor.entry.digest, tensor.ref.offset, tensor.ref.length)
            if place in known:
                found.append(known[place])
    return tuple(found) or None


def _leading(side: Nodes) -> list[Hashable]:
    """Hash of each node with all that is computed from it, up to the graph's outputs."""
    outs: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for place, source in enumerate(side.outputs):
        if source is not None and source[0] >= 0:
            outs[source[0]].append((place, source[1]))
    hashes: list[bytes] = [b""] * len(side)
    for number in reversed(range(len(side))):
        users = sorted((output, hashes[user], place) for output, user, place in side.users[number])
        hashes[number] = hash_of("leading", side.alone[number], users, outs.get(number, []))
    return list(hashes)


def _pair_alike(
    match: Match,
    before: Sequence[Hashable],
    after: Sequence[Hashable],
    *,
    unique: bool = False,
    spare: bool = False,
) -> list[tuple[int, int]]:
    """Pair unmatched nodes with equal keys in order, and return the pairs. None is no key.

    Only where as many have the key on both sides (with `spare`, the first of the more), with `unique`, one on each.
    """
    groups: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, (keys, taken) in enumerate(((before, match.forward), (after, match.backward))):
        for number, key in enumerate(keys):
            if key is not None and number not in taken:
                groups[key][side].append(number)
    pairs = []
    for old, new in groups.values():
        if (spare or len(old) == len(new)) and not (unique and len(old) > 1):
            pairs += list(zip(old, new, strict=False))
    for pair in pairs:
        match.add(*pair)
    return pairs


def _follow(match: Match, waiting: deque[tuple[int, int]]) -> None:
    """Go on from matched pairs along the edges."""
    before, after = match.before, match.after
    while waiting:
        old, new = waiting.popleft()
        for was, now in zip(before.sources[old], after.sources[new], strict=False):
            _pair_sources(match, was, now, waiting)
        for place in range(len(before.nodes[old].outputs)):
            _pair_users(
                match,
                [(user, at) for output, user, at in before.users[old] if output == place],
                [(user, at) for output, user, at in after.users[new] if output == place],
                waiting,
            )


def _pair_sources(match: Match, was: Source | None, now: Source | None, waiting: deque[tuple[int, int]]) -> None:
    if was is None or now is None or was[1] != now[1] or min(was[0], now[0]) < 0:
        return
    old, new = was[0], now[0]
    if old in match.forward or new in match.backward or match.before.alone[old] != match.after.alone[new]:
        return
    match.add(old, new)
    waiting.append((old, new))


def _pair_users(
    match: Match,
    old_users: Iterable[tuple[int, int]],
    new_users: Iterable[tuple[int, int]],
    waiting: deque[tuple[int, int]],
) -> None:
    """Match the users of one value that are alike, in order, where there are as many before as after."""
    groups: dict[tuple[bytes, int], tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    sides = ((old_users, match.before, match.forward), (new_users, match.after, match.backward))
    for side, (users, nodes, taken) in enumerate(sides):
        for user, place in users:
            if user not in taken:
                groups[nodes.alone[user], place][side].append(user)
    for old, new in groups.values():
        if len(old) != len(new):
            continue
        for pair in zip(old, new, strict=True):
            if pair[0] not in match.forward and pair[1] not in match.backward:  # one may use a value twice
                match.add(*pair)
                waiting.append(pair)


def _bridge(match: Match, waiting: deque[tuple[int, int]]) -> bool:
    """Match what is alike and lies between the same matched nodes; False where nothing was."""
    old_names = {number: number for number in match.forward}
    keys = [
        [(alone, *ends) for alone, ends in zip(nodes.alone, _ends(nodes, names, len(match.before)), strict=True)]
        for nodes, names in ((match.before, old_names), (match.after, match.backward))
    ]
    pairs = _pair_alike(match, *keys)
    waiting.extend(pairs)
    return bool(pairs)


def _ends(nodes: Nodes, names: Mapping[int, int], last: int) -> list[tuple[int, int]]:
    """Of each node: the last matched node that it is computed from, and the first that is computed from it.

    Both by their `names`, the matched nodes' numbers before; -1 stands for the inputs, `last` for the outputs.
    """
    below, above = [-1] * len(nodes), [last] * len(nodes)
    for number, taken in enumerate(nodes.sources):
        sources = [source[0] for source in taken if source is not None and source[0] >= 0]
        below[number] = max((names.get(s, below[s]) for s in sources), default=-1)
    for number in reversed(range(len(nodes))):
        above[number] = min((names.get(user, above[user]) for _, user, _ in nodes.users[number]), default=last)
    return list(zip(below, above, strict=True))
