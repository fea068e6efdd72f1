"""Activations: what stands behind a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.op import Op
from cnnc.ir.types import DType, TensorType
from cnnc.ops.broadcast import NUMBERS, SIGNED
from cnnc.ops.unary.elementary import error_function
from cnnc.ops.unary.one_input import _Unary


class Relu(_Unary):
    """y = max(x, 0); NaN stays NaN."""

    takes = SIGNED

    def _numpy(self, x: np.ndarray) -> Any:
        return np.maximum(x, 0)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x < 0, te.const(0, dtype), x)


@dataclass(frozen=True)
class Clip(_Unary):
    """y = min(max(x, low), high); None is no bound, and high wins where low > high."""

    low: float | None = None
    high: float | None = None
    takes = NUMBERS

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type; the bounds must be numbers of x's dtype."""
        for bound in (self.low, self.high):
            if bound is None or (x.dtype.is_float and not math.isnan(bound)):
                continue
            info = np.iinfo(x.dtype.numpy) if x.dtype.is_integer else None
            if info is None or bound != int(bound) or not info.min <= bound <= info.max:
                raise ShapeError(f"clip: bound {bound} is no number of x : {x}")
        return self._infer(x)

    def _numpy(self, x: np.ndarray) -> Any:
        y = x if self.low is None else np.maximum(x, x.dtype.type(self.low))
        return y if self.high is None else np.minimum(y, x.dtype.type(self.high))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        y = x
        if self.low is not None:
            low = te.const(self.low, dtype)
            y = te.select(y < low, low, y)
        if self.high is not None:
            high = te.const(self.high, dtype)
            y = te.select(y > high, high, y)
        return y

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(-1, 2), cls(0, 6), cls(None, 1), cls(-2, None), cls(2, 1))


@dataclass(frozen=True)
class LeakyRelu(_Unary):
    """y = x if x >= 0, else alpha * x."""

    alpha: float = 0.01

    def _numpy(self, x: np.ndarray) -> Any:
        return np.where(x < 0, self.alpha * x, x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x < 0, x * self.alpha, x)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(0.125), cls())


@dataclass(frozen=True)
class ThresholdedRelu(_Unary):
    """y = x if x > alpha, else 0."""

    alpha: float = 1.0

    def _numpy(self, x: np.ndarray) -> Any:
        return np.where(x > self.alpha, x, 0)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x > self.alpha, x, te.const(0, dtype))


@dataclass(frozen=True)
class Elu(_Unary):
    """y = x if x >= 0, else alpha * (e^x - 1)."""

    alpha: float = 1.0

    def _numpy(self, x: np.ndarray) -> Any:
        return np.where(x < 0, self.alpha * np.expm1(x), x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x < 0, te.expm1(x) * self.alpha, x)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(0.5))


@dataclass(frozen=True)
class Selu(_Unary):
    """y = gamma * (x if x > 0, else alpha * (e^x - 1))  (Klambauer et al., NeurIPS 2017)."""

    alpha: float = 1.6732632423543772
    gamma: float = 1.0507009873554805

    def _numpy(self, x: np.ndarray) -> Any:
        return self.gamma * np.where(x > 0, x, self.alpha * np.expm1(x))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x > 0, x, te.expm1(x) * self.alpha) * self.gamma


@dataclass(frozen=True)
class Celu(_Unary):
    """y = max(x, 0) + min(0, alpha * (e^(x / alpha) - 1))."""

    alpha: float = 1.0

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type; alpha divides, so it is not 0."""
        if self.alpha == 0:
            raise ShapeError("celu: alpha is 0, but x is divided by it")
        return self._infer(x)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.maximum(x, 0) + np.minimum(0, self.alpha * np.expm1(x / self.alpha))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        zero = te.const(0, dtype)
        return te.maximum(x, zero) + te.minimum(zero, te.expm1(x / self.alpha) * self.alpha)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(0.5))


class Sigmoid(_Unary):
    """y = 1 / (1 + e^-x)."""

    def _numpy(self, x: np.ndarray) -> Any:
        return _sigmoid(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.sigmoid(x)


@dataclass(frozen=True)
class HardSigmoid(_Unary):
    """y = min(max(alpha * x + beta, 0), 1)."""

    alpha: float = 0.2
    beta: float = 0.5

    def _numpy(self, x: np.ndarray) -> Any:
        return np.clip(self.alpha * x + self.beta, 0, 1)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return _unit_clip(te, dtype, x * self.alpha + self.beta)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(1 / 6, 0.5))


class HardSwish(_Unary):
    """y = x * min(max(x / 6 + 1/2, 0), 1)  (MobileNetV3, section 5.2)."""

    def _numpy(self, x: np.ndarray) -> Any:
        return x * np.clip(x * (1 / 6) + 0.5, 0, 1)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return x * _unit_clip(te, dtype, x * (1 / 6) + 0.5)


@dataclass(frozen=True)
class Silu(_Unary):
    """y = x * sigmoid(alpha * x), also called swish."""

    alpha: float = 1.0

    def _numpy(self, x: np.ndarray) -> Any:
        return x * _sigmoid(x if self.alpha == 1 else self.alpha * x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return x * te.sigmoid(x if self.alpha == 1 else x * self.alpha)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(1.5))


@dataclass(frozen=True)
class Gelu(_Unary):
    """y = x * P(normal <= x): x/2 * (1 + erf(x / sqrt 2)), or with "tanh" its approximation.

    The approximation is x/2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) (Hendrycks and Gimpel 2016).
    """

    approximate: str = "none"

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type."""
        if self.approximate not in ("none", "tanh"):
            raise ShapeError(f'gelu: approximate is "none" or "tanh", not {self.approximate!r}')
        return self._infer(x)

    def _numpy(self, x: np.ndarray) -> Any:
        if self.approximate == "none":
            return 0.5 * x * (1 + error_function(x * math.sqrt(0.5)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        if self.approximate == "none":
            return te.gelu(x)
        return x * 0.5 * (te.tanh((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls("tanh"))


class Mish(_Unary):
    """y = x * tanh(softplus(x))."""

    def _numpy(self, x: np.ndarray) -> Any:
        return x * np.tanh(_softplus(x))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2); above 20 it is 1 in every dtype.
        e = te.exp(te.select(x > 20, te.const(20, dtype), x))
        grown = e * (e + 2)
        return x * te.select(x > 20, te.const(1, dtype), grown / (grown + 2))

    span = (-8.0, 30.0)


class Softplus(_Unary):
    """y = log(1 + e^x)."""

    span = (-30.0, 30.0)

    def _numpy(self, x: np.ndarray) -> Any:
        return _softplus(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.select(x > 0, x, te.const(0, dtype)) + te.log1p(te.exp(-te.abs(x)))


class Softsign(_Unary):
    """y = x / (1 + |x|)."""

    def _numpy(self, x: np.ndarray) -> Any:
        return x / (1 + np.abs(x))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return x / (te.abs(x) + 1)


@dataclass(frozen=True)
class Shrink(_Unary):
    """y = x - bias if x > threshold, x + bias if x < -threshold, else 0."""

    threshold: float = 0.5
    bias: float = 0.0

    def _numpy(self, x: np.ndarray) -> Any:
        return np.where(x < -self.threshold, x + self.bias, np.where(x > self.threshold, x - self.bias, 0))

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        above = te.select(x > self.threshold, x - self.bias, te.const(0, dtype))
        return te.select(x < -self.threshold, x + self.bias, above)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(1.5, 1.0))


def _unit_clip(te: Any, dtype: DType, x: Any) -> Any:
    """Clip to [0, 1]; NaN stays NaN."""
    y = te.select(x < 0, te.const(0, dtype), x)
    return te.select(y > 1, te.const(1, dtype), y)


def _sigmoid(x: np.ndarray) -> Any:
    return 1 / (1 + np.exp(-x))


def _softplus(x: np.ndarray) -> Any:
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)
