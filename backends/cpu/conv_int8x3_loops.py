"""The loop nest of a 1x1 convolution in int8 digits on matrix tiles (see conv_int8x3.py for the method)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cpu import amx
from cnnc.backends.cpu.conv_int8x3_shape import IN_A_STEP, TILES, DigitParams, slices_of
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.epilogue import SIDE_BY_SIDE, finish
from cnnc.backends.cpu.int8_digits import DIGITS, PRODUCTS, digits, larger, scale_of, sums_scaled, unit_of
from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS
from cnnc.backends.cpu.reduce_lanes import lane_max
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import Body

__all__ = ["DigitLoops"]

AHEAD = 6
"""Pixels that are asked for early."""

A, B = 6, 7
"""The registers of a tile of input and one of weights, beside sums of two tiles of pixels."""


class DigitLoops:
    """Writes the loop nest of one convolution."""

    def __init__(self, shape: ConvShape, params: DigitParams, body: Body) -> None:
        self.shape = shape
        self.params = params
        self.body = body.bind(shape.output_shape)
        self.x, self.weight = self.body.operands[:2]
        self.y = self.body.output()
        self.previous = loops.previous_slice()
        self.pixels = shape.oh * shape.ow
        self.row_blocks, self.oc_slices = slices_of(shape, params)
        self.steps = -(-shape.ic_blocks // IN_A_STEP)
        self.lines = -(-params.pixels // TILE_ROWS) * TILE_ROWS | 1
        self.input = loops.buffer("input", (self.steps, DIGITS, self.lines, TILE_LINE), "uint32")
        self.units = loops.buffer("units", (params.pixels,))
        self.sums = loops.buffer("sums", (TILES, DIGITS, TILE_ROWS, TILE_LINE), "int32")
        self.biggest = loops.buffer("biggest", (TILE_LINE,), "int32", scope="local")
        self.computed = loops.buffer("computed", (shape.ic_blocks, TILE_LINE))

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
        buffers = [self.sums, self.biggest]
        if self.x is None:
            buffers.append(self.computed)
        return loops.sequence(
            *(loops.alloc(buffer) for buffer in buffers),
            fill,
            amx.configured(loops.loop(blocks, lambda i: self._block(image, first_oc + i, first, present), "oc")),
        )

    # Digits of the input

    def _split_pixel(self, image: Any, first: Any, pixel: Any) -> Any:
        """Write the digits of all channels of a pixel, and its unit."""
        shape = self.shape
        row, column = (first + pixel) // shape.ow * shape.stride[0], (first + pixel) % shape.ow * shape.stride[1]

        def compute(block: Any) -> Any:
            def lane(c: Any) -> Any:
                return loops.store(self.computed, self.body.operand((image, block, row, column, c)), block, c)

            return loops.vectorized(TILE_LINE, lane)

        def read(block: Any) -> Any:
            if self.x is None:
                return loops.load(self.computed, block, 0, lanes=TILE_LINE)
            return loops.load(self.x, image, block, row, column, 0, lanes=TILE_LINE)

        def look(block: Any) -> Any:
            found = larger(loops.load(self.biggest, 0, lanes=TILE_LINE), read(block))
            return loops.sequence(
                compute(block) if self.x is None else self._ask_for_pixel(image, block, first + pixel + AHEAD),
                loops.store(self.biggest, found, 0, lanes=TILE_LINE),
            )

        most = loops.buffer("most", (1,), "int32", scope="local")
        scale = tirx.Broadcast(scale_of(loops.load(most, 0)), TILE_LINE)

        def split(step: Any, present: int) -> Any:
            vectors = [read(step * IN_A_STEP + j) if j < present else None for j in range(IN_A_STEP)]
            return loops.sequence(
                *(
                    loops.store(self.input, value, step, digit, pixel, 0, lanes=TILE_LINE)
                    for digit, value in enumerate(digits(vectors, scale))
                )
            )

        return loops.sequence(
            loops.alloc(most),
            self._forget(),
            loops.loop(shape.ic_blocks, look, "block"),
            loops.store(most, lane_max(loops.load(self.biggest, 0, lanes=TILE_LINE), TILE_LINE), 0),
            loops.store(self.units, unit_of(loops.load(most, 0)), pixel),
            self._each_step(split),
        )

    def _ask_for_pixel(self, image: Any, block: Any, pixel: Any) -> Any:
        """Ask for a block of channels of a pixel: those of one lie far apart, which hardware does not foresee."""
        ow, (down, across) = self.shape.ow, self.shape.stride
        return loops.prefetch(self.x, image, block, pixel // ow * down, pixel % ow * across, 0)

    def _forget(self) -> Any:
        return loops.store(self.biggest, tirx.Broadcast(tirx.const(0, "int32"), TILE_LINE), 0, lanes=TILE_LINE)

    def _each_step(self, body: Callable[[Any, int], Any]) -> Any:
        """Run `body(step, blocks in it)` for all steps, of which the last may have fewer blocks."""
        whole, left = divmod(self.shape.ic_blocks, IN_A_STEP)
        return loops.sequence(
            loops.loop(whole, lambda step: body(step, IN_A_STEP), "step") if whole else None,
            body(loops.const(whole), left) if left else None,
        )

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

        def step(number: Any) -> Any:
            statements = [loops.when(tirx.EQ(group, 0), self._ask_for_weights(oc + 1, number))]
            of_weight = None
            for of_x, of_w in PRODUCTS:
                if of_w != of_weight:
                    statements.append(amx.load(B, self.weight, oc, number, of_w, 0, 0, 0))
                    of_weight = of_w
                for tile in range(tiles):
                    statements.append(amx.load(A, self.input, number, of_x, pixel + tile * TILE_ROWS, 0))
                    statements.append(amx.multiply_add_int8(tile * DIGITS + of_x + of_w, A, B))
            return loops.sequence(*statements)

        registers = range(tiles * DIGITS)
        return loops.sequence(
            *(amx.zero(register) for register in registers),
            loops.loop(self.steps, step, "step"),
            *(amx.store(r, self.sums, r // DIGITS, r % DIGITS, 0, 0) for r in registers),
        )

    def _ask_for_weights(self, oc: Any, step: Any) -> Any:
        """Ask for the digits of a block of outputs for a step."""
        lines = DIGITS * TILE_ROWS
        return loops.unrolled(
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

    def _output_at(self, image: Any, oc: Any, pixel: Any, lane: Any) -> tuple[Any, ...]:
        return (image, oc, pixel // self.shape.ow, pixel % self.shape.ow, lane)
