"""What elementwise operators of one input share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.broadcast import _Elementwise


class _Unary(_Elementwise):
    """y = f(x), element by element."""

    span: ClassVar[tuple[float, float]] = (-4.0, 4.0)
    """Where the examples draw floats from: inside the domain of f."""

    def infer(self, x: TensorType) -> TensorType:
        """Give x's shape."""
        return self._infer(x)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        """Give the operators the examples show; one with attributes shows several."""
        return (cls(),)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show odd sizes, 0-d, no elements, a run-time batch, a blocked layout with pad lanes, other dtypes."""
        first, *others = cls._variants()
        main = DType.F32 if DType.F32 in cls.takes else min(cls.takes & {DType.BOOL, DType.I32})
        types = [
            TensorType((2, 5, 3, 7), main),
            TensorType((), main),
            TensorType((3, 0, 2), main),
            TensorType((Dim.symbol("n", 3), 4), main),
            TensorType((2, 5, 3, 7), main, Layout("NCHW4c")),
        ]
        types += [TensorType((3, 5), d) for d in (DType.F64, DType.F16, DType.I64, DType.I8) if d in cls.takes]
        for type_ in types:
            yield cls._example(first, type_)
        for op in others:
            yield cls._example(op, types[0])

    @classmethod
    def _example(cls, op: Op, type_: TensorType) -> Example:
        if not type_.dtype.is_float:
            return Example(op, (type_,))
        low, high = cls.span

        def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            return (rng.uniform(low, high, type_.static_shape).astype(type_.dtype.numpy),)

        return Example(op, (type_,), draw)
