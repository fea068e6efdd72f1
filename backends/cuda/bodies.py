"""The tensor expressions around what a template computes: its sums, or an operator whole, are the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnc.backends.lower.body import Body
from cnnc.backends.lower.kernel import lower_after, lower_values, placeholder
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node, Value
from cnnc.ops.fused import Fused


def body_around(kernel: Fused, anchor: Node, operands: Sequence[Value] = ()) -> Body:
    """Give the expressions of a kernel whose one reduction is the anchor's sums, and those of some operands."""
    inputs = {value: placeholder(value.type, f"x{i}") for i, value in enumerate(kernel.body.inputs)}
    (output,) = kernel.body.outputs
    values = lower_values([output], inputs)
    final = values[output]
    return Body(tuple(inputs.values()), tuple(values[v] for v in operands), _sums(final, anchor), final)


def body_after(kernel: Fused, anchor: Node) -> Body:
    """Give the expressions of what follows the anchor, which the template computes whole, of any stages."""
    inputs, result, final = lower_after(kernel, anchor)
    return Body(inputs, (), result, final)


def _sums(final: Any, anchor: Node) -> Any:
    """Find the stage that reduces, among those a tensor is computed from."""
    from tvm import te

    pending = [final]
    while pending:
        tensor = pending.pop()
        if isinstance(tensor.op, te.ComputeOp):
            if tensor.op.reduce_axis:
                return tensor
            pending.extend(tensor.op.input_tensors)
    raise VerifyError(f"kernel {anchor.op.name}: none of its stages reduces")
