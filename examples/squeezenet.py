"""SqueezeNet (Iandola et al., *SqueezeNet: AlexNet-level accuracy with 50x fewer parameters*, 2016, table 1).

`squeezenet1_1` is the authors' later version with 2.4 times less work.  Parameters are named as torchvision's.
"""

from cnnc.frontends.dsl import (
    Tensor,
    concat,
    conv,
    dropout,
    flatten,
    global_avg_pool,
    max_pool,
    network,
    relu,
    scope,
)

pool = max_pool(3, stride=2, ceil_mode=True)


def fire(x: Tensor, index: int, squeeze: int, expand: int) -> Tensor:
    """Squeeze by 1x1, expand by 1x1 and 3x3 side by side (figure 1)."""
    with scope("features", index):
        x = x >> conv(squeeze, 1, name="squeeze") >> relu
        return x >> concat(
            conv(expand, 1, name="expand1x1") >> relu,
            conv(expand, 3, pad=1, name="expand3x3") >> relu,
        )


def classifier(x: Tensor) -> Tensor:
    """Score the classes at every place, then take the mean."""
    return x >> dropout(0.5) >> conv(1000, 1, name="classifier.1") >> relu >> global_avg_pool >> flatten


@network(x=(3, 224, 224))
def squeezenet1_0(x: Tensor) -> Tensor:
    """1,248,424 parameters."""
    x = x >> conv(96, 7, stride=2, name="features.0") >> relu >> pool
    for index, squeeze, expand in [(3, 16, 64), (4, 16, 64), (5, 32, 128)]:
        x = fire(x, index, squeeze, expand)
    x = x >> pool
    for index, squeeze, expand in [(7, 32, 128), (8, 48, 192), (9, 48, 192), (10, 64, 256)]:
        x = fire(x, index, squeeze, expand)
    return classifier(fire(x >> pool, 12, 64, 256))


@network(x=(3, 224, 224))
def squeezenet1_1(x: Tensor) -> Tensor:
    """1,235,496 parameters."""
    x = x >> conv(64, 3, stride=2, name="features.0") >> relu >> pool
    for index, squeeze, expand in [(3, 16, 64), (4, 16, 64)]:
        x = fire(x, index, squeeze, expand)
    x = x >> pool
    for index, squeeze, expand in [(6, 32, 128), (7, 32, 128)]:
        x = fire(x, index, squeeze, expand)
    x = x >> pool
    for index, squeeze, expand in [(9, 48, 192), (10, 48, 192), (11, 64, 256), (12, 64, 256)]:
        x = fire(x, index, squeeze, expand)
    return classifier(x)
