"""Winograd convolution on blocked channels (NCHWc): the kernels and strides that have matrices, any padding.

    y = A' [sum over c of (B' x[c] D) * u[o, c]] C     for each tile of m x m outputs, u = G w H'

A slice transforms a chunk of tiles, which stay in L2, multiplies them position by position by the transformed
weights in register tiles of `pixels` tiles times some blocks of output channels, and transforms the sums back, the
epilogue applied as they are stored.  Tiles are counted through images and rows, so that chunks are of any size; those
that overlap the padding are gathered first.  The matrices and their source are in `cnnc.ops.winograd`; the division
into slices is that of Jia et al., "Optimizing N-dimensional, Winograd-based convolution for manycore CPUs", PPoPP'18,
section 4, without its barriers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of, operand_bytes, params_of, schedule_of
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.cpu.winograd_shape import WinogradParams, WinogradShape
from cnnc.errors import VerifyError
from cnnc.ops.blocked import channel_layout
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.winograd import winograd_layout, winograd_tile
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.cpu.body import Body

__all__ = ["Winograd", "WinogradParams", "WinogradShape", "build", "cost", "space"]

MOST_TILES = 64
"""More tiles at once only take more cache."""

MOST_BLOCKS = 16
"""Blocks of output channels for each pass over the transformed tiles: more save nothing."""


def space(shape: WinogradShape, machine: Machine) -> Iterator[WinogradParams]:
    """Give the tile sizes worth considering."""
    fewest = -(-shape.tiles // MOST_TILES)
    chunks = {fewest * factor for factor in (1, 2, 3, 4, 6, 8)} | {-(-shape.tiles // (3 * p)) for p in range(2, 15)}
    tiles = sorted({-(-shape.tiles // count) for count in chunks if count <= shape.tiles})
    for oc_slices in (1, 2, 4, 8):
        if shape.conv.oc_blocks % oc_slices:
            continue
        blocks = shape.conv.oc_blocks // oc_slices
        groups = [group for group in range(1, MOST_BLOCKS + 1) if blocks % group == 0]
        for group, count in product(groups[-3:], tiles):
            most = {
                max(p for p in range(1, machine.registers) if machine.fits(p, v)) for v in range(1, min(group, 4) + 1)
            }
            for pixels in sorted({min(p, count) for p in most}):
                yield WinogradParams(count, pixels, group, oc_slices)


def cost(shape: WinogradShape, params: WinogradParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    conv, positions = shape.conv, shape.positions
    channels = conv.ic_blocks * conv.block
    blocks = conv.oc_blocks // params.oc_slices
    chunks = -(-shape.tiles // params.tiles)
    slices = chunks * params.oc_slices
    groups = blocks // params.group
    products = groups * positions * _group_cycles(params, channels, machine)
    transforms = positions * params.tiles * (INPUT_CYCLES * conv.ic_blocks + OUTPUT_CYCLES * blocks)
    compute = products + transforms

    weights = conv.weight_bytes * shape.vertical.weights * shape.horizontal.weights * channels * blocks * conv.block
    data = 4.0 * positions * channels * params.tiles
    sums = 4.0 * positions * params.tiles * params.group * conv.block
    slab = conv.weight_bytes * channels * conv.block * min(params.group, 3)
    readings = sum(count for _, count in even_split(params.tiles, params.pixels)) if slab > machine.l1 else 1
    near = (weights * readings + data * groups) / machine.l2_bytes
    far = 4.0 * shape.outputs * params.tiles * (channels * math.prod(conv.stride) + blocks * conv.block)
    if weights + data + sums > 0.8 * machine.l2:
        far += weights
    if data + sums > 0.8 * machine.l2:
        far += data * (1 + groups)
    far /= machine.memory_bytes
    one = max(compute, far) + EXPOSED * (near + far) + SLICE_CYCLES
    waves = -(-slices // machine.threads)
    # Among equals, prefer what would still divide among more threads than expected.
    uneven = -(-slices // MANY_THREADS) * MANY_THREADS / slices
    return one * waves * (1.0 + 0.02 * uneven) / machine.hertz


INPUT_CYCLES = 7.0
"""Cycles to transform a vector of input, for each position in the tile."""

OUTPUT_CYCLES = 4.0
"""Cycles to transform a vector of sums back and store it."""

EXPOSED = 0.2
"""The share of the traffic from L2 and memory that arithmetic does not hide: a weight serves but a chunk of tiles."""

SLICE_CYCLES = 200.0
"""What starting a slice costs."""

MANY_THREADS = 8


@lru_cache(4096)
def _group_cycles(params: WinogradParams, channels: int, machine: Machine) -> float:
    """Count the cycles of the products of one position of all tiles of a chunk by one group of output channels."""
    cycles = 0.0
    for pixels, count in even_split(params.tiles, params.pixels):
        for vectors, parts in machine.vector_parts(pixels, params.group):
            cycles += count * parts * (12.0 + 2.0 * pixels * vectors + channels * machine.tile_cycles(pixels, vectors))
    return cycles


def build(shape: WinogradShape, params: WinogradParams, machine: Machine, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from cnnc.backends.cpu.winograd_loops import WinogradLoops

    return WinogradLoops(shape, params, machine, body).function()


@dataclass(frozen=True)
class Winograd:
    """The template: convolutions whose algorithm is `winograd2` or `winograd4`, on blocked channels."""

    name: str = "winograd"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a convolution of float32 images in blocks with transformed weights."""
        return _shape_of(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, p) for p in space(_known_shape(kernel, target), machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known_shape(kernel, target), params_of(WinogradParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        shape, anchor = _known_shape(kernel, target), anchor_of(kernel, target, "conv", narrow=(1,))
        if anchor is None:
            raise VerifyError(f"{self.name} cannot compute kernel {kernel.anchor}")
        return build(shape, params_of(WinogradParams, schedule), machine_of(target), body_of(kernel, anchor))


def _known_shape(kernel: Fused, target: Target) -> WinogradShape:
    shape = _shape_of(kernel, target)
    if shape is None:
        raise VerifyError(f"winograd cannot compute kernel {kernel.anchor}")
    return shape


@lru_cache(64)
def _shape_of(kernel: Fused, target: Target) -> WinogradShape | None:
    """Give the convolution of a kernel, if this template can compute it."""
    anchor = anchor_of(kernel, target, "conv", narrow=(1,))
    if anchor is None or not isinstance(anchor.op, Conv):
        return None
    op, x, u, block = anchor.op, anchor.inputs[0].type, anchor.inputs[1].type, target.vector_lanes
    tile = winograd_tile(op.algorithm)
    if tile is None or x.layout != channel_layout(4, block) or u.layout != winograd_layout(block, block):
        return None
    n, ic, height, width = x.static_shape
    kh, kw = op.window(u).kernel
    pad = (op.pad[0], op.pad[1], op.pad[2], op.pad[3])
    stride = (op.stride[0], op.stride[1])
    conv = ConvShape(n, ic, height, width, u.static_shape[0], kh, kw, stride=stride, pad=pad, block=block)
    return WinogradShape(replace(conv, weight_bytes=operand_bytes(anchor.inputs[1])), tile)
