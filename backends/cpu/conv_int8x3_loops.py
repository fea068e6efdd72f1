"""The loop nest of a convolution in int8 digits on matrix tiles (see conv_int8x3.py for the method)."""

from __future__ import annotations

import functools
import math
from typing import Any

from tvm import tirx

from cnnc.backends.cpu import amx
from cnnc.backends.cpu.conv_int8x3_shape import DigitParams, lines_of, row_blocks_of, slices_of
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.digit_products import digit_products
from cnnc.backends.cpu.digit_rows import split_row
from cnnc.backends.cpu.digit_sizes import DIGITS, IN_A_STEP, TILES
from cnnc.backends.cpu.epilogue import SIDE_BY_SIDE, finish
from cnnc.backends.cpu.int8_digits import sums_scaled
from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import Body

__all__ = ["DigitLoops"]

AHEAD = 6
"""Pixels that are asked for early."""


class DigitLoops:
    """Writes the loop nest of one convolution, whose output is of a physical shape."""

    def __init__(self, shape: ConvShape, params: DigitParams, body: Body, output: tuple[int, ...]) -> None:
        self.shape = shape
        self.params = params
        self.body = body.bind(output)
        self.x, self.weight = self.body.operands[:2]
        self.y = self.body.output()
        self.previous = loops.previous_slice()
        self.pixels = shape.oh * shape.ow
        self.row_blocks, self.oc_slices = slices_of(shape, params)
        self.blocks = row_blocks_of(shape)
        self.steps = -(-self.blocks // IN_A_STEP)
        self.lines = lines_of(params.pixels)
        self.input = loops.buffer("input", (self.steps, DIGITS, self.lines, TILE_LINE), "uint32")
        self.units = loops.buffer("units", (params.pixels,))
        self.sums = loops.buffer("sums", (TILES, DIGITS, TILE_ROWS, TILE_LINE), "int32")
        self.computed = loops.buffer("computed", (self.blocks, TILE_LINE))

    def function(self) -> Any:
        """Make the PrimFunc."""
        body = loops.parallel(self.shape.n * self.row_blocks * self.oc_slices, self._slice)
        inputs = [*self.body.inputs, self.y, self.previous]
        return loops.function(inputs, loops.sequence(loops.alloc(self.input), loops.alloc(self.units), body))

    def _slice(self, index: Any) -> Any:
        """Compute some blocks of output channels of some pixels, one block after the other."""
        shape, params = self.shape, self.params
        image, block = index // self.oc_slices // self.row_blocks, index // self.oc_slices % self.row_blocks
        first_oc, first = index % self.oc_slices * params.oc_blocks, block * params.pixels
        present: Any = params.pixels
        if self.pixels % params.pixels:
            present = tirx.min(loops.const(params.pixels), self.pixels - first)
        blocks: Any = params.oc_blocks
        if shape.oc_blocks % params.oc_blocks:
            blocks = tirx.min(loops.const(params.oc_blocks), shape.oc_blocks - first_oc)

        fill = loops.loop(present, lambda pixel: self._split_pixel(image, first, pixel), "pixel")
        if self.oc_slices > 1:
            fill = loops.when(tirx.NE(self.previous // self.oc_slices, index // self.oc_slices), fill)
        buffers = [self.sums]
        if self.x is None:
            buffers.append(self.computed)
        return loops.sequence(
            *(loops.alloc(buffer) for buffer in buffers),
            fill,
            amx.configured(loops.loop(blocks, lambda i: self._block(image, first_oc + i, first, present), "oc")),
        )

    # Digits of the input

    def _split_pixel(self, image: Any, first: Any, pixel: Any) -> Any:
        """Write the digits of all channels of all taps of a pixel of output, and its unit."""

        def compute(block: Any) -> Any:
            def lane(c: Any) -> Any:
                at, inside = self._tap_at(image, block, first + pixel, c)
                value = self.body.operand(at)
                if inside is not None:
                    value = tirx.Select(inside, value, tirx.const(0, "float32"))
                return loops.store(self.computed, value, block, c)

            return loops.vectorized(TILE_LINE, lane)

        def read(block: Any) -> Any:
            if self.x is None:
                return loops.load(self.computed, block, 0, lanes=TILE_LINE)
            at, inside = self._tap_at(image, block, first + pixel, 0)
            value = loops.load(self.x, *at, lanes=TILE_LINE)
            if inside is None:
                return value
            zero = tirx.Broadcast(tirx.const(0, "float32"), TILE_LINE)
            return tirx.Select(tirx.Broadcast(inside, TILE_LINE), value, zero)

        def before(block: Any) -> Any:
            if self.x is None:
                return compute(block)
            return self._ask_for_pixel(image, block, first + pixel + AHEAD)

        def put(step: Any, digit: int, value: Any) -> Any:
            return loops.store(self.input, value, step, digit, pixel, 0, lanes=TILE_LINE)

        return split_row(self.blocks, read, put, lambda unit: loops.store(self.units, unit, pixel), before)

    def _tap_at(self, image: Any, block: Any, pixel: Any, lane: Any) -> tuple[tuple[Any, ...], Any | None]:
        """Say where a block of a pixel's row lies in the input, and whether there is such a place.

        Where it is in the padding, the place given is another; None if no pixel has padding.
        """
        shape = self.shape
        tap, channel = (block // shape.ic_blocks, block % shape.ic_blocks) if shape.kh * shape.kw > 1 else (0, block)
        taps = (tap // shape.kw if shape.kw > 1 else tap, tap % shape.kw if shape.kw > 1 else 0)
        row, above = _within(pixel // shape.ow * shape.stride[0] + taps[0] * shape.dilation[0], 0, shape)
        column, beside = _within(pixel % shape.ow * shape.stride[1] + taps[1] * shape.dilation[1], 1, shape)
        inside = [*above, *beside]
        every = functools.reduce(tirx.And, inside) if inside else None
        return self._input_at(image, channel, row, column, lane), every

    def _ask_for_pixel(self, image: Any, block: Any, pixel: Any) -> Any:
        """Ask for a block of channels of a pixel: those of one lie far apart, which hardware does not foresee."""
        if self.shape.kh * self.shape.kw > 1:
            # Most of what a window reads, those before it have read.
            return None
        at, _ = self._tap_at(image, block, pixel, 0)
        return loops.prefetch(self.x, *at)

    # Multiplying

    def _block(self, image: Any, oc: Any, first: Any, present: Any) -> Any:
        """Compute a block of output channels of a slice's pixels, some tiles at a time."""
        together = TILES * TILE_ROWS

        def group(number: Any) -> Any:
            pixel = number * together
            return loops.sequence(
                self._products(oc, number, pixel, TILES if self.params.pixels > TILE_ROWS else 1),
                self._finish(image, oc, first, pixel, tirx.min(loops.const(together), present - pixel)),
            )

        return loops.loop((present + (together - 1)) // together, group, "group")

    def _products(self, oc: Any, group: Any, pixel: Any, tiles: int) -> Any:
        """Add up the products of all channels for some tiles of pixels; the first group asks for the next weights."""
        rows = (self.input, lambda step, digit, tile: (step, digit, pixel + tile * TILE_ROWS, 0))
        weights = (self.weight, lambda step, digit: (oc, step, digit, 0, 0, 0))

        def ask(step: Any) -> Any:
            return loops.when(tirx.EQ(group, 0), self._ask_for_weights(oc + 1, step))

        return digit_products(self.steps, tiles, rows, weights, self.sums, ask)

    def _ask_for_weights(self, oc: Any, step: Any) -> Any:
        """Ask for the digits of a block of outputs for a step."""
        lines = DIGITS * TILE_ROWS
        return loops.loop(
            lines,
            lambda line: loops.prefetch(self.weight, oc, step, line // TILE_ROWS, line % TILE_ROWS, 0, 0),
            "line",
        )

    def _finish(self, image: Any, oc: Any, first: Any, pixel: Any, count: Any) -> Any:
        """Store what is computed for `count` pixels, the epilogue applied."""
        shape = self.shape
        together = math.gcd(SIDE_BY_SIDE, self.params.pixels, self.pixels)

        def some(start: Any) -> Any:
            def value(at: tuple[int, ...], lane: Any) -> Any:
                here = start + at[0]
                sums = [
                    loops.load(self.sums, here // TILE_ROWS, order, here % TILE_ROWS, lane) for order in range(DIGITS)
                ]
                product = sums_scaled(sums, loops.load(self.units, pixel + here))
                result = self.body.value(product, self._output_at(image, oc, first + pixel + here, lane))
                if shape.oc % shape.block:
                    result = tirx.Select(oc * shape.block + lane < shape.oc, result, tirx.const(0, self.y.dtype))
                return result

            def store(at: tuple[int, ...], lane: Any, value: Any) -> Any:
                return loops.store(self.y, value, *self._output_at(image, oc, first + pixel + start + at[0], lane))

            return finish([(p,) for p in range(together)], shape.block, value, store)

        return loops.loop(count // together, lambda number: some(number * together), "pixel")

    # Where things lie

    def _input_at(self, image: Any, block: Any, row: Any, column: Any, lane: Any) -> tuple[Any, ...]:
        return (image, block, row, column, lane)

    def _output_at(self, image: Any, oc: Any, pixel: Any, lane: Any) -> tuple[Any, ...]:
        return (image, oc, pixel // self.shape.ow, pixel % self.shape.ow, lane)


def _within(padded: Any, axis: int, shape: ConvShape) -> tuple[Any, list[Any]]:
    """Give the place in the input of one in the padded input, moved inside, and the conditions that it is the same."""
    begin, end, size = shape.pad[axis], shape.pad[axis + 2], (shape.h, shape.w)[axis]
    at, conditions = padded - begin, []
    if begin:
        conditions.append(tirx.GE(at, loops.const(0)))
    if end:
        conditions.append(tirx.LT(at, loops.const(size)))
    moved = tirx.max(at, loops.const(0)) if begin else at
    return tirx.min(moved, loops.const(size - 1)) if end else moved, conditions
