"""MobileNetV2 (Sandler et al., *MobileNetV2: inverted residuals and linear bottlenecks*, CVPR 2018, table 2).

Parameters are named as torchvision's `mobilenet_v2`.
"""

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
    relu6,
    scope,
)

# expansion, channels, count, stride
TABLE = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def unit(channels: int, kernel: int, name: str, stride: int = 1, groups: int = 1) -> Chain:
    """Convolution, batch norm, ReLU6."""
    with scope(name):
        y = conv(channels, kernel, stride=stride, pad=kernel // 2, groups=groups, bias=False, name="0")
        return y >> batch_norm(name="1") >> relu6


def inverted_residual(x: Tensor, expansion: int, channels: int, stride: int) -> Tensor:
    """Expand by 1x1, convolve depthwise, project by 1x1 without activation; add x where shapes agree (figure 4)."""
    wide, number, y = x.channels * expansion, 0, x
    with scope("conv"):
        if expansion > 1:
            y, number = y >> unit(wide, 1, "0"), 1
        y = y >> unit(wide, 3, f"{number}", stride=stride, groups=wide)
        y = y >> conv(channels, 1, bias=False, name=f"{number + 1}") >> batch_norm(name=f"{number + 2}")
    return x + y if x.shape == y.shape else y


@network(x=(3, 224, 224))
def mobilenet_v2(x: Tensor) -> Tensor:
    """3,504,872 parameters."""
    x = x >> unit(32, 3, "features.0", stride=2)
    index = 1
    for expansion, channels, count, stride in TABLE:
        for i in range(count):
            with scope("features", index):
                x = inverted_residual(x, expansion, channels, stride if i == 0 else 1)
            index += 1
    x = x >> unit(1280, 1, f"features.{index}")
    return x >> global_avg_pool >> flatten >> dropout(0.2) >> linear(1000, name="classifier.1")
