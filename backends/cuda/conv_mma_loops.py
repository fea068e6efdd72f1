"""The product of matrices of `conv_mma`: where the chunks of a tile are in image and weight, and where its sums go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.conv_mma import MmaConv, shape_of
from cnnc.backends.cuda.launches import address, within
from cnnc.backends.cuda.mma_launch import Product, product_func
from cnnc.backends.cuda.mma_params import BlockTile, MmaShape
from cnnc.backends.cuda.mma_ring import Operand
from cnnc.backends.cuda.tma_tile import BoxedOperand
from cnnc.ops.fused import Fused


def conv_mma_func(kernel: Fused, found: MmaConv, tile: BlockTile) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""

    def image(x: Any, group: Any) -> Operand:
        return Operand(_image(found, x, group))

    def weight(w: Any, group: Any) -> Operand:
        return Operand(_weight(found, w, shape_of(found), group))

    return product_func(conv_product(kernel, found, image, weight), tile)


OperandOf = Callable[[Any, Any], Operand | BoxedOperand]
"""Gives an operand by its buffer and the group."""


def conv_product(kernel: Fused, found: MmaConv, image: OperandOf, weight: OperandOf) -> Product:
    """Tell a kernel's product: pixels of all images by output channels."""
    body = body_around(kernel, found.node).bind(found.node.types[0].physical_shape)
    buffers = dict(zip(kernel.body.inputs, body.inputs, strict=True))
    _, _, oh, ow = found.node.types[0].static_shape

    def index(pixel: Any, block: Any, channel: Any) -> tuple[Any, ...]:
        return pixel // (oh * ow), block, pixel // ow % oh, pixel % ow, channel

    return Product(
        body,
        shape_of(found),
        lambda group: image(buffers[found.image], group),
        lambda group: weight(buffers[found.weight], group),
        found.block,
        index,
    )


def _image(found: MmaConv, x: Any, group: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Find the chunk of an output pixel's window: the pixel counted through all images, the chunk by (r, s, block)."""
    images, _, oh, ow = found.node.types[0].static_shape
    _, all_blocks, height, width, _ = found.image.type.physical_shape
    blocks = all_blocks // found.conv.groups
    kh, kw = found.weight.type.static_shape[2:]
    (sh, sw), (top, left, *_), (dh, dw) = found.conv.stride, found.conv.pad, found.conv.dilation

    def chunk_at(pixel: Any, chunk: Any) -> tuple[Any, Any]:
        tap, block = chunk // blocks, chunk % blocks
        h = pixel // ow % oh * sh - top + tap // kw * dh
        w = pixel % ow * sw - left + tap % kw * dw
        valid = [pixel < images * oh * ow, tap < kh * kw]
        valid += within(h, -top, (oh - 1) * sh - top + (kh - 1) * dh, height)
        valid += within(w, -left, (ow - 1) * sw - left + (kw - 1) * dw, width)
        # Where it is not valid, the address is not used.
        return address(x, pixel // (oh * ow), group * blocks + block, h, w, 0), tirx.all(*valid)

    return chunk_at


def _weight(found: MmaConv, w: Any, shape: MmaShape, group: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Find the chunk of an output channel of a group."""
    channels = found.weight.type.static_shape[0]

    def chunk_at(channel: Any, chunk: Any) -> tuple[Any, Any]:
        # Chunks of all channels lie side by side, and (r, s, block) is how HWIO8i counts them.
        place = chunk * channels + group * shape.columns + channel
        return address(w, 0, 0, 0, place, 0), tirx.all(channel < shape.columns, chunk < shape.chunks)

    return chunk_at
