"""Convolution on AMX's matrix tiles, each float32 in three bf16 parts, on blocked channels (NCHWc).

    y[p, o] = sum over taps t, channels c of x[p + shift(t), c] * w[t, c, o]        in tiles of 16 pixels x 16 outputs

A slice splits its input into parts once, laid out so that 16 pixels of 32 channels are a tile for every tap (see
planes.py), unless the slice before was of the same input.  Then it goes through its blocks of output channels: up to
four tiles of sums stay in registers for all taps and channels, and each tile of weights serves all of them.  Weights
are split in the shadow of the tile unit: while the first pixels are multiplied by those two steps before, and the first
of a block while the last pixels of the block before are.  The parts, and why their products are as good as float32, are
in bf16_parts.py.  Any stride, padding and dilation; what is elementwise before the convolution is computed as its input
is split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import (
    anchor_of,
    body_of,
    machine_of,
    operand_bytes,
    prologue_flops,
    stored_operand,
)
from cnnc.backends.cpu.conv_bf16x3_shape import MatrixParams, is_pointwise, part_products, reshaped
from cnnc.backends.cpu.conv_shape import MOST_PARTS, ConvShape, rows_read
from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS, Machine
from cnnc.backends.cpu.planes import Planes
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Value
from cnnc.ir.types import DType
from cnnc.ops.blocked import channel_layout, weight_layout
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.round_bf16 import RoundBf16
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["ConvBf16x3", "build", "cost", "space"]

MOST_TILES = 4
"""Tiles of sums, beside three of weights and one of input in eight registers."""


def space(shape: ConvShape, machine: Machine) -> Iterator[MatrixParams]:
    """Give the tile sizes worth considering."""
    rows = reshaped(shape).oh
    parts = [
        count for count in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64) if count <= rows
    ]
    blocks = sorted({-(-shape.oc_blocks // count) for count in (1, 2, 3, 4, 6, 8, 16) if count <= shape.oc_blocks})
    for row_count, oc_blocks in product(sorted({_in_tiles(shape, -(-rows // count)) for count in parts}), blocks):
        for tiles, pairs in product(range(2, MOST_TILES + 1), _passes(shape)):
            yield MatrixParams(row_count, tiles, oc_blocks, pairs)


def _passes(shape: ConvShape) -> list[int]:
    """Give the pairs of blocks of input channels to consider for a pass: all, or few where one tap reads each once."""
    pairs = -(-shape.ic_blocks // 2)
    return [0, *(few for few in (2, 4) if shape.kh * shape.kw == 1 and few < pairs and pairs % few == 0)]


def _in_tiles(shape: ConvShape, pixels: int) -> int:
    """Round pixels of a 1x1 convolution up to what fills the registers."""
    together = MOST_TILES * TILE_ROWS
    return min(-(-pixels // together) * together, shape.h * shape.w) if is_pointwise(shape) else pixels


def cost(shape: ConvShape, params: MatrixParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    shape = reshaped(shape)
    planes = Planes(shape, params.rows)
    pairs = -(-shape.ic_blocks // 2)
    passes = pairs // params.pairs if params.pairs else 1
    steps = pairs * shape.kh * shape.kw
    x_parts, w_parts = shape.parts
    number = sum(map(len, part_products(x_parts, w_parts)))
    parts = PART_BYTES * x_parts * planes.pixels * pairs / passes
    row_blocks, oc_slices = -(-shape.oh // params.rows), -(-shape.oc_blocks // params.oc_blocks)
    slices = shape.n * row_blocks * oc_slices

    groups = even_split(-(-planes.outputs // TILE_ROWS), params.tiles)
    products = sum(count * (steps * number * _product_cycles(size) + GROUP_CYCLES) for size, count in groups)
    products *= 1.0 + FAR_PARTS * min(max(parts / (FAR_SHARE * machine.l2) - 0.5, 0.0), 1.0)
    if passes > 1:
        products += passes * (WAITING_TILE_CYCLES * planes.outputs / TILE_ROWS + FIRST_SPLIT_CYCLES)
    first = steps * SPLIT_CYCLES * TILE_ROWS * EXPOSED_SPLIT
    weights = shape.weight_bytes * steps * 2.0 * TILE_LINE * shape.block
    one = max(products + first, weights / machine.memory_bytes) + BLOCK_CYCLES
    one += planes.outputs * FINISH_CYCLES
    w_bytes = PART_BYTES * w_parts * steps / passes * TILE_ROWS
    if parts + w_bytes <= NEAR_BYTES:
        one *= NEAR
    splitting = (SPLIT_CYCLES + shape.prologue) * planes.pixels * pairs
    total = one * params.oc_blocks + SLICE_CYCLES
    resident = parts + w_bytes + 4.0 * planes.outputs * shape.block
    resident += 4.0 * planes.outputs * shape.block * params.oc_blocks if passes > 1 else 0.0
    if resident > L2_SHARE * machine.l2:
        spilled = min(resident / (L2_SHARE * machine.l2) - 1.0, 1.0)
        total += spilled * params.oc_blocks * passes * parts / machine.memory_bytes
    vector = EXPOSED * 4.0 * shape.block / machine.memory_bytes
    total += vector * params.oc_blocks * planes.outputs
    splitting += vector * shape.ic_blocks * rows_read(shape, params.rows) * shape.w
    alike = oc_slices if passes == 1 else 1
    total = total * machine.turns(slices) + splitting * machine.turns(slices, alike)
    return total * machine.sharing(slices) / machine.hertz


def _product_cycles(tiles: int) -> float:
    """Count the cycles of a product of parts of 32 channels for some tiles: each sum waits for the one before it."""
    return max(TILE_CYCLES * tiles, WAITING_CYCLES)


TILE_CYCLES = 23.0
"""Cycles of a product of tiles, and the loads it needs."""

WAITING_CYCLES = 67.0
"""Cycles from one product to the next that adds to the same tile."""

SPLIT_CYCLES, EXPOSED_SPLIT = 29.0, 0.18
"""Cycles to split two vectors into parts; the share of it that products do not hide, for weights."""

GROUP_CYCLES = 27.0
"""Cycles until the sums of a group of tiles are known and those of the next begin."""

EXPOSED = 0.38
"""The share of reading input and writing output that nothing hides."""

FINISH_CYCLES = 2.6
"""Cycles to take a vector of sums through the epilogue."""

FAR_PARTS, FAR_SHARE = 0.25, 0.36
"""By how much products take longer whose parts take a share of L2: half of it does no harm yet."""

NEAR, NEAR_BYTES = 0.72, 31 << 10
"""How much less time a block takes whose parts, of input and of weights, stay in L1: 48 KiB in CPUs with tiles."""

WAITING_TILE_CYCLES, FIRST_SPLIT_CYCLES = 40.0, 100.0
"""Cycles to write and read a tile of sums between passes, and to split the first weights of a pass."""

BLOCK_CYCLES, SLICE_CYCLES = 264.0, 500.0
"""What starting a block of outputs costs, and a slice."""

PART_BYTES = 64.0
"""Bytes of a part of two vectors."""

L2_SHARE = 0.68
"""The share of L2 that parts may take."""


def build(shape: ConvShape, params: MatrixParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from cnnc.backends.cpu.conv_bf16x3_loops import MatrixLoops

    return MatrixLoops(shape, params, body).function()


@dataclass(frozen=True)
class ConvBf16x3:
    """The template: 2-D convolutions whose algorithm is `bf16x3`, of one group, on blocks of 16 channels."""

    name: str = "conv_bf16x3"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a convolution of float32 images in blocks, where there are tiles to compute it in."""
        return _shape_of(kernel, target) is not None

    def takes_prologue(self, kernel: Fused, target: Target) -> bool:
        """Take any: it is computed as the input is split."""
        return _shape_of(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, p) for p in space(_known_shape(kernel, target), machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known_shape(kernel, target), params_of(MatrixParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        shape = _known_shape(kernel, target)
        anchor = anchor_of(kernel, target, "conv", prologue=True, narrow=(1,))
        if anchor is None:
            raise VerifyError(f"{self.name} cannot compute kernel {kernel.anchor}")
        return build(shape, params_of(MatrixParams, schedule), body_of(kernel, anchor))


def _known_shape(kernel: Fused, target: Target) -> ConvShape:
    shape = _shape_of(kernel, target)
    if shape is None:
        raise VerifyError(f"conv_bf16x3 cannot compute kernel {kernel.anchor}")
    return shape


def bf16_parts(operand: Value) -> int:
    """Give how many bf16 numbers hold all of a number of an operand: fewer if it comes from 16 bits."""
    if isinstance(operand.op, RoundBf16):
        return 1
    return {DType.BF16: 1, DType.F16: 2}.get(stored_operand(operand).dtype, MOST_PARTS)


@lru_cache(64)
def _shape_of(kernel: Fused, target: Target) -> ConvShape | None:
    """Give the convolution of a kernel, if this template can compute it."""
    if not target.multiplies_tiles:
        return None
    anchor = anchor_of(kernel, target, "conv", prologue=True, narrow=(1,))
    if anchor is None or not isinstance(anchor.op, Conv) or anchor.op.algorithm != "bf16x3":
        return None
    op, x, w, block = anchor.op, anchor.inputs[0].type, anchor.inputs[1].type, TILE_LINE
    if x.layout != channel_layout(4, block) or w.layout != weight_layout(4, block, block):
        return None
    (oc, _, kh, kw), (n, ic, height, width) = w.static_shape, x.static_shape
    if op.groups > 1:
        return None
    return ConvShape(
        *(n, ic, height, width, oc, kh, kw),
        stride=(op.stride[0], op.stride[1]),
        pad=(op.pad[0], op.pad[1], op.pad[2], op.pad[3]),
        dilation=(op.dilation[0], op.dilation[1]),
        block=block,
        prologue=prologue_flops(kernel, anchor),
        weight_bytes=operand_bytes(anchor.inputs[1]),
        parts=(bf16_parts(anchor.inputs[0]), bf16_parts(anchor.inputs[1])),
    )
