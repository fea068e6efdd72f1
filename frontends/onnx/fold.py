"""Compute at import what is known then: shapes, shape arithmetic, and operators of constants.

Planned bytes are checked before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from cnnc.errors import CnncError, LimitError, ModelError
from cnnc.frontends.onnx.node import OnnxNode
from cnnc.frontends.onnx.tensors import check_dims
from cnnc.ir.graph import Node, Value
from cnnc.ir.op import as_tuple
from cnnc.ir.types import DType
from cnnc.ops.source import Constant, constant
from cnnc.options import Limits, format_bytes


def constant_array(value: Value) -> np.ndarray | None:
    """Give the array of a constant value, None for any other."""
    return value.op.value.array if isinstance(value.op, Constant) else None


def check_new_nodes(results: Iterable[Value], seen: set[Node], limits: Limits) -> list[Node]:
    """Check the sizes of all nodes an operator's reader made; adds them to `seen` and gives them, inputs first."""
    made: list[Node] = []
    stack = [(value.node, False) for value in results]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            made.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((value.node, False) for value in node.inputs)
    for node in made:
        for type_ in node.types:
            check_dims(type_.static_shape, limits)
            if type_.nbytes > limits.tensor:
                raise LimitError(
                    f"{type_} takes {format_bytes(type_.nbytes)} (limit tensor={format_bytes(limits.tensor)})"
                )
    return made


class Folding:
    """Replaces values that depend on constants only by constants, within limits that hold for a whole import."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._spent = 0

    def fold(self, results: Sequence[Value], made: Iterable[Node], labels: Sequence[str]) -> list[Value]:
        """Give the results, those that can be computed now as constants.

        `made` are the nodes the results are made of, inputs first; others count as known only if they are constants.
        """
        arrays: dict[Value, np.ndarray] = {}
        for node in made:
            arrays |= {value: array for value in node.inputs if (array := constant_array(value)) is not None}
            if isinstance(node.op, Constant):
                arrays[Value(node)] = node.op.value.array
            elif node.inputs and all(value in arrays for value in node.inputs):
                inputs = [arrays[value] for value in node.inputs]
                if self._allows(sum(type_.nbytes for type_ in node.types), inputs):
                    arrays |= _evaluate(node, inputs)
        return [
            constant(arrays[value], label=label) if value in arrays and not _labelled(value) else value
            for value, label in zip(results, labels, strict=True)
        ]

    def _allows(self, planned: int, inputs: Sequence[np.ndarray]) -> bool:
        """Whether a result may be computed: it is small, or no larger than one of its inputs.

        The sum of the inputs is no measure: two halves of a chain that double each other would never end.
        """
        if planned > max(self.limits.folding, *(array.nbytes for array in inputs)):
            return False
        self._spent += planned
        return self._spent <= self.limits.memory


def _labelled(value: Value) -> bool:
    return isinstance(value.op, Constant) and value.op.label != ""


def _evaluate(node: Node, inputs: Sequence[np.ndarray]) -> dict[Value, np.ndarray]:
    with np.errstate(all="ignore"):
        outputs = as_tuple(node.op.reference(*inputs))
    return {
        value: np.asarray(output).astype(value.dtype.numpy, copy=False).reshape(value.type.static_shape)
        for value, output in zip(node.values, outputs, strict=True)
    }


def read_constant(node: OnnxNode) -> Value:
    """Constant: the one attribute it carries."""
    if len(node.attributes) != 1:
        raise node.invalid(f"needs exactly one value attribute, not {len(node.attributes)}")
    (name,) = node.attributes
    if name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise node.unsupported(f"a constant given by {name}")
    value = node.attr(name)
    dtypes = {"value_float": np.float32, "value_floats": np.float32}
    array = value if name == "value" else np.array(value, dtypes.get(name, np.int64))
    return constant(_carried(node, array))


def _carried(node: OnnxNode, array: np.ndarray) -> np.ndarray:
    if array.dtype not in {dtype.numpy for dtype in DType}:
        raise node.unsupported(f"elements of type {array.dtype}")
    return array


def read_shape(node: OnnxNode, x: Value) -> Value:
    """Shape: the input's shape, or the slice [start:end] of it."""
    shape = x.type.static_shape
    start, end = node.attr("start", 0), node.attr("end", len(shape))
    return constant(np.array(shape[_clamp(start, len(shape)) : _clamp(end, len(shape))], np.int64))


def _clamp(axis: int, rank: int) -> int:
    return min(max(axis + rank if axis < 0 else axis, 0), rank)


def read_size(node: OnnxNode, x: Value) -> Value:
    """Size: the input's element count."""
    return constant(np.array(x.type.elements, np.int64))


def read_constant_of_shape(node: OnnxNode, shape: Value) -> Value:
    """ConstantOfShape: one value, as often as the shape says."""
    sizes = node.const(shape)
    value = node.attr("value", np.zeros(1, np.float32))
    if sizes is None or sizes.ndim != 1 or sizes.dtype != np.int64:
        raise node.invalid(f"the shape must be a list of INT64, not {shape.type}")
    if value.size != 1:
        raise node.invalid(f"value must have one element, not {value.size}")
    dims = tuple(int(size) for size in sizes)
    check_planned(check_dims(dims, node.limits) * value.itemsize, node.limits)
    return constant(np.full(dims, _carried(node, value).reshape(())))


def read_range(node: OnnxNode, start: Value, limit: Value, delta: Value) -> Value:
    """Range: start, start + delta, ... below limit."""
    arrays = [node.const(value) for value in (start, limit, delta)]
    first, last, step = (_scalar(node, array) for array in arrays)
    if not first.dtype == last.dtype == step.dtype:
        raise node.invalid(f"start, limit and delta have types {first.dtype}, {last.dtype} and {step.dtype}")
    if step == 0 or not (np.isfinite(first) and np.isfinite(last) and np.isfinite(step)):
        raise node.invalid(f"from {first} to {last} by steps of {step} never ends")
    count = _range_count(first, last, step)
    check_planned(count * first.itemsize, node.limits)
    return constant(np.asarray(first + np.arange(count).astype(first.dtype) * step, first.dtype))


def _range_count(first: np.generic, last: np.generic, step: np.generic) -> int:
    if np.issubdtype(first.dtype, np.integer):
        return max(-(-(int(last) - int(first)) // int(step)), 0)
    count = (float(last) - float(first)) / float(step)
    if not math.isfinite(count):
        raise LimitError("has more elements than can be counted")
    return max(math.ceil(count), 0)


def _scalar(node: OnnxNode, array: np.ndarray | None) -> np.generic:
    if array is None or array.size != 1:
        raise node.invalid("start, limit and delta must be scalars")
    scalar: np.generic = array.reshape(-1)[0]
    return scalar


def check_planned(nbytes: int, limits: Limits) -> None:
    """Check the size of a constant before it is made; raises `LimitError`."""
    if nbytes > limits.folding:
        raise LimitError(
            f"a constant of {format_bytes(nbytes)} would be made (limit folding={format_bytes(limits.folding)})"
        )


SHAPE_READERS: dict[str, Callable[..., Value]] = {
    "Constant": read_constant,
    "Shape": read_shape,
    "Size": read_size,
    "ConstantOfShape": read_constant_of_shape,
    "Range": read_range,
}
"""Operators that never reach the graph: with fixed input shapes they are constants."""


def _input_sized(arrays: Sequence[np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays)


def _rank_times_input(arrays: Sequence[np.ndarray]) -> int:
    return 8 * arrays[0].size * max(arrays[0].ndim, 1)


def _one_hot(arrays: Sequence[np.ndarray]) -> int:
    indices, depth, values = arrays
    return indices.size * max(int(depth.reshape(-1)[0]), 1) * values.itemsize


_FOLDED_BY_ONNX: dict[str, Callable[[Sequence[np.ndarray]], int]] = {
    "NonZero": _rank_times_input,
    "OneHot": _one_hot,
    "GatherND": lambda arrays: arrays[1].size * max(arrays[0].nbytes, 1),
    "Mod": _input_sized,
    "BitShift": _input_sized,
    "CumSum": _input_sized,
    "EyeLike": lambda arrays: 8 * arrays[0].size,
    "GatherElements": lambda arrays: arrays[1].size * 8,
    "ScatterElements": _input_sized,
    "ScatterND": _input_sized,
    "Trilu": _input_sized,
    "Compress": _input_sized,
    "Unique": lambda arrays: 32 * max(arrays[0].size, 1),
    "TopK": lambda arrays: 2 * 8 * arrays[0].size,
    "IsNaN": _input_sized,
    "IsInf": _input_sized,
}
"""Operators without a counterpart in the graph that occur in shape arithmetic, each with a bound on its result's
bytes: on constants they are computed by ONNX's own reference implementation."""


def fold_by_reference(node: OnnxNode, inputs: Sequence[Value | None]) -> list[Value] | None:
    """Compute a node of constants by ONNX's reference implementation; None where that cannot be done."""
    bound = _FOLDED_BY_ONNX.get(node.op_type)
    arrays = [None if value is None else constant_array(value) for value in inputs]
    known = [array for array in arrays if array is not None]
    if bound is None or node.domain or not known or len(known) != sum(value is not None for value in inputs):
        return None
    # Takes longer to import than most models to read, and few need it.
    from onnx.reference import ReferenceEvaluator

    try:
        check_planned(bound(known), node.limits)
        proto = node.resolved_proto()
        outputs = ReferenceEvaluator(proto, opsets={"": node.opset}).run(
            None, {name: array for name, array in zip(proto.input, arrays, strict=True) if array is not None}
        )
    except CnncError:
        raise
    except Exception as error:  # foreign code on numbers that were never checked: any kind comes out of it
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"cannot be computed from its constant inputs: {type(error).__name__}: {reason}") from None
    return [constant(_carried(node, np.asarray(output))) for output in outputs]
