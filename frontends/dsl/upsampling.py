"""Layers that make feature maps larger, and their inverses."""

from __future__ import annotations

import math

from cnnc.frontends.dsl.convolution import check_groups
from cnnc.frontends.dsl.initial import Role
from cnnc.frontends.dsl.layer import Site, layer
from cnnc.frontends.dsl.options import Padding, Sizes, check_count, check_rank, per_axis, read_pad
from cnnc.frontends.dsl.tensor import Tensor
from cnnc.ops.conv_transpose import ConvTranspose
from cnnc.ops.resize import Resize
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


@layer
def resize(
    at: Site, x: Tensor, size: Sizes, mode: str = "nearest", *, align_corners: bool = False, name: str = ""
) -> Tensor:
    """Interpolate x[N,C,...] to a spatial size, as `torch.nn.functional.interpolate` does.

    Modes: "nearest", "linear" (bilinear in two dimensions), "cubic".
    """
    return _resize(at, x, per_axis(at, size, check_rank(at, x), "size"), mode, align_corners)


@layer
def upsample(
    at: Site, x: Tensor, scale: Sizes, mode: str = "nearest", *, align_corners: bool = False, name: str = ""
) -> Tensor:
    """Interpolate x[N,C,...] to `scale` times its size; "nearest" repeats pixels.  Modes as in `resize`."""
    scales = per_axis(at, scale, check_rank(at, x), "scale")
    if not all(isinstance(size, int) for size in x.spatial):
        raise at.error(f"wants spatial sizes known now, got {x.type}")
    sizes = tuple(size * factor for size, factor in zip(x.spatial, scales, strict=True) if isinstance(size, int))
    return _resize(at, x, sizes, mode, align_corners)


def _resize(at: Site, x: Tensor, sizes: tuple[int, ...], mode: str, align_corners: bool) -> Tensor:
    if mode not in ("nearest", "linear", "cubic"):
        raise at.error(f'wants mode "nearest", "linear" or "cubic", got {mode!r}')
    if align_corners and mode == "nearest":
        raise at.error('wants align_corners with "linear" or "cubic" only')
    for size in sizes:
        check_count(at, size, "size")
    whole = (*x.shape[:2], *sizes)
    if mode == "nearest":
        return at.call(Resize(whole, mode=mode, coordinate_mode="asymmetric", nearest_mode="floor"), x)
    corners = "align_corners" if align_corners else "half_pixel"
    return at.call(Resize(whole, mode=mode, coordinate_mode=corners), x)
