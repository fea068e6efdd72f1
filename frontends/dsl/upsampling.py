"""Layers that make feature maps larger, and their inverses."""

from __future__ import annotations

import math

from cnnc.frontends.dsl.convolution import check_groups
from cnnc.frontends.dsl.initial import Role
from cnnc.frontends.dsl.layer import Site, layer
from cnnc.frontends.dsl.options import Padding, Sizes, check_rank, per_axis, read_pad
from cnnc.frontends.dsl.tensor import Tensor
from cnnc.ops.conv_transpose import ConvTranspose
from cnnc.ops.space import DepthToSpace, SpaceToDepth


@layer
def conv_transpose(
    at: Site,
    x: Tensor,
    channels: int,
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    pad: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    output_pad: Sizes = 0,
    bias: bool = True,
    name: str = "",
) -> Tensor:
    """Convolve x[N,C,...] transposed, which makes it larger: (in - 1) * stride + reach - 2 * pad + output_pad.

    Also called deconvolution.  Parameters weight[C, channels/groups, kernel...] and bias[channels].
    """
    rank = check_rank(at, x)
    kernels = per_axis(at, kernel, rank, "kernel")
    strides, dilations = per_axis(at, stride, rank, "stride"), per_axis(at, dilation, rank, "dilation")
    if isinstance(pad, str):
        raise at.error(f"wants pad as numbers, got {pad!r}")
    pads = read_pad(at, pad, x, kernels, strides, dilations)
    extra = per_axis(at, output_pad, rank, "output_pad")
    check_groups(at, x, channels, groups)
    shape = (x.channels, channels // groups, *kernels)
    fan_in = max(x.channels // groups * math.prod(kernels) // math.prod(strides), 1)
    inputs = [x, at.parameter("weight", shape, Role.WEIGHT, fan_in)]
    if bias:
        inputs.append(at.parameter("bias", (channels,), Role.BIAS, fan_in))
    return at.call(ConvTranspose(strides, pads, dilations, groups, extra), *inputs)


@layer
def depth_to_space(at: Site, x: Tensor, block: int, *, name: str = "") -> Tensor:
    """Move channels into block x block pixels: [N,C*b*b,H,W] -> [N,C,H*b,W*b], as PyTorch's pixel shuffle."""
    return at.call(DepthToSpace(block, "CRD"), x)


@layer
def space_to_depth(at: Site, x: Tensor, block: int, *, name: str = "") -> Tensor:
    """Move block x block pixels into channels: [N,C,H,W] -> [N,b*b*C,H/b,W/b], as PyTorch's pixel unshuffle."""
    return at.call(SpaceToDepth(block, "CRD"), x)
