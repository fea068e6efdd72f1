"""Local response normalisation across channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.blocked import channel_block, channel_layout, every, fixed, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, narrow


@dataclass(frozen=True)
class Lrn(Op):
    """Divide by the energy of neighbouring channels (Krizhevsky et al., 2012, section 3.3).

    y[n,c,...] = x[n,c,...] / (bias + alpha/size * sum of x[n,j,...]^2) ^ beta,
    j from c - floor((size-1)/2) to c + ceil((size-1)/2), inside the channels

    The paper's alpha is alpha/size here, as in ONNX and PyTorch.
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    bias: float = 1.0

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type; raises `ShapeError` for a size below 1 or an input without channels."""
        check_floats(self.name, x=x)
        if x.rank < 2:
            raise ShapeError(f"{self.name}: needs axes N and C, not x : {x}")
        if self.size < 1:
            raise ShapeError(f"{self.name}: size={self.size} must be at least 1")
        return x.with_layout(None)

    def infer_layout(self, x: TensorType) -> tuple[Layout | None, ...]:
        """Keep the layout, which is plain or has channels in blocks."""
        return (channel_layout(x.rank, channel_block(self.name, "x", x)),)

    def reference(self, x: np.ndarray) -> np.ndarray:
        """Add up shifted squares."""
        wide = widen(x)
        before, after = (self.size - 1) // 2, self.size // 2
        channels = x.shape[1]
        squares = np.pad(wide * wide, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
        total = np.zeros_like(wide)
        for shift in range(self.size):
            total += squares[:, shift : shift + channels]
        scale = wide.dtype.type(self.bias) + wide.dtype.type(self.alpha / self.size) * total
        return narrow(wide / scale ** wide.dtype.type(self.beta), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce over the window of channels, then divide."""
        type_ = types[0]
        wide = working_dtype(type_.dtype)
        channels = fixed(self.name, type_.shape[1:2])[0]
        k = te.reduce_axis(self.size, "k")
        rows = type_.with_dtype(wide)

        def square(n: Any, c: Any, *p: Any) -> Any:
            neighbour = c + k - (self.size - 1) // 2
            # In a pad lane c itself lies beyond the channels; its neighbours inside are harmless, and masked below.
            within = every(te, [neighbour >= 0, neighbour < channels])
            read = cast_to(te, te.at(xs[0], type_, n, neighbour, *p), type_.dtype, wide)
            return te.sum(te.where(within, read * read, te.const(0, wide)), [k])

        squares = tensor(te, rows, square, "lrn_squares", guard=False)

        def element(*i: Any) -> Any:
            scale = te.at(squares, rows, *i) * te.const(self.alpha / self.size, wide) + te.const(self.bias, wide)
            value = cast_to(te, te.at(xs[0], type_, *i), type_.dtype, wide)
            return cast_to(te, value / te.pow(scale, te.const(self.beta, wide)), wide, type_.dtype)

        return [tensor(te, type_, element, "lrn")]

    def flops(self, x: TensorType) -> int:
        """Count a square and an addition for each neighbour, and four for each element."""
        return x.elements * (2 * self.size + 4)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give odd and even sizes, one larger than the channels, several ranks, a blocked layout."""
        for size, shape in (
            (5, (2, 9, 4, 3)),
            (4, (1, 6, 5, 5)),
            (1, (1, 3, 2, 2)),
            (9, (1, 3, 4)),
            (3, (1, 4, 2, 3, 2)),
        ):
            yield Example(cls(size, 0.3, 0.75, 2.0), (TensorType(shape),))
        yield Example(cls(3, 0.5, 0.6, 1.0), (TensorType((2, 5)),))
        yield Example(cls(5), (TensorType((0, 6, 2, 2)),))
        yield Example(cls(5), (TensorType((Dim.symbol("n", 3), 6, 2, 2)),))
        yield Example(cls(5, 0.3), (TensorType((1, 6, 3, 3), DType.F64),))
        yield Example(cls(5, 0.3), (TensorType((1, 6, 3, 3), DType.F16),))
        yield Example(cls(5, 0.3), (TensorType((2, 6, 3, 3), DType.F32, Layout("NCHW4c")),))


@onnx("LRN")
def _lrn(node: ForeignNode, x: Value) -> Value:
    size = node.attr("size")
    if size is None:
        raise node.invalid("size is missing")
    return call(Lrn(size, node.attr("alpha", 1e-4), node.attr("beta", 0.75), node.attr("bias", 1.0)), x)
