"""The launches of `winograd`: input transform, one product of matrices for each position, output transform."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.ffma_params import NUMBERS, FfmaParams
from cnnc.backends.cuda.ffma_tile import ffma_product
from cnnc.backends.cuda.launches import address, launch, position, within
from cnnc.backends.cuda.mma_ring import Operand, Order
from cnnc.backends.cuda.winograd import THREADS, WinogradConv
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import BoundBody
from cnnc.backends.lower.filtering import transformed, transformed_back
from cnnc.ops.fused import Fused

__all__ = ["winograd_func"]


def winograd_func(kernel: Fused, found: WinogradConv, tile: FfmaParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    body = body_around(kernel, found.node, found.node.inputs[:2]).bind(found.output)
    steps = _Launches(
        found,
        tile,
        body,
        body.output(),
        loops.buffer("data", found.data_shape, scope="global"),
        loops.buffer("products", found.sums_shape, scope="global"),
    )
    statements = [loops.alloc(steps.data), loops.alloc(steps.products)]
    for first in range(0, found.tiles, found.part):
        count = min(found.part, found.tiles - first)
        statements += [
            steps.transform_input(first, count),
            steps.multiply(count),
            steps.transform_products(first, count),
        ]
    statement = loops.sequence(*statements)
    return loops.function([*body.inputs, steps.output], statement)


@dataclass(frozen=True)
class _Launches:
    """Writes the launches of one convolution, for `count` tiles from the `first` on."""

    found: WinogradConv
    tile: FfmaParams
    body: BoundBody
    output: Any
    data: Any
    products: Any

    def transform_input(self, first: int, count: int) -> Any:
        """Write B' x D, 0 in the padding: the columns of a tile first, then its rows."""
        v, h = self.found.vertical, self.found.horizontal
        (_, channels, height, width), (_, rows, across) = self.found.image, self.found.grid
        top, left = self.found.conv.pad[:2]
        x = self.body.operands[0]
        column = loops.buffer("column", (v.inputs,), scope="local")
        half = loops.buffer("half", (v.positions, h.inputs), scope="local")

        def one(channel: Any, number: Any) -> Any:
            image, row, place = position(self.found.grid, first + number)
            row, place = row * v.step - top, place * h.step - left

            def pixel(r: int, s: int) -> Any:
                inside = within(row + r, r - top, (rows - 1) * v.step + r - top, height)
                inside += within(place + s, s - left, (across - 1) * h.step + s - left, width)
                value = loops.load(x, image, channel, row + r, place + s)
                zero = tirx.const(0.0, "float32")
                return tirx.if_then_else(tirx.all(*inside), value, zero) if inside else value

            statements = []
            for s in range(h.inputs):
                statements += [loops.store(column, pixel(r, s), r) for r in range(v.inputs)]
                sums = transformed(v, [loops.load(column, r) for r in range(v.inputs)])
                statements += [loops.store(half, value, a, s) for a, value in enumerate(sums)]
            for a in range(v.positions):
                sums = transformed(h, [loops.load(half, a, s) for s in range(h.inputs)])
                statements += [
                    loops.store(self.data, value, a * h.positions + b, channel, number) for b, value in enumerate(sums)
                ]
            return loops.sequence(loops.alloc(column), loops.alloc(half), *statements)

        return self._each_tile(channels, count, one)

    def multiply(self, count: int) -> Any:
        """Write the product of the weights and the transformed input, for each position."""
        found, tile = self.found, self.tile
        v, h = found.vertical, found.horizontal
        channels, outputs = found.image[1], found.output[1]
        weight = self.body.operands[1]
        stage = tile.depth * NUMBERS
        whole = math.ceil(channels / stage) * stage

        def block(thread: Any, wide: Any, high: Any, number: Any) -> Any:
            first, start = high * tile.rows, wide * tile.columns
            # The last positions of an axis may share their weights.
            row, column = (
                tirx.min(index, loops.const(axis.weights - 1)) if axis.weights < axis.positions else index
                for axis, index in ((v, number // h.positions), (h, number % h.positions))
            )

            def weights(chunk: Any, k: Any) -> tuple[Any, Any]:
                group = first // NUMBERS + chunk
                valid = [*within(k, 0, whole - 1, channels), group < math.ceil(outputs / NUMBERS)]
                return address(weight, row, column, k, group, 0), tirx.all(*valid)

            def data(chunk: Any, k: Any) -> tuple[Any, Any]:
                # The last chunk of a channel may go beyond the tiles: sums nobody reads are made of that.
                place = start + chunk * NUMBERS
                valid = [*within(k, 0, whole - 1, channels), place < found.pitch]
                return address(self.data, number, k, place), tirx.all(*valid)

            def store(row: Any, column: Any, value: Any) -> Any:
                row, column = first + row, start + column
                put = loops.vectorized(
                    NUMBERS, lambda lane: loops.store(self.products, value(lane), number, row, column + lane)
                )
                return loops.when(tirx.all(row < outputs, column < found.pitch), put)

            left, right = (Operand(chunk, Order.ACROSS, NUMBERS) for chunk in (weights, data))
            sums = ffma_product(tile, left, right, thread, (0, loops.const(whole // stage)), NUMBERS)
            return loops.sequence(sums.compute, sums.finish(store))

        grid = (math.ceil(count / tile.columns), math.ceil(outputs / tile.rows), found.positions)
        return launch(grid, tile.threads, block)

    def transform_products(self, first: int, count: int) -> Any:
        """Write A' m C, columns first, and store what the epilogue makes of what lies inside the output."""
        v, h = self.found.vertical, self.found.horizontal
        channels, height = self.found.output[1:3]
        half = loops.buffer("half", (v.tile, h.positions), scope="local")
        result = loops.buffer("result", (h.tile,), scope="local")

        def one(channel: Any, number: Any) -> Any:
            image, row, column = position(self.found.grid, first + number)
            row, column = row * v.tile, column * h.tile
            statements = []
            for b in range(h.positions):
                values = [loops.load(self.products, a * h.positions + b, channel, number) for a in range(v.positions)]
                statements += [loops.store(half, value, i, b) for i, value in enumerate(transformed_back(v, values))]
            for i in range(v.tile):
                values = [loops.load(half, i, b) for b in range(h.positions)]
                statements += [loops.store(result, value, j) for j, value in enumerate(transformed_back(h, values))]
                stored = self._store_row(result, (image, channel, row + i, column))
                statements.append(stored if height % v.tile == 0 else loops.when(row + i < height, stored))
            return loops.sequence(loops.alloc(half), loops.alloc(result), *statements)

        return self._each_tile(channels, count, one)

    def _store_row(self, result: Any, at: tuple[Any, Any, Any, Any]) -> Any:
        """Finish and store a row of a tile, at once where all rows are whole."""
        *before, first = at
        tile, width = self.found.horizontal.tile, self.found.output[3]

        def pixel(j: Any) -> Any:
            index = (*before, first + j)
            return loops.store(self.output, self.body.value(loops.load(result, j), index), *index)

        # Vectors of four are for numbers alone: of truth values TVM writes more than there are.
        if width % tile == 0 and str(self.output.dtype) == "float32":
            return loops.vectorized(tile, pixel)
        return loops.unrolled(tile, lambda j: loops.when(first + j < width, pixel(j)), "j")

    def _each_tile(self, channels: int, count: int, one: Callable[[Any, Any], Any]) -> Any:
        """Launch a thread for each of so many tiles of each channel, neighbours for neighbouring tiles."""
        threads = channels * count

        def work(thread: Any, group: Any) -> Any:
            number = group * THREADS + thread
            statement = one(number // count, number % count)
            return statement if threads % THREADS == 0 else loops.when(number < threads, statement)

        return launch((math.ceil(threads / THREADS),), THREADS, work)
