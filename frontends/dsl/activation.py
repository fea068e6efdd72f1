"""Activations: layers without parameters that work on each number, and softmax."""

from __future__ import annotations

from cnnc.frontends.dsl.layer import Site, layer
from cnnc.frontends.dsl.options import axis_of
from cnnc.frontends.dsl.tensor import Tensor
from cnnc.ops import unary
from cnnc.ops.softmax import LogSoftmax, Softmax


@layer
def relu(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """max(x, 0)."""
    return at.call(unary.Relu(), x)


@layer
def relu6(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """min(max(x, 0), 6)."""
    return at.call(unary.Clip(0.0, 6.0), x)


@layer
def leaky_relu(at: Site, x: Tensor, alpha: float = 0.01, *, name: str = "") -> Tensor:
    """x where positive, else alpha * x."""
    return at.call(unary.LeakyRelu(float(alpha)), x)


@layer
def elu(at: Site, x: Tensor, alpha: float = 1.0, *, name: str = "") -> Tensor:
    """x where positive, else alpha * (exp(x) - 1)."""
    return at.call(unary.Elu(float(alpha)), x)


@layer
def silu(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """x * sigmoid(x), also called swish."""
    return at.call(unary.Silu(), x)


@layer
def gelu(at: Site, x: Tensor, approximate: str = "none", *, name: str = "") -> Tensor:
    """x * Phi(x), Phi the normal distribution; `approximate="tanh"` for the usual approximation."""
    return at.call(unary.Gelu(approximate), x)


@layer
def hard_sigmoid(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """min(max(x / 6 + 1 / 2, 0), 1), as in PyTorch."""
    return at.call(unary.HardSigmoid(1 / 6, 0.5), x)


@layer
def hard_swish(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """x * hard_sigmoid(x)."""
    return at.call(unary.HardSwish(), x)


@layer
def sigmoid(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """1 / (1 + exp(-x))."""
    return at.call(unary.Sigmoid(), x)


@layer
def tanh(at: Site, x: Tensor, *, name: str = "") -> Tensor:
    """The hyperbolic tangent."""
    return at.call(unary.Tanh(), x)


@layer
def softmax(at: Site, x: Tensor, axis: int = -1, *, name: str = "") -> Tensor:
    """exp(x) / sum of exp(x) along an axis, the last by default."""
    return at.call(Softmax(axis_of(at, x, axis)), x)


@layer
def log_softmax(at: Site, x: Tensor, axis: int = -1, *, name: str = "") -> Tensor:
    """The logarithm of softmax along an axis, the last by default."""
    return at.call(LogSoftmax(axis_of(at, x, axis)), x)
