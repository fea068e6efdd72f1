"""The input of a slice in planes (see planes.py), each number in bf16 parts, two blocks of channels beside each other.

    parts[pair, part, pixel][c] = part of x[2 pair, pixel, c] | part of x[2 pair + 1, pixel, c]

Sixteen pixels from any one on are a tile for the processor, so every tap of the kernel reads its tiles as they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from cnnc.backends.cpu.bf16_parts import paired_parts
from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS
from cnnc.backends.cpu.planes import Planes
from cnnc.backends.lower import loops

__all__ = ["PlaneParts"]

Read = Callable[[Any, Any, Any, Any], Any]
"""From a block of channels, a row, a column and a lane to the expression of an input number."""


class PlaneParts:
    """The parts of `pairs` pairs of blocks of channels, of which the input has `blocks` blocks."""

    def __init__(self, planes: Planes, pairs: int, parts: int, blocks: int) -> None:
        self.planes = planes
        self.pairs = pairs
        self.parts = parts
        self.blocks = blocks
        # The last tile may go on beyond the last plane.
        lines = parts * pairs * planes.pixels + TILE_ROWS
        self.buffer = loops.buffer("input", (lines, TILE_LINE), "uint32")

    def line(self, pair: Any, part: int, pixel: Any) -> Any:
        """Give the index of the line with a part of a pixel."""
        return (pair * self.parts + part) * self.planes.pixels + pixel

    def fill(self, first_row: Any, first_pair: Any, read: Read) -> Any:
        """Write the parts of what the output rows from `first_row` on are computed from, padding among it."""
        down, across = self.planes.phases

        def one_pair(pair: Any) -> Any:
            return loops.sequence(
                *(self._plane(first_row, first_pair, pair, d, a, read) for d in range(down) for a in range(across))
            )

        return loops.loop(self.pairs, one_pair, "pair")

    def _plane(self, first_row: Any, first_pair: Any, pair: Any, down: int, across: int, read: Read) -> Any:
        """Fill the plane of one phase along either axis."""
        planes, shape = self.planes, self.planes.shape
        start, stride, left = planes.start(down, across), shape.stride[1], shape.pad[1] - across
        begin = min(max(-(-left // stride), 0), planes.width)
        end = min(max((shape.w - 1 + left) // stride + 1, begin), planes.width)

        def one_row(row: Any) -> Any:
            x_row = (first_row + row) * shape.stride[0] + down - shape.pad[0]
            at = start + row * planes.width

            def pixel(column: Any) -> Any:
                def value(half: int, lane: Any) -> Any:
                    return read((first_pair + pair) * 2 + half, x_row, column * stride - left, lane)

                return self._pixel(first_pair, pair, at + column, value)

            def blank(count: int, first: int) -> Any:
                zeros = [tirx.Broadcast(tirx.const(0, "uint32"), TILE_LINE)] * self.parts
                return loops.loop(count, lambda c: self._put(zeros, pair, at + c), "column", first) if count else None

            inside = loops.sequence(
                blank(begin, 0),
                loops.loop(end - begin, pixel, "column", begin) if end > begin else None,
                blank(planes.width - end, end),
            )
            if self._all_rows_are_inside:
                return inside
            return loops.when(tirx.all(x_row >= 0, x_row < shape.h), inside, blank(planes.width, 0))

        return loops.loop(planes.height, one_row, "row")

    @property
    def _all_rows_are_inside(self) -> bool:
        """Whether all rows of the planes of all slices are rows of the input."""
        planes, shape = self.planes, self.planes.shape
        last_slice = (shape.oh - 1) // planes.rows * planes.rows
        lowest = (last_slice + planes.height - 1) * shape.stride[0] + planes.phases[0] - 1
        return shape.pad[0] == 0 and lowest < shape.h

    def _pixel(self, first_pair: Any, pair: Any, at: Any, value: Callable[[int, Any], Any]) -> Any:
        """Write the parts of one pixel; a last pair may have one block."""
        found = loops.buffer("found", (2, TILE_LINE), scope="local")

        def read(half: int) -> Any:
            return loops.vectorized(TILE_LINE, lambda lane: loops.store(found, value(half, lane), half, lane))

        second = read(1)
        if self.blocks % 2:
            nothing = loops.store(found, tirx.Broadcast(tirx.const(0.0, "float32"), TILE_LINE), 1, 0, lanes=TILE_LINE)
            second = loops.when((first_pair + pair) * 2 + 1 < self.blocks, second, nothing)
        low, high = (loops.load(found, half, 0, lanes=TILE_LINE) for half in range(2))
        return loops.sequence(
            loops.alloc(found), read(0), second, self._put(paired_parts(low, high, self.parts), pair, at)
        )

    def _put(self, parts: Sequence[Any], pair: Any, at: Any) -> Any:
        return loops.sequence(
            *(
                loops.store(self.buffer, value, self.line(pair, part, at), 0, lanes=TILE_LINE)
                for part, value in enumerate(parts)
            )
        )
