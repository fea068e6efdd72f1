"""ShuffleNet V2 (Ma et al., *ShuffleNet V2: practical guidelines for efficient CNN architecture design*, ECCV 2018).

Parameters are named as torchvision's `shufflenet_v2_x1_0`.
"""

from cnnc.frontends.dsl import (
    Chain,
    Tensor,
    batch_norm,
    concat,
    conv,
    flatten,
    global_avg_pool,
    linear,
    max_pool,
    network,
    relu,
    reshape,
    scope,
    split,
    transpose,
)


def pointwise(channels: int, number: int) -> Chain:
    """1x1 convolution, batch norm, ReLU."""
    return conv(channels, 1, bias=False, name=f"{number}") >> batch_norm(name=f"{number + 1}") >> relu


def depthwise(channels: int, stride: int, number: int) -> Chain:
    """Convolve each channel by itself, then batch norm."""
    y = conv(channels, 3, stride=stride, pad=1, groups=channels, bias=False, name=f"{number}")
    return y >> batch_norm(name=f"{number + 1}")


def shuffle(x: Tensor) -> Tensor:
    """Deal the channels of two halves out in turn."""
    h, w = x.spatial
    return x >> reshape(2, -1, h, w) >> transpose(0, 2, 1, 3, 4) >> reshape(x.channels, h, w)


def unit(x: Tensor, channels: int, stride: int) -> Tensor:
    """Figure 3: (c) keeps one half of the channels as it is, (d) halves the size in both branches."""
    half = channels // 2
    if stride == 1:
        left, right = split(x, 2)
    else:
        right = x
        with scope("branch1"):
            left = x >> depthwise(x.channels, stride, 0) >> pointwise(half, 2)
    with scope("branch2"):
        right = right >> pointwise(half, 0) >> depthwise(half, stride, 3) >> pointwise(half, 5)
    return shuffle(concat(left, right))


@network(x=(3, 224, 224))
def shufflenet_v2_x1_0(x: Tensor) -> Tensor:
    """2,278,604 parameters."""
    with scope("conv1"):
        x = x >> conv(24, 3, stride=2, pad=1, bias=False, name="0") >> batch_norm(name="1") >> relu
    x = x >> max_pool(3, stride=2, pad=1)
    for stage, channels, count in [(2, 116, 4), (3, 232, 8), (4, 464, 4)]:
        for i in range(count):
            with scope(f"stage{stage}", i):
                x = unit(x, channels, 2 if i == 0 else 1)
    with scope("conv5"):
        x = x >> pointwise(1024, 0)
    return x >> global_avg_pool >> flatten >> linear(1000, name="fc")
