"""Input rows that a kernel computes itself, kept near the core for the slice that reads them.

    rows[c, r, w] = f(x[n, c, top + r, w], ...)      for the input rows, and channels, that a slice of outputs needs

So what is elementwise before a convolution costs no pass over memory.  Padding is not among the rows: a convolution
reads nothing there, whatever f makes of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cpu.conv_shape import ConvShape, rows_read
from cnnc.backends.cpu.epilogue import SIDE_BY_SIDE, finish
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import BoundBody

__all__ = ["StagedRows"]

Position = Callable[[Any, Any], tuple[Any, Any]]
"""From a row and a column as the loops count them to those of the tensors."""


class StagedRows:
    """The rows that a slice of `rows` output rows from `first` on reads, computed by the prologue of a body."""

    def __init__(self, shape: ConvShape, body: BoundBody, position: Position, first: Any, rows: int) -> None:
        self.shape = shape
        self.body = body
        self.position = position
        self.top = first * shape.stride[0] - shape.pad[0]
        self.count = rows_read(shape, rows)
        self.rows = loops.buffer("rows", (shape.ic_blocks, self.count, shape.w, shape.block))

    def fill(self, image: Any, group: Any) -> Any:
        """Compute the rows, for all channels of a group of the convolution."""
        shape, top = self.shape, self.top
        step = math.gcd(shape.w, SIDE_BY_SIDE)
        begin, end = tirx.max(loops.const(0), -top), tirx.min(loops.const(self.count), shape.h - top)

        def pixels(channel: Any, row: Any, column: Any) -> Any:
            def value(place: tuple[int, ...], lane: Any) -> Any:
                at = self.position(top + row, column + place[0])
                return self.body.operand((image, group * shape.ic_blocks + channel, *at, lane))

            def store(place: tuple[int, ...], lane: Any, value: Any) -> Any:
                return loops.store(self.rows, value, channel, row, column + place[0], lane)

            return finish([(p,) for p in range(step)], shape.block, value, store)

        def one_row(channel: Any, row: Any) -> Any:
            return loops.loop(shape.w // step, lambda i: pixels(channel, row, i * step), "column")

        def one_channel(channel: Any) -> Any:
            return loops.loop(tirx.max(end - begin, 0), lambda row: one_row(channel, row), "row", begin)

        return loops.sequence(loops.alloc(self.rows), loops.loop(shape.ic_blocks, one_channel, "channel"))

    def load(self, channel: Any, row: Any, column: Any, lane: Any) -> Any:
        """Read a number at a block of channels of the group, an input row and a column."""
        return loops.load(self.rows, channel, row - self.top, column, lane)
