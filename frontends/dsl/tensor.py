"""Tensors of the DSL: a value of the graph with operators, so that `>>`, `+` and `*` write networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from cnnc.errors import ModelError
from cnnc.frontends.dsl.draft import Applied, Draft
from cnnc.frontends.dsl.lines import trace, user_lines
from cnnc.frontends.dsl.scope import current_scope
from cnnc.ir.graph import Value
from cnnc.ir.op import Op
from cnnc.ir.types import DType, Size, TensorType
from cnnc.ops.binary import Add, Div, Mul, Pow, Sub
from cnnc.ops.source import constant
from cnnc.ops.unary import Neg

Number: TypeAlias = float | np.ndarray


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a network being written; its shape is known at once.

    `x >> layer` applies a layer or any function of one tensor.  `+ - * / **` work on tensors, numbers and
    arrays with numpy's broadcasting.  They bind tighter than `>>`: write `(x >> layer) + y`.
    """

    value: Value
    draft: Draft

    @property
    def type(self) -> TensorType:
        """Shape and dtype."""
        return self.value.type

    @property
    def shape(self) -> tuple[Size, ...]:
        """The sizes, the batch first."""
        return self.value.shape

    @property
    def rank(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> DType:
        """The element type."""
        return self.value.dtype

    @property
    def channels(self) -> int:
        """The size of axis 1; raises `ModelError` where there is none."""
        if self.rank < 2 or not isinstance(self.shape[1], int):
            raise ModelError(f"a tensor {self.type} has no channels{trace()}")
        return self.shape[1]

    @property
    def spatial(self) -> tuple[Size, ...]:
        """The sizes after batch and channels."""
        return self.shape[2:]

    def __rshift__(self, layer: Callable[[Tensor], Tensor]) -> Tensor:
        if not callable(layer):
            raise ModelError(f"x >> {layer!r}: on the right stands a layer or a function of one tensor{trace()}")
        return layer(self)

    def __add__(self, other: Tensor | Number) -> Tensor:
        return _binary(Add(), self, other)

    def __radd__(self, other: Number) -> Tensor:
        return _binary(Add(), other, self)

    def __sub__(self, other: Tensor | Number) -> Tensor:
        return _binary(Sub(), self, other)

    def __rsub__(self, other: Number) -> Tensor:
        return _binary(Sub(), other, self)

    def __mul__(self, other: Tensor | Number) -> Tensor:
        return _binary(Mul(), self, other)

    def __rmul__(self, other: Number) -> Tensor:
        return _binary(Mul(), other, self)

    def __truediv__(self, other: Tensor | Number) -> Tensor:
        return _binary(Div(), self, other)

    def __rtruediv__(self, other: Number) -> Tensor:
        return _binary(Div(), other, self)

    def __pow__(self, other: Tensor | Number) -> Tensor:
        return _binary(Pow(), self, other)

    def __neg__(self) -> Tensor:
        return apply(Neg(), self)

    # numpy would otherwise take `array + tensor` apart element by element.
    __array_ufunc__ = None

    def __bool__(self) -> bool:
        raise ModelError(f"a tensor has no truth value: its numbers are not known yet{trace()}")

    def __repr__(self) -> str:
        return f"<Tensor {self.type}>"


def apply(op: Op, *tensors: Tensor) -> Tensor:
    """Apply an operator of `cnnc.ops` to tensors of one network, as a layer of its own; its first output."""
    return apply_all(op, *tensors)[0]


def apply_all(op: Op, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply an operator to tensors of one network, as a layer of its own; all of its outputs.

    Raises `ModelError` where the tensors are of different networks.
    """
    lines = user_lines()
    draft = tensors[0].draft
    if any(tensor.draft is not draft for tensor in tensors):
        raise ModelError(f"{op.name}: the tensors belong to different networks{trace(lines)}")
    name = draft.name_of(object(), current_scope(), "", op.name, lines)
    value = draft.apply(op, [tensor.value for tensor in tensors], name, lines)
    draft.record(Applied(name, op.name, value.node.values, (value.node,), (), lines))
    return tuple(Tensor(output, draft) for output in value.node.values)


def _binary(op: Op, left: Any, right: Any) -> Tensor:
    tensor = left if isinstance(left, Tensor) else right
    operands = [_operand(side, tensor) for side in (left, right)]
    if None in operands:
        return cast("Tensor", NotImplemented)
    return apply(op, *(operand for operand in operands if operand is not None))


def _operand(side: Any, beside: Tensor) -> Tensor | None:
    """Make a tensor of a number or array that stands beside one; None for anything else."""
    if isinstance(side, Tensor):
        return side
    if isinstance(side, bool) or not isinstance(side, int | float | np.number | np.ndarray):
        return None
    return Tensor(constant(np.asarray(side), beside.dtype), beside.draft)
