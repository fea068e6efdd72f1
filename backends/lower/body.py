"""What a kernel computes: the anchor's operands, and elementwise TE stages on values still in registers.

    y[i] = f(anchor[i], further inputs...),  anchor = convolution, pool, ... of the operands

A template says where in its loop nest an output value is complete, and asks here for the expression to store.  Where
the first operand is itself computed, elementwise, from inputs of the kernel (a prologue), it asks for that, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import te, tirx

from cnnc.backends.lower import loops
from cnnc.errors import VerifyError

__all__ = ["Body", "BoundBody", "plain_body"]


@dataclass(frozen=True)
class Body:
    """The tensor expressions of a kernel.

    `inputs` are TE placeholders of all inputs in the order of the kernel's parameters, `operands` those of them
    that the anchor takes, the first of which may be a stage computed from inputs instead, for templates that know of
    prologues; `anchor` is the tensor the template computes, and `final` the kernel's output, which
    follows from the anchor (or is it) by stages without reductions and has its shape.  `guards_lanes_only` says
    that conditions in those stages keep nothing from being read but what pad lanes would read beside their vector.
    """

    inputs: tuple[Any, ...]
    operands: tuple[Any, ...]
    anchor: Any
    final: Any
    guards_lanes_only: bool = False

    def bind(self, shape: Sequence[int]) -> BoundBody:
        """Declare the buffers; raises VerifyError if anchor or output are not of the anchor's physical `shape`."""
        for what, tensor in (("the anchor", self.anchor), ("the output", self.final)):
            found = tuple(int(extent) for extent in tensor.shape)
            if found != tuple(shape):
                raise VerifyError(f"kernel body: {what} has shape {found}; the template computes {tuple(shape)}")
        buffers = {
            tensor: loops.buffer(f"x{i}", [int(extent) for extent in tensor.shape], str(tensor.dtype))
            for i, tensor in enumerate(self.inputs)
        }
        return BoundBody(self, buffers)


def plain_body(
    operands: Sequence[Sequence[int]],
    output: Sequence[int],
    extra: tuple[Any, ...] = (),
    apply: Callable[[Any], Any] = lambda anchor: anchor,
) -> Body:
    """Make a body from physical shapes; `apply` gives the output from the anchor and the placeholders `extra`."""
    placeholders = tuple(te.placeholder(tuple(shape), name=f"operand{i}") for i, shape in enumerate(operands))
    anchor = te.placeholder(tuple(output), name="anchor")
    return Body((*placeholders, *extra), placeholders, anchor, apply(anchor))


@dataclass(frozen=True)
class BoundBody:
    """A body with a buffer for each input."""

    body: Body
    buffers: dict[Any, Any]

    @property
    def inputs(self) -> list[Any]:
        """The buffers of all inputs, in order."""
        return list(self.buffers.values())

    @property
    def operands(self) -> list[Any]:
        """The buffers of the anchor's operands; None for one that the kernel computes."""
        return [self.buffers.get(tensor) for tensor in self.body.operands]

    def output(self) -> Any:
        """Declare the buffer of the output."""
        final = self.body.final
        return loops.buffer("y", [int(extent) for extent in final.shape], str(final.dtype))

    def value(self, accumulator: Any, indices: Sequence[Any]) -> Any:
        """Give the expression to store at `indices` of the output, from the anchor's value there."""

        def read(tensor: Any, at: Sequence[Any]) -> Any:
            if tensor.same_as(self.body.anchor):
                return accumulator
            if tensor in self.buffers:
                return tirx.BufferLoad(self.buffers[tensor], list(at))
            return _inlined(tensor, at, read, self.body.guards_lanes_only)

        return read(self.body.final, [loops.const(index) for index in indices])

    def operand(self, indices: Sequence[Any], which: int = 0) -> Any:
        """Give the expression of an operand, by default the first one, at `indices`, from the kernel's inputs."""

        def read(tensor: Any, at: Sequence[Any]) -> Any:
            if tensor in self.buffers:
                return tirx.BufferLoad(self.buffers[tensor], list(at))
            return _inlined(tensor, at, read, self.body.guards_lanes_only)

        return read(self.body.operands[which], [loops.const(index) for index in indices])


_CALL = type(tirx.exp(tirx.const(0.0, "float32")))


def _inlined(tensor: Any, at: Sequence[Any], read: Callable[[Any, Sequence[Any]], Any], lanes_only: bool) -> Any:
    """Give the body of a compute stage at the given indices, its inputs replaced by what `read` gives."""
    if not isinstance(tensor.op, te.ComputeOp) or tensor.op.reduce_axis:
        raise VerifyError(f"stage {tensor.op.name} beside the anchor is no elementwise computation")
    indices = dict(zip((axis.var for axis in tensor.op.axis), at, strict=True))

    def call(node: Any) -> Any:
        if node.op.name == "te.tensor_load":
            return read(node.args[0], list(node.args[1:]))
        if node.op.name == "tirx.if_then_else" and lanes_only:
            # The rest of a vector is readable, as buffers are aligned to 64 bytes, and a selection has no branches.
            return tirx.Select(*node.args)
        return node

    replace = [(tirx.Var, lambda var: indices.get(var, var)), (_CALL, call)]
    return tvm_ffi.structural_map(tensor.op.body[tensor.value_index], replace, order="post")
