"""Attention: shares of the keys that a query resembles, and the mean of their values by those shares."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, TensorType, format_shape
from cnnc.ops.blocked import fixed, tensor
from cnnc.ops.broadcast import broadcast_shapes, widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, narrow
from cnnc.ops.softmax import Softmax


@dataclass(frozen=True)
class Attention(Op):
    """Scaled dot-product attention of several heads (Vaswani et al. 2017, section 3.2.1).

    y[b, m, h, :] = sum over n of p[b, h, m, n] * v[b, n, h, :]
    p[b, h, m, :] = softmax over n of (scale * (q[b, m, h, :] . k[b, n, h, :]) + mask[b, h, m, n])

    Inputs q[B,M,F], k[B,N,G], v[B,N,H] and optionally a mask that broadcasts to [B,heads,M,N]; the output is
    [B,M,heads*value_size].  Of the features of q, head h has `size` from starts[0] + h * steps[0] on; so have those of
    k, with starts[1] and steps[1], and of v, `value_size` of them with starts[2] and steps[2].  One tensor may thus
    be all three.
    """

    heads: int
    size: int
    value_size: int
    scale: float
    starts: tuple[int, int, int]
    steps: tuple[int, int, int]

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None) -> TensorType:
        """Give [B,M,heads*value_size]; raises `ShapeError` where sizes or dtypes do not fit."""
        check_floats(self.name, q=q, k=k, v=v, mask=mask)
        if self.heads < 1 or min(self.size, self.value_size, len(self.starts) - 2, len(self.steps) - 2) < 1:
            raise ShapeError(f"{self.name}: {self.heads} heads of {self.size} and {self.value_size} features are none")
        sizes = (self.size, self.size, self.value_size)
        for key, type_, start, step, size in zip("qkv", (q, k, v), self.starts, self.steps, sizes, strict=True):
            if type_.rank != 3:
                raise ShapeError(f"{self.name}: takes {key}[batch,tokens,features], not {key} : {type_}")
            (features,) = fixed(self.name, type_.shape[2:])
            ends = [start, start + (self.heads - 1) * step]
            if min(ends) < 0 or max(ends) + size > features:
                raise ShapeError(f"{self.name}: {self.heads} heads from {start} by {step} leave {key} : {type_}")
        if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1]:
            raise ShapeError(f"{self.name}: batch or tokens of q : {q}, k : {k} and v : {v} differ")
        scores = (q.shape[0], self.heads, q.shape[1], k.shape[1])
        if mask is not None and (mask.rank > 4 or broadcast_shapes(self.name, mask.shape, scores) != scores):
            raise ShapeError(f"{self.name}: mask : {mask} does not broadcast to {format_shape(scores)}")
        return q.with_shape((*q.shape[:2], self.heads * self.value_size))

    def _head(self, array: np.ndarray, which: int) -> np.ndarray:
        """Give [B,heads,tokens,size] of q (0), k (1) or v (2)."""
        size = self.value_size if which == 2 else self.size
        start, step = self.starts[which], self.steps[which]
        features = start + step * np.arange(self.heads)[:, None] + np.arange(size)
        return widen(array)[:, :, features].transpose(0, 2, 1, 3)

    def reference(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Multiply, take shares, multiply."""
        heads = self._head(q, 0)
        scores = heads @ self._head(k, 1).swapaxes(2, 3) * heads.dtype.type(self.scale)
        if mask is not None:
            scores = scores + widen(mask)
        with np.errstate(invalid="ignore"):
            y = Softmax(3).reference(scores) @ self._head(v, 2)
        batch, _, rows, _ = y.shape
        return narrow(y.transpose(0, 2, 1, 3).reshape(batch, rows, self.heads * self.value_size), q)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the features, twice over the keys for softmax, and over the keys again."""
        q, k = types[:2]
        out = self.infer(*types)
        dtype, wide = out.dtype, working_dtype(out.dtype)
        (keys,) = fixed(self.name, k.shape[1:2])
        d = te.reduce_axis(self.size, "d")

        def read(which: int, batch: Any, token: Any, head: Any, feature: Any) -> Any:
            at = head * self.steps[which] + feature + self.starts[which]
            return cast_to(te, te.at(xs[which], types[which], batch, token, at), dtype, wide)

        rows = TensorType((q.shape[0], self.heads, q.shape[1]), wide)
        products = TensorType((*rows.shape, keys), wide)

        def product(b: Any, h: Any, m: Any, n: Any) -> Any:
            return te.sum(read(0, b, m, h, d) * read(1, b, n, h, d), [d])

        dots = tensor(te, products, product, "attention_dots")

        def scores(*i: Any) -> Any:
            value = te.at(dots, products, *i) * te.const(self.scale, wide)
            if len(xs) < 4:
                return value
            mask = types[3]
            own = zip(mask.shape, i[4 - mask.rank :], strict=True)
            index = [0 if size == 1 else axis for size, axis in own]
            return value + cast_to(te, te.at(xs[3], mask, *index), dtype, wide)

        largest = tensor(te, rows, lambda *i: _over(te, keys, lambda n: scores(*i, n), te.max), "attention_max")

        def exponential(*i: Any) -> Any:
            return te.exp(scores(*i) - te.at(largest, rows, *i[:3]))

        total = tensor(te, rows, lambda *i: _over(te, keys, lambda n: exponential(*i, n), te.sum), "attention_sum")

        def value(b: Any, m: Any, feature: Any) -> Any:
            h, e = te.floordiv(feature, self.value_size), te.floormod(feature, self.value_size)

            def share(n: Any) -> Any:
                return exponential(b, h, m, n) / te.at(total, rows, b, h, m) * read(2, b, n, h, e)

            return _over(te, keys, share, te.sum)

        wide_out = out.with_dtype(wide)
        y = tensor(te, wide_out, value, self.name)
        if wide is dtype:
            return [y]
        return [tensor(te, out, lambda *i: te.cast(te.at(y, wide_out, *i), dtype), "attention_round")]

    def flops(self, q: TensorType, k: TensorType, v: TensorType, mask: TensorType | None = None) -> int:
        """Count two for each multiply-add, and those of softmax."""
        out = self.infer(q, k, v, mask)
        scores = TensorType((*out.shape[:2], self.heads, k.shape[1])).elements
        return scores * (2 * self.size + 2 * self.value_size + 5 + (mask is not None))

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give heads side by side and interleaved, one tensor as all three, masks, no rows, other dtypes."""
        plain = cls(2, 4, 3, 0.5, (0, 0, 0), (4, 4, 3))
        q, k, v = (TensorType(shape) for shape in ((2, 5, 8), (2, 7, 8), (2, 7, 6)))
        yield Example(plain, (q, k, v))
        yield Example(cls(3, 2, 2, 1.0, (0, 6, 12), (2, 2, 2)), (TensorType((1, 4, 18)),) * 3)
        yield Example(cls(3, 2, 2, 1.0, (0, 2, 4), (6, 6, 6)), (TensorType((1, 4, 18)),) * 3)
        for mask in ((7,), (5, 7), (2, 1, 1, 7), (1, 2, 5, 1)):
            yield Example(plain, (q, k, v, TensorType(mask)))
        yield Example(plain, (TensorType((2, 0, 8)), k, v))
        batch = Dim.symbol("n", 2)
        yield Example(plain, tuple(t.with_shape((batch, *t.shape[1:])) for t in (q, k, v)))
        for dtype in (DType.F64, DType.F16):
            yield Example(plain, tuple(t.with_dtype(dtype) for t in (q, k, v)))


def _over(te: Any, extent: int, element: Any, reduce: Any) -> Any:
    """Reduce over an axis of its own."""
    axis = te.reduce_axis(extent, "n")
    return reduce(element(axis), [axis])
