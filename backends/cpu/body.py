"""What a kernel computes: the anchor's operands, and elementwise TE stages on values still in registers.

    y[i] = f(anchor(operands...)[i], further inputs...)

A template says where in its loop nest an output value is complete, and asks here for the expression to store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import te, tirx

from cnnc.backends.cpu import loops
from cnnc.errors import VerifyError

__all__ = ["Body", "BoundBody", "plain_body"]


@dataclass(frozen=True)
class Body:
    """The inputs of a kernel and what follows its anchor.

    `inputs` are TE placeholders of all inputs in the order of the kernel's parameters, `operands` those of them
    that the anchor takes; `apply` maps the anchor's output tensor to the kernel's, of the same physical shape,
    through `te.compute` stages without reductions (None: the anchor's output is the kernel's).
    """

    inputs: tuple[Any, ...]
    operands: tuple[Any, ...]
    apply: Callable[[Any], Any] | None = None

    def bind(self, shape: Sequence[int]) -> BoundBody:
        """Fix the anchor's physical output shape; raises VerifyError if the stages change it."""
        anchor = te.placeholder(tuple(shape), name="anchor")
        final = anchor if self.apply is None else self.apply(anchor)
        if tuple(int(extent) for extent in final.shape) != tuple(shape):
            raise VerifyError(f"epilogue turns a tensor of shape {tuple(shape)} into {final.shape}; it must keep it")
        buffers = {
            tensor: loops.buffer(f"x{i}", [int(extent) for extent in tensor.shape], str(tensor.dtype))
            for i, tensor in enumerate(self.inputs)
        }
        return BoundBody(self, anchor, final, buffers)


def plain_body(
    *operands: tuple[int, ...], extra: tuple[Any, ...] = (), apply: Callable[[Any], Any] | None = None
) -> Body:
    """Make a body from the physical shapes of the anchor's operands, with further inputs after them."""
    placeholders = tuple(te.placeholder(shape, name=f"operand{i}") for i, shape in enumerate(operands))
    return Body((*placeholders, *extra), placeholders, apply)


@dataclass(frozen=True)
class BoundBody:
    """A body over a known shape, with a buffer for each input."""

    body: Body
    anchor: Any
    final: Any
    buffers: dict[Any, Any]

    @property
    def inputs(self) -> list[Any]:
        """The buffers of all inputs, in order."""
        return list(self.buffers.values())

    @property
    def operands(self) -> list[Any]:
        """The buffers of the anchor's operands."""
        return [self.buffers[tensor] for tensor in self.body.operands]

    def output(self) -> Any:
        """Declare the buffer of the output."""
        return loops.buffer("y", [int(extent) for extent in self.final.shape], str(self.final.dtype))

    def value(self, accumulator: Any, indices: Sequence[Any]) -> Any:
        """Give the expression to store at `indices` of the output, from the anchor's value there."""

        def read(tensor: Any, at: Sequence[Any]) -> Any:
            if tensor.same_as(self.anchor):
                return accumulator
            if tensor in self.buffers:
                return tirx.BufferLoad(self.buffers[tensor], list(at))
            return _inlined(tensor, at, read)

        return read(self.final, [loops.const(index) for index in indices])


_CALL = type(tirx.exp(tirx.const(0.0, "float32")))


def _inlined(tensor: Any, at: Sequence[Any], read: Callable[[Any, Sequence[Any]], Any]) -> Any:
    """Give the body of a compute stage at the given indices, its inputs replaced by what `read` gives."""
    if not isinstance(tensor.op, te.ComputeOp) or tensor.op.reduce_axis:
        raise VerifyError(f"epilogue stage {tensor.op.name} is no elementwise computation")
    indices = dict(zip((axis.var for axis in tensor.op.axis), at, strict=True))

    def call(node: Any) -> Any:
        match node.op.name:
            case "te.tensor_load":
                return read(node.args[0], list(node.args[1:]))
            case "tirx.if_then_else":
                # Guards of pad lanes: what they keep from being read is at most the rest of a vector, which is
                # readable, and a selection stays in vector registers.
                return tirx.Select(*node.args)
        return node

    replace = [(tirx.Var, lambda var: indices.get(var, var)), (_CALL, call)]
    return tvm_ffi.structural_map(tensor.op.body[tensor.value_index], replace, order="post")
