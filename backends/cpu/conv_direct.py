"""Direct convolution on blocked channels (NCHWc), for any stride, padding, dilation and groups of whole blocks.

    y[n, o, h, w] = sum over c, r, s of x[n, c, h * stride + r * dilation - pad, ...] * weight[o, c, r, s]

A register tile is `pixels` neighbours in a row times `vectors` blocks of output channels; each input value is
broadcast against the weights of `vectors` blocks.  Nothing is copied for padding (see segments.py).  With
`plain_input` the input is NCHW, as the first layer of a network finds it.  Where the input is elementwise in others, a
slice computes the rows it needs first (see staged_rows.py), and then all output channels from them.  The method is that
of Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures", SC'18, section II.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product, starmap
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of, operand_bytes, prologue_flops
from cnnc.backends.cpu.conv_shape import ConvShape, DirectParams, reshaped, rows_read, segments_of
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import tap_range
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ops.blocked import channel_layout, weight_layout
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["ConvDirect", "ConvShape", "DirectParams", "build", "cost", "space"]


def is_pointwise(shape: ConvShape) -> bool:
    """Whether output pixel i depends on input pixel i alone."""
    return shape.kh == shape.kw == 1 and shape.stride == (1, 1) and not any(shape.pad)


def space(shape: ConvShape, machine: Machine) -> Iterator[DirectParams]:
    """Give the tile sizes worth considering."""
    pixels = shape.h * shape.w
    widths = [0]
    if is_pointwise(shape):
        long = [w for w in _divisors(pixels) if w >= 28 and pixels // w >= 4]
        widths = [*long[::-2][:2], pixels]
        if shape.prologue:
            widths = sorted({*widths, *_near_widths(shape, machine)})
    blocks = shape.oc_blocks // shape.groups
    groups = [v for v in range(1, 9) if blocks % v == 0]
    if max(groups) < min(blocks, 4):
        groups.append(blocks)
    for width, vectors in product(widths, groups):
        rows = reshaped(shape, DirectParams(1, 1, 1, 1, 1, width))
        for channels in _passes(shape, vectors, machine):
            yield from _spaces_of(rows, machine, width, vectors, channels)


def _passes(shape: ConvShape, vectors: int, machine: Machine) -> list[int]:
    """Give the blocks of input channels to consider for a pass: all, or as many as leave their weights in L1."""
    weights = 4 * vectors * shape.block * shape.inner * shape.kh * shape.kw
    fitting = [d for d in _divisors(shape.ic_blocks) if d * weights <= NEAR_SHARE * machine.l1]
    return [0] if not fitting or fitting[-1] == shape.ic_blocks else [0, fitting[-1]]


NEAR_SHARE = 0.7
"""The share of L1 that weights may take; the rest is for input."""


def _spaces_of(shape: ConvShape, machine: Machine, width: int, vectors: int, channels: int) -> Iterator[DirectParams]:
    groups = shape.oc_blocks // vectors
    per_conv_group = groups // shape.groups
    rows = sorted({-(-shape.oh // parts) for parts in (1, 2, 4, 8, 16, 32) if parts <= shape.oh})
    oc_tiles = [count for count in (1, 2, 4, 8) if per_conv_group % count == 0]
    if shape.prologue and per_conv_group not in oc_tiles:
        oc_tiles.append(per_conv_group)

    def fits(pixels: int, v: int) -> bool:
        return machine.fits(pixels, v) and _leaves_room(shape, pixels, v, machine)

    pixels = {max(p for p in range(1, machine.registers) if fits(p, v)) for v in range(1, min(vectors, 5) + 1)}
    yield from starmap(
        lambda p, o, r, outer: DirectParams(p, vectors, o, r, outer, width, channels),
        product(sorted(pixels), oc_tiles, rows, (0, 1) if groups > 1 and shape.oh > 1 else (1,)),
    )


def _leaves_room(shape: ConvShape, pixels: int, vectors: int, machine: Machine) -> bool:
    """Whether a register tile leaves room for the weights of a kernel row.

    Where few channels are read plain, LLVM unrolls rows that are not too long; with 32 registers it keeps them there.
    """
    if not shape.plain_input or not machine.broadcasts_from_memory or not 1 < shape.kw <= LONGEST_UNROLLED:
        return True
    return pixels == 1 or (pixels + shape.kw) * vectors <= machine.registers


LONGEST_UNROLLED, CROWDED = 16, 1.5
"""The longest kernel rows that are unrolled, and by how much arithmetic takes longer where their weights push sums out
of registers."""


def _near_widths(shape: ConvShape, machine: Machine) -> list[int]:
    """Give the longest rows of pixels whose channels stay in L1 when a slice computes them, if they fill a tile."""
    most = STAYS_IN_L1 * machine.l1 / (4.0 * shape.ic_blocks * shape.inner)
    return [w for w in _divisors(shape.h * shape.w) if 8 <= w <= most][-2:]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def cost(shape: ConvShape, params: DirectParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    shape = reshaped(shape, params)
    channels = shape.ic_blocks * shape.inner
    oc_slices = shape.oc_blocks // (params.vectors * params.oc_tiles)
    row_blocks = -(-shape.oh // params.rows)
    slices = shape.n * oc_slices * row_blocks
    waves = machine.turns(slices) / slices

    rows = shape.n * shape.oc_blocks // params.vectors * shape.oh
    passes = shape.ic_blocks // (params.channels or shape.ic_blocks)
    compute = rows * _row_cycles(shape, params.pixels, params.vectors, passes, machine) * waves
    slab = shape.weight_bytes * params.vectors * shape.block * channels * shape.kh * shape.kw
    tiles = sum(segment.count for segment in segments_of(shape, params.pixels))
    pixels_read = min(params.pixels * shape.stride[1] + shape.kw - 1, shape.w)
    tile_input = 4.0 * pixels_read * channels * shape.kh
    streamed = tile_input + (slab if (slab + tile_input) / passes > 0.8 * machine.l1 else 0.0)
    near = rows * tiles * streamed / machine.l2_bytes * waves
    far_bytes = _far_bytes(shape, params, machine, row_blocks, oc_slices)
    if slab / passes > 0.6 * machine.l2:
        far_bytes += rows * tiles * slab
    far = far_bytes / machine.memory_bytes / machine.threads
    total = max(compute, near, far) + HIDDEN * (compute + far) + HIDDEN_NEAR * near
    total += SLICE_CYCLES * slices / machine.threads
    if shape.prologue:
        total += _staging_cycles(shape, params, machine, rows * tiles * tile_input) * slices * waves
    return total * machine.sharing(slices) / machine.hertz


HIDDEN, HIDDEN_NEAR = 0.05, 0.15
"""The shares of arithmetic or memory traffic, and of L2 traffic, that still add to the time of the slowest of them."""

SLICE_CYCLES = 60.0
"""What starting a slice costs."""


@lru_cache(4096)
def _row_cycles(shape: ConvShape, pixels: int, group: int, passes: int, machine: Machine) -> float:
    """Count the cycles of arithmetic for one row of pixels by one group of output vectors."""
    terms = (shape.ic // shape.groups if passes == 1 else shape.ic_blocks * shape.inner) * _mean_taps(shape)
    cycles = 0.0
    for segment in segments_of(shape, pixels):
        for vectors, count in machine.vector_parts(segment.pixels, group):
            tile = passes * (12.0 + segment.pixels * vectors) + 3.0 * shape.ic_blocks * shape.kh * len(segment.runs)
            for run in segment.runs:
                run_pixels = run.end - run.begin
                step = machine.tile_cycles(run_pixels, vectors) + machine.load_cycles * (run_pixels + vectors)
                step *= 1.0 if _leaves_room(shape, run_pixels, vectors, machine) else CROWDED
                tile += terms * (run.last - run.first) * step
            cycles += tile * segment.count * count
    return cycles


@lru_cache(64)
def _mean_taps(shape: ConvShape) -> float:
    """Give the mean number of kernel rows that read input rows, not padding."""
    top, step = shape.pad[0], shape.stride[0]
    ranges = (tap_range(row * step - top, shape.h, shape.kh, shape.dilation[0]) for row in range(shape.oh))
    return sum(last - first for first, last in ranges) / shape.oh


def _far_bytes(shape: ConvShape, params: DirectParams, machine: Machine, row_blocks: int, oc_slices: int) -> float:
    """Count the bytes that slices bring in from beyond L2, in the order they follow each other."""
    channels = shape.ic_blocks * shape.inner
    weights = shape.weight_bytes * params.vectors * params.oc_tiles * shape.block * channels * shape.kh * shape.kw
    rows = min((params.rows - 1) * shape.stride[0] + shape.dilation[0] * (shape.kh - 1) + 1, shape.h)
    inputs = 4.0 * channels * rows * shape.w
    outer, inner, outer_count, inner_count = (
        (weights, inputs, oc_slices, row_blocks) if params.oc_outer else (inputs, weights, row_blocks, oc_slices)
    )
    inner_stays = outer + inner * inner_count < machine.l2
    inner_loads = 1 if inner_stays else outer_count
    return shape.n * (outer * outer_count + inner * inner_count * inner_loads + 4.0 * math.prod(shape.output_shape[1:]))


STAGED_CYCLES, STAGED_L2_CYCLES = 1.5, 5.0
"""Cycles to load and store a vector of staged input: where it stays in L1, and where L2 has to take it."""

DEAR_TO_PASS = 0.125
"""The share of L2 from which on an image is dear to read and write once more."""

STAYS_IN_L1 = 0.65
"""The share of L1 that staged input may take, beside the weights that stream through."""


def _staging_cycles(shape: ConvShape, params: DirectParams, machine: Machine, streamed: float) -> float:
    """Count the cycles in which a slice computes its input, `streamed` being the bytes that all slices read of it."""
    numbers = shape.ic_blocks * min(rows_read(shape, params.rows), shape.h) * shape.w * shape.inner
    moving = STAGED_CYCLES if 4.0 * numbers <= STAYS_IN_L1 * machine.l1 else STAGED_L2_CYCLES
    cycles = numbers / machine.lanes * (moving + shape.prologue / machine.fma_ports)
    slab = 4.0 * params.vectors * shape.block * shape.ic_blocks * shape.inner * shape.kh * shape.kw
    slices = shape.n * -(-shape.oh // params.rows) * shape.oc_blocks // (params.vectors * params.oc_tiles)
    beyond = streamed / slices if 4.0 * numbers + slab > 0.8 * machine.l2 else 0.0
    return max(cycles, 4.0 * numbers / machine.memory_bytes) + beyond / machine.memory_bytes


def build(shape: ConvShape, params: DirectParams, machine: Machine, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from cnnc.backends.cpu.conv_loops import ConvLoops

    return ConvLoops(shape, params, machine, body).function()


@dataclass(frozen=True)
class ConvDirect:
    """The template: 2-D convolutions on blocked channels, or from plain input to blocked output.

    What is elementwise before the convolution may be part of the kernel, where its input is in blocks.
    """

    name: str = "conv_direct"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a convolution with algorithm `direct` whose groups, if any, are whole blocks."""
        return _shape_of(kernel, target) is not None

    def takes_prologue(self, kernel: Fused, target: Target) -> bool:
        """Take it where no element is computed twice, and a pass over the image is dear.

        Other kernels read rows that their neighbours compute, too, and do so much with them that a pass is little.
        """
        shape = _shape_of(kernel, target)
        if shape is None or not is_pointwise(shape):
            return False
        return 4 * math.prod(shape.input_shape) >= target.caches.l2 * DEAR_TO_PASS

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, p) for p in space(_known_shape(kernel, target), machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known_shape(kernel, target), params_of(DirectParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor = anchor_of(kernel, target, "conv", prologue=True, narrow=(1,))
        if anchor is None:
            raise VerifyError(f"{self.name} cannot compute kernel {kernel.anchor}")
        params = params_of(DirectParams, schedule)
        return build(_known_shape(kernel, target), params, machine_of(target), body_of(kernel, anchor))


def _known_shape(kernel: Fused, target: Target) -> ConvShape:
    shape = _shape_of(kernel, target)
    if shape is None:
        raise VerifyError(f"conv_direct cannot compute kernel {kernel.anchor}")
    return shape


@lru_cache(64)
def _shape_of(kernel: Fused, target: Target) -> ConvShape | None:
    """Give the convolution of a kernel, if this template can compute it."""
    anchor = anchor_of(kernel, target, "conv", prologue=True, narrow=(1,))
    if anchor is None or not isinstance(anchor.op, Conv) or anchor.op.algorithm != "direct":
        return None
    op, x, w, block = anchor.op, anchor.inputs[0].type, anchor.inputs[1].type, target.vector_lanes
    plain = x.layout is None
    if x.rank != 4 or w.layout != weight_layout(4, 1 if plain else block, block):
        return None
    if not plain and x.layout != channel_layout(4, block):
        return None
    (oc, group_in, kh, kw), (n, ic, height, width) = w.static_shape, x.static_shape
    prologue = prologue_flops(kernel, anchor)
    if plain and prologue:
        return None
    if op.groups > 1 and (plain or group_in % block or oc // op.groups % block):
        return None
    return ConvShape(
        *(n, ic, height, width, oc, kh, kw),
        stride=(op.stride[0], op.stride[1]),
        pad=(op.pad[0], op.pad[1], op.pad[2], op.pad[3]),
        dilation=(op.dilation[0], op.dilation[1]),
        groups=op.groups,
        block=block,
        plain_input=plain,
        prologue=prologue,
        weight_bytes=operand_bytes(anchor.inputs[1]),
    )
