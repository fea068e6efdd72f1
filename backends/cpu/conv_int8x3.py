"""Convolution on AMX's matrix tiles, each float32 in three int8 digits, on blocked channels (NCHWc).

    y[p, o] = sum over taps k, channels c of x[p * stride - pad + k * dilation, c] * w[k, c, o]

in tiles of 16 pixels x 16 outputs, 64 numbers of the sum at a time.  The digits are of fixed-point numbers with one
scale for all that a pixel of output is the sum of, and one for all weights of an output (see int8_digits.py), so that
their products are added up in integers: six products of tiles for 64 channels, where parts in bf16 take twelve, and
half the bytes to load.  The weights come as digits.

A row is what a pixel's window sees, padding as zeros; with several taps, each number of the input is split for each
window that sees it, which is little beside its products with all outputs.  A slice splits the rows of its pixels once,
unless the slice before was of the same, and then goes through its blocks of output channels: the weights of a block
stay in L1 while all pixels pass, and those of the next are asked for early.  Any window; what is elementwise before the
convolution is computed as its input is split.

Source for rows in place of windows: Chellapilla, Puri and Simard, "High performance convolutional neural networks for
document processing", IWFHR 2006, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of, prologue_flops
from cnnc.backends.cpu.conv_int8x3_shape import DigitParams, row_blocks_of, slices_of
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.digit_sizes import DIGITS, IN_A_STEP, PRODUCTS, TILES
from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS, Machine
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.blocked import channel_layout
from cnnc.ops.digit_conv import MOST_TERMS, DigitConv
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["ConvInt8x3", "build", "cost", "space"]


def space(shape: ConvShape, machine: Machine) -> Iterator[DigitParams]:
    """Give the tile sizes worth considering: whole pairs of tiles of pixels, whose digits L2 can hold."""
    pixels, together = shape.oh * shape.ow, TILES * TILE_ROWS
    most = max(int(machine.l2 / _pixel_bytes(shape)) // together, 1) * together
    parts = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 98)
    sizes = {min(-(-pixels // count // together) * together, pixels) for count in parts}
    sizes |= {-(-pixels // count) for count in parts if pixels % count == 0 and pixels // count >= TILE_ROWS}
    sizes |= {min(size, pixels) for size in (2 * together, 4 * together, 8 * together, most)}
    sizes = {size for size in sizes if size <= most}
    blocks = {-(-shape.oc_blocks // count) for count in (1, 2, 3, 4, 6, 8, 16) if count <= shape.oc_blocks}
    for size, oc_blocks in product(sorted(sizes), sorted(blocks)):
        yield DigitParams(size, oc_blocks)


def cost(shape: ConvShape, params: DigitParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    row_blocks, oc_slices = slices_of(shape, params)
    slices = shape.n * row_blocks * oc_slices
    blocks = row_blocks_of(shape)
    steps = -(-blocks // IN_A_STEP)
    groups = _groups(shape, params) / row_blocks
    block_bytes = steps * DIGITS * TILE_ROWS * 4.0 * TILE_LINE
    near = block_bytes <= NEAR_WEIGHTS * machine.l1
    product_cycles = PRODUCT_CYCLES if near else FAR_PRODUCT_CYCLES
    data = _pixel_bytes(shape) * params.pixels
    product_cycles += FAR_DATA_CYCLES * max(data / machine.l2 - L2_SHARE, 0.0)
    products = groups * (steps * len(PRODUCTS) * TILES * product_cycles + GROUP_CYCLES)
    again = machine.stream_bytes / machine.l2_bytes if shape.oc_blocks * block_bytes + data < machine.l2 else 1.0
    weights = block_bytes / machine.stream_bytes * (1.0 + again * (shape.n * row_blocks - 1)) / (shape.n * row_blocks)
    one = max(products, weights) + EXPOSED_WEIGHTS * min(products, weights)
    one += params.pixels * (FINISH_CYCLES + EXPOSED * 4.0 * shape.block / machine.memory_bytes)
    seen = min(shape.kh * shape.kw, shape.stride[0] * shape.stride[1]) * shape.ic_blocks
    pixel = PIXEL_CYCLES + blocks * (VECTOR_CYCLES + shape.prologue)
    pixel += EXPOSED * 4.0 * seen * shape.block / machine.memory_bytes
    total = (one * params.oc_blocks + SLICE_CYCLES) * machine.turns(slices)
    total += pixel * params.pixels * machine.turns(slices, oc_slices)
    return total * machine.sharing(slices) / machine.hertz


def _pixel_bytes(shape: ConvShape) -> float:
    """Count the bytes of the digits of all that a pixel is the sum of."""
    return DIGITS * 4.0 * TILE_LINE * -(-row_blocks_of(shape) // IN_A_STEP)


def _groups(shape: ConvShape, params: DigitParams) -> int:
    """Count the groups of tiles that an image's pixels are multiplied in."""
    whole, left = divmod(shape.oh * shape.ow, params.pixels)
    together = TILES * TILE_ROWS
    return whole * -(-params.pixels // together) + -(-left // together)


PRODUCT_CYCLES, FAR_PRODUCT_CYCLES, FAR_DATA_CYCLES = 23.0, 44.0, 30.0
"""Cycles of a product of tiles and the loads it needs, where the weights of a block stay in L1, and where not; and what
is added where the pixels' digits leave L2."""

NEAR_WEIGHTS, L2_SHARE = 0.8, 0.4
"""The share of L1 that the weights of a block may take, and the share of L2 that the pixels' digits may."""

GROUP_CYCLES, SLICE_CYCLES = 100.0, 500.0
"""What starting two tiles of pixels costs, and a slice."""

EXPOSED_WEIGHTS = 0.8
"""The share of reading weights, or of the products beside, that the longer of both does not hide."""

EXPOSED = 0.38
"""The share of reading input and writing output that nothing hides."""

FINISH_CYCLES = 7.0
"""Cycles to scale a vector of sums and take it through the epilogue."""

PIXEL_CYCLES, VECTOR_CYCLES = 25.0, 6.0
"""Cycles to find the scale of a pixel, and to split a vector of its channels."""


def build(shape: ConvShape, params: DigitParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from cnnc.backends.cpu.conv_int8x3_loops import DigitLoops

    return DigitLoops(shape, params, body, shape.output_shape).function()


@dataclass(frozen=True)
class ConvInt8x3:
    """The template: `digit_conv` on blocks of 16 channels; with several taps, whole ones."""

    name: str = "conv_int8x3"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a convolution of float32 images in blocks, where there are tiles to compute it in."""
        return _shape_of(kernel, target) is not None

    def takes_prologue(self, kernel: Fused, target: Target) -> bool:
        """Take any where a window is a pixel: it is computed as the input is split, once for each that sees it."""
        shape = _shape_of(kernel, target)
        return shape is not None and shape.kh * shape.kw == 1

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, p) for p in space(_known_shape(kernel, target), machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known_shape(kernel, target), params_of(DigitParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        shape = _known_shape(kernel, target)
        anchor = _anchor_of(kernel, target)
        if anchor is None:
            raise VerifyError(f"{self.name} cannot compute kernel {kernel.anchor}")
        return build(shape, params_of(DigitParams, schedule), body_of(kernel, anchor))


def _known_shape(kernel: Fused, target: Target) -> ConvShape:
    shape = _shape_of(kernel, target)
    if shape is None:
        raise VerifyError(f"conv_int8x3 cannot compute kernel {kernel.anchor}")
    return shape


@lru_cache(64)
def _shape_of(kernel: Fused, target: Target) -> ConvShape | None:
    """Give the convolution of a kernel, if this template can compute it."""
    if not target.multiplies_tiles:
        return None
    anchor = _anchor_of(kernel, target)
    if anchor is None or not isinstance(anchor.op, DigitConv):
        return None
    op, x, block = anchor.op, anchor.inputs[0].type, TILE_LINE
    if x.layout != channel_layout(4, block):
        return None
    (n, ic, height, width), oc = x.static_shape, anchor.types[0].static_shape[1]
    taps = math.prod(op.kernel)
    if taps * ic > MOST_TERMS or (taps > 1 and ic % block):
        return None
    return ConvShape(
        *(n, ic, height, width, oc, *op.kernel),
        stride=op.stride,
        pad=op.pad,
        dilation=op.dilation,
        block=block,
        prologue=prologue_flops(kernel, anchor),
    )


def _anchor_of(kernel: Fused, target: Target) -> Node | None:
    return anchor_of(kernel, target, "digit_conv", prologue=True, digits=(1,))
