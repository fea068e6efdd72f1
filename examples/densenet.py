"""DenseNet (Huang, Liu, van der Maaten, Weinberger, *Densely connected convolutional networks*, CVPR 2017, table 1).

Every layer sees the outputs of all layers before it in its block.  Parameters are named as torchvision's.
"""

from cnnc.frontends.dsl import (
    Tensor,
    avg_pool,
    batch_norm,
    concat,
    conv,
    flatten,
    global_avg_pool,
    linear,
    max_pool,
    network,
    relu,
    scope,
)


def dense_layer(x: Tensor, growth: int) -> Tensor:
    """Add `growth` channels: BN-ReLU-conv 1x1 to 4 * growth, BN-ReLU-conv 3x3."""
    y = x >> batch_norm(name="norm1") >> relu >> conv(4 * growth, 1, bias=False, name="conv1")
    y = y >> batch_norm(name="norm2") >> relu >> conv(growth, 3, pad=1, bias=False, name="conv2")
    return concat(x, y)


def transition(x: Tensor) -> Tensor:
    """Halve channels and size between two blocks."""
    return x >> batch_norm(name="norm") >> relu >> conv(x.channels // 2, 1, bias=False, name="conv") >> avg_pool(2)


def densenet(x: Tensor, growth: int, counts: tuple[int, int, int, int]) -> Tensor:
    """Build one column of table 1."""
    with scope("features"):
        x = x >> conv(2 * growth, 7, stride=2, pad=3, bias=False, name="conv0") >> batch_norm(name="norm0") >> relu
        x = x >> max_pool(3, stride=2, pad=1)
        for block, count in enumerate(counts, start=1):
            for i in range(1, count + 1):
                with scope(f"denseblock{block}", f"denselayer{i}"):
                    x = dense_layer(x, growth)
            if block < len(counts):
                with scope(f"transition{block}"):
                    x = transition(x)
        x = x >> batch_norm(name="norm5") >> relu
    return x >> global_avg_pool >> flatten >> linear(1000, name="classifier")


@network(x=(3, 224, 224))
def densenet121(x: Tensor) -> Tensor:
    """7,978,856 parameters."""
    return densenet(x, 32, (6, 12, 24, 16))


@network(x=(3, 224, 224))
def densenet169(x: Tensor) -> Tensor:
    """14,149,480 parameters."""
    return densenet(x, 32, (6, 12, 32, 32))
