"""Layers with trained weights: convolutions and fully connected layers."""

from __future__ import annotations

import math

from cnnc.frontends.dsl.initial import Role
from cnnc.frontends.dsl.layer import Site, layer
from cnnc.frontends.dsl.options import Padding, Sizes, check_count, check_rank, per_axis, read_pad
from cnnc.frontends.dsl.tensor import Tensor
from cnnc.ops.conv import Conv
from cnnc.ops.dense import Dense


@layer
def conv(
    at: Site,
    x: Tensor,
    channels: int,
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    pad: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    bias: bool = True,
    name: str = "",
) -> Tensor:
    """Convolve x[N,C,...] in one to three dimensions (correlate, as all frameworks do); gives [N,channels,...].

    Parameters weight[channels, C/groups, kernel...] and bias[channels].  `groups=x.channels` is depthwise.
    Raises `ShapeError` where groups, kernel or padding do not fit.
    """
    rank = check_rank(at, x)
    kernels = per_axis(at, kernel, rank, "kernel")
    strides, dilations = per_axis(at, stride, rank, "stride"), per_axis(at, dilation, rank, "dilation")
    pads = read_pad(at, pad, x, kernels, strides, dilations)
    check_groups(at, x, channels, groups)
    shape = (channels, x.channels // groups, *kernels)
    fan_in = math.prod(shape[1:])
    inputs = [x, at.parameter("weight", shape, Role.WEIGHT, fan_in)]
    if bias:
        inputs.append(at.parameter("bias", (channels,), Role.BIAS, fan_in))
    return at.call(Conv(strides, pads, dilations, groups), *inputs)


@layer
def conv1d(
    at: Site,
    x: Tensor,
    channels: int,
    kernel: int,
    *,
    stride: int = 1,
    pad: Padding = 0,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
    name: str = "",
) -> Tensor:
    """Convolve a signal x[N,C,L]: `conv` that insists on one spatial axis."""
    check_rank(at, x, spatial=1)
    options = {"stride": stride, "pad": pad, "dilation": dilation, "groups": groups, "bias": bias}
    return conv.define(at, x, channels, kernel, **options)


@layer
def linear(at: Site, x: Tensor, features: int, *, bias: bool = True, name: str = "") -> Tensor:
    """Connect the last axis of x[...,I] fully: y = x w^T + b; gives [...,features].

    Also called dense or fully connected.  Parameters weight[features, I] and bias[features].
    """
    if x.rank < 2 or not isinstance(x.shape[-1], int):
        raise at.error(f"wants x[...,I] with I known now, got {x.type}")
    check_count(at, features, "features")
    fan_in = x.shape[-1]
    inputs = [x, at.parameter("weight", (features, fan_in), Role.WEIGHT, fan_in)]
    if bias:
        inputs.append(at.parameter("bias", (features,), Role.BIAS, fan_in))
    return at.call(Dense(), *inputs)


dense = linear


def check_groups(at: Site, x: Tensor, channels: int, groups: int) -> None:
    """Raise `ShapeError` where groups do not divide the channels."""
    check_count(at, channels, "channels")
    check_count(at, groups, "groups")
    if x.channels % groups or channels % groups:
        raise at.error(f"wants groups that divide {x.channels} and {channels} channels, got {groups}")
