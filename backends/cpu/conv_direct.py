"""Direct convolution on blocked channels (NCHWc), for any stride, padding, dilation and groups of whole blocks.

    y[n, o, h, w] = sum over c, r, s of x[n, c, h * stride + r * dilation - pad, ...] * weight[o, c, r, s]

A register tile is `pixels` neighbours in a row times `vectors` blocks of output channels; each input value is
broadcast against the weights of `vectors` blocks.  Nothing is copied for padding (see segments.py).  With
`plain_input` the input is NCHW, as the first layer of a network finds it.  The method is that of Georganas et al.,
"Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures", SC'18, section II.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product, starmap
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import Run, Segment, row_segments, tap_range

if TYPE_CHECKING:
    from cnnc.backends.cpu.body import Body

__all__ = ["ConvShape", "DirectParams", "build", "cost", "space"]


@dataclass(frozen=True)
class ConvShape:
    """A convolution: logical sizes, and the channel block of its layouts.

    `pad` is (top, left, bottom, right).  `plain_input`: the input is NCHW and the weight OIHW{block}o.
    """

    n: int
    ic: int
    h: int
    w: int
    oc: int
    kh: int
    kw: int
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    block: int = 16
    plain_input: bool = False

    @property
    def oh(self) -> int:
        """Output rows."""
        return (self.h + self.pad[0] + self.pad[2] - self.dilation[0] * (self.kh - 1) - 1) // self.stride[0] + 1

    @property
    def ow(self) -> int:
        """Output columns."""
        return (self.w + self.pad[1] + self.pad[3] - self.dilation[1] * (self.kw - 1) - 1) // self.stride[1] + 1

    @property
    def oc_blocks(self) -> int:
        """Blocks of output channels, the last one perhaps padded."""
        return -(-self.oc // self.block)

    @property
    def ic_blocks(self) -> int:
        """Blocks of input channels of one group: what the reduction runs over outermost."""
        channels = self.ic // self.groups
        return channels if self.plain_input else -(-channels // self.block)

    @property
    def inner(self) -> int:
        """Input channels that lie next to each other."""
        return 1 if self.plain_input else self.block

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The physical shape of the input."""
        shape = (self.n, self.ic_blocks * self.groups, self.h, self.w)
        return shape if self.plain_input else (*shape, self.block)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The physical shape of the weight."""
        shape = (self.oc_blocks, self.ic_blocks, self.kh, self.kw)
        return (*shape, self.block) if self.plain_input else (*shape, self.block, self.block)

    @property
    def operand_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The physical shapes of the operands: input and weight."""
        return (self.input_shape, self.weight_shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The physical shape of the output."""
        return (self.n, self.oc_blocks, self.oh, self.ow, self.block)

    @property
    def flops(self) -> int:
        """Floating point operations of the logical convolution, padding counted as data."""
        return 2 * self.n * self.oc * self.oh * self.ow * (self.ic // self.groups) * self.kh * self.kw


@dataclass(frozen=True)
class DirectParams:
    """Tile sizes.

    Register tiles have at most `pixels` pixels; a slice computes `oc_tiles` groups of `vectors` blocks of output
    channels on `rows` rows.  `oc_outer` (0 or 1): whether slices with the same weights follow each other, or
    those with the same input rows.  `width`, for 1x1 kernels: pixels are taken in rows of this length (else 0).
    """

    pixels: int
    vectors: int
    oc_tiles: int
    rows: int
    oc_outer: int = 1
    width: int = 0


def reshaped(shape: ConvShape, params: DirectParams) -> ConvShape:
    """Give the shape in rows of `params.width` pixels."""
    return replace(shape, h=shape.h * shape.w // params.width, w=params.width) if params.width else shape


def is_pointwise(shape: ConvShape) -> bool:
    """Whether output pixel i depends on input pixel i alone."""
    return shape.kh == shape.kw == 1 and shape.stride == (1, 1) and not any(shape.pad)


def space(shape: ConvShape, machine: Machine) -> Iterator[DirectParams]:
    """Give the tile sizes worth considering."""
    pixels = shape.h * shape.w
    widths = [0]
    if is_pointwise(shape):
        long = [w for w in _divisors(pixels) if w >= 28 and pixels // w >= 4]
        widths = [*long[::-2][:4], pixels]
    blocks = shape.oc_blocks // shape.groups
    groups = [v for v in range(1, 9) if blocks % v == 0]
    if max(groups) < min(blocks, 4):
        groups.append(blocks)
    for width, vectors in product(widths, groups):
        yield from _spaces_of(reshaped(shape, DirectParams(1, 1, 1, 1, 1, width)), machine, width, vectors)


def _spaces_of(shape: ConvShape, machine: Machine, width: int, vectors: int) -> Iterator[DirectParams]:
    groups = shape.oc_blocks // vectors
    per_conv_group = groups // shape.groups
    rows = sorted({-(-shape.oh // parts) for parts in (1, 2, 4, 8, 16, 32) if parts <= shape.oh})
    oc_tiles = [count for count in (1, 2, 4, 8) if per_conv_group % count == 0]
    pixels = {max(p for p in range(1, machine.registers) if machine.fits(p, v)) for v in range(1, min(vectors, 5) + 1)}
    yield from starmap(
        lambda p, o, r, outer: DirectParams(p, vectors, o, r, outer, width),
        product(sorted(pixels), oc_tiles, rows, (0, 1) if groups > 1 and shape.oh > 1 else (1,)),
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def cost(shape: ConvShape, params: DirectParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    shape = reshaped(shape, params)
    channels = shape.ic_blocks * shape.inner
    oc_slices = shape.oc_blocks // (params.vectors * params.oc_tiles)
    row_blocks = -(-shape.oh // params.rows)
    slices = shape.n * oc_slices * row_blocks
    waves = -(-slices // machine.threads) / slices

    rows = shape.n * shape.oc_blocks // params.vectors * shape.oh
    compute = rows * _row_cycles(shape, params.pixels, params.vectors, machine) * waves
    slab = 4.0 * params.vectors * shape.block * channels * shape.kh * shape.kw
    tiles = sum(segment.count for segment in _segments(shape, params.pixels))
    pixels_read = min(params.pixels * shape.stride[1] + shape.kw - 1, shape.w)
    tile_input = 4.0 * pixels_read * channels * shape.kh
    streamed = tile_input + (slab if slab + tile_input > 0.8 * machine.l1 else 0.0)
    near = rows * tiles * streamed / machine.l2_bytes * waves
    far_bytes = _far_bytes(shape, params, machine, row_blocks, oc_slices)
    if slab > 0.6 * machine.l2:
        far_bytes += rows * tiles * slab
    far = far_bytes / machine.memory_bytes / machine.threads
    total = max(compute, near, far) + HIDDEN * (compute + near + far) + SLICE_CYCLES * slices / machine.threads
    # Among equals, prefer what would still divide among more threads than expected.
    uneven = -(-slices // MANY_THREADS) * MANY_THREADS / slices
    return total * (1.0 + 0.01 * uneven) / machine.hertz


HIDDEN = 0.05
"""The share of what runs beside the slowest of arithmetic, L2 and memory traffic that still adds to the time."""

MANY_THREADS = 8

SLICE_CYCLES = 60.0
"""What starting a slice costs."""


@lru_cache(4096)
def _row_cycles(shape: ConvShape, pixels: int, group: int, machine: Machine) -> float:
    """Count the cycles of arithmetic for one row of pixels by one group of output vectors."""
    terms = shape.ic_blocks * shape.inner * _mean_taps(shape)
    cycles = 0.0
    for segment in _segments(shape, pixels):
        for vectors, count in machine.vector_parts(segment.pixels, group):
            tile = 12.0 + segment.pixels * vectors + 3.0 * shape.ic_blocks * shape.kh * len(segment.runs)
            for run in segment.runs:
                tile += terms * (run.last - run.first) * machine.tile_cycles(run.end - run.begin, vectors)
            cycles += tile * segment.count * count
    return cycles


def _mean_taps(shape: ConvShape) -> float:
    """Give the mean number of kernel rows that read input rows, not padding."""
    top, step = shape.pad[0], shape.stride[0]
    ranges = (tap_range(row * step - top, shape.h, shape.kh, shape.dilation[0]) for row in range(shape.oh))
    return sum(last - first for first, last in ranges) / shape.oh


def _far_bytes(shape: ConvShape, params: DirectParams, machine: Machine, row_blocks: int, oc_slices: int) -> float:
    """Count the bytes that slices bring in from beyond L2, in the order they follow each other."""
    channels = shape.ic_blocks * shape.inner
    weights = 4.0 * params.vectors * params.oc_tiles * shape.block * channels * shape.kh * shape.kw
    rows = min((params.rows - 1) * shape.stride[0] + shape.dilation[0] * (shape.kh - 1) + 1, shape.h)
    inputs = 4.0 * channels * rows * shape.w
    outer, inner, outer_count, inner_count = (
        (weights, inputs, oc_slices, row_blocks) if params.oc_outer else (inputs, weights, row_blocks, oc_slices)
    )
    inner_stays = outer + inner * inner_count < machine.l2
    inner_loads = 1 if inner_stays else outer_count
    return shape.n * (outer * outer_count + inner * inner_count * inner_loads + 4.0 * math.prod(shape.output_shape[1:]))


def build(shape: ConvShape, params: DirectParams, machine: Machine, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands are x and weight."""
    return _Emitter(shape, params, machine, body).function()


@lru_cache(4096)
def _segments(shape: ConvShape, pixels: int) -> tuple[Segment, ...]:
    return row_segments(shape.w, shape.ow, shape.kw, shape.stride[1], shape.pad[1], shape.dilation[1], pixels)


class _Emitter:
    """Writes the loop nest of one convolution."""

    def __init__(self, shape: ConvShape, params: DirectParams, machine: Machine, body: Body) -> None:
        from cnnc.backends.cpu import loops

        self.t = loops
        self.params = params
        self.machine = machine
        self.body = body.bind(shape.output_shape)
        self.x, self.weight = self.body.operands
        self.y = self.body.output()
        self.logical = shape
        self.shape = shape = reshaped(shape, params)
        self.segments = _segments(shape, params.pixels)

    def function(self) -> Any:
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
        from tvm import tirx

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
        return self.t.sequence(
            *(
                self.t.loop(
                    segment.count,
                    lambda tile, s=segment: self._tiles(image, oc, row, s.start + tile * s.pixels, s),
                    "tile",
                )
                for segment in self.segments
            )
        )

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
        from tvm import tirx

        t, shape = self.t, self.shape
        block = shape.block
        sums = t.buffer("sums", (vectors, segment.pixels, block), scope="local")

        def start(v: Any, p: Any) -> Any:
            zero = tirx.Broadcast(tirx.const(0.0, "float32"), block)
            return t.store(sums, zero, v, p, 0, lanes=block)

        group = oc // (shape.oc_blocks // shape.groups)

        def reduce(channel: Any) -> Any:
            return self._kernel_rows(sums, image, oc, row, column, segment, group * shape.ic_blocks + channel, channel)

        def finish(v: Any, p: Any) -> Any:
            def lane(c: Any) -> Any:
                at = (image, oc + v, *self._position(row, column + p), c)
                value = self.body.value(t.load(sums, v, p, c), at)
                if shape.oc % block:
                    inside = (oc + v) * block + c < shape.oc
                    value = tirx.Select(inside, value, tirx.const(0, self.y.dtype))
                return t.store(self.y, value, *at)

            return t.vectorized(block, lane)

        def each(body: Any) -> Any:
            return t.unrolled(vectors, lambda v: t.unrolled(segment.pixels, lambda p: body(v, p), "p"), "v")

        return t.sequence(t.alloc(sums), each(start), t.loop(shape.ic_blocks, reduce, "channel"), each(finish))

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
        from tvm import tirx

        t, shape = self.t, self.shape
        stride, pad, dilation = shape.stride[0], shape.pad[0], shape.dilation[0]
        top = row * stride - pad

        def kernel_row(tap: Any) -> Any:
            x_row = top + tap * dilation
            return t.sequence(
                *(self._run(sums, (image, x_channel, x_row), (oc, channel, tap), column, run) for run in segment.runs)
            )

        if not any(tap_padding(shape)):
            return t.loop(shape.kh, kernel_row, "kernel_row")
        zero, rows = t.const(0), t.const(shape.h)
        first = tirx.max(zero, (dilation - 1 - top) // dilation)
        last = tirx.min(t.const(shape.kh), (rows - top + dilation - 1) // dilation)
        return t.loop(last - first, kernel_row, "kernel_row", first)

    def _run(self, sums: Any, x_at: tuple[Any, ...], w_at: tuple[Any, ...], column: Any, run: Run) -> Any:
        """Add what a run of kernel columns contributes."""
        from tvm import tirx

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
                    w = t.load(self.weight, oc + v, channel, kernel_row, first + k // inner, *lane, 0, lanes=block)
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


def tap_padding(shape: ConvShape) -> tuple[bool, bool]:
    """Tell whether some output row reads above the input, or below it."""
    lowest = (shape.oh - 1) * shape.stride[0] - shape.pad[0] + (shape.kh - 1) * shape.dilation[0]
    return shape.pad[0] > 0, lowest >= shape.h
