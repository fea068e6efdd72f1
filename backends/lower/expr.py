"""Expressions and tensors as operators see them: TVM's, with cnnc's dtypes and no surprises.

Arithmetic takes Python numbers beside expressions and gives them the expression's dtype; two expressions of
different float types, or a float and an integer, do not mix (write `te.cast`).  On integers `//` and `%` round
down, as indices need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from tvm import tirx

from cnnc.backends.lower import exact
from cnnc.errors import VerifyError
from cnnc.ir.types import DType

TVM_DTYPES = {
    DType.F32: "float32",
    DType.F16: "float16",
    DType.BF16: "bfloat16",
    DType.F64: "float64",
    DType.I8: "int8",
    DType.U8: "uint8",
    DType.I32: "int32",
    DType.I64: "int64",
    DType.BOOL: "bool",
}
_FROM_TVM = {name: dtype for dtype, name in TVM_DTYPES.items()}

Number: TypeAlias = bool | int | float


class Expr:
    """A scalar expression; `node` is TVM's."""

    __slots__ = ("node",)

    def __init__(self, node: Any) -> None:
        self.node = node

    @property
    def dtype(self) -> DType:
        """The element type."""
        return _FROM_TVM[str(self.node.ty.dtype)]

    @staticmethod
    def of(value: Operand, dtype: DType) -> Expr:
        """Make a Python number a constant of `dtype`; an expression stays what it is."""
        if isinstance(value, Expr):
            return value
        whole = not dtype.is_float and dtype is not DType.BOOL
        if whole and (isinstance(value, bool) or value != int(value)):
            raise VerifyError(f"the constant {value!r} is no {dtype}")
        return Expr(tirx.const(int(value) if whole else value, TVM_DTYPES[dtype]))

    def _binary(self, other: Operand, make: Callable[[Any, Any], Any], swap: bool = False) -> Expr:
        a, b = same_type(self, other)
        return Expr(make(b.node, a.node) if swap else make(a.node, b.node))

    def _arithmetic(self, other: Operand, name: str, make: Callable[[Any, Any], Any], swap: bool = False) -> Expr:
        """Apply `make`, which TVM may simplify, to integers and the operator of that name to floats."""
        a, b = same_type(self, other)
        x, y = (b.node, a.node) if swap else (a.node, b.node)
        return Expr(exact.binary(name, x, y) if a.dtype.is_float else make(x, y))

    def __add__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "add", lambda a, b: a + b)

    def __radd__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "add", lambda a, b: a + b, swap=True)

    def __sub__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "sub", lambda a, b: a - b)

    def __rsub__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "sub", lambda a, b: a - b, swap=True)

    def __mul__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "mul", lambda a, b: a * b)

    def __rmul__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "mul", lambda a, b: a * b, swap=True)

    def __truediv__(self, other: Operand) -> Expr:
        return self._divide(other, swap=False)

    def __rtruediv__(self, other: Operand) -> Expr:
        return self._divide(other, swap=True)

    def _divide(self, other: Operand, swap: bool) -> Expr:
        if not self.dtype.is_float:
            raise VerifyError(f"'/' is for floats, not {self.dtype}: use te.floordiv or te.truncdiv")
        return self._arithmetic(other, "div", tirx.div, swap)

    def __floordiv__(self, other: Operand) -> Expr:
        return self._binary(other, tirx.floordiv)

    def __mod__(self, other: Operand) -> Expr:
        return self._binary(other, tirx.floormod)

    def __neg__(self) -> Expr:
        # 0 - x would make 0.0 of 0.0, not -0.0.
        return self * -1 if self.dtype.is_float else 0 - self

    def __and__(self, other: Operand) -> Expr:
        return self._binary(other, tirx.all if self.dtype is DType.BOOL else tirx.bitwise_and)

    def __or__(self, other: Operand) -> Expr:
        return self._binary(other, tirx.any if self.dtype is DType.BOOL else tirx.bitwise_or)

    def __xor__(self, other: Operand) -> Expr:
        return self._binary(other, tirx.NE if self.dtype is DType.BOOL else tirx.bitwise_xor)

    def __invert__(self) -> Expr:
        return Expr(tirx.Not(self.node) if self.dtype is DType.BOOL else tirx.bitwise_not(self.node))

    def __lshift__(self, other: Operand) -> Expr:
        return self._binary(other, tirx.shift_left)

    def __rshift__(self, other: Operand) -> Expr:
        return self._binary(other, tirx.shift_right)

    def __lt__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "lt", tirx.LT)

    def __le__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "le", tirx.LE)

    def __gt__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "gt", tirx.GT)

    def __ge__(self, other: Operand) -> Expr:
        return self._arithmetic(other, "ge", tirx.GE)

    def __eq__(self, other: Operand) -> Expr:  # type: ignore[override]
        return self._arithmetic(other, "eq", tirx.EQ)

    def __ne__(self, other: Operand) -> Expr:  # type: ignore[override]
        return self._arithmetic(other, "ne", tirx.NE)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise VerifyError("an expression has no truth value while compiling: use te.where or te.select")

    def __repr__(self) -> str:
        return f"Expr({self.node})"


Operand: TypeAlias = Expr | Number


def same_type(a: Operand, b: Operand) -> tuple[Expr, Expr]:
    """Bring two operands to one type: numbers take the other's, i32 beside i64 becomes i64."""
    if not isinstance(a, Expr):
        if not isinstance(b, Expr):
            raise VerifyError(f"neither {a!r} nor {b!r} has a dtype: use te.const")
        a = Expr.of(a, b.dtype)
    b = Expr.of(b, a.dtype)
    if a.dtype is b.dtype:
        return a, b
    if {a.dtype, b.dtype} == {DType.I32, DType.I64}:
        return Expr(tirx.Cast("int64", a.node)), Expr(tirx.Cast("int64", b.node))
    raise VerifyError(f"an expression mixes {a.dtype} and {b.dtype}: use te.cast")


class Tensor:
    """A tensor of TE: reading it at indices gives an expression.  `raw` is TVM's."""

    __slots__ = ("raw",)

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    @property
    def shape(self) -> tuple[int, ...]:
        """The physical shape."""
        return tuple(int(extent) for extent in self.raw.shape)

    @property
    def dtype(self) -> DType:
        """The element type."""
        return _FROM_TVM[str(self.raw.dtype)]

    def __getitem__(self, index: Operand | Sequence[Operand]) -> Expr:
        indices = index if isinstance(index, tuple | list) else (index,)
        return Expr(self.raw(*(as_index(i) for i in indices)))


def as_index(value: Operand) -> Any:
    """Give TVM's i32 form of an index."""
    if not isinstance(value, Expr):
        return tirx.const(value, "int32")
    if not value.dtype.is_integer:
        raise VerifyError(f"an index must be an integer, not {value.dtype}")
    return value.node if value.dtype is DType.I32 else tirx.Cast("int32", value.node)
