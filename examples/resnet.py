"""Residual networks: y = F(x) + x, then ReLU.

He, Zhang, Ren, Sun, *Deep residual learning for image recognition*, CVPR 2016, table 1; ResNeXt: Xie et al.,
CVPR 2017; wide: Zagoruyko, Komodakis, BMVC 2016.  As in torchvision, whose parameter names these are, the 3x3
convolution of a bottleneck has the stride.
"""

from collections.abc import Callable
from functools import partial

from cnnc.frontends.dsl import (
    Tensor,
    batch_norm,
    conv,
    flatten,
    global_avg_pool,
    linear,
    max_pool,
    network,
    relu,
    scope,
)

Block = Callable[[Tensor, int, int], Tensor]


def basic(x: Tensor, width: int, stride: int) -> Tensor:
    """Two 3x3 convolutions."""
    y = x >> conv(width, 3, stride=stride, pad=1, bias=False, name="conv1") >> batch_norm(name="bn1") >> relu
    y = y >> conv(width, 3, pad=1, bias=False, name="conv2") >> batch_norm(name="bn2")
    return relu(y + shortcut(x, width, stride))


def bottleneck(x: Tensor, width: int, stride: int, groups: int = 1, group_width: int = 64) -> Tensor:
    """1x1 to fewer channels, 3x3, 1x1 to more; `groups` is ResNeXt's cardinality."""
    inner = width * group_width // 64 * groups
    y = x >> conv(inner, 1, bias=False, name="conv1") >> batch_norm(name="bn1") >> relu
    y = (
        y
        >> conv(inner, 3, stride=stride, pad=1, groups=groups, bias=False, name="conv2")
        >> batch_norm(name="bn2")
        >> relu
    )
    y = y >> conv(4 * width, 1, bias=False, name="conv3") >> batch_norm(name="bn3")
    return relu(y + shortcut(x, 4 * width, stride))


def shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """x itself, or its projection where the block changes the shape (option B)."""
    if stride == 1 and x.channels == channels:
        return x
    return x >> conv(channels, 1, stride=stride, bias=False, name="downsample.0") >> batch_norm(name="downsample.1")


def resnet(x: Tensor, block: Block, counts: tuple[int, int, int, int]) -> Tensor:
    """Build one column of table 1."""
    x = x >> conv(64, 7, stride=2, pad=3, bias=False, name="conv1") >> batch_norm(name="bn1") >> relu
    x = x >> max_pool(3, stride=2, pad=1)
    for stage, count in enumerate(counts, start=1):
        for i in range(count):
            with scope(f"layer{stage}", i):
                x = block(x, 32 * 2**stage, 2 if stage > 1 and i == 0 else 1)
    return x >> global_avg_pool >> flatten >> linear(1000, name="fc")


@network(x=(3, 224, 224))
def resnet18(x: Tensor) -> Tensor:
    """11,689,512 parameters."""
    return resnet(x, basic, (2, 2, 2, 2))


@network(x=(3, 224, 224))
def resnet34(x: Tensor) -> Tensor:
    """21,797,672 parameters."""
    return resnet(x, basic, (3, 4, 6, 3))


@network(x=(3, 224, 224))
def resnet50(x: Tensor) -> Tensor:
    """25,557,032 parameters."""
    return resnet(x, bottleneck, (3, 4, 6, 3))


@network(x=(3, 224, 224))
def resnet101(x: Tensor) -> Tensor:
    """44,549,160 parameters."""
    return resnet(x, bottleneck, (3, 4, 23, 3))


@network(x=(3, 224, 224))
def resnet152(x: Tensor) -> Tensor:
    """60,192,808 parameters."""
    return resnet(x, bottleneck, (3, 8, 36, 3))


@network(x=(3, 224, 224))
def resnext50_32x4d(x: Tensor) -> Tensor:
    """Cardinality 32, each group 4 wide: 25,028,904 parameters."""
    return resnet(x, partial(bottleneck, groups=32, group_width=4), (3, 4, 6, 3))


@network(x=(3, 224, 224))
def wide_resnet50_2(x: Tensor) -> Tensor:
    """The inside of each bottleneck twice as wide: 68,883,240 parameters."""
    return resnet(x, partial(bottleneck, group_width=128), (3, 4, 6, 3))
