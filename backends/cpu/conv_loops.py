"""The loop nest of a direct convolution (see conv_direct.py for the method)."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

from tvm import tirx

from cnnc.backends.cpu import loops
from cnnc.backends.cpu.body import Body
from cnnc.backends.cpu.conv_shape import ConvShape, DirectParams, reshaped, segments_of
from cnnc.backends.cpu.epilogue import finish
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import Run, Segment

__all__ = ["ConvLoops"]


class ConvLoops:
    """Writes the loop nest of one convolution."""

    def __init__(self, shape: ConvShape, params: DirectParams, machine: Machine, body: Body) -> None:
        self.t = loops
        self.params = params
        self.machine = machine
        self.body = body.bind(shape.output_shape)
        self.x, self.weight = self.body.operands[:2]
        self.y = self.body.output()
        self.logical = shape
        self.shape = shape = reshaped(shape, params)
        self.segments = segments_of(shape, params.pixels)

    def function(self) -> Any:
        """Make the PrimFunc."""
        shape, params = self.shape, self.params
        row_blocks = -(-shape.oh // params.rows)
        oc_slices = shape.oc_blocks // (params.vectors * params.oc_tiles)

        def one_slice(index: Any) -> Any:
            if params.oc_outer:
                image, oc, rows = index // (oc_slices * row_blocks), index // row_blocks % oc_slices, index % row_blocks
            else:
                image, rows, oc = index // (oc_slices * row_blocks), index // oc_slices % row_blocks, index % oc_slices
            return self._slice(image, oc, rows)

        body = self.t.parallel(shape.n * oc_slices * row_blocks, one_slice)
        return self.t.function([*self.body.inputs, self.y], body)

    def _slice(self, image: Any, oc: Any, row_block: Any) -> Any:
        shape, params = self.shape, self.params
        first = row_block * params.rows
        exact = shape.oh % params.rows == 0
        rows: Any = params.rows if exact else tirx.min(self.t.const(params.rows), shape.oh - first)
        return self.t.loop(
            params.oc_tiles,
            lambda tile: self.t.loop(
                rows,
                lambda row: self._row(image, (oc * params.oc_tiles + tile) * params.vectors, first + row),
                "row",
            ),
            "oc_tile",
        )

    def _row(self, image: Any, oc: Any, row: Any) -> Any:
        def tiles(segment: Segment) -> Any:
            def tile(index: Any) -> Any:
                return self._tiles(image, oc, row, segment.start + index * segment.pixels, segment)

            return self.t.loop(segment.count, tile, "tile")

        return self.t.sequence(*(tiles(segment) for segment in self.segments))

    def _tiles(self, image: Any, oc: Any, row: Any, column: Any, segment: Segment) -> Any:
        """Compute a tile of pixels for all vectors of the group, as many at a time as registers allow."""

        def part(first: int, vectors: int, count: int) -> Any:
            def tile(index: Any) -> Any:
                return self._tile(image, oc + first + index * vectors, row, column, segment, vectors)

            return self.t.loop(count, tile, "part")

        statements, first = [], 0
        for vectors, count in self.machine.vector_parts(segment.pixels, self.params.vectors):
            statements.append(part(first, vectors, count))
            first += vectors * count
        return self.t.sequence(*statements)

    def _tile(self, image: Any, oc: Any, row: Any, column: Any, segment: Segment, vectors: int) -> Any:
        t, shape = self.t, self.shape
        block = shape.block
        sums = t.buffer("sums", (vectors, segment.pixels, block), scope="local")

        def start(v: Any, p: Any) -> Any:
            zero = tirx.Broadcast(tirx.const(0.0, "float32"), block)
            return t.store(sums, zero, v, p, 0, lanes=block)

        group = oc // (shape.oc_blocks // shape.groups)

        def reduce(channel: Any) -> Any:
            return self._kernel_rows(sums, image, oc, row, column, segment, group * shape.ic_blocks + channel, channel)

        def at(place: tuple[int, ...], lane: Any) -> tuple[Any, ...]:
            v, p = place
            return (image, oc + v, *self._position(row, column + p), lane)

        def value(place: tuple[int, ...], lane: Any) -> Any:
            value = self.body.value(t.load(sums, *place, lane), at(place, lane))
            if shape.oc % block:
                inside = (oc + place[0]) * block + lane < shape.oc
                value = tirx.Select(inside, value, tirx.const(0, self.y.dtype))
            return value

        def store(place: tuple[int, ...], lane: Any, value: Any) -> Any:
            return t.store(self.y, value, *at(place, lane))

        def each(body: Any) -> Any:
            return t.unrolled(vectors, lambda v: t.unrolled(segment.pixels, lambda p: body(v, p), "p"), "v")

        # A tile that reads nothing but padding has no runs.
        products = t.loop(shape.ic_blocks, reduce, "channel") if segment.runs else None
        places = list(product(range(vectors), range(segment.pixels)))
        return t.sequence(t.alloc(sums), each(start), products, finish(places, block, value, store))

    def _position(self, row: Any, column: Any) -> tuple[Any, Any]:
        """Give a pixel in the rows of the tensors, which those of the loops may not be."""
        if not self.params.width:
            return row, column
        flat = row * self.params.width + column
        return flat // self.logical.w, flat % self.logical.w

    def _kernel_rows(
        self, sums: Any, image: Any, oc: Any, row: Any, column: Any, segment: Segment, x_channel: Any, channel: Any
    ) -> Any:
        """Loop over the kernel rows that read input rows, not padding."""
        t, shape = self.t, self.shape
        stride, pad, dilation = shape.stride[0], shape.pad[0], shape.dilation[0]
        top = row * stride - pad

        def kernel_row(tap: Any) -> Any:
            x_row = top + tap * dilation
            return t.sequence(
                *(self._run(sums, (image, x_channel, x_row), (oc, channel, tap), column, run) for run in segment.runs)
            )

        lowest = (shape.oh - 1) * stride - pad + (shape.kh - 1) * dilation
        if pad == 0 and lowest < shape.h:
            return t.loop(shape.kh, kernel_row, "kernel_row")
        zero, rows = t.const(0), t.const(shape.h)
        first = tirx.max(zero, (dilation - 1 - top) // dilation)
        last = tirx.min(t.const(shape.kh), (rows - top + dilation - 1) // dilation)
        return t.loop(last - first, kernel_row, "kernel_row", first)

    def _run(self, sums: Any, x_at: tuple[Any, ...], w_at: tuple[Any, ...], column: Any, run: Run) -> Any:
        """Add what a run of kernel columns contributes."""
        t, shape = self.t, self.shape
        inner, block = shape.inner, shape.block
        vectors = int(sums.shape[0])
        image, x_channel, row = x_at
        oc, channel, kernel_row = w_at

        def taps(count: int, first: Any) -> Any:
            """Run over kernel columns that read neighbouring pixels: those and inner channels are one axis."""
            origin = column * shape.stride[1] - shape.pad[1] + first * shape.dilation[1]

            def term(k: Any) -> Any:
                def one(p: Any, v: Any) -> Any:
                    x = self._input(image, x_channel, row, origin + p * shape.stride[1], k)
                    lane = () if shape.plain_input else (k % inner,)
                    w = t.widened(self.weight, oc + v, channel, kernel_row, first + k // inner, *lane, 0, lanes=block)
                    total = t.load(sums, v, p, 0, lanes=block) + tirx.Broadcast(x, block) * w
                    return t.store(sums, total, v, p, 0, lanes=block)

                pixels = run.end - run.begin
                # The innermost loop runs over the smaller side, whose operands stay in registers.
                if vectors > pixels:
                    return t.unrolled(vectors, lambda v: t.unrolled(pixels, lambda p: one(p, v), "p", run.begin), "v")
                return t.unrolled(pixels, lambda p: t.unrolled(vectors, lambda v: one(p, v), "v"), "p", run.begin)

            length = count * inner
            step = math.gcd(length, UNROLL)
            return t.loop(length // step, lambda k: t.unrolled(step, lambda u: term(k * step + u)), "k")

        if shape.dilation[1] == 1:
            return taps(run.last - run.first, t.const(run.first))
        return t.loop(run.last - run.first, lambda tap: taps(1, tap), "kernel_column", run.first)

    def _input(self, image: Any, channel: Any, row: Any, column: Any, k: Any) -> Any:
        """Read the input value `k` channels, and pixels beyond them, after the first channel of a pixel."""
        if self.shape.plain_input:
            return self.t.load(self.x, image, channel, *self._position(row, column + k))
        lanes = self.shape.block
        return self.t.load(self.x, image, channel, *self._position(row, column + k // lanes), k % lanes)


UNROLL = 2
"""Input channels for each turn of the innermost loop."""
