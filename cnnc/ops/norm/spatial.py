"""Instance and group norm: moments of each image over groups of its channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, Kind, Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.blocked import channel_block, channel_layout, fixed, plain_only, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.norm.moments import along_channels, check_rank, moments, standardise
from cnnc.ops.numeric import cast_to, check_floats, check_vector, narrow


@dataclass(frozen=True)
class _SpatialNorm(Op):
    """What instance and group norm share: moments of each image over a group of its channels."""

    kind: ClassVar[Kind] = Kind.REDUCTION

    def _groups(self, channels: int) -> int:
        raise TypeError(f"{self.name} defines no groups")

    def _epsilon(self) -> float:
        raise TypeError(f"{self.name} defines no epsilon")

    def infer(self, x: TensorType, gamma: TensorType, beta: TensorType) -> TensorType:
        """Give x's type; raises `ShapeError` for vectors of another length or groups that do not divide C."""
        check_floats(self.name, x=x, gamma=gamma, beta=beta)
        check_rank(self.name, x)
        channels = fixed(self.name, x.shape[1:2])[0]
        check_vector(self.name, "gamma", gamma, channels, "channel")
        check_vector(self.name, "beta", beta, channels, "channel")
        groups = self._groups(channels)
        if channels and (groups < 1 or channels % groups):
            raise ShapeError(f"{self.name}: groups={groups} must divide the {channels} channels of x : {x}")
        return x.with_layout(None)

    def reference(self, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
        """Standardise each group of each image, then scale and shift each channel."""
        if x.size == 0:
            return x
        grouped = widen(x).reshape(x.shape[0], self._groups(x.shape[1]), -1)
        y = standardise(grouped, (2,), self._epsilon()).reshape(x.shape)
        return narrow(y * along_channels(gamma, x.ndim) + along_channels(beta, x.ndim), x)

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Reduce twice, then scale and shift."""
        type_ = types[0]
        wide = working_dtype(type_.dtype)
        channels = type_.static_shape[1]
        groups = self._groups(channels)
        size = channels // groups if channels else 0
        # One row for each group; where a group is a channel it lies in x's own layout, pad lanes and all.
        rows = TensorType((type_.shape[0], groups if channels else 0), wide)
        if type_.layout is not None:
            rows = TensorType((type_.shape[0], channels, *(1,) * (type_.rank - 2)), wide, type_.layout)

        def read(*i: Any) -> Any:
            return cast_to(te, te.at(xs[0], type_, *i), type_.dtype, wide)

        def at(row: Sequence[Any], inner: Sequence[Any]) -> Sequence[Any]:
            return (row[0], row[1] * size + inner[0] if size > 1 else row[1], *inner[1:])

        extents = (size, *fixed(self.name, type_.shape[2:]))
        mean, var = moments(te, read, rows, extents, at)

        def element(*i: Any) -> Any:
            row = (i[0], i[1] // size if size > 1 else i[1], *(0,) * (rows.rank - 2))
            value = (read(*i) - mean(*row)) / te.sqrt(var(*row) + te.const(self._epsilon(), wide))
            gamma, beta = (
                cast_to(te, te.at(v, t, i[1]), t.dtype, wide) for v, t in zip(xs[1:], types[1:], strict=True)
            )
            return cast_to(te, value * gamma + beta, wide, type_.dtype)

        return [tensor(te, type_, element, self.name)]

    def flops(self, x: TensorType, *vectors: TensorType) -> int:
        """Count eight for each element: two sums, two differences, a square, a division, scale and shift."""
        return 8 * x.elements


@dataclass(frozen=True)
class InstanceNorm(_SpatialNorm):
    """Normalise each channel of each image over its spatial axes.

    y[n,c,...] = (x[n,c,...] - mean[n,c]) / sqrt(var[n,c] + epsilon) * gamma[c] + beta[c]
    """

    epsilon: float = 1e-5

    def _groups(self, channels: int) -> int:
        return channels

    def _epsilon(self) -> float:
        return self.epsilon

    def infer_layout(self, x: TensorType, *vectors: TensorType) -> tuple[Layout | None, ...]:
        """Keep x's layout; the vectors are plain."""
        plain_only(self.name, **dict(zip(("gamma", "beta"), vectors, strict=True)))
        return (channel_layout(x.rank, channel_block(self.name, "x", x)),)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give one to three spatial axes, other dtypes, a blocked layout."""
        for x in (
            *_norm_types(),
            TensorType((2, 6, 5, 3), DType.F32, Layout("NCHW4c")),
        ):
            vector = TensorType(x.static_shape[1:2], x.dtype)
            yield Example(cls(1e-3), (x, vector, vector))


def _norm_types() -> Iterable[TensorType]:
    for shape in ((2, 6, 5, 4), (1, 6, 9), (2, 6, 2, 3, 4), (0, 6, 4, 4)):
        yield TensorType(shape)
    yield TensorType((Dim.symbol("n", 3), 6, 4, 4))
    yield TensorType((2, 6, 5, 4), DType.F64)
    yield TensorType((2, 6, 5, 4), DType.F16)


@dataclass(frozen=True)
class GroupNorm(_SpatialNorm):
    """Normalise each group of channels of each image (Wu and He, 2018).

    y[n,c,...] = (x[n,c,...] - mean[n,g]) / sqrt(var[n,g] + epsilon) * gamma[c] + beta[c],  g the group of c
    """

    groups: int
    epsilon: float = 1e-5

    def _groups(self, channels: int) -> int:
        return self.groups

    def _epsilon(self) -> float:
        return self.epsilon

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give one group, some groups, and a group for each channel."""
        for x in _norm_types():
            for groups in (1, 3, 6):
                vector = TensorType(x.static_shape[1:2], x.dtype)
                yield Example(cls(groups, 1e-3), (x, vector, vector))
