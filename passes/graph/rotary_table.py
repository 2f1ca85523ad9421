"""Cosines and sines of rotary embeddings as tables by position, computed by the graph that used to compute them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from passes.graph.fusion import NotFusedError
from passes.graph.part_of_graph import DependsOnOthersError, compute

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def rotary_tables(
    cosines: ir.Value, sines: ir.Value, positions: ir.Value | None, *, length: int, opsets: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Tables float [length, rotary width / 2] of values [B, S, rotary width / 2] that follow from `positions` [B, S].

    Raises: NotFusedError where they depend on more than each position by itself, or have another shape.
    """
    import numpy as np

    if positions is None:
        raise NotFusedError("its graph takes no positions")
    order = np.arange(length, dtype=np.int64)
    try:
        rising = compute([cosines, sines], {positions: order[None]}, opsets)
        falling = compute([cosines, sines], {positions: order[None, ::-1].copy()}, opsets)
        short = compute([cosines, sines], {positions: order[None, : min(2, length)].copy()}, opsets)
    except DependsOnOthersError as others:
        raise NotFusedError(f"its rotary embedding depends on {others}, not on positions alone") from None
    for table in rising:
        if table.ndim != 3 or table.shape[:2] != (1, length):
            raise NotFusedError(f"its rotary embedding has cosines of shape {list(table.shape)}")
    for table, backwards, beginning in zip(rising, falling, short, strict=True):
        alone = np.array_equal(table, backwards[:, ::-1]) and np.array_equal(table[:, :2], beginning)
        if not alone:
            raise NotFusedError("its rotary embedding changes with the length of the sequence")
    return rising[0][0], rising[1][0]
