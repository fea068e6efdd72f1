"""Batch norm with statistics known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.blocked import channel_block, channel_layout, plain_only, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.norm.moments import along_channels, check_rank
from cnnc.ops.numeric import cast_to, check_floats, check_vector, narrow


@dataclass(frozen=True)
class BatchNorm(Op):
    """Normalise each channel with statistics known beforehand (inference).

    y[n,c,...] = (x[n,c,...] - mean[c]) / sqrt(var[c] + epsilon) * gamma[c] + beta[c]

    Inputs x, gamma, beta, mean, var.
    """

    epsilon: float = 1e-5

    kind: ClassVar[Kind] = Kind.ELEMENTWISE

    def infer(
        self, x: TensorType, gamma: TensorType, beta: TensorType, mean: TensorType, var: TensorType
    ) -> TensorType:
        """Give x's type; raises `ShapeError` for vectors of another length or dtype."""
        check_floats(self.name, x=x, gamma=gamma, beta=beta, mean=mean, var=var)
        check_rank(self.name, x)
        for what, vector in (("gamma", gamma), ("beta", beta), ("mean", mean), ("var", var)):
            check_vector(self.name, what, vector, x.shape[1], "channel")
        return x.with_layout(None)

    def infer_layout(self, x: TensorType, *vectors: TensorType) -> tuple[Layout | None, ...]:
        """Keep x's layout; the vectors are plain."""
        plain_only(self.name, **dict(zip(("gamma", "beta", "mean", "var"), vectors, strict=True)))
        return (channel_layout(x.rank, channel_block(self.name, "x", x)),)

    def reference(
        self, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, var: np.ndarray
    ) -> np.ndarray:
        """Scale and shift."""
        gamma, beta, mean, var = (along_channels(v, x.ndim) for v in (gamma, beta, mean, var))
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = gamma / np.sqrt(var + var.dtype.type(self.epsilon))
        return narrow((widen(x) - mean) * scale + beta, x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Scale and shift each element."""
        type_ = types[0]
        wide = working_dtype(type_.dtype)

        def element(*i: Any) -> Any:
            x = cast_to(te, te.at(xs[0], type_, *i), type_.dtype, wide)
            vectors = zip(xs[1:], types[1:], strict=True)
            gamma, beta, mean, var = (cast_to(te, te.at(v, t, i[1]), t.dtype, wide) for v, t in vectors)
            scale = gamma / te.sqrt(var + te.const(self.epsilon, wide))
            return cast_to(te, (x - mean) * scale + beta, wide, type_.dtype)

        return [tensor(te, type_, element, self.name)]

    def flops(self, x: TensorType, *vectors: TensorType) -> int:
        """Count a subtraction and a multiply-add for each element."""
        return 3 * x.elements

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give several ranks, a run-time batch, half precision, a blocked layout."""
        for x in (
            TensorType((2, 3, 5, 4)),
            TensorType((4, 6)),
            TensorType((1, 3, 7)),
            TensorType((0, 3, 2, 2)),
            TensorType((Dim.symbol("n", 2), 3, 2, 2)),
            TensorType((2, 3, 4, 4), DType.F64),
            TensorType((2, 3, 4, 4), DType.F16),
            TensorType((2, 6, 3, 5), DType.F32, Layout("NCHW4c")),
        ):
            vector = TensorType(x.static_shape[1:2], x.dtype)
            yield Example(cls(1e-3), (x, *(vector,) * 4), _draw_batch_norm(x))


def _draw_batch_norm(x: TensorType) -> Callable[[np.random.Generator], tuple[np.ndarray, ...]]:
    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        channels = x.static_shape[1]
        data, gamma, beta, mean = (rng.uniform(-1, 1, s) for s in (x.static_shape, channels, channels, channels))
        arrays = (data, gamma, beta, mean, rng.uniform(0.2, 2, channels))
        return tuple(a.astype(x.dtype.numpy) for a in arrays)

    return draw
