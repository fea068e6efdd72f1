"""Winograd convolution on AMX's matrix tiles, each transformed number in three int8 digits, on blocked channels.

    y = A' [sum over c of (B' x[c] D) * u[o, c]] C     for each tile of m x m outputs, u = G w H'

As in winograd.py, but for the products.  What a tile is transformed to at a position is a row of fixed-point numbers,
one scale for all its channels, and so are the weights of an output at a position, which come as digits: sums of their
products are exact in integers, six products of tiles for 64 channels (see int8_digits.py).  A slice transforms and
splits a chunk of tiles, unless the slice before has done so for other output channels, and multiplies them position by
position, by one block of outputs after the other; sums are scaled to float32 before they are transformed back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of, prologue_flops
from cnnc.backends.cpu.conv_int8x3 import (
    EXPOSED,
    EXPOSED_WEIGHTS,
    FAR_PRODUCT_CYCLES,
    GROUP_CYCLES,
    L2_SHARE,
    NEAR_WEIGHTS,
    PRODUCT_CYCLES,
    VECTOR_CYCLES,
)
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.digit_sizes import DIGITS, IN_A_STEP, PRODUCTS, TILES
from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS, Machine
from cnnc.backends.cpu.winograd import INPUT_CYCLES, MOST_OPERATIONS, OUTPUT_CYCLES, SLICE_CYCLES, prologue_cycles
from cnnc.backends.cpu.winograd_shape import WinogradParams, WinogradShape
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.blocked import channel_layout
from cnnc.ops.digit_conv import MOST_TERMS
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.winograd_digit_conv import WinogradDigitConv
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["DigitWinogradParams", "WinogradInt8x3", "build", "cost", "space"]

MOST_TILES = 64
"""More tiles at once only take more cache."""


@dataclass(frozen=True)
class DigitWinogradParams:
    """Tile sizes: a slice transforms `tiles` tiles and computes one of `oc_slices` parts of the output channels."""

    tiles: int
    oc_slices: int


def space(shape: WinogradShape, machine: Machine) -> Iterator[DigitWinogradParams]:
    """Give the tile sizes worth considering."""
    whole = range(TILE_ROWS, MOST_TILES + 1, TILE_ROWS)
    even = {-(-shape.tiles // count) for count in range(1, 65)}
    sizes = {size for size in {*whole, *even} if size <= min(shape.tiles, MOST_TILES)} or {shape.tiles}
    for size, oc_slices in product(sorted(sizes), (1, 2, 4, 8)):
        if shape.conv.oc_blocks % oc_slices == 0:
            yield DigitWinogradParams(size, oc_slices)


def cost(shape: WinogradShape, params: DigitWinogradParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    conv, positions = shape.conv, shape.positions
    chunks, blocks = -(-shape.tiles // params.tiles), conv.oc_blocks // params.oc_slices
    slices = chunks * params.oc_slices
    steps = -(-conv.ic_blocks // IN_A_STEP)
    step_bytes = DIGITS * TILE_ROWS * 4.0 * TILE_LINE
    product_cycles = PRODUCT_CYCLES if steps * step_bytes <= NEAR_WEIGHTS * machine.l1 else FAR_PRODUCT_CYCLES
    data = DIGITS * 4.0 * TILE_LINE * steps * positions * params.tiles
    product_cycles += FAR_DATA_CYCLES * min(max(data / machine.l2 - L2_SHARE, 0.0), 1.0)
    whole, left = divmod(-(-params.tiles // TILE_ROWS), TILES)
    multiplied = whole * TILES + (TILES if whole else 1) * left
    products = multiplied * steps * len(PRODUCTS) * product_cycles + (whole + left) * GROUP_CYCLES
    weights = steps * step_bytes / machine.memory_bytes
    one = max(products, weights) + EXPOSED_WEIGHTS * min(products, weights)
    one += params.tiles * (SCALED_CYCLES + OUTPUT_CYCLES)
    vector = EXPOSED * 4.0 * conv.block / machine.memory_bytes
    total = blocks * (positions * one + vector * shape.outputs * params.tiles) + SLICE_CYCLES
    tile = (
        positions * (ROW_CYCLES + conv.ic_blocks * (INPUT_CYCLES + VECTOR_CYCLES))
        + vector * conv.ic_blocks * shape.outputs
    )
    if conv.prologue:
        tile += prologue_cycles(shape, machine)
    total = total * machine.turns(slices) + tile * params.tiles * machine.turns(slices, params.oc_slices)
    return total * machine.sharing(slices) / machine.hertz


SCALED_CYCLES, ROW_CYCLES, FAR_DATA_CYCLES = 8.0, 35.0, 16.0
"""Cycles to scale a vector of sums, and to find the scale of a row; and what is added to a product where the tiles'
digits leave L2."""


def build(shape: WinogradShape, params: DigitWinogradParams, machine: Machine, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x, digits and units."""
    from cnnc.backends.cpu.winograd_int8x3_loops import WinogradDigitLoops

    sizes = WinogradParams(params.tiles, min(params.tiles, TILES * TILE_ROWS), 1, params.oc_slices)
    return WinogradDigitLoops(shape, sizes, machine, body).function()


@dataclass(frozen=True)
class WinogradInt8x3:
    """The template: convolutions by Winograd's algorithm with weights in digits, on blocks of 16 channels."""

    name: str = "winograd_int8x3"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a convolution of float32 images in blocks, where there are tiles to compute it in."""
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
        return cost(_known_shape(kernel, target), params_of(DigitWinogradParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        shape, anchor = _known_shape(kernel, target), _anchor_of(kernel, target)
        if anchor is None:
            raise VerifyError(f"{self.name} cannot compute kernel {kernel.anchor}")
        return build(shape, params_of(DigitWinogradParams, schedule), machine_of(target), body_of(kernel, anchor))


def _known_shape(kernel: Fused, target: Target) -> WinogradShape:
    shape = _shape_of(kernel, target)
    if shape is None:
        raise VerifyError(f"winograd_int8x3 cannot compute kernel {kernel.anchor}")
    return shape


def _anchor_of(kernel: Fused, target: Target) -> Node | None:
    return anchor_of(kernel, target, "winograd_digit_conv", prologue=True, digits=(1,))


@lru_cache(64)
def _shape_of(kernel: Fused, target: Target) -> WinogradShape | None:
    """Give the convolution of a kernel, if this template can compute it."""
    if not target.multiplies_tiles:
        return None
    anchor = _anchor_of(kernel, target)
    if anchor is None or not isinstance(anchor.op, WinogradDigitConv):
        return None
    op, x, block = anchor.op, anchor.inputs[0].type, TILE_LINE
    if x.layout != channel_layout(4, block) or x.static_shape[1] > MOST_TERMS:
        return None
    (n, ic, height, width), oc = x.static_shape, anchor.types[0].static_shape[1]
    prologue = prologue_flops(kernel, anchor)
    conv = ConvShape(n, ic, height, width, oc, *op.kernel, pad=op.pad, block=block, prologue=prologue)
    return WinogradShape(conv, op.tile)
