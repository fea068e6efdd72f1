"""Kernels with an anchor: what templates that compute one operator, and what follows it in registers, share."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.machine import AVX2, AVX512, Machine
from cnnc.errors import VerifyError
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind
from cnnc.ir.types import DType, TensorType
from cnnc.ops.cast import Cast
from cnnc.ops.fused import Fused
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = [
    "anchor_of",
    "body_after",
    "body_of",
    "machine_of",
    "operand_bytes",
    "prologue_flops",
    "stored_operand",
]


def machine_of(target: Target) -> Machine:
    """Give what cost models and register tiles need to know of a target."""
    return replace(
        AVX512 if target.vector_lanes >= AVX512.lanes else AVX2,
        lanes=target.vector_lanes,
        registers=target.vector_registers,
        l1=target.caches.l1,
        l2=target.caches.l2,
        l3=target.caches.l3,
        threads=target.threads,
    )


def anchor_of(
    kernel: Fused,
    target: Target,
    *names: str,
    prologue: bool = False,
    narrow: Collection[int] = (),
    digits: Collection[int] = (),
) -> Node | None:
    """Give the operator of one of these names that a kernel is about, if the rest can follow it in registers.

    That is: everything is float32 of fixed, non-empty shape, the anchor reads inputs of the kernel, and every
    operator that depends on it is elementwise, in its shape and layout.  With `prologue`, the first operand may be
    computed from inputs by operators that are elementwise in its shape and layout.  Operands at the positions `narrow`
    may be stored in 16 bits, and converted before the anchor reads them; those at `digits` are int8.
    """
    body = kernel.body
    if target.kind != "cpu" or len(body.outputs) != 1:
        return None
    nodes = [
        node for node in body.nodes if node.op.kind >= Kind.REDUCTION and node.op.name not in ("input", "constant")
    ]
    if len(nodes) != 1 or nodes[0].op.name not in names or len(nodes[0].types) != 1:
        return None
    anchor = nodes[0]
    types = {value: value.type for node in body.nodes for value in node.values}
    if any(not t.is_static or 0 in t.static_shape for t in types.values()):
        return None
    operands = [stored_operand(v) if i in narrow else v for i, v in enumerate(anchor.inputs)]
    wide = {v for v, t in types.items() if t.dtype is DType.F32}
    wide |= {v for i, v in enumerate(anchor.inputs) if i in digits and v.dtype is DType.I8}
    if not all(v in wide or (v in operands and _is_converted_only(v, body)) for v in types):
        return None
    inputs = set(body.inputs)
    computed = [value for value in operands if value not in inputs]
    if computed and not (prologue and computed == [anchor.inputs[0]] and _is_elementwise(computed[0], inputs)):
        return None
    result = anchor.types[0]
    dependent = {anchor}
    for node in body.nodes:
        if not any(value.node in dependent for value in node.inputs):
            continue
        same = len(node.types) == 1 and node.types[0] == result
        if node.op.kind is not Kind.ELEMENTWISE or not same:
            return None
        dependent.add(node)
    return anchor if body.outputs[0].node in dependent else None


def _is_elementwise(value: Value, inputs: set[Value]) -> bool:
    """Whether a value follows from inputs, and single numbers, by elementwise operators of its type."""
    return all(
        node.op.kind is Kind.ELEMENTWISE and node.types == (value.type,)
        for node in _before(value, inputs)
        if node.op.name != "constant"
    )


def _before(value: Value, inputs: set[Value]) -> list[Node]:
    """List the operators that a value is computed by from inputs."""
    found: dict[Node, None] = {}
    pending = [value]
    while pending:
        value = pending.pop()
        if value not in inputs and value.node not in found:
            found[value.node] = None
            pending.extend(value.node.inputs)
    return list(found)


def prologue_flops(kernel: Fused, anchor: Node) -> float:
    """Count the operations by which a kernel computes an element of its anchor's first operand; 0 where it reads it."""
    operand = anchor.inputs[0]
    if operand in kernel.body.inputs:
        return 0.0
    nodes = _before(operand, set(kernel.body.inputs))
    return max(1.0, sum(node.op.flops(*(v.type for v in node.inputs)) for node in nodes) / operand.type.elements)


def stored_operand(operand: Value) -> Value:
    """Give what an operand of an anchor is converted from, if it is stored in 16 bits; else the operand itself."""
    if isinstance(operand.op, Cast) and operand.inputs[0].dtype in (DType.F16, DType.BF16):
        return operand.inputs[0]
    return operand


def operand_bytes(operand: Value) -> int:
    """Give the bytes that a number of an anchor's operand takes in memory."""
    return stored_operand(operand).dtype.itemsize


def _is_converted_only(value: Value, body: Graph) -> bool:
    """Whether a value is read by conversions and nothing else."""
    return value not in body.outputs and all(isinstance(user.op, Cast) for user in body.users[value])


def body_of(kernel: Fused, anchor: Node) -> Body:
    """Give the tensor expressions of a kernel, the anchor being its one reduction."""
    from cnnc.backends.lower.body import Body
    from cnnc.backends.lower.kernel import lower_values, placeholder

    inputs = {value: placeholder(value.type, f"x{i}") for i, value in enumerate(kernel.body.inputs)}
    (output,) = kernel.body.outputs
    values = lower_values([output], inputs)
    operands = tuple(values[stored_operand(value)] for value in anchor.inputs)
    final = values[output]
    return Body(tuple(inputs.values()), operands, _reduction(final), final, _guards_lanes_only(kernel, anchor))


def body_after(kernel: Fused, anchor: Node) -> Body:
    """Give the tensor expressions of what follows the anchor, which the template computes whole, of any stages."""
    from cnnc.backends.lower.body import Body
    from cnnc.backends.lower.kernel import lower_after

    inputs, result, final = lower_after(kernel, anchor)
    of = dict(zip(kernel.body.inputs, inputs, strict=True))
    operands = tuple(of[value] for value in anchor.inputs)
    return Body(inputs, operands, result, final, _guards_lanes_only(kernel, anchor))


def _guards_lanes_only(kernel: Fused, anchor: Node) -> bool:
    """Tell whether all beside the anchor reads its own element, or that of a vector along the channels.

    What lies in blocks as the element does has its pad lanes, too; so does a weight, which is converted as it lies.
    """
    converted = {value.node for value in anchor.inputs if stored_operand(value) is not value}
    others = [
        node
        for node in kernel.body.nodes
        if node is not anchor and node not in converted and node.op.name not in ("input", "constant")
    ]
    if any(node.op.kind is not Kind.ELEMENTWISE for node in others):
        return False

    def is_vector(type_: TensorType) -> bool:
        return max(type_.static_shape, default=1) == math.prod(type_.static_shape)

    def has_lanes(type_: TensorType, made: TensorType) -> bool:
        return (
            type_.layout is not None and type_.layout == made.layout and type_.static_shape[1] == made.static_shape[1]
        )

    read = [(value.type, node.types[0]) for node in others for value in node.inputs]
    return all(type_ == made or is_vector(type_) or has_lanes(type_, made) for type_, made in read)


def _reduction(final: Any) -> Any:
    """Find the stage that reduces, among those a tensor is computed from."""
    from tvm import te

    pending, seen = [final], set()
    while pending:
        tensor = pending.pop()
        if tensor in seen or not isinstance(tensor.op, te.ComputeOp):
            continue
        if tensor.op.reduce_axis:
            return tensor
        seen.add(tensor)
        pending.extend(tensor.op.input_tensors)
    raise VerifyError(f"kernel {final.op.name}: none of its stages reduces")
