"""Change of layout: the same tensor, stored another way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.blocked import tensor


@dataclass(frozen=True)
class LayoutTransform(Op):
    """Store a tensor in another layout; `layout` None is plain row-major.

    y[i] = x[i] for every logical index i
    """

    layout: Layout | None

    kind: ClassVar[Kind] = Kind.INJECTIVE

    def infer(self, x: TensorType) -> TensorType:
        """Give x's shape and dtype; raises `ShapeError` for a layout of another rank."""
        if self.layout is not None and self.layout.rank != x.rank:
            raise ShapeError(f"{self.name}: layout {self.layout} is for rank {self.layout.rank}, not for x : {x}")
        return x.with_layout(None)

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Take any layout and give the one asked for."""
        return (self.layout,)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Give x: meaning does not depend on storage."""
        return x

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Read each element at its logical index; pad lanes become 0."""
        out = types[0].with_layout(self.layout)
        return [tensor(te, out, lambda *i: te.at(xs[0], types[0], *i), self.name)]

    def flops(self, x: TensorType) -> int:
        """No arithmetic."""
        return 0

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give plain to blocked and back, one block to another, weights, a run-time batch, integers."""
        plain = TensorType((2, 6, 3, 5))
        blocked = Layout("NCHW4c")
        yield Example(cls(blocked), (plain,))
        yield Example(cls(None), (plain.with_layout(blocked),))
        yield Example(cls(Layout("NCHW8c")), (plain.with_layout(blocked),))
        yield Example(cls(Layout("NHWC")), (plain,))
        yield Example(cls(blocked), (plain.with_layout(Layout("NHWC")),))
        yield Example(cls(Layout("OIHW4i8o")), (TensorType((9, 6, 3, 3)),))
        yield Example(cls(Layout("NCW4c")), (TensorType((1, 5, 7), DType.I64),))
        yield Example(cls(blocked), (TensorType((Dim.symbol("n", 2), 5, 2, 2), DType.F16),))
