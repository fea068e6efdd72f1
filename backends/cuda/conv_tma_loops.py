"""The product of matrices of `conv_tma`: the boxes of a tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from cnnc.backends.cuda import tma
from cnnc.backends.cuda.conv_mma import MmaConv, shape_of
from cnnc.backends.cuda.conv_mma_loops import conv_product
from cnnc.backends.cuda.conv_tma import box_columns, image_map, weight_map
from cnnc.backends.cuda.machine import CHUNK_BYTES
from cnnc.backends.cuda.mma_launch import product_func
from cnnc.backends.cuda.mma_params import SWIZZLED, TmaParams
from cnnc.backends.cuda.tensor_maps import mapped
from cnnc.backends.cuda.tma_tile import BoxCopy, BoxedOperand, Lines
from cnnc.backends.host.device import MAP_TYPES
from cnnc.ops.fused import Fused


def conv_tma_func(kernel: Fused, found: MmaConv, tile: TmaParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, its output, and the maps."""

    def image(x: Any, group: Any) -> BoxedOperand:
        def copies(pixel: Any, chunk: Any) -> Sequence[BoxCopy]:
            start = _window(found, pixel)
            return [BoxCopy(i * tile.rows, tma.IM2COL, _tap(found, group, start, chunk + i)) for i in range(tile.depth)]

        return BoxedOperand(mapped(x, image_map(found, tile.rows), 0), Lines.CHUNKS, copies)

    def weight(w: Any, group: Any) -> BoxedOperand:
        box, words = box_columns(tile.columns), CHUNK_BYTES // MAP_TYPES["u64"]

        def copies(column: Any, chunk: Any) -> Sequence[BoxCopy]:
            first = group * shape_of(found).columns + column
            return [
                BoxCopy(i * tile.columns + part, tma.tiled(2), ((first + part) * words, chunk + i))
                for i in range(tile.depth)
                for part in range(0, tile.columns, box)
            ]

        return BoxedOperand(mapped(w, weight_map(found, tile.columns), 1), Lines.CHUNKS, copies)

    return product_func(conv_product(kernel, found, image, weight), tile)


def _window(found: MmaConv, pixel: Any) -> tuple[Any, Any, Any]:
    """Give the first column, the first row and the image of an output pixel's window."""
    _, _, oh, ow = found.node.types[0].static_shape
    (sh, sw), (top, left, *_) = found.conv.stride, found.conv.pad
    return pixel % ow * sw - left, pixel // ow % oh * sh - top, pixel // (oh * ow)


def _tap(found: MmaConv, group: Any, start: tuple[Any, Any, Any], chunk: Any) -> tuple[Any, ...]:
    """Give where a copy starts, and the tap, by the chunk counted as (r, s, block); beyond the last one all is 0."""
    all_blocks = found.image.type.physical_shape[1]
    blocks, kw = all_blocks // found.conv.groups, found.weight.type.static_shape[3]
    tap, block = chunk // blocks, group * blocks + chunk % blocks
    r, s = tap // kw, tap % kw
    chunks = shape_of(found).chunks
    if chunks % SWIZZLED:
        there = chunk < chunks
        # Not the weight's zeros alone, which would make NaN of an infinite number.
        block, r = tirx.Select(there, block, all_blocks), tirx.Select(there, r, 0)
    dh, dw = found.conv.dilation
    return 0, *start, block, s * dw, r * dh, 0
