"""The loop nest of a Winograd convolution in int8 digits (see winograd_int8x3.py for the method)."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from cnnc.backends.cpu import amx
from cnnc.backends.cpu.conv_int8x3_shape import lines_of
from cnnc.backends.cpu.digit_products import digit_products
from cnnc.backends.cpu.digit_rows import split_row
from cnnc.backends.cpu.digit_sizes import DIGITS, IN_A_STEP, TILES
from cnnc.backends.cpu.int8_digits import sums_scaled
from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS, Machine
from cnnc.backends.cpu.winograd_loops import WinogradLoops
from cnnc.backends.cpu.winograd_shape import WinogradParams, WinogradShape
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import Body

__all__ = ["WinogradDigitLoops"]


class WinogradDigitLoops(WinogradLoops):
    """Writes the loop nest of one convolution: as that in float32, but for what lies between the transforms."""

    def __init__(self, shape: WinogradShape, params: WinogradParams, machine: Machine, body: Body) -> None:
        super().__init__(shape, params, machine, body)
        self.unit = self.body.operands[2]
        self.steps = -(-shape.conv.ic_blocks // IN_A_STEP)
        lines = lines_of(params.tiles)
        self.data = loops.buffer("data", (shape.positions, shape.conv.ic_blocks | 1, TILE_LINE))
        """What is transformed of one tile."""
        self.digits = loops.buffer("digits", (shape.positions, self.steps, DIGITS, lines, TILE_LINE), "uint32")
        self.units = loops.buffer("units", (shape.positions, params.tiles))
        self.sums = loops.buffer("sums", (TILES, DIGITS, TILE_ROWS, TILE_LINE), "int32")

    def _kept(self) -> list[Any]:
        return [self.digits, self.units]

    def _slice(self, index: Any) -> Any:
        return loops.sequence(loops.alloc(self.data), loops.alloc(self.sums), amx.configured(super()._slice(index)))

    def _inputs(self, first: Any, tiles: Any) -> Any:
        """Transform the input tiles of a chunk one after the other, and split them position by position."""
        blocks = self.shape.conv.ic_blocks

        def one(number: Any) -> Any:
            return loops.sequence(
                loops.loop(blocks, lambda channel: self._input_tile(channel, first + number, channel), "ic"),
                loops.loop(self.shape.positions, lambda position: self._split(position, number), "position"),
            )

        return loops.loop(tiles, one, "tile")

    def _split(self, position: Any, number: Any) -> Any:
        """Write the digits of all channels of a tile at a position, and their unit."""

        def put(step: Any, digit: int, value: Any) -> Any:
            return loops.store(self.digits, value, position, step, digit, number, 0, lanes=TILE_LINE)

        return split_row(
            self.shape.conv.ic_blocks,
            lambda block: loops.load(self.data, position, block, 0, lanes=TILE_LINE),
            put,
            lambda unit: loops.store(self.units, unit, position, number),
        )

    def _products(self, oc: Any, tiles: Any) -> Any:
        """Multiply, position by position, the tiles of a chunk by the weights of a block of outputs."""
        together = TILES * TILE_ROWS
        groups = -(-tiles // together) if isinstance(tiles, int) else (tiles + (together - 1)) // together

        def one(position: Any) -> Any:
            return loops.loop(groups, lambda group: self._group(oc, position, group, tiles), "group")

        return loops.loop(self.shape.positions, one, "position")

    def _group(self, oc: Any, position: Any, group: Any, tiles: Any) -> Any:
        first = group * (TILES * TILE_ROWS)
        count = tirx.min(loops.const(TILES * TILE_ROWS), tiles - first)
        last = tirx.EQ(position, self.shape.positions - 1)
        later = (
            tirx.Select(last, loops.const(0), position + 1),
            oc + tirx.Select(last, loops.const(1), loops.const(0)),
        )

        def ask(step: Any) -> Any:
            """Ask for the digits of the next position."""

            def line(number: Any) -> Any:
                at = (*later, step, number // TILE_ROWS, number % TILE_ROWS, 0, 0)
                return loops.prefetch(self.weight, *at)

            return loops.when(tirx.EQ(group, 0), loops.loop(DIGITS * TILE_ROWS, line, "line"))

        def scaled(number: Any) -> Any:
            sums = [
                loops.load(self.sums, number // TILE_ROWS, order, number % TILE_ROWS, 0, lanes=TILE_LINE)
                for order in range(DIGITS)
            ]
            of_output = loops.load(self.unit, position, oc, 0, lanes=TILE_LINE)
            unit = tirx.Broadcast(loops.load(self.units, position, first + number), TILE_LINE)
            value = sums_scaled(sums, unit) * of_output
            return loops.store(self.products, value, 0, first + number, position, 0, lanes=TILE_LINE)

        products = digit_products(
            self.steps,
            TILES if self.params.tiles > TILE_ROWS else 1,
            (self.digits, lambda step, digit, tile: (position, step, digit, first + tile * TILE_ROWS, 0)),
            (self.weight, lambda step, digit: (position, oc, step, digit, 0, 0, 0)),
            self.sums,
            ask,
        )
        return loops.sequence(products, loops.loop(count, scaled, "tile"))
