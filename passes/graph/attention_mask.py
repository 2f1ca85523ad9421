"""What a graph's attention mask lets see, found by computing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.graph.fusion import NotFusedError
from passes.graph.part_of_graph import DependsOnOthersError, ancestors, compute

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


@dataclass(frozen=True)
class CausalMask:
    """Each position sees itself and those before it, of which `window` says how many with it; None: all."""

    window: int | None = None


@dataclass(frozen=True)
class Case:
    """A step to compute the mask for: `real` tokens of each sequence in `past + new` positions, from the left."""

    past: int
    new: int
    real: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.past + self.new


@dataclass(frozen=True)
class MaskInputs:
    """The graph's inputs that a mask may follow from."""

    tokens: ir.Value
    mask: ir.Value
    positions: ir.Value | None
    pasts: tuple[ir.Value, ...]

    def arrays(self, case: Case) -> dict[ir.Value, np.ndarray]:
        """Arrays for the case. Of a cache only the number of its positions matters."""
        import numpy as np

        batch = len(case.real)
        mask = (np.arange(case.total)[None] < np.array(case.real)[:, None]).astype(np.int64)
        given = {self.tokens: np.zeros((batch, case.new), np.int64), self.mask: mask}
        if self.positions is not None:
            given[self.positions] = np.broadcast_to(np.arange(case.past, case.total), (batch, case.new)).copy()
        return given | {past: np.zeros((batch, 1, case.past, 1), np.float32) for past in self.pasts}


def causal_mask(mask: ir.Value, inputs: MaskInputs, *, length: int, opsets: Mapping[str, int]) -> CausalMask:
    """What `mask` [B, 1, S, T] lets see: bool, or a float that is added, 0 where a position is seen.

    Queries that are padding are not looked at: what they see is no one's business.

    Raises: NotFusedError where that is not causal, with or without a window, or depends on other inputs.
    """
    cases = _cases(length)
    far = next(cases)
    seen = _seen(mask, inputs, far, opsets)
    visible = int(seen[0, 0, -1].sum())
    found = CausalMask(None if visible == far.total else visible)
    _check(seen, far, found)
    for case in cases:
        _check(_seen(mask, inputs, case, opsets), case, found)
    if found.window is not None:  # where the first key goes out of sight
        past = max(0, found.window - 3)
        new = min(6, length - past)
        case = Case(past, new, (past + new,))
        _check(_seen(mask, inputs, case, opsets), case, found)
    return found


def _cases(length: int) -> Iterator[Case]:
    """The longest first, which shows a window; then prompts, padded ones, continuations and single tokens."""
    new = min(2, length)
    yield Case(length - new, new, (length,))
    for case in (Case(0, 5, (5, 3)), Case(4, 3, (7, 7)), Case(6, 1, (7,)), Case(4, 3, (7, 5))):
        if case.total <= length:
            yield case


def _seen(mask: ir.Value, inputs: MaskInputs, case: Case, opsets: Mapping[str, int]) -> np.ndarray:
    """bool [B, 1, S, T]."""
    import numpy as np

    _, leaves = ancestors([mask])
    given = {value: array for value, array in inputs.arrays(case).items() if value in leaves}
    try:
        (made,) = compute([mask], given, opsets)
    except DependsOnOthersError as others:
        raise NotFusedError(f"its mask depends on {others}") from None
    except Exception as error:  # ONNX Runtime's exceptions share no base; a part that needs a cache's contents fails
        raise NotFusedError(f"its mask cannot be computed alone: {str(error).partition(chr(10))[0]}") from None
    seen = made if made.dtype == np.bool_ else made == 0
    shape = (len(case.real), 1, case.new, case.total)
    if made.ndim != 4 or made.shape[1] != 1:
        raise NotFusedError(f"its mask has the shape {list(made.shape)}, one for each head")
    return np.broadcast_to(seen, shape)


def _check(seen: np.ndarray, case: Case, expected: CausalMask) -> None:
    """Raises: NotFusedError where a query that is no padding sees something else."""
    import numpy as np

    query = np.arange(case.past, case.total)[None, :, None]  # [1, S, 1]
    key = np.arange(case.total)[None, None, :]  # [1, 1, T]
    real = np.array(case.real)[:, None, None]
    visible = (key <= query) & (key < real)
    if expected.window is not None:
        visible &= key > query - expected.window
    wrong = (seen[:, 0] != visible) & (query < real)
    if wrong.any():
        raise NotFusedError(
            f"its mask is not causal: with {case.past} positions before {case.new} new ones, "
            f"{int(wrong.sum())} of {wrong.size} entries differ"
        )
