"""EfficientNet (Tan, Le, *EfficientNet: rethinking model scaling for convolutional neural networks*, ICML 2019).

Table 1 gives B0; B1 to B7 follow by compound scaling: depth, width and resolution grow together (equation 3).
Parameters are named as timm's `efficientnet_b0` and so on; padding is symmetric, as there.
"""

import math
from typing import NamedTuple

from cnnc.frontends.dsl import (
    Chain,
    Tensor,
    batch_norm,
    conv,
    dropout,
    flatten,
    global_avg_pool,
    linear,
    network,
    scope,
    sigmoid,
    silu,
)


class Stage(NamedTuple):
    """One row of table 1."""

    expansion: int
    kernel: int
    channels: int
    repeats: int
    stride: int


TABLE = (
    Stage(expansion=1, kernel=3, channels=16, repeats=1, stride=1),
    Stage(expansion=6, kernel=3, channels=24, repeats=2, stride=2),
    Stage(expansion=6, kernel=5, channels=40, repeats=2, stride=2),
    Stage(expansion=6, kernel=3, channels=80, repeats=3, stride=2),
    Stage(expansion=6, kernel=5, channels=112, repeats=3, stride=1),
    Stage(expansion=6, kernel=5, channels=192, repeats=4, stride=2),
    Stage(expansion=6, kernel=3, channels=320, repeats=1, stride=1),
)


def scaled(channels: int, width: float) -> int:
    """Widen, to a multiple of 8, by rounding that never takes more than a tenth away."""
    wide = channels * width
    rounded = max(8, int(wide + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wide else rounded + 8


def pointwise(channels: int, number: int, name: str) -> Chain:
    """1x1 convolution and batch norm."""
    return conv(channels, 1, bias=False, name=name) >> batch_norm(name=f"bn{number}")


def depthwise(x: Tensor, kernel: int, stride: int, number: int) -> Tensor:
    """Convolve each channel by itself, then batch norm and SiLU."""
    y = conv(x, x.channels, kernel, stride=stride, pad=kernel // 2, groups=x.channels, bias=False, name="conv_dw")
    return y >> batch_norm(name=f"bn{number}") >> silu


def squeeze_excite(x: Tensor, reduced: int) -> Tensor:
    """Scale each channel by a gate computed from the means of all channels."""
    with scope("se"):
        z = x >> global_avg_pool >> conv(reduced, 1, name="conv_reduce") >> silu
        return x * (z >> conv(x.channels, 1, name="conv_expand") >> sigmoid)


def mbconv(x: Tensor, stage: Stage, channels: int, stride: int) -> Tensor:
    """Expand by 1x1, convolve depthwise, squeeze and excite, project by 1x1; add the input where shapes agree."""
    reduced = x.channels // 4
    if stage.expansion == 1:
        y = squeeze_excite(depthwise(x, stage.kernel, stride, 1), reduced) >> pointwise(channels, 2, "conv_pw")
    else:
        y = x >> pointwise(x.channels * stage.expansion, 1, "conv_pw") >> silu
        y = squeeze_excite(depthwise(y, stage.kernel, stride, 2), reduced) >> pointwise(channels, 3, "conv_pwl")
    return y + x if y.shape == x.shape else y


def efficientnet(x: Tensor, width: float, depth: float, rate: float) -> Tensor:
    """Build the network of table 1, wider and deeper."""
    x = x >> conv(scaled(32, width), 3, stride=2, pad=1, bias=False, name="conv_stem") >> batch_norm(name="bn1") >> silu
    for number, stage in enumerate(TABLE):
        for i in range(math.ceil(stage.repeats * depth)):
            with scope("blocks", number, i):
                x = mbconv(x, stage, scaled(stage.channels, width), stage.stride if i == 0 else 1)
    x = x >> pointwise(scaled(1280, width), 2, "conv_head") >> silu
    return x >> global_avg_pool >> flatten >> dropout(rate) >> linear(1000, name="classifier")


@network(x=(3, 224, 224))
def efficientnet_b0(x: Tensor) -> Tensor:
    """5,288,548 parameters."""
    return efficientnet(x, width=1.0, depth=1.0, rate=0.2)


@network(x=(3, 240, 240))
def efficientnet_b1(x: Tensor) -> Tensor:
    """7,794,184 parameters."""
    return efficientnet(x, width=1.0, depth=1.1, rate=0.2)


@network(x=(3, 260, 260))
def efficientnet_b2(x: Tensor) -> Tensor:
    """9,109,994 parameters."""
    return efficientnet(x, width=1.1, depth=1.2, rate=0.3)


@network(x=(3, 300, 300))
def efficientnet_b3(x: Tensor) -> Tensor:
    """12,233,232 parameters."""
    return efficientnet(x, width=1.2, depth=1.4, rate=0.3)


@network(x=(3, 380, 380))
def efficientnet_b4(x: Tensor) -> Tensor:
    """19,341,616 parameters."""
    return efficientnet(x, width=1.4, depth=1.8, rate=0.4)


@network(x=(3, 456, 456))
def efficientnet_b5(x: Tensor) -> Tensor:
    """30,389,784 parameters."""
    return efficientnet(x, width=1.6, depth=2.2, rate=0.4)


@network(x=(3, 528, 528))
def efficientnet_b6(x: Tensor) -> Tensor:
    """43,040,704 parameters."""
    return efficientnet(x, width=1.8, depth=2.6, rate=0.5)


@network(x=(3, 600, 600))
def efficientnet_b7(x: Tensor) -> Tensor:
    """66,347,960 parameters."""
    return efficientnet(x, width=2.0, depth=3.1, rate=0.5)
