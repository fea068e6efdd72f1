"""ONNX operators that compare positions with indices: one-hot vectors, hardmax, eye, triangles."""

from __future__ import annotations

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.op import ForeignNode, onnx
from cnnc.ir.types import DType
from cnnc.ops.axes import integers, normal_axis
from cnnc.ops.binary import Add
from cnnc.ops.blocked import fixed
from cnnc.ops.cast import convert, onnx_dtype
from cnnc.ops.compare import Equal, Less, Where
from cnnc.ops.reshape import flatten, reshape, unsqueeze
from cnnc.ops.scan import ArgMax
from cnnc.ops.slice import slice_axes
from cnnc.ops.source import constant


def _positions(size: int, axis: int, rank: int) -> Value:
    """Make 0, 1, ... along one axis of a tensor of some rank."""
    return constant(np.arange(size).reshape([size if i == axis else 1 for i in range(rank)]), DType.I64)


@onnx("OneHot")
def _one_hot(node: ForeignNode, indices: Value, depth: Value, values: Value) -> Value:
    """where(position = index, on, off); an index outside [-depth, depth) is nowhere."""
    sizes = integers(node.const(depth))
    if len(sizes) != 1 or sizes[0] < 0 or values.shape != (2,):
        raise node.invalid(f"depth {sizes} must be one number >= 0, values {values.type} two numbers")
    rank = indices.type.rank + 1
    axis = normal_axis(node.op_type, node.attr("axis", -1), rank)
    index = convert(indices, DType.I64)
    wrapped = call(Where(), call(Less(), index, constant(0, DType.I64)), call(Add(), index, constant(sizes[0])), index)
    hit = call(Equal(), unsqueeze(wrapped, [axis]), _positions(sizes[0], axis, rank))
    return call(Where(), hit, slice_axes(values, [1], [2], None, None), slice_axes(values, [0], [1], None, None))


@onnx("Hardmax")
def _hardmax(node: ForeignNode, x: Value) -> Value:
    """1 at the first largest element along an axis, 0 elsewhere; before opset 13 of x flattened at the axis."""
    axis = normal_axis(node.op_type, node.attr("axis", 1 if node.opset < 13 else -1), x.type.rank)
    if node.opset < 13 and axis < x.type.rank - 1:
        return reshape(_hardmax_along(flatten(x, axis), 1), x.shape)
    return _hardmax_along(x, axis)


def _hardmax_along(x: Value, axis: int) -> Value:
    (size,) = fixed("hardmax", x.shape[axis : axis + 1])
    hit = call(Equal(), call(ArgMax(axis), x), _positions(size, axis, x.type.rank))
    return convert(hit, x.dtype)


@onnx("EyeLike")
def _eye_like(node: ForeignNode, x: Value) -> Value:
    if x.type.rank != 2:
        raise node.invalid(f"needs a matrix, not {x.type}")
    number = node.attr("dtype")
    dtype = x.dtype if number is None else onnx_dtype(node, number)
    rows, columns = fixed(node.op_type, x.shape)
    return constant(np.eye(rows, columns, node.attr("k", 0)), dtype)


@onnx("Trilu")
def _trilu(node: ForeignNode, x: Value, k: Value | None = None) -> Value:
    if x.type.rank < 2:
        raise node.invalid(f"needs at least a matrix, not {x.type}")
    offsets = [0] if k is None else integers(node.const(k))
    if len(offsets) != 1:
        raise node.invalid(f"k must be one number, not {offsets}")
    rows, columns = fixed(node.op_type, x.shape[-2:])
    distance = np.arange(columns) - np.arange(rows)[:, None]
    kept = distance >= offsets[0] if node.attr("upper", 1) else distance <= offsets[0]
    zero = constant(np.zeros((), x.dtype.numpy))
    return call(Where(), constant(kept), x, zero)
