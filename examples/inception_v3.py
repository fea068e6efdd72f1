"""Inception v3 (Szegedy et al., *Rethinking the Inception architecture for computer vision*, CVPR 2016, table 1).

Large windows are factored into 1xn and nx1.  Parameters are named as torchvision's `inception_v3`; the
auxiliary classifier of its checkpoints acts in training only.
"""

from cnnc.frontends.dsl import (
    Branches,
    Chain,
    Tensor,
    avg_pool,
    batch_norm,
    concat,
    conv,
    dropout,
    flatten,
    global_avg_pool,
    linear,
    max_pool,
    network,
    relu,
    scope,
)

mean = avg_pool(3, stride=1, pad=1)
shrink = max_pool(3, stride=2)


def unit(name: str, channels: int, kernel: int | tuple[int, int], stride: int = 1, pad: str = "same") -> Chain:
    """Convolution, batch norm, ReLU; with a stride there is no padding."""
    with scope(name):
        y = conv(channels, kernel, stride=stride, pad=pad if stride == 1 else "valid", bias=False, name="conv")
        return y >> batch_norm(epsilon=1e-3, name="bn") >> relu


def square(pool_channels: int) -> Branches:
    """Figure 5: 5x5 beside two 3x3 (torchvision's InceptionA)."""
    return concat(
        unit("branch1x1", 64, 1),
        unit("branch5x5_1", 48, 1) >> unit("branch5x5_2", 64, 5),
        unit("branch3x3dbl_1", 64, 1) >> unit("branch3x3dbl_2", 96, 3) >> unit("branch3x3dbl_3", 96, 3),
        mean >> unit("branch_pool", pool_channels, 1),
    )


def shrink_to_17() -> Branches:
    """From 35x35 to 17x17 (figure 10; torchvision's InceptionB)."""
    return concat(
        unit("branch3x3", 384, 3, stride=2),
        unit("branch3x3dbl_1", 64, 1) >> unit("branch3x3dbl_2", 96, 3) >> unit("branch3x3dbl_3", 96, 3, stride=2),
        shrink,
    )


def factored(c: int) -> Branches:
    """Figure 6: 7x7 as 1x7 and 7x1 (torchvision's InceptionC)."""
    return concat(
        unit("branch1x1", 192, 1),
        unit("branch7x7_1", c, 1) >> unit("branch7x7_2", c, (1, 7)) >> unit("branch7x7_3", 192, (7, 1)),
        unit("branch7x7dbl_1", c, 1)
        >> unit("branch7x7dbl_2", c, (7, 1))
        >> unit("branch7x7dbl_3", c, (1, 7))
        >> unit("branch7x7dbl_4", c, (7, 1))
        >> unit("branch7x7dbl_5", 192, (1, 7)),
        mean >> unit("branch_pool", 192, 1),
    )


def shrink_to_8() -> Branches:
    """From 17x17 to 8x8 (torchvision's InceptionD)."""
    return concat(
        unit("branch3x3_1", 192, 1) >> unit("branch3x3_2", 320, 3, stride=2),
        unit("branch7x7x3_1", 192, 1)
        >> unit("branch7x7x3_2", 192, (1, 7))
        >> unit("branch7x7x3_3", 192, (7, 1))
        >> unit("branch7x7x3_4", 192, 3, stride=2),
        shrink,
    )


def expanded() -> Branches:
    """Figure 7: 1x3 beside 3x1 (torchvision's InceptionE)."""
    return concat(
        unit("branch1x1", 320, 1),
        unit("branch3x3_1", 384, 1) >> concat(unit("branch3x3_2a", 384, (1, 3)), unit("branch3x3_2b", 384, (3, 1))),
        unit("branch3x3dbl_1", 448, 1)
        >> unit("branch3x3dbl_2", 384, 3)
        >> concat(unit("branch3x3dbl_3a", 384, (1, 3)), unit("branch3x3dbl_3b", 384, (3, 1))),
        mean >> unit("branch_pool", 192, 1),
    )


@network(x=(3, 299, 299), training_only=("AuxLogits.",))
def inception_v3(x: Tensor) -> Tensor:
    """23,834,568 parameters."""
    x = x >> unit("Conv2d_1a_3x3", 32, 3, stride=2) >> unit("Conv2d_2a_3x3", 32, 3, pad="valid")
    x = x >> unit("Conv2d_2b_3x3", 64, 3) >> shrink
    x = x >> unit("Conv2d_3b_1x1", 80, 1) >> unit("Conv2d_4a_3x3", 192, 3, pad="valid") >> shrink
    for name, channels in [("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)]:
        with scope(name):
            x = x >> square(channels)
    with scope("Mixed_6a"):
        x = x >> shrink_to_17()
    for name, channels in [("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)]:
        with scope(name):
            x = x >> factored(channels)
    with scope("Mixed_7a"):
        x = x >> shrink_to_8()
    for name in ("Mixed_7b", "Mixed_7c"):
        with scope(name):
            x = x >> expanded()
    return x >> global_avg_pool >> flatten >> dropout(0.5) >> linear(1000, name="fc")
