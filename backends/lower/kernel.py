"""Kernels as tensor expressions: walks the body of a `Fused` and lets every operator describe itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm import te as tvm_te
from tvm import tirx

from cnnc.backends.lower.expr import TVM_DTYPES, Expr, Tensor
from cnnc.backends.lower.vocabulary import Vocabulary
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node, Value
from cnnc.ir.types import TensorType
from cnnc.ops.fused import Fused
from cnnc.ops.source import Constant


@dataclass(frozen=True)
class LoweredKernel:
    """A kernel's TE tensors (TVM's): one placeholder an input of the body, one tensor an output."""

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]

    @property
    def is_empty(self) -> bool:
        """Whether no output has an element, so that there is nothing to schedule."""
        return all(0 in map(int, tensor.shape) for tensor in self.outputs)

    def prim_func(self) -> Any:
        """Make the unscheduled s_tir PrimFunc over inputs, then outputs."""
        if self.is_empty:
            return _empty_func((*self.inputs, *self.outputs))
        return tvm_te.create_prim_func([*self.inputs, *self.outputs])


def lower_kernel(fused: Fused) -> LoweredKernel:
    """Describe a whole kernel; scalar constants of the body become part of the code.

    Raises VerifyError where the body holds a constant tensor, which must be an input of the kernel.
    """
    body = fused.body
    inputs = {value: placeholder(value.type, f"x{i}") for i, value in enumerate(body.inputs)}
    values = lower_values(body.outputs, inputs)
    outputs: list[Any] = []
    for position, value in enumerate(body.outputs):
        tensor = values[value]
        if 0 in value.type.physical_shape and not all(0 in v.type.physical_shape for v in body.outputs):
            # TE cannot describe a tensor without elements; nothing is written to it.
            outputs.append(tvm_te.placeholder((1,), TVM_DTYPES[value.type.dtype], f"y{position}"))
            continue
        is_taken = value in inputs or any(tensor.same_as(other) for other in outputs)
        outputs.append(_copy(tensor, f"y{position}") if is_taken else tensor)
    return LoweredKernel(tuple(inputs.values()), tuple(outputs))


def lower_values(wanted: Iterable[Value], known: Mapping[Value, Any]) -> dict[Value, Any]:
    """Give TE tensors for values of a body, given those of others (inputs, or the anchor's result).

    Walks back from `wanted` to `known`; the result holds both and everything between.
    """
    te = Vocabulary()
    tensors = {value: Tensor(raw) for value, raw in known.items()}
    for node in _nodes_between(wanted, known):
        if isinstance(node.op, Constant):
            tensors[node.values[0]] = _scalar_constant(te, node)
            continue
        xs = [tensors[value] for value in node.inputs]
        results = node.op.compute(te, xs, [value.type for value in node.inputs])
        for value, result in zip(node.values, results, strict=True):
            tensors[value] = _checked(node, value, result)
    return {value: tensor.raw for value, tensor in tensors.items()}


def lower_after(fused: Fused, anchor: Node) -> tuple[tuple[Any, ...], Any, Any]:
    """Give TE tensors for a kernel whose anchor something else computes: inputs, the anchor's result, the output."""
    inputs = {value: placeholder(value.type, f"x{i}") for i, value in enumerate(fused.body.inputs)}
    result = tvm_te.placeholder(anchor.types[0].physical_shape, TVM_DTYPES[anchor.types[0].dtype], "anchor")
    (output,) = fused.body.outputs
    return tuple(inputs.values()), result, lower_values([output], {**inputs, anchor.values[0]: result})[output]


def placeholder(type_: TensorType, name: str) -> Any:
    """Make a TE placeholder of a type's physical shape."""
    return tvm_te.placeholder(type_.physical_shape, TVM_DTYPES[type_.dtype], name)


def _nodes_between(wanted: Iterable[Value], known: Mapping[Value, Any]) -> list[Node]:
    """List the nodes that must be computed, each after its inputs (iterative: bodies may be deep)."""
    order: list[Node] = []
    done: set[Node] = set()
    stack = [(value.node, False) for value in wanted if value not in known]
    while stack:
        node, expanded = stack.pop()
        if node in done:
            continue
        if expanded:
            done.add(node)
            order.append(node)
            continue
        stack.append((node, True))
        stack.extend((value.node, False) for value in node.inputs if value not in known)
    return order


class _Scalar(Tensor):
    """A constant: reading it anywhere gives the number itself, so that no stage is needed."""

    __slots__ = ("number",)

    def __init__(self, raw: Any, number: Expr) -> None:
        super().__init__(raw)
        self.number = number

    def __getitem__(self, index: Any) -> Expr:
        return self.number


def _scalar_constant(te: Vocabulary, node: Node) -> Tensor:
    type_ = node.types[0]
    if not isinstance(node.op, Constant) or type_.elements != 1 or type_.layout is not None:
        held = f"a kernel's body holds the {node.op.name} {type_}"
        raise VerifyError(f"{held}; only plain single numbers may stay inside")
    number = te.const(node.op.value.array.reshape(-1)[0], type_.dtype)
    return _Scalar(te.compute(type_.physical_shape, lambda *_: number, "constant").raw, number)


def _checked(node: Node, value: Value, result: Any) -> Tensor:
    """Hold what an operator described against the type it inferred."""
    wanted = value.type
    if not isinstance(result, Tensor):
        raise VerifyError(f"{node.op.name}: compute gave {result!r}, not a tensor of te.compute")
    if result.shape != wanted.physical_shape or result.dtype is not wanted.dtype:
        raise VerifyError(
            f"{node.op.name}: compute describes {result.dtype}{list(result.shape)}"
            f" but the output is {wanted}, physically {list(wanted.physical_shape)}"
        )
    return result


def _copy(raw: Any, name: str) -> Any:
    return tvm_te.compute(raw.shape, lambda *index: raw(*index), name=name)


def _empty_func(tensors: Iterable[Any]) -> Any:
    """Make the kernel that writes nothing, for outputs without elements."""
    buffers = [
        tirx.decl_buffer([max(math.prod(map(int, t.shape)), 1)], str(t.dtype), name=f"t{i}")
        for i, t in enumerate(tensors)
    ]
    return tirx.PrimFunc(buffers, tirx.Evaluate(tirx.const(0, "int32"))).with_attr("tirx.noalias", True)
