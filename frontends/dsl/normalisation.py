"""Normalisations, and dropout, which does nothing at inference."""

from __future__ import annotations

import numpy as np

from cnnc.frontends.dsl.initial import Role
from cnnc.frontends.dsl.layer import Site, layer
from cnnc.frontends.dsl.options import axis_of
from cnnc.frontends.dsl.tensor import Tensor
from cnnc.ops.lrn import Lrn
from cnnc.ops.norm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm
from cnnc.ops.source import constant


@layer
def batch_norm(at: Site, x: Tensor, *, epsilon: float = 1e-5, affine: bool = True, name: str = "") -> Tensor:
    """Normalise each channel by its running statistics: (x - mean) / sqrt(var + epsilon) * gamma + beta.

    Parameters weight, bias (with `affine`; otherwise 1 and 0), running_mean, running_var, all [C]
    (Ioffe, Szegedy, ICML 2015).
    """
    if x.rank < 2:
        raise at.error(f"wants x[N,C,...], got {x.type}")
    gamma, beta = (_affine(at, x.channels)) if affine else (_filled(at, x, 1.0), _filled(at, x, 0.0))
    mean = at.parameter("running_mean", (x.channels,), Role.MEAN)
    var = at.parameter("running_var", (x.channels,), Role.VARIANCE)
    return at.call(BatchNorm(float(epsilon)), x, gamma, beta, mean, var)


@layer
def layer_norm(at: Site, x: Tensor, axis: int = -1, *, epsilon: float = 1e-5, name: str = "") -> Tensor:
    """Normalise over the axes from `axis` on, the last by default.

    Parameters weight and bias of the shape of those axes (Ba et al., 2016).
    """
    axis = axis_of(at, x, axis)
    sizes = x.shape[axis:]
    if not all(isinstance(size, int) for size in sizes):
        raise at.error(f"wants sizes known now from axis {axis} on, got {x.type}")
    shape = tuple(size for size in sizes if isinstance(size, int))
    gamma, beta = at.parameter("weight", shape, Role.GAMMA), at.parameter("bias", shape, Role.BETA)
    return at.call(LayerNorm(axis, float(epsilon)), x, gamma, beta)


@layer
def group_norm(at: Site, x: Tensor, groups: int, *, epsilon: float = 1e-5, name: str = "") -> Tensor:
    """Normalise each of `groups` groups of channels of each example (Wu, He, ECCV 2018); weight, bias [C]."""
    gamma, beta = _affine(at, x.channels)
    return at.call(GroupNorm(groups, float(epsilon)), x, gamma, beta)


@layer
def instance_norm(at: Site, x: Tensor, *, epsilon: float = 1e-5, affine: bool = False, name: str = "") -> Tensor:
    """Normalise each channel of each example (Ulyanov et al., 2016); weight, bias [C] with `affine`."""
    gamma, beta = (_affine(at, x.channels)) if affine else (_filled(at, x, 1.0), _filled(at, x, 0.0))
    return at.call(InstanceNorm(float(epsilon)), x, gamma, beta)


@layer
def lrn(
    at: Site, x: Tensor, size: int = 5, *, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, name: str = ""
) -> Tensor:
    """Divide by (bias + alpha / size * sum of squares over `size` neighbouring channels) ** beta.

    Local response normalisation (Krizhevsky et al., NIPS 2012, section 3.3; alpha is PyTorch's, size times theirs).
    """
    return at.call(Lrn(size, float(alpha), float(beta), float(bias)), x)


@layer
def dropout(at: Site, x: Tensor, rate: float = 0.5, *, name: str = "") -> Tensor:
    """Give the input unchanged: dropout acts in training only (Srivastava et al., JMLR 2014)."""
    if not 0 <= rate <= 1:
        raise at.error(f"wants a rate from 0 to 1, got {rate}")
    return x


def _affine(at: Site, channels: int) -> tuple[Tensor, Tensor]:
    return at.parameter("weight", (channels,), Role.GAMMA), at.parameter("bias", (channels,), Role.BETA)


def _filled(at: Site, x: Tensor, number: float) -> Tensor:
    return Tensor(constant(np.full(x.channels, number), x.dtype), at.draft)
