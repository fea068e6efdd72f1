"""Convolution as a product of matrices that is never laid out, whose tiles are copied as boxes (TMA).

    as in `conv_wgmma`

A map of the image is for windows (im2col): a copy takes the block of channels of so many pixels at a tap, walks from
row to row and image to image as the products' rows do, with their strides, and gives zeros for padding.  Blocks of
channels are the map's outermost axis, images the one before it, so that a walk ends in the next image, not the next
block.  In a stage the blocks of a place in depth lie side by side, as in memory, which makes them the matrices of eight
rows that products read without a swizzle; so do the weights, which are copied in lines of all columns.

PTX ISA, "Tensors: im2col mode"; NVIDIA's CUTLASS, `SM90_TMA_LOAD_IM2COL`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from cnnc.backends.cuda.conv_mma import MmaConv, matched, shape_of
from cnnc.backends.cuda.conv_wgmma import ConvWgmma
from cnnc.backends.cuda.machine import CHUNK_BYTES
from cnnc.backends.cuda.mma_params import LINE_BYTES, TMA_TILES, BlockTile, TmaParams, seconds
from cnnc.backends.host.device import MAP_TYPES, MOST_BOX, TensorMap
from cnnc.backends.lower.template import params_of
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

_MOST_OFFSET = 30
"""Of a tap from a window's first, in a map of five axes: less than 31, as CUTLASS has it."""


@dataclass(frozen=True)
class ConvTma(ConvWgmma):
    """Convolutions of `conv_wgmma` whose image and weight are within the limits of maps."""

    name: str = "conv_tma"
    tiles: ClassVar[tuple[BlockTile, ...]] = TMA_TILES
    params: ClassVar[type[BlockTile]] = TmaParams

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take what `conv_wgmma` takes, if maps can tell of it."""
        if not super().matches(kernel, target):
            return False
        found = _matched(kernel)
        taps = zip(found.weight.type.static_shape[2:], found.conv.dilation, strict=True)
        near = all((taps - 1) * dilation <= _MOST_OFFSET for taps, dilation in taps)
        return near and image_map(found, MOST_BOX).is_possible and weight_map(found, MOST_BOX).is_possible

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate seconds: a line of a box is a block of a pixel's channels, or part of a line of all columns."""
        tile = params_of(TmaParams, schedule)
        lines = tile.rows * tile.depth + tile.columns * tile.depth * CHUNK_BYTES // LINE_BYTES
        return seconds(shape_of(_matched(kernel)), tile, target, lines)

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Give the PrimFunc over the kernel's inputs, its output, and the maps."""
        from cnnc.backends.load_tvm import load_tvm

        load_tvm()
        from cnnc.backends.cuda.conv_tma_loops import conv_tma_func

        return conv_tma_func(kernel, _matched(kernel), params_of(TmaParams, schedule))


def image_map(found: MmaConv, pixels: int) -> TensorMap:
    """Tell of the image: channels of a block, columns, rows, images, blocks; boxes of so many pixels."""
    images, blocks, height, width, block = found.image.type.physical_shape
    (sh, sw), (top, left, bottom, right) = found.conv.stride, found.conv.pad
    kh, kw = (
        (taps - 1) * dilation
        for taps, dilation in zip(found.weight.type.static_shape[2:], found.conv.dilation, strict=True)
    )
    plane = height * width * CHUNK_BYTES
    return TensorMap(
        str(found.image.dtype),
        (block, width, height, images, blocks),
        (CHUNK_BYTES, width * CHUNK_BYTES, blocks * plane, plane),
        (block, pixels),
        lower=(-left, -top, 0),
        upper=(right - kw, bottom - kh, 0),
        steps=(1, sw, sh, 1, 1),
    )


def weight_map(found: MmaConv, columns: int) -> TensorMap:
    """Tell of the weight: the chunks of all columns, eight bytes at a time, and places in depth.

    A box is a line of so many columns, half of them where that is more than it can be.
    """
    shape = shape_of(found)
    words = CHUNK_BYTES // MAP_TYPES["u64"]
    line = found.weight.type.static_shape[0] * words
    return TensorMap("u64", (line, shape.chunks), (line * MAP_TYPES["u64"],), (box_columns(columns) * words, 1))


def box_columns(columns: int) -> int:
    """Give the columns of a box of weights, which divide those of a tile."""
    most = MOST_BOX * MAP_TYPES["u64"] // CHUNK_BYTES
    return columns // math.ceil(columns / most)


def _matched(kernel: Fused) -> MmaConv:
    found = matched(kernel)
    assert found is not None, "only kernels that match are costed and built"
    return found
