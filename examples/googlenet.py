"""GoogLeNet (Szegedy et al., *Going deeper with convolutions*, CVPR 2015, table 1): Inception, version 1.

`googlenet_2014` is the paper's network: biases, 5x5 convolutions, local response normalisation; 6,998,552
parameters.  `googlenet` is torchvision's, whose names it has: batch norm everywhere, and 3x3 where the paper has 5x5;
6,624,904 parameters.  Checkpoints' auxiliary classifiers act in training only.
"""

from collections.abc import Callable
from functools import partial

from cnnc.frontends.dsl import (
    Branches,
    Chain,
    Tensor,
    batch_norm,
    concat,
    conv,
    dropout,
    flatten,
    global_avg_pool,
    linear,
    lrn,
    max_pool,
    network,
    relu,
    scope,
)

# 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection
TABLE = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}

Unit = Callable[..., Chain]


def plain(channels: int, kernel: int, name: str, stride: int = 1) -> Chain:
    """Convolution with bias, ReLU."""
    return conv(channels, kernel, stride=stride, pad=kernel // 2, name=name) >> relu


def normalised(channels: int, kernel: int, name: str, stride: int = 1) -> Chain:
    """Convolution, batch norm, ReLU."""
    with scope(name):
        y = conv(channels, kernel, stride=stride, pad=kernel // 2, bias=False, name="conv")
        return y >> batch_norm(epsilon=1e-3, name="bn") >> relu


def inception(unit: Unit, large: int, row: tuple[int, int, int, int, int, int]) -> Branches:
    """Four branches side by side, 1x1 convolutions in front of the dear ones (figure 2b)."""
    c1, reduce3, c3, reduce5, c5, projection = row
    return concat(
        unit(c1, 1, "branch1"),
        unit(reduce3, 1, "branch2.0") >> unit(c3, 3, "branch2.1"),
        unit(reduce5, 1, "branch3.0") >> unit(c5, large, "branch3.1"),
        max_pool(3, stride=1, pad=1) >> unit(projection, 1, "branch4.1"),
    )


def stage(x: Tensor, number: str, block: Callable[[tuple[int, int, int, int, int, int]], Branches]) -> Tensor:
    """Run the inception modules whose name begins with this number."""
    for name, row in TABLE.items():
        if name.startswith(number):
            with scope(f"inception{name}"):
                x = x >> block(row)
    return x


@network(x=(3, 224, 224))
def googlenet_2014(x: Tensor) -> Tensor:
    """The network of the paper."""
    pool, norm = max_pool(3, stride=2, ceil_mode=True), lrn(5, alpha=1e-4, beta=0.75)
    block = partial(inception, plain, 5)
    x = x >> plain(64, 7, "conv1", stride=2) >> pool >> norm
    x = x >> plain(64, 1, "conv2") >> plain(192, 3, "conv3") >> norm >> pool
    x = stage(stage(x, "3", block) >> pool, "4", block) >> pool
    return stage(x, "5", block) >> global_avg_pool >> flatten >> dropout(0.4) >> linear(1000, name="fc")


@network(x=(3, 224, 224), training_only=("aux1.", "aux2."))
def googlenet(x: Tensor) -> Tensor:
    """The form that torchvision has weights for."""
    pool = max_pool(3, stride=2, ceil_mode=True)
    block = partial(inception, normalised, 3)
    x = x >> normalised(64, 7, "conv1", stride=2) >> pool
    x = x >> normalised(64, 1, "conv2") >> normalised(192, 3, "conv3") >> pool
    x = stage(stage(x, "3", block) >> pool, "4", block) >> max_pool(2, ceil_mode=True)
    return stage(x, "5", block) >> global_avg_pool >> flatten >> dropout(0.2) >> linear(1000, name="fc")
