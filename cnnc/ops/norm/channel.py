"""Channel norm: moments over the channels of each pixel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.blocked import channel_block, fixed, plain_only, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.norm.moments import along_channels, check_rank, moments, standardise
from cnnc.ops.numeric import cast_to, check_floats, check_vector, narrow


@dataclass(frozen=True)
class ChannelNorm(Op):
    """Normalise the channels of each pixel: a layer norm whose features stand in axis 1 (ConvNeXt's LayerNorm2d).

    y[n,c,...] = (x[n,c,...] - mean) / sqrt(var + epsilon) * gamma[c] + beta[c],  mean and (population) var over c

    Inputs x[N,C,...], gamma[C], beta[C].
    """

    epsilon: float = 1e-6

    kind: ClassVar[Kind] = Kind.REDUCTION

    def infer(self, x: TensorType, gamma: TensorType, beta: TensorType) -> TensorType:
        """Give x's type; raises `ShapeError` for vectors of another length."""
        check_floats(self.name, x=x, gamma=gamma, beta=beta)
        check_rank(self.name, x)
        channels = fixed(self.name, x.shape[1:2])[0]
        check_vector(self.name, "gamma", gamma, channels, "channel")
        check_vector(self.name, "beta", beta, channels, "channel")
        return x.with_layout(None)

    def infer_layout(self, x: TensorType, gamma: TensorType, beta: TensorType) -> tuple[Layout | None, ...]:
        """Keep the layout of x; the vectors are plain."""
        channel_block(self.name, "x", x)
        plain_only(self.name, gamma=gamma, beta=beta)
        return (x.layout,)

    def reference(self, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """Standardise along axis 1, then scale and shift each channel."""
        y = standardise(widen(x), (1,), self.epsilon)
        return narrow(y * along_channels(gamma, x.ndim) + along_channels(beta, x.ndim), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce twice, then scale and shift."""
        type_ = types[0]
        wide = working_dtype(type_.dtype)
        pixels = TensorType((type_.shape[0], *type_.shape[2:]), wide)

        def read(*i: Any) -> Any:
            return cast_to(te, te.at(xs[0], type_, *i), type_.dtype, wide)

        def at(pixel: Sequence[Any], channel: Sequence[Any]) -> Sequence[Any]:
            return (pixel[0], channel[0], *pixel[1:])

        mean, var = moments(te, read, pixels, fixed(self.name, type_.shape[1:2]), at)

        def element(*i: Any) -> Any:
            pixel = (i[0], *i[2:])
            value = (read(*i) - mean(*pixel)) / te.sqrt(var(*pixel) + te.const(self.epsilon, wide))
            value = value * cast_to(te, te.at(xs[1], types[1], i[1]), type_.dtype, wide)
            value = value + cast_to(te, te.at(xs[2], types[2], i[1]), type_.dtype, wide)
            return cast_to(te, value, wide, type_.dtype)

        return [tensor(te, type_, element, self.name)]

    def flops(self, x: TensorType, *vectors: TensorType) -> int:
        """Count eight for each element: two sums, two differences, a square, a division, scale and shift."""
        return 8 * x.elements

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give several ranks, channels that fill no block, a run-time batch, nothing at all, other dtypes."""
        for shape in ((2, 6), (2, 5, 7), (2, 6, 3, 4), (1, 9, 2, 3, 2), (0, 3, 2, 2)):
            vector = TensorType(shape[1:2])
            yield Example(cls(1e-5), (TensorType(shape), vector, vector))
        yield Example(cls(), (TensorType((Dim.symbol("n", 3), 5, 2, 2)), TensorType((5,)), TensorType((5,))))
        for dtype in (DType.F64, DType.F16):
            vector = TensorType((4,), dtype)
            yield Example(cls(1e-4), (TensorType((2, 4, 3, 3), dtype), vector, vector))
