"""Winograd convolution on blocked channels (NCHWc): the kernels and strides that have matrices, any padding.

    y = A' [sum over c of (B' x[c] D) * u[o, c]] C     for each tile of m x m outputs, u = G w H'

A slice transforms a chunk of tiles, which stay in L2, unless the slice before has done so for other output channels.
It multiplies them position by position by the transformed weights in register tiles of `pixels` tiles times some blocks
of output channels, and transforms the sums back, the epilogue applied as they are stored.  What is elementwise before
the convolution is applied as tiles are loaded, and not to the padding.  Tiles are counted through images and rows, so
that chunks are of any size; those that overlap the padding are gathered first.  The matrices and their source are in
`cnnc.ops.winograd`; the division into slices is that of Jia et al., "Optimizing N-dimensional, Winograd-based
convolution for manycore CPUs", PPoPP'18, section 4, without its barriers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of, operand_bytes, prologue_flops
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.cpu.winograd_shape import WinogradParams, WinogradShape
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ops.blocked import channel_layout
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.winograd import winograd_layout, winograd_tile
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["Winograd", "WinogradParams", "WinogradShape", "build", "cost", "space"]

MOST_TILES = 64
"""More tiles at once only take more cache."""

MOST_OPERATIONS = 4
"""Operations of a prologue: a scale, a shift and a ReLU, and one more."""

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
    fresh = machine.turns(slices, params.oc_slices) / machine.turns(slices)
    transforms = positions * params.tiles * (fresh * INPUT_CYCLES * conv.ic_blocks + OUTPUT_CYCLES * blocks)
    if conv.prologue:
        transforms += fresh * prologue_cycles(shape, machine) * params.tiles
    compute = products + transforms

    weights = conv.weight_bytes * shape.vertical.weights * shape.horizontal.weights * channels * blocks * conv.block
    data = 4.0 * positions * channels * params.tiles
    sums = 4.0 * positions * params.tiles * params.group * conv.block
    readings = _readings(params, channels, conv.block, machine)
    near = (weights * readings + (data + SUMS_MOVED * sums) * groups) / machine.l2_bytes
    images = 4.0 * shape.outputs * params.tiles * (fresh * channels * math.prod(conv.stride) + blocks * conv.block)
    again = weights * _beyond(weights + data + sums, machine)
    reading = images / machine.memory_bytes
    reading += _weight_cycles(weights, again, weights * params.oc_slices, chunks, machine)
    spilled = _beyond(data + sums, machine) * (data * (1 + groups) + SUMS_MOVED * sums * groups)
    one = max(compute, reading) + EXPOSED_FAR * min(compute, reading) + EXPOSED_NEAR * near + SLICE_CYCLES
    one += EXPOSED_SPILL * spilled / machine.memory_bytes
    return one * machine.turns(slices) * machine.sharing(slices) / machine.hertz


def _weight_cycles(weights: float, again: float, whole: float, chunks: int, machine: Machine) -> float:
    """Count the cycles in which a slice's weights, of the `whole`, flow from beyond L2, in the mean over all chunks.

    The first chunk finds all of them in memory; the others read some `again`, from where the one before has left them.
    """
    evicted = min(max(whole / machine.l3 - L3_KEEPS, 0.0), 1.0)
    later = evicted / machine.stream_bytes + (1 - evicted) / machine.memory_bytes
    return (weights / machine.stream_bytes + (chunks - 1) * again * later) / chunks


def _readings(params: WinogradParams, channels: int, block: int, machine: Machine) -> float:
    """Give how often weights flow from L2: once for each register tile, unless those of a few vectors stay in L1."""
    tiles = sum(count for _, count in even_split(params.tiles, params.pixels))
    vectors = max(v for v, _ in machine.vector_parts(min(params.pixels, params.tiles), params.group))
    together = 4.0 * channels * (vectors * block + params.pixels)
    lost = min(max((together / machine.l1 - L1_KEEPS) / L1_LOSES, 0.0), 1.0)
    return 1 + (tiles - 1) * lost


def _beyond(size: float, machine: Machine) -> float:
    """Give the share of a working set that L2 does not keep: some earlier than it is full, as others use it, too."""
    return min(max((size / machine.l2 - L2_KEEPS) / L2_LOSES, 0.0), 1.0)


INPUT_CYCLES = 7.0
"""Cycles to transform a vector of input, for each position in the tile."""

OUTPUT_CYCLES = 4.0
"""Cycles to transform a vector of sums back and store it."""

SUMS_MOVED = 3.0
"""How often the sums of products pass between L1 and what is behind it: a line is fetched, written and read again."""

L2_KEEPS, L2_LOSES = 0.75, 0.9
"""The working set, as a share of L2, from which on it spills, and how much more of it spills entirely."""

L1_KEEPS, L1_LOSES = 0.5, 0.5
"""The weights and data of a register tile, as a share of L1, from which on weights leave it between tiles, and how much
more of them all do."""

L3_KEEPS = 0.75
"""The weights, as a share of L3, from which on it loses some between chunks."""

EXPOSED_NEAR, EXPOSED_FAR, EXPOSED_SPILL = 0.4, 0.1, 0.9
"""The shares of the traffic that arithmetic does not hide: from L2; from memory, asked for early; and spilled."""

SLICE_CYCLES = 200.0
"""What starting a slice costs."""

TILE_CYCLES, STORE_CYCLES = 40.0, 4.0
"""What a register tile costs beside its multiply-adds, and each of its sums: they are stored far from each other."""

LOAD_CYCLES = 0.1
"""What each load that is an instruction of its own adds to a term of the sums."""


@lru_cache(4096)
def _group_cycles(params: WinogradParams, channels: int, machine: Machine) -> float:
    """Count the cycles of the products of one position of all tiles of a chunk by one group of output channels."""
    cycles = 0.0
    for pixels, count in even_split(params.tiles, params.pixels):
        for vectors, parts in machine.vector_parts(pixels, params.group):
            step = machine.tile_cycles(pixels, vectors)
            step += LOAD_CYCLES * machine.loading_instructions(pixels, vectors)
            cycles += count * parts * (TILE_CYCLES + STORE_CYCLES * pixels * vectors + channels * step)
    return cycles


GATHERED_CYCLES = 1.5
"""Cycles to load and store a vector of input on its way through a prologue."""


def prologue_cycles(shape: WinogradShape, machine: Machine) -> float:
    """Count the cycles in which the input of a tile is computed; tiles overlap, so most is computed again."""
    vectors = shape.conv.ic_blocks * shape.vertical.inputs * shape.horizontal.inputs
    return vectors * (GATHERED_CYCLES + shape.conv.prologue / machine.fma_ports)


def build(shape: WinogradShape, params: WinogradParams, machine: Machine, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from cnnc.backends.cpu.winograd_loops import WinogradLoops

    return WinogradLoops(shape, params, machine, body).function()


@dataclass(frozen=True)
class Winograd:
    """The template: convolutions whose algorithm is one of Winograd's, on blocked channels.

    What is elementwise before the convolution may be part of the kernel.
    """

    name: str = "winograd"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a convolution of float32 images in blocks with transformed weights."""
        return _shape_of(kernel, target) is not None

    def takes_prologue(self, kernel: Fused, target: Target) -> bool:
        """Take a few operations: most inputs have part in several tiles, and are computed for each."""
        shape = _shape_of(kernel, target)
        return shape is not None and shape.conv.prologue <= MOST_OPERATIONS

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, p) for p in space(_known_shape(kernel, target), machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known_shape(kernel, target), params_of(WinogradParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        shape = _known_shape(kernel, target)
        anchor = anchor_of(kernel, target, "conv", prologue=True, narrow=(1,))
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
    anchor = anchor_of(kernel, target, "conv", prologue=True, narrow=(1,))
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
    conv = replace(conv, prologue=prologue_flops(kernel, anchor), weight_bytes=operand_bytes(anchor.inputs[1]))
    return WinogradShape(conv, tile)
