"""Direct convolution of few input channels, as a network's first one, on a GPU's ordinary cores.

    y[n, o, oh, ow] = epilogue(sum over ic, r, s of x[n, ic, oh * stride - pad + r * dilation, ...] * w[o, ic, r, s])

The image is plain; the result lies as the weight says, plain or in blocks of channels.  A block of threads has the
patch of the image that its outputs need in shared memory, each number once, and the weights of its channels: of the
whole kernel, or of a row of it at a time.  A warp has one group of channels, so that its weights are read for all
lanes at once, and each lane a few rows of pixels.  Columns that the stride skips lie apart in shared memory: lanes read
neighbours, whatever the stride.  Sums are f32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

from cnnc.backends.cuda.conv_gemm import MOST_IMAGES
from cnnc.backends.cuda.direct import VECTOR, Work, image_block, moved_bytes, seconds
from cnnc.backends.cuda.first_layout import is_cheaper_plain
from cnnc.backends.cuda.machine import COPY, GPUS, LANES
from cnnc.backends.cuda.operands import STORED, follows_in_registers
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ops.blocked import weight_layout
from cnnc.ops.cast import Cast
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.round_tf32 import RoundTf32
from cnnc.target import Target

MOST_CHANNELS = 4
"""Of the input."""

MOST_TAPS = 16
"""Columns of a kernel, whose products are written out."""

SMALLEST = 8
"""Output channels of a thread at least: whole blocks of them."""

MOST_SUMS = 32
"""Of a thread: with more, registers do not suffice for what is loaded ahead."""

_RANK = 4
_BANKS = 32


@dataclass(frozen=True)
class FirstParams:
    """A thread's output channels and rows, a warp's columns, a block's warps, and rows of the kernel at a time."""

    channels: int
    rows: int
    width: int
    warps: int
    taps: int

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.warps * LANES

    @property
    def lane_rows(self) -> int:
        """Rows of pixels that a warp has side by side."""
        return LANES // self.width

    @property
    def height(self) -> int:
        """The output rows of a block."""
        return self.rows * self.lane_rows

    @property
    def outputs(self) -> int:
        """The output channels of a block."""
        return self.channels * self.warps


@dataclass(frozen=True)
class FirstConv:
    """A kernel's convolution: its node, its operands' shapes, and how many output channels lie together."""

    node: Node
    conv: Conv
    block: int

    @property
    def image(self) -> tuple[int, ...]:
        """The shape of the image."""
        return self.node.inputs[0].type.static_shape

    @property
    def weight(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.node.inputs[1].type.static_shape

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of the result."""
        return self.node.types[0].static_shape

    def grid(self, tile: FirstParams) -> tuple[int, int, int]:
        """Count the blocks: across, down, images and groups of channels."""
        images, channels, height, width = self.output
        groups = math.ceil(channels / tile.outputs)
        return math.ceil(width / tile.width), math.ceil(height / tile.height), images * groups


@dataclass(frozen=True)
class Patch:
    """A block's part of the image in shared memory: channels of rows, each row by the columns' remainders.

    Column x is at (x mod stride) * `phase` + x div stride of its row.  A row is read in vectors of `vector` columns; no
    window has the first `lead` columns.
    """

    channels: int
    rows: int
    columns: int
    vector: int
    lead: int
    phase: int
    pitch: int

    @property
    def numbers(self) -> int:
        """Its size, of whole vectors."""
        return math.ceil(self.channels * self.rows * self.pitch / VECTOR) * VECTOR


def patch_of(found: FirstConv, tile: FirstParams) -> Patch:
    """Give the patch for a stage: all rows that the kernel meets, or one for each output row."""
    (_, channels, _, _), (_, _, kh, kw) = found.image, found.weight
    (down, across), (dh, dw) = found.conv.stride, found.conv.dilation
    whole = tile.taps == kh
    rows = (tile.height - 1) * down + (kh - 1) * dh + 1 if whole else tile.height
    # A vector is in the image, or in its padding, as a whole; tiles begin where it does.
    vector = VECTOR if found.image[3] % VECTOR == 0 else 1
    lead = -found.conv.pad[1] % vector
    columns = math.ceil((lead + (tile.width - 1) * across + (kw - 1) * dw + 1) / vector) * vector
    phase = math.ceil(columns / across)
    step = down if whole else 1
    least = phase * across
    # Rows of a warp's pixels should not be in the same banks, where that is possible.
    apart = (pitch for pitch in range(least, least + _BANKS) if step * pitch % _BANKS == tile.width % _BANKS)
    return Patch(channels, rows, columns, vector, lead, phase, next(apart, least))


def weight_pitch(tile: FirstParams) -> int:
    """Give the distance of a term's weights to the next one's: vectors, and few terms in the same banks."""
    return tile.outputs + VECTOR


def shared_numbers(found: FirstConv, tile: FirstParams) -> int:
    """Count the numbers in shared memory."""
    _, channels, _, kw = found.weight
    return patch_of(found, tile).numbers + channels * tile.taps * kw * weight_pitch(tile)


@dataclass(frozen=True)
class ConvFirst:
    """Convolutions of up to four plain channels, in one group, with an elementwise epilogue."""

    name: str = "conv_first"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take f32 and 16-bit operands, rounded to tf32 or not."""
        return target.is_gpu and matched(kernel) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tiles that fit into shared memory, and are not much larger than the result."""
        found = _matched(kernel)
        return [
            schedule_of(self.name, tile)
            for tile in _tiles(found)
            if 4 * shared_numbers(found, tile) <= GPUS[target.arch].most_shared_bytes
        ]

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds: products and loads from shared memory, after what it takes to fill it."""
        found, tile = _matched(kernel), params_of(FirstParams, schedule)
        patch, (_, channels, kh, kw) = patch_of(found, tile), found.weight
        stages, terms = kh // tile.taps, channels * kh * kw
        sums = tile.rows * tile.channels
        vectors = stages * patch.channels * patch.rows * patch.columns // patch.vector
        weights = terms * tile.outputs // min(found.block, VECTOR)
        # A vector is one load, and is stored number by number.
        copied = vectors * (_COPY_PIXEL + 2 * patch.vector) + weights * COPY
        instructions = (
            _START + terms * (sums + tile.channels / VECTOR + tile.rows) + copied / tile.threads + sums * _EPILOGUE
        )
        work = Work(
            math.prod(found.grid(tile)),
            tile.threads,
            instructions,
            1 + 2 * stages,
            min(255, 40 + sums + tile.channels),
            4 * shared_numbers(found, tile),
        )
        return seconds(work, moved_bytes(kernel), target)

    def prefers_plain(self, node: Node, block: int, target: Target) -> bool:
        """Whether a convolution is better left to this template than to tensor cores, for which images change."""
        return is_cheaper_plain(self, node, block, target)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, then its output."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.conv_first_loops import conv_first_func

        return conv_first_func(kernel, _matched(kernel), params_of(FirstParams, schedule))


_START, _COPY_PIXEL, _EPILOGUE = 100, 40, 6
"""Instructions of a thread to find its place, to put a vector into the patch, and to finish an element."""


def _tiles(found: FirstConv) -> Iterator[FirstParams]:
    _, outputs, height, width = found.output
    kh = found.weight[2]
    for channels, rows, columns, warps, taps in product(
        (SMALLEST, 2 * SMALLEST), (1, 2, 4), (8, 16, 32), (1, 2, 4, 8), {kh, 1}
    ):
        tile = FirstParams(channels, rows, columns, warps, taps)
        if channels * rows > MOST_SUMS:
            continue
        smallest = channels == SMALLEST and warps == 1, rows == 1, columns == 8
        fits = tile.outputs < outputs + SMALLEST, tile.height < 2 * height, columns < 2 * width
        if all(either or other for either, other in zip(smallest, fits, strict=True)):
            yield tile


@lru_cache(256)
def matched(kernel: Fused) -> FirstConv | None:
    """Find a kernel's convolution of few channels; None where it is none, or is none for this template."""
    node = follows_in_registers(kernel, Conv)
    if node is None or not isinstance(node.op, Conv) or node.op.algorithm != "direct" or node.op.groups != 1:
        return None
    image, weight = (value.type for value in node.inputs[:2])
    if not all(_is_read(value, kernel.body) for value in node.inputs[:2]) or node.types[0].dtype not in STORED:
        return None
    block = image_block(node.types[0])
    if block is None or image.layout is not None:
        return None
    images, outputs, height, _ = node.types[0].static_shape
    launched = max(height, images * math.ceil(outputs / SMALLEST)) <= MOST_IMAGES
    fits = launched and image.static_shape[1] <= MOST_CHANNELS and weight.static_shape[3] <= MOST_TAPS
    lies = weight.layout == (weight_layout(_RANK, 1, block) if block > 1 else None)
    return FirstConv(node, node.op, block) if fits and lies and block <= SMALLEST else None


def _is_read(operand: Value, body: Graph) -> bool:
    """Whether an operand is an input, perhaps widened or rounded."""
    while isinstance(operand.op, Cast | RoundTf32):
        (operand,) = operand.inputs
    return operand in body.inputs and operand.dtype in STORED


def _matched(kernel: Fused) -> FirstConv:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
