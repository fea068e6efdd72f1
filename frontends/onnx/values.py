"""Check the numbers in a node that no schema restricts: windows, group counts, block sizes, constant indices.

These make a node meaningless whatever its input shapes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cnnc.errors import LimitError
from cnnc.frontends.onnx.fold import check_planned, constant_array
from cnnc.frontends.onnx.node import OnnxNode
from cnnc.ir.graph import Value
from cnnc.ir.types import DType, format_shape

_WINDOWED = frozenset(
    {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv", "MaxPool", "AveragePool", "LpPool"}
    | {"MaxUnpool", "Col2Im"}
)


def check_values(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    """Check a node's attribute values and constant operands; raises `ModelError` or `LimitError`."""
    if node.domain:
        return
    if node.op_type in _WINDOWED:
        _check_window(node)
        _check_kernel(node, inputs)
    rule = _RULES.get(node.op_type)
    if rule is not None:
        rule(node, inputs)


def _ints(node: OnnxNode, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(attribute.ints)


def _check_window(node: OnnxNode) -> None:
    for name in ("kernel_shape", "strides", "dilations"):
        values = _ints(node, name)
        if any(value < 1 for value in values):
            raise node.invalid(f"{name} {list(values)} must be positive")
    pads = _ints(node, "pads")
    if any(value < 0 for value in pads):
        raise node.invalid(f"pads {list(pads)} must not be negative")
    for name in ("kernel_shape", "strides", "dilations", "pads"):
        if any(value > node.limits.dim for value in _ints(node, name)):
            raise LimitError(f"{name} {list(_ints(node, name))} is beyond {node.limits.dim} (limit dim)")
    lengths = {name: len(_ints(node, name)) for name in ("kernel_shape", "strides", "dilations")}
    lengths = {name: length for name, length in lengths.items() if length}
    if pads:
        if len(pads) % 2:
            raise node.invalid(f"pads {list(pads)} must have a begin and an end for each axis")
        lengths["pads"] = len(pads) // 2
    if len(set(lengths.values())) > 1:
        text = ", ".join(f"{name} for {length}" for name, length in lengths.items())
        raise node.invalid(f"attributes are for different numbers of axes: {text}")
    group = node.attributes.get("group")
    if group is not None and group.i < 1:
        raise node.invalid(f"group is {group.i}; it must be positive")


def _check_kernel(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    """A convolution's kernel_shape repeats the weights' spatial shape, and axes are as many as the input has."""
    x = inputs[0] if inputs else None
    spatial = 0 if x is None else max(x.type.rank - 2, 0)
    if x is not None and node.op_type != "Col2Im":
        for name, entries in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 2)):
            values = _ints(node, name)
            if values and len(values) != entries * spatial:
                raise node.invalid(f"{name} {list(values)} does not fit an input of shape {format_shape(x.shape)}")
    w = inputs[1] if len(inputs) > 1 else None
    kernel = _ints(node, "kernel_shape")
    if node.op_type in ("Conv", "ConvTranspose") and kernel and w is not None and tuple(w.shape[2:]) != kernel:
        raise node.invalid(f"kernel_shape {list(kernel)} contradicts the weights' shape {format_shape(w.shape)}")


def _check_division(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    divisor = inputs[1] if len(inputs) > 1 else None
    if divisor is None or not divisor.dtype.is_integer:
        return
    array = constant_array(divisor)
    if array is not None and (array == 0).any():
        raise node.invalid("divides integers by the constant 0")


def _check_block(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    attribute = node.attributes.get("blocksize")
    if attribute is not None and not 1 <= attribute.i <= node.limits.dim:
        raise node.invalid(f"blocksize is {attribute.i}; it must be 1 to {node.limits.dim}")


def _check_reshape(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    """The target's element count must be the input's in exact arithmetic: 64-bit products wrap."""
    if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
        return
    target = constant_array(inputs[1])
    if target is None:
        return
    sizes = [int(size) for size in target.reshape(-1)]
    shape = inputs[0].type.static_shape
    text = f"{format_shape(shape)} to {format_shape(sizes)}"
    if any(size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise node.invalid(f"cannot reshape {text}: at most one entry may be -1, none below")
    allow_zero = node.attributes.get("allowzero")
    if allow_zero is None or not allow_zero.i:
        if any(size == 0 and axis >= len(shape) for axis, size in enumerate(sizes)):
            raise node.invalid(f"cannot reshape {text}: an entry 0 copies a dimension that the input does not have")
        sizes = [shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    wanted, given = math.prod(size for size in sizes if size != -1), math.prod(shape)
    if -1 in sizes and (wanted == 0 or given % wanted):
        raise node.invalid(f"cannot reshape {text}: {given} elements are no multiple of {wanted}")
    if -1 not in sizes and wanted != given:
        raise node.invalid(f"cannot reshape {text}: {given} elements are not {wanted}")


def _check_depth(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    """The positions 0, 1, ... that one-hot vectors are compared with become a constant."""
    depth = constant_array(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else None
    if depth is not None and depth.size and np.isfinite(depth).all():
        check_planned(8 * int(depth.reshape(-1)[0]), node.limits)


def _check_eye(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    """An identity matrix becomes a constant."""
    if inputs and inputs[0] is not None:
        check_planned(8 * inputs[0].type.elements, node.limits)


def _check_indices(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    """Constant indices along one axis must lie in [-size, size)."""
    if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
        return
    data, indices = inputs[0], constant_array(inputs[1])
    axis_attribute = node.attributes.get("axis")
    axis = 0 if axis_attribute is None else axis_attribute.i
    if not -data.type.rank <= axis < data.type.rank:
        raise node.invalid(f"axis {axis} does not exist in {data.type}")
    if indices is not None:
        _require_range(node, indices, data.type.static_shape[axis], axis)


def _check_index_tuples(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    """Constant indices of GatherND and ScatterND: the last axis indexes the data's axes after the batch ones."""
    if len(inputs) < 2 or inputs[0] is None or inputs[1] is None:
        return
    shape, indices = inputs[0].type.static_shape, constant_array(inputs[1])
    batch_attribute = node.attributes.get("batch_dims")
    batch = 0 if batch_attribute is None else batch_attribute.i
    if indices is None:
        return
    if indices.ndim == 0 or not 0 <= batch < min(len(shape), indices.ndim):
        raise node.invalid(f"indices of shape {format_shape(indices.shape)} do not fit data of {format_shape(shape)}")
    if indices.shape[-1] > len(shape) - batch:
        raise node.invalid(f"{indices.shape[-1]} indices for data of shape {format_shape(shape)}, batch_dims {batch}")
    for position in range(indices.shape[-1]):
        _require_range(node, indices[..., position], shape[batch + position], batch + position)


def _require_range(node: OnnxNode, indices: np.ndarray, size: int, axis: int) -> None:
    if indices.dtype.kind not in "iu":
        raise node.invalid(f"indices must be integers, not {DType.of(indices)}")
    outside = (indices < -size) | (indices >= size)
    if outside.any():
        worst = int(indices[outside].reshape(-1)[0])
        raise node.invalid(f"index {worst} is outside of axis {axis}, which has {size} entries")


_RULES: dict[str, Callable[[OnnxNode, Sequence[Value | None]], None]] = {
    "Div": _check_division,
    "Mod": _check_division,
    "DepthToSpace": _check_block,
    "SpaceToDepth": _check_block,
    "Reshape": _check_reshape,
    "OneHot": _check_depth,
    "EyeLike": _check_eye,
    "Gather": _check_indices,
    "GatherElements": _check_indices,
    "ScatterElements": _check_indices,
    "GatherND": _check_index_tuples,
    "ScatterND": _check_index_tuples,
}
