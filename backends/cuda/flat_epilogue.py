"""Kernels of a convolution with what follows it told of flat pixels: [n, c, h, w] as [n, c, h * w], the same bytes.

A product of matrices has pixels in one dimension; elementwise followers do not mind, as long as no operand tells rows
of an image from its columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Node, Value
from cnnc.ir.op import Kind
from cnnc.ir.types import DType, TensorType
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused
from cnnc.ops.source import Constant, Input

_RANK = 4


@dataclass(frozen=True)
class FlatKernel:
    """A kernel whose anchor is `conv`, of the body `kernel`.

    `products` stands for the convolution's result with flat pixels, `output` for the kernel's, computed from it; `of`
    gives the stand-ins of the kernel's inputs that followers read.
    """

    kernel: Fused
    node: Node
    conv: Conv
    products: Value
    output: Value
    of: dict[Value, Value]

    @property
    def operands(self) -> tuple[Value, ...]:
        """What the convolution reads: image, weight, and perhaps a bias."""
        return self.node.inputs


@lru_cache(256)
def flat_kernel(kernel: Fused) -> FlatKernel | None:
    """Tell a kernel of flat pixels; None where it is none."""
    body = kernel.body
    node = _anchor(kernel)
    if node is None or not isinstance(node.op, Conv) or len(body.outputs) != 1:
        return None
    n, channels, h, w = node.types[0].static_shape
    products = call(Input("products", TensorType((n, channels, h * w))))
    flat: dict[Value, Value] = {node.values[0]: products}
    for follower in _followers(kernel, node):
        if follower.op.kind is not Kind.ELEMENTWISE:
            return None
        inputs = [_flat_operand(value, flat, node, (h, w)) for value in follower.inputs]
        known = [value for value in inputs if value is not None]
        if len(known) < len(inputs):
            return None
        try:
            results = call(follower.op, *known).node.values
        except ShapeError:
            return None
        for value, result in zip(follower.values, results, strict=True):
            if result.type.shape != _flat_shape(value.type.static_shape, (h, w)):
                return None
            flat[value] = result
    output = flat.get(body.outputs[0])
    if output is None or output.type != products.type:
        return None
    return FlatKernel(kernel, node, node.op, products, output, {v: f for v, f in flat.items() if v in body.inputs})


def _anchor(kernel: Fused) -> Node | None:
    """Give the convolution of one group that a kernel is about, if all is f32 in plain layouts and known sizes."""
    body = kernel.body
    types = [type_ for node in body.nodes for type_ in node.types]
    if any(not t.is_static or t.dtype is not DType.F32 or t.layout is not None or 0 in t.static_shape for t in types):
        return None
    found = [node for node in body.nodes if node.inputs and node.op.kind >= Kind.REDUCTION]
    if len(found) != 1 or not isinstance(found[0].op, Conv) or found[0].types[0].rank != _RANK:
        return None
    conv, reads_inputs = found[0].op, all(value in body.inputs for value in found[0].inputs)
    return found[0] if reads_inputs and conv.groups == 1 and conv.tile is None else None


def _followers(kernel: Fused, anchor: Node) -> list[Node]:
    return [node for node in kernel.body.nodes if node is not anchor and node.inputs]


def _flat_operand(value: Value, flat: dict[Value, Value], anchor: Node, size: tuple[int, int]) -> Value | None:
    """Give the flat form of what a follower reads; None where it has none, or the convolution reads it as it is."""
    if value in flat:
        return flat[value]
    shape = _flat_shape(value.type.static_shape, size)
    if shape is None or value in anchor.inputs:
        return None
    if isinstance(value.op, Constant):
        made = call(Constant(type(value.op.value)(value.op.value.array.reshape(shape))))
    else:
        made = call(Input(f"flat{len(flat)}", value.type.with_shape(shape)))
    flat[value] = made
    return made


def _flat_shape(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[int, ...] | None:
    """Join the last two extents, which must be an image's or 1; a single number keeps what it is."""
    if len(shape) < 2:
        return shape if math.prod(shape) == 1 else None
    return (*shape[:-2], math.prod(shape[-2:])) if shape[-2:] in (size, (1, 1)) else None
