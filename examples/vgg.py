"""VGG (Simonyan, Zisserman, *Very deep convolutional networks for large-scale image recognition*, 2014, table 1).

Nothing but 3x3 convolutions and 2x2 max pooling.  Parameters are named as torchvision's `vgg16` and so on.
"""

from collections.abc import Sequence

from cnnc.frontends.dsl import Tensor, adaptive_avg_pool, conv, dropout, flatten, linear, max_pool, network, relu, scope

POOL = 0
VGG11 = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG13 = (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
VGG16 = (64, 64, POOL, 128, 128, POOL, *[256] * 3, POOL, *[512] * 3, POOL, *[512] * 3, POOL)
VGG19 = (64, 64, POOL, 128, 128, POOL, *[256] * 4, POOL, *[512] * 4, POOL, *[512] * 4, POOL)


def vgg(x: Tensor, columns: Sequence[int]) -> Tensor:
    """Stack the layers of one column of table 1, then three fully connected ones."""
    index = 0
    for channels in columns:
        if channels == POOL:
            x, index = x >> max_pool(2), index + 1
        else:
            x, index = x >> conv(channels, 3, pad=1, name=f"features.{index}") >> relu, index + 2
    x = x >> adaptive_avg_pool(7) >> flatten
    with scope("classifier"):
        x = x >> linear(4096, name="0") >> relu >> dropout(0.5)
        return x >> linear(4096, name="3") >> relu >> dropout(0.5) >> linear(1000, name="6")


@network(x=(3, 224, 224))
def vgg11(x: Tensor) -> Tensor:
    """Column A, 11 layers: 132,863,336 parameters."""
    return vgg(x, VGG11)


@network(x=(3, 224, 224))
def vgg13(x: Tensor) -> Tensor:
    """Column B, 13 layers: 133,047,848 parameters."""
    return vgg(x, VGG13)


@network(x=(3, 224, 224))
def vgg16(x: Tensor) -> Tensor:
    """Column D, 16 layers: 138,357,544 parameters."""
    return vgg(x, VGG16)


@network(x=(3, 224, 224))
def vgg19(x: Tensor) -> Tensor:
    """Column E, 19 layers: 143,667,240 parameters."""
    return vgg(x, VGG19)
