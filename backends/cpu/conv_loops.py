"""The loop nest of a direct convolution (see conv_direct.py for the method)."""

from __future__ import annotations

import math
from itertools import accumulate, product
from typing import Any, NamedTuple

from tvm import tirx

from cnnc.backends.cpu.conv_shape import ConvShape, DirectParams, reshaped, segments_of
from cnnc.backends.cpu.epilogue import finish
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import Run, Segment
from cnnc.backends.cpu.staged_rows import StagedRows
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import Body

__all__ = ["ConvLoops"]


class _Channels(NamedTuple):
    """A block of input channels: its number in the input and in the weight, and how many of its lanes to add up."""

    source: Any
    weight: Any
    lanes: int


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
        self.channels = params.channels or shape.ic_blocks
        self.together = _blocks_together(self.channels, shape.inner * shape.kh * shape.kw)
        self.row_tiles = sum(segment.count for segment in self.segments)
        self.staged: StagedRows | None = None

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
        if self.x is None:
            self.staged = StagedRows(shape, self.body, self._position, first, params.rows)

        def row_of(tile: Any, first_channel: Any, row: Any) -> Any:
            return self._row(image, (oc * params.oc_tiles + tile) * params.vectors, first + row, first_channel)

        def one_pass(tile: Any, number: Any) -> Any:
            return self.t.loop(rows, lambda row: row_of(tile, number * self.channels, row), "row")

        passes = shape.ic_blocks // self.channels
        outputs = self.t.loop(
            params.oc_tiles,
            lambda tile: self.t.loop(passes, lambda number: one_pass(tile, number), "pass"),
            "oc_tile",
        )
        if self.staged is None:
            return outputs
        return self.t.sequence(self.staged.fill(image, self._group(oc * params.oc_tiles * params.vectors)), outputs)

    def _group(self, oc: Any) -> Any:
        """Give the group that a block of output channels belongs to."""
        return oc // (self.shape.oc_blocks // self.shape.groups)

    def _row(self, image: Any, oc: Any, row: Any, first_channel: Any) -> Any:
        def tiles(segment: Segment, before: int) -> Any:
            def tile(index: Any) -> Any:
                number = row * self.row_tiles + before + index
                column = segment.start + index * segment.pixels
                return self._tiles(image, oc, row, column, first_channel, segment, number)

            return self.t.loop(segment.count, tile, "tile")

        before = accumulate((segment.count for segment in self.segments), initial=0)
        return self.t.sequence(*(tiles(segment, first) for segment, first in zip(self.segments, before, strict=False)))

    def _tiles(
        self, image: Any, oc: Any, row: Any, column: Any, first_channel: Any, segment: Segment, number: Any
    ) -> Any:
        """Compute tile `number` of an image for all vectors of the group, as many at a time as registers allow."""

        def part(first: int, vectors: int, count: int) -> Any:
            def tile(index: Any) -> Any:
                place = (image, oc + first + index * vectors, row, column)
                return self._tile(*place, first_channel, segment, vectors, number)

            return self.t.loop(count, tile, "part")

        statements, first = [], 0
        for vectors, count in self.machine.vector_parts(segment.pixels, self.params.vectors):
            statements.append(part(first, vectors, count))
            first += vectors * count
        return self.t.sequence(*statements)

    def _tile(
        self,
        image: Any,
        oc: Any,
        row: Any,
        column: Any,
        first_channel: Any,
        segment: Segment,
        vectors: int,
        number: Any,
    ) -> Any:
        t, shape = self.t, self.shape
        block = shape.block
        sums = t.buffer("sums", (vectors, segment.pixels, block), scope="local")

        def start(v: Any, p: Any) -> Any:
            zero = tirx.Broadcast(tirx.const(0.0, "float32"), block)
            return t.store(sums, zero, v, p, 0, lanes=block)

        def add(other: Any, v: Any, p: Any, *place: Any) -> Any:
            total = t.load(sums, v, p, 0, lanes=block) + t.load(other, *place, 0, lanes=block)
            return t.store(sums, total, v, p, 0, lanes=block)

        def go_on(v: Any, p: Any) -> Any:
            return add(self.y, v, p, *at((v, p), 0)[:-1])

        def put_by(v: Any, p: Any) -> Any:
            return t.store(self.y, t.load(sums, v, p, 0, lanes=block), *at((v, p), 0), lanes=block)

        group_channel = 0 if self.staged else self._group(oc) * shape.ic_blocks

        def reduce(index: Any, lanes: int = shape.inner) -> Any:
            channel = first_channel + index
            channels = _Channels(group_channel + channel, channel, lanes)
            return t.sequence(
                self._ask_for_weights(oc, vectors, segment, channel, number),
                self._ask_for_operands(vectors, segment, channel, at),
                self._kernel_rows(sums, image, oc, row, column, segment, channels),
            )

        is_padded = shape.last_inner != shape.inner and self.channels == shape.ic_blocks

        def reduce_some(first: Any, count: int, is_last: bool) -> Any:
            """Add up some blocks; where it is known which is the last, without the lanes that pad it."""
            whole = count - (is_last and is_padded)
            blocks = t.loop(whole, lambda i: reduce(first + i), "channel") if whole else None
            return blocks if whole == count else t.sequence(blocks, reduce(first + whole, shape.last_inner))

        def reduce_all() -> Any:
            """Add up all blocks, so many at a time that sums stay short, and so exact."""
            together, turns = self.together, -(-self.channels // self.together)
            if turns == 1:
                return reduce_some(0, self.channels, is_last=True)
            totals = t.buffer("totals", (vectors, segment.pixels, block))

            def put_in(v: Any, p: Any) -> Any:
                return t.store(totals, t.load(sums, v, p, 0, lanes=block), v, p, 0, lanes=block)

            def turn(number: Any, count: int = together, is_last: bool = False) -> Any:
                blocks = reduce_some(number * together, count, is_last)
                return t.sequence(each(start), blocks, each(lambda v, p: add(totals, v, p, v, p)))

            def kept(number: Any) -> Any:
                return t.sequence(turn(number), each(put_in))

            last = turns - 1
            return t.sequence(
                t.alloc(totals),
                reduce_some(0, together, is_last=False),
                each(put_in),
                t.loop(last - 1, kept, "turn", 1) if last > 1 else None,
                turn(last, self.channels - last * together, is_last=True),
            )

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
        products = reduce_all() if segment.runs else None
        finished = finish(list(product(range(vectors), range(segment.pixels))), block, value, store)
        if self.channels == shape.ic_blocks:
            return t.sequence(t.alloc(sums), each(start), products, finished)
        further = t.when(first_channel > 0, each(go_on))
        end = t.when(first_channel + self.channels == shape.ic_blocks, finished, each(put_by))
        return t.sequence(t.alloc(sums), each(start), products, further, end)

    def _ask_for_weights(self, oc: Any, vectors: int, segment: Segment, channel: Any, number: Any) -> Any:
        """Ask for the weights of the next group, each tile for a share: hardware does so up to the end of a page only.

        So they come from memory while this group is computed.  With many tiles, or few multiply-adds for a weight, the
        time of either is not worth the instructions.
        """
        t, shape = self.t, self.shape
        tiles = self.row_tiles * shape.oh
        if tiles > MOST_SHARES or segment.pixels < FEWEST_PIXELS:
            return None
        per_line = LINE // shape.block
        lines = -(-shape.kh * shape.kw * shape.inner // (tiles * per_line))
        first = (number * shape.ic_blocks + channel) * lines
        origin = (0,) * (len(shape.weight_shape) - 3)

        def ask(v: Any, line: Any) -> Any:
            return t.prefetch(self.weight, oc + self.params.vectors + v, *origin, (first + line) * per_line, 0)

        return t.unrolled(vectors, lambda v: t.unrolled(lines, lambda line: ask(v, line), "line"), "v")

    def _ask_for_operands(self, vectors: int, segment: Segment, channel: Any, at: Any) -> Any:
        """Ask for what the epilogue reads beside the sums, a residual say: a share in each turn of the channel loop."""
        t, shape = self.t, self.shape
        beside = [x for x in self.body.inputs if x not in (self.x, self.weight) and x.shape == self.y.shape]
        pixels = range(0, segment.pixels, LINE // shape.block)
        share = -(-vectors * len(pixels) // shape.ic_blocks)

        def ask(operand: Any, turn: int) -> Any:
            number = channel * share + turn
            place = (number // len(pixels), number % len(pixels) * pixels.step)
            return t.prefetch(operand, *at(place, 0))

        return t.sequence(*(ask(operand, turn) for operand in beside for turn in range(share))) if beside else None

    def _position(self, row: Any, column: Any) -> tuple[Any, Any]:
        """Give a pixel in the rows of the tensors, which those of the loops may not be."""
        if not self.params.width:
            return row, column
        flat = row * self.params.width + column
        return flat // self.logical.w, flat % self.logical.w

    def _kernel_rows(
        self, sums: Any, image: Any, oc: Any, row: Any, column: Any, segment: Segment, channels: _Channels
    ) -> Any:
        """Loop over the kernel rows that read input rows, not padding."""
        t, shape = self.t, self.shape
        stride, pad, dilation = shape.stride[0], shape.pad[0], shape.dilation[0]
        top = row * stride - pad

        def kernel_row(tap: Any) -> Any:
            x_row = top + tap * dilation
            return t.sequence(
                *(self._run(sums, (image, x_row), (oc, tap), channels, column, run) for run in segment.runs)
            )

        lowest = (shape.oh - 1) * stride - pad + (shape.kh - 1) * dilation
        if pad == 0 and lowest < shape.h:
            return t.loop(shape.kh, kernel_row, "kernel_row")
        zero, rows = t.const(0), t.const(shape.h)
        first = tirx.max(zero, (dilation - 1 - top) // dilation)
        last = tirx.min(t.const(shape.kh), (rows - top + dilation - 1) // dilation)
        return t.loop(last - first, kernel_row, "kernel_row", first)

    def _run(
        self, sums: Any, x_at: tuple[Any, Any], w_at: tuple[Any, Any], channels: _Channels, column: Any, run: Run
    ) -> Any:
        """Add what a run of kernel columns contributes."""
        t, shape = self.t, self.shape
        block = shape.block
        vectors, pixels = int(sums.shape[0]), run.end - run.begin
        image, row = x_at
        oc, kernel_row = w_at

        def taps(count: int, first: Any) -> Any:
            """Run over kernel columns that read neighbouring pixels."""
            origin = column * shape.stride[1] - shape.pad[1] + first * shape.dilation[1]

            def term(tap: Any, lane: Any) -> Any:
                def one(p: Any, v: Any) -> Any:
                    x = self._input(image, channels.source, row, origin + p * shape.stride[1] + tap, lane)
                    w_lane = () if shape.plain_input else (lane,)
                    at = (oc + v, channels.weight, kernel_row, first + tap, *w_lane, 0)
                    w = t.widened(self.weight, *at, lanes=block)
                    total = t.load(sums, v, p, 0, lanes=block) + tirx.Broadcast(x, block) * w
                    return t.store(sums, total, v, p, 0, lanes=block)

                # The innermost loop runs over the smaller side, whose operands stay in registers.
                if vectors > pixels:
                    return t.unrolled(vectors, lambda v: t.unrolled(pixels, lambda p: one(p, v), "p", run.begin), "v")
                return t.unrolled(pixels, lambda p: t.unrolled(vectors, lambda v: one(p, v), "v"), "p", run.begin)

            def along(length: int, number: Any) -> Any:
                step = math.gcd(length, UNROLL)
                return t.loop(length // step, lambda k: t.unrolled(step, lambda u: number(k * step + u)), "k")

            lanes = channels.lanes
            if lanes == shape.inner:
                # Those and the lanes are one axis.
                return along(count * lanes, lambda k: term(k // lanes, k % lanes))
            return t.loop(count, lambda tap: along(lanes, lambda lane: term(tap, lane)), "kernel_column")

        if shape.dilation[1] == 1:
            return taps(run.last - run.first, t.const(run.first))
        return t.loop(run.last - run.first, lambda tap: taps(1, tap), "kernel_column", run.first)

    def _input(self, image: Any, channel: Any, row: Any, column: Any, lane: Any) -> Any:
        """Read a number of the input, or of the rows computed from it."""
        if self.shape.plain_input:
            return self.t.load(self.x, image, channel, *self._position(row, column))
        if self.staged is not None:
            return self.staged.load(channel, row, column, lane)
        return self.t.load(self.x, image, channel, *self._position(row, column), lane)


MOST_TERMS = 640
"""Products to add up one after the other: of two sums as long, the rounding error is less than of one of both."""


def _blocks_together(blocks: int, terms: int) -> int:
    """Give how many of some blocks of channels, with so many products each, to add up in one sum."""
    turns = min(-(-blocks * terms // MOST_TERMS), blocks)
    return -(-blocks // turns)


LINE = 16
"""f32 in a cache line."""

MOST_SHARES = 48
"""Weights that serve more tiles are too few to be asked for early."""

FEWEST_PIXELS = 4
"""Weights that serve fewer pixels come as fast as memory gives them; asking for others would be in the way."""

UNROLL = 2
"""Input channels for each turn of the innermost loop."""
