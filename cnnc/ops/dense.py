"""Matrix products: fully connected layers and batched matrix multiplication."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.literal import Literal
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, Size, TensorType
from cnnc.ops.blocked import fixed, plain_only, tensor, weight_layout
from cnnc.ops.broadcast import broadcast_shapes, widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, check_same_dtype, check_vector, narrow
from cnnc.ops.source import Constant, constant


@dataclass(frozen=True)
class Dense(Op):
    """Multiply each row by a matrix of weights: a fully connected layer.

    y[..., o] = b[o] + sum over i of x[..., i] * w[o, i]

    Inputs x[...,I], w[O,I], optionally b[O].  PyTorch calls it Linear, ONNX has Gemm with transB.  `algorithm` names
    how it is computed ("direct", "bf16x3"); what the layer means stays the same.
    """

    algorithm: str = "direct"

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, x: TensorType, w: TensorType, b: TensorType | None = None) -> TensorType:
        """Give [...,O]; raises `ShapeError` where the sizes or dtypes do not fit."""
        check_floats(self.name, x=x, weight=w, bias=b)
        if w.rank != 2 or x.rank < 1:
            raise ShapeError(f"{self.name}: takes x[...,I] and weight[O,I], not x : {x} and weight : {w}")
        if x.shape[-1] != w.shape[1]:
            raise ShapeError(f"{self.name}: weight takes {w.shape[1]} features but x : {x} has {x.shape[-1]}")
        check_vector(self.name, "bias", b, w.shape[0], "output feature")
        return x.with_shape((*x.shape[:-1], w.shape[0]))

    def infer_layout(self, x: TensorType, w: TensorType, b: TensorType | None = None) -> tuple[Layout | None, ...]:
        """Take plain tensors; the weight may be packed in blocks of outputs, `OI8o`."""
        plain_only(self.name, x=x, bias=b)
        if w.layout is not None and w.layout != weight_layout(2, 1, w.layout.block("O")):
            raise ShapeError(f"{self.name}: weight is in layout {w.layout}; it must be plain or such as OI8o")
        return (None,)

    def reference(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        """Multiply, then add the bias."""
        y = widen(x) @ widen(w).T
        return narrow(y if b is None else y + widen(b), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the features, then add the bias."""
        x_type, w_type = types[0], types[1]
        out = self.infer(*types)
        wide = working_dtype(out.dtype)
        k = te.reduce_axis(fixed(self.name, w_type.shape[1:])[0], "k")

        def products(*i: Any) -> Any:
            value = cast_to(te, te.at(xs[0], x_type, *i[:-1], k), out.dtype, wide)
            return te.sum(value * cast_to(te, te.at(xs[1], w_type, i[-1], k), out.dtype, wide), [k])

        sums = tensor(te, out.with_dtype(wide), products, "dense")
        if len(xs) == 2 and wide is out.dtype:
            return [sums]

        def finish(*i: Any) -> Any:
            value = te.at(sums, out.with_dtype(wide), *i)
            if len(xs) == 3:
                value = value + cast_to(te, te.at(xs[2], types[2], i[-1]), out.dtype, wide)
            return cast_to(te, value, wide, out.dtype)

        return [tensor(te, out, finish, "dense_bias")]

    def flops(self, x: TensorType, w: TensorType, b: TensorType | None = None) -> int:
        """Count two for each multiply-add, one for each bias."""
        return self.infer(x, w, b).elements * (2 * w.static_shape[1] + (b is not None))

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give one row, many rows, more axes, empty and run-time batches, other dtypes."""
        for x, w, bias in (
            ((1, 12), (5, 12), True),
            ((7, 33), (17, 33), False),
            ((2, 3, 8), (4, 8), True),
            ((6,), (3, 6), True),
            ((0, 4), (3, 4), True),
            ((2, 0), (3, 0), True),
        ):
            types = (TensorType(x), TensorType(w), TensorType(w[:1]))
            yield Example(cls(), types if bias else types[:2])
        yield Example(cls(), (TensorType((Dim.symbol("n", 4), 6)), TensorType((5, 6)), TensorType((5,))))
        for dtype in (DType.F64, DType.F16):
            yield Example(cls(), tuple(TensorType(shape, dtype) for shape in ((3, 8), (5, 8), (5,))))


@dataclass(frozen=True)
class MatMul(Op):
    """Multiply matrices that lie in the last two axes; the axes before broadcast, as in numpy.

    y[..., m, n] = sum over k of a[..., m, k] * b[..., k, n]

    `transpose_a` (`transpose_b`) says that the last two axes of a (b) stand the other way round.  A vector a is one
    row, a vector b one column, and that axis is left out of the result; vectors are not transposed.
    """

    transpose_a: bool = False
    transpose_b: bool = False

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, a: TensorType, b: TensorType) -> TensorType:
        """Give the product's type; raises `ShapeError` where the sizes or dtypes do not fit."""
        check_same_dtype(self.name, a=a, b=b)
        if a.dtype is DType.BOOL:
            raise ShapeError(f"{self.name}: takes numbers, not a : {a}")
        left, right = self._matrix(a, self.transpose_a, row=True), self._matrix(b, self.transpose_b, row=False)
        if left[-1] != right[-2]:
            raise ShapeError(f"{self.name}: a : {a} has {left[-1]} columns but b : {b} has {right[-2]} rows")
        batch = broadcast_shapes(self.name, left[:-2], right[:-2])
        rows, columns = left[-2:-1] if a.rank > 1 else (), right[-1:] if b.rank > 1 else ()
        return a.with_shape((*batch, *rows, *columns))

    def _matrix(self, type_: TensorType, transposed: bool, row: bool) -> tuple[Size, ...]:
        """Give the shape as [..., rows, columns]."""
        if type_.rank == 0:
            raise ShapeError(f"{self.name}: takes matrices, not the scalar {type_}")
        if type_.rank == 1:
            return (1, *type_.shape) if row else (*type_.shape, 1)
        *batch, rows, columns = type_.shape
        return (*batch, columns, rows) if transposed else (*batch, rows, columns)

    def reference(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Leave it to numpy."""
        left = np.swapaxes(a, -1, -2) if self.transpose_a and a.ndim > 1 else a
        right = np.swapaxes(b, -1, -2) if self.transpose_b and b.ndim > 1 else b
        return narrow(np.matmul(widen(left), widen(right)), a)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the common axis."""
        a, b = types
        out = self.infer(a, b)
        wide = working_dtype(out.dtype)
        k = te.reduce_axis(fixed(self.name, self._matrix(a, self.transpose_a, row=True)[-1:])[0], "k")
        batch_rank = out.rank - (a.rank > 1) - (b.rank > 1)

        def products(*i: Any) -> Any:
            batch, rest = i[:batch_rank], i[batch_rank:]
            left = _operand_index(a, batch, (rest[0], k) if a.rank > 1 else (k,), self.transpose_a)
            right = _operand_index(b, batch, (k, rest[-1]) if b.rank > 1 else (k,), self.transpose_b)
            value = cast_to(te, te.at(xs[0], a, *left), a.dtype, wide)
            return te.sum(value * cast_to(te, te.at(xs[1], b, *right), b.dtype, wide), [k])

        sums = tensor(te, out.with_dtype(wide), products, "mat_mul")
        if wide is out.dtype:
            return [sums]
        return [tensor(te, out, lambda *i: te.cast(te.at(sums, out.with_dtype(wide), *i), out.dtype), "mat_mul_round")]

    def flops(self, a: TensorType, b: TensorType) -> int:
        """Count two for each multiply-add."""
        depth = TensorType(self._matrix(a, self.transpose_a, row=True)[-1:]).elements
        return 2 * self.infer(a, b).elements * depth

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give matrices, vectors, batches that broadcast, transposed operands, integers, nothing at all."""
        for a, b in (
            ((3, 4), (4, 5)),
            ((2, 3, 4), (2, 4, 5)),
            ((2, 1, 3, 4), (3, 4, 5)),
            ((3, 4), (2, 4, 1)),
            ((4,), (4, 3)),
            ((3, 4), (4,)),
            ((4,), (4,)),
            ((2, 3, 4), (4,)),
            ((0, 4), (4, 3)),
            ((2, 0), (0, 3)),
        ):
            yield Example(cls(), (TensorType(a), TensorType(b)))
        yield Example(cls(transpose_a=True), (TensorType((4, 3)), TensorType((4, 5))))
        yield Example(cls(transpose_b=True), (TensorType((2, 3, 4)), TensorType((5, 4))))
        yield Example(cls(transpose_a=True, transpose_b=True), (TensorType((2, 4, 3)), TensorType((2, 5, 4))))
        yield Example(cls(), (TensorType((Dim.symbol("n", 3), 2, 4)), TensorType((4, 5))))
        for dtype in (DType.F64, DType.F16, DType.I32, DType.I64):
            yield Example(cls(), (TensorType((3, 6), dtype), TensorType((6, 2), dtype)))


def _operand_index(type_: TensorType, batch: Sequence[Any], last: Sequence[Any], transposed: bool) -> tuple[Any, ...]:
    """Write an operand's index: the batch axes broadcast, the last ones swap where it is transposed."""
    own = type_.rank - len(last)
    front = [0 if size == 1 else i for size, i in zip(type_.shape[:own], batch[len(batch) - own :], strict=True)]
    return (*front, *(reversed(last) if transposed and len(last) == 2 else last))


def transposed_constant(value: Value) -> Value | None:
    """Give the transposed matrix of a constant one, None for anything else."""
    if not isinstance(value.op, Constant) or len(value.shape) != 2:
        return None
    label = f"{value.op.label}.T" if value.op.label else ""
    return call(Constant(Literal(value.op.value.array.T), label))


@onnx("MatMul")
def _mat_mul(node: ForeignNode, a: Value, b: Value) -> Value:
    weight = transposed_constant(b) if a.dtype.is_float and a.shape else None
    return call(MatMul(), a, b) if weight is None else call(Dense(), a, weight)


@onnx("Gemm")
def _gemm(node: ForeignNode, a: Value, b: Value, c: Value | None = None) -> Value:
    """Read alpha * A' B' + beta * C; ordinary layers become `Dense`."""
    if len(a.shape) != 2 or len(b.shape) != 2:
        raise node.invalid(f"Gemm takes matrices, not A : {a.type} and B : {b.type}")
    transpose_a, transpose_b = bool(node.attr("transA", 0)), bool(node.attr("transB", 0))
    alpha, beta = node.attr("alpha", 1.0), node.attr("beta", 1.0)
    weight = b if transpose_b else transposed_constant(b)
    if weight is None or transpose_a or not a.dtype.is_float:
        product = call(MatMul(transpose_a, transpose_b), a, b)
    elif alpha == beta == 1.0 and c is not None and c.shape == weight.shape[:1]:
        return call(Dense(), a, weight, c)
    else:
        product = call(Dense(), a, weight)
    product = _scaled(node, product, alpha)
    if c is None:
        return product
    if broadcast_shapes("gemm", product.shape, c.shape) != product.shape:
        raise node.invalid(f"C : {c.type} does not broadcast to the product {product.type}")
    from cnnc.ops.binary import Add

    return call(Add(), product, _scaled(node, c, beta))


def _scaled(node: ForeignNode, value: Value, factor: float) -> Value:
    if factor == 1.0:
        return value
    if not value.dtype.is_float and not float(factor).is_integer():
        raise node.unsupported(f"the factor {factor} of integers {value.type}")
    from cnnc.ops.binary import Mul

    return call(Mul(), value, constant(np.asarray(factor), value.dtype))
