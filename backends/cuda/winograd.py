"""Winograd convolution in f32 on a GPU's ordinary cores: the kernels and strides that have matrices, any padding.

    data[p, c, t] = (B' x[c] D)[p] of tile t       sums[p, o, t] = sum over c of u[o, c, p] * data[p, c, t]
    y = epilogue(A' sums C)                        for each tile of m x m outputs, u = G w H'

Three launches, which hand each other numbers through scratch memory: the transform of the input, a product of matrices
for each position p in a tile, and the transform of the sums with the epilogue.  Tiles are counted through images and
rows, and lie side by side, so that neighbouring threads have neighbouring tiles in all three.  Where they are so many
that scratch memory would be large, one part of them after the other goes through three launches.  The matrices and
their source are in `cnnc.ops.winograd`; that the products are those of matrices is Lavin and Gray's, CVPR 2016,
section 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cnnc.backends.cuda.direct import Work, moved_bytes, seconds
from cnnc.backends.cuda.ffma_params import NUMBERS, FfmaParams
from cnnc.backends.cuda.machine import GPUS, SECONDS_PER_LAUNCH
from cnnc.backends.cuda.operands import follows_in_registers
from cnnc.backends.cuda.winograd_params import TILES, product_seconds
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Node
from cnnc.ir.types import DType
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.winograd import Transform, transform, winograd_rows_layout
from cnnc.target import Target

MOST_SCRATCH = 512 << 20
"""Bytes of scratch memory, which an artifact holds as long as it is loaded; from there on tiles go in parts."""

MOST_PARTS = 8
"""Each has launches, and machine code, of its own."""

THREADS = 128
"""Of a block that transforms: each thread a tile of one channel."""

_RANK = 4
_WHOLE = max(tile.columns for tile in TILES)
_MOST_BLOCKS = 65535
_REGISTERS = 64
_L2_KEEPS = 0.5
"""The share of the L2 cache that what is handed on may take without going through memory."""


@dataclass(frozen=True)
class WinogradConv:
    """A kernel's convolution: its node, and the filters along its axes."""

    node: Node
    conv: Conv
    vertical: Transform
    horizontal: Transform

    @property
    def positions(self) -> int:
        """Products for a tile and a pair of channels."""
        return self.vertical.positions * self.horizontal.positions

    @property
    def image(self) -> tuple[int, ...]:
        """The shape of the image."""
        return self.node.inputs[0].type.static_shape

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.node.types[0].static_shape

    @property
    def grid(self) -> tuple[int, int, int]:
        """Count the tiles: images, rows of tiles, tiles in a row."""
        images, _, height, width = self.output
        return images, math.ceil(height / self.vertical.tile), math.ceil(width / self.horizontal.tile)

    @property
    def tiles(self) -> int:
        """All tiles."""
        return math.prod(self.grid)

    @property
    def parts(self) -> int:
        """Count the parts that tiles go in."""
        numbers = self.positions * (self.image[1] + self.output[1]) * self.tiles
        return math.ceil(4 * numbers / MOST_SCRATCH)

    @property
    def part(self) -> int:
        """The tiles of a part, of several but for the last whole blocks of the product."""
        return self.tiles if self.parts == 1 else math.ceil(self.tiles / self.parts / _WHOLE) * _WHOLE

    @property
    def pitch(self) -> int:
        """From the numbers of one channel to the next in scratch memory: whole chunks."""
        return math.ceil(self.part / NUMBERS) * NUMBERS

    @property
    def data_shape(self) -> tuple[int, int, int]:
        """Transformed input."""
        return self.positions, self.image[1], self.pitch

    @property
    def sums_shape(self) -> tuple[int, int, int]:
        """Sums of products."""
        return self.positions, self.output[1], self.pitch

    @property
    def scratch_bytes(self) -> int:
        """What the launches hand each other."""
        return 4 * (math.prod(self.data_shape) + math.prod(self.sums_shape))


@dataclass(frozen=True)
class Winograd:
    """Convolutions whose algorithm is `winograd2` or `winograd4`, of plain images, with an elementwise epilogue."""

    name: str = "winograd"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take f32 images and transformed weights in rows, if the parts are not too many."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give every tile of the product."""
        return [schedule_of(self.name, tile) for tile in TILES]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds: of launches none begins before the one before it has ended."""
        found, tile = _matched(kernel), params_of(FfmaParams, schedule)
        gpu, parts = GPUS[target.arch], found.parts
        data, sums = 4 * math.prod(found.data_shape), 4 * math.prod(found.sums_shape)
        near = data + sums <= _L2_KEEPS * gpu.l2_bytes
        # Bytes that take memory as long as those handed on take.
        share = gpu.bandwidth / gpu.l2_bandwidth if near else 1.0
        image, weight = (value.type.nbytes for value in found.node.inputs[:2])
        after = moved_bytes(kernel) - image - weight
        (_, channels, _, _), (_, outputs, _, _) = found.image, found.output
        transforms = _transform_seconds(found, channels, image / parts + share * data, target)
        transforms += _transform_seconds(found, outputs, after / parts + share * sums, target)
        bandwidth = gpu.bandwidth / share
        products = product_seconds(tile, found.positions, outputs, found.part, channels, bandwidth, target)
        return parts * (transforms + max(products, weight / gpu.bandwidth) + SECONDS_PER_LAUNCH)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.winograd_loops import winograd_func

        return winograd_func(kernel, _matched(kernel), params_of(FfmaParams, schedule))


_ELEMENT = 3
"""Instructions to load or store a number of a tile: its address, whether it is there."""


def _transform_seconds(found: WinogradConv, channels: int, nbytes: float, target: Target) -> float:
    """Estimate the launch that transforms a part's tiles of some channels, to or from their positions."""
    v, h = found.vertical, found.horizontal
    numbers = v.inputs * h.inputs + v.positions * h.positions
    arithmetic = h.inputs * v.positions * v.inputs + v.positions * h.positions * h.inputs
    blocks = math.ceil(channels * found.part / THREADS)
    return seconds(Work(blocks, THREADS, _ELEMENT * numbers + arithmetic, 2, _REGISTERS), round(nbytes), target)


@lru_cache(256)
def matched(kernel: Fused) -> WinogradConv | None:
    """Find a kernel's convolution; None where it is not for this template."""
    node = follows_in_registers(kernel, Conv)
    if node is None or not isinstance(node.op, Conv) or node.op.tile is None or node.types[0].rank != _RANK:
        return None
    image, weight = node.inputs[:2]
    if any(value not in kernel.body.inputs or value.dtype is not DType.F32 for value in node.inputs):
        return None
    if image.type.layout is not None or weight.type.layout != winograd_rows_layout():
        return None
    axes = zip(node.op.window(weight.type).kernel, node.op.stride, strict=True)
    vertical, horizontal = (transform(node.op.tile, taps, stride) for taps, stride in axes)
    found = WinogradConv(node, node.op, vertical, horizontal)
    return found if found.output[1] <= _MOST_BLOCKS and found.parts <= MOST_PARTS else None


def _matched(kernel: Fused) -> WinogradConv:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
