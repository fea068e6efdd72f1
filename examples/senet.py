"""SE-ResNet-50 (Hu, Shen, Sun, *Squeeze-and-excitation networks*, CVPR 2018).

A ResNet whose blocks weigh their channels: squeeze (global mean), excite (fc, ReLU, fc, sigmoid), scale.
Parameters are named as timm's `seresnet50`, whose fully connected layers are 1x1 convolutions.
"""

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
    sigmoid,
)


def squeeze_excite(x: Tensor, reduction: int = 16) -> Tensor:
    """Scale each channel by a gate computed from the means of all channels (figure 1)."""
    with scope("se"):
        z = x >> global_avg_pool >> conv(x.channels // reduction, 1, name="fc1") >> relu
        return x * (z >> conv(x.channels, 1, name="fc2") >> sigmoid)


def se_bottleneck(x: Tensor, width: int, stride: int) -> Tensor:
    """ResNet's bottleneck, its output scaled before the addition (figure 3)."""
    y = x >> conv(width, 1, bias=False, name="conv1") >> batch_norm(name="bn1") >> relu
    y = y >> conv(width, 3, stride=stride, pad=1, bias=False, name="conv2") >> batch_norm(name="bn2") >> relu
    y = y >> conv(4 * width, 1, bias=False, name="conv3") >> batch_norm(name="bn3") >> squeeze_excite
    if y.shape != x.shape:
        x = x >> conv(4 * width, 1, stride=stride, bias=False, name="downsample.0") >> batch_norm(name="downsample.1")
    return relu(y + x)


@network(x=(3, 224, 224))
def seresnet50(x: Tensor) -> Tensor:
    """28,088,024 parameters."""
    x = x >> conv(64, 7, stride=2, pad=3, bias=False, name="conv1") >> batch_norm(name="bn1") >> relu
    x = x >> max_pool(3, stride=2, pad=1)
    for stage, (width, count) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for i in range(count):
            with scope(f"layer{stage}", i):
                x = se_bottleneck(x, width, 2 if stage > 1 and i == 0 else 1)
    return x >> global_avg_pool >> flatten >> linear(1000, name="fc")
