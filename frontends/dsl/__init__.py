"""The DSL: layers are values, `>>` chains them, Python does the rest.

    @network(x=(3, 32, 32))
    def simple_cnn(x: Tensor) -> Tensor:
        x = x >> conv(16, 3, pad=1, name="conv1") >> relu >> max_pool(2)
        return x >> flatten >> linear(10, name="fc1")

    net = simple_cnn(batch=4).init(seed=0)

Parameters have `state_dict` names: the layer's `name=` after the open `with scope("layer1", 0)`s.
"""

from cnnc.frontends.dsl.activation import (
    elu,
    gelu,
    hard_sigmoid,
    hard_swish,
    leaky_relu,
    log_softmax,
    relu,
    relu6,
    sigmoid,
    silu,
    softmax,
    tanh,
)
from cnnc.frontends.dsl.convolution import conv, conv1d, dense, linear
from cnnc.frontends.dsl.filters import (
    box,
    box_kernel,
    convolve,
    correlate,
    gaussian,
    gaussian_kernel,
    prewitt,
    sharpen,
    sobel,
)
from cnnc.frontends.dsl.initial import Initial, Role
from cnnc.frontends.dsl.layer import Branches, Chain, Function, Layer, LayerKind, Site, identity, layer
from cnnc.frontends.dsl.loading import load_network
from cnnc.frontends.dsl.network import Definition, Network, network
from cnnc.frontends.dsl.normalisation import batch_norm, dropout, group_norm, instance_norm, layer_norm, lrn
from cnnc.frontends.dsl.pooling import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    global_avg_pool,
    global_max_pool,
    max_pool,
    min_pool,
)
from cnnc.frontends.dsl.scope import scope
from cnnc.frontends.dsl.shaping import concat, crop, flatten, pad, reshape, split, transpose
from cnnc.frontends.dsl.tensor import Tensor, apply, apply_all
from cnnc.frontends.dsl.upsampling import conv_transpose, depth_to_space, resize, space_to_depth, upsample

__all__ = [
    "Branches",
    "Chain",
    "Definition",
    "Function",
    "Initial",
    "Layer",
    "LayerKind",
    "Network",
    "Role",
    "Site",
    "Tensor",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "apply",
    "apply_all",
    "avg_pool",
    "batch_norm",
    "box",
    "box_kernel",
    "concat",
    "conv",
    "conv1d",
    "conv_transpose",
    "convolve",
    "correlate",
    "crop",
    "dense",
    "depth_to_space",
    "dropout",
    "elu",
    "flatten",
    "gaussian",
    "gaussian_kernel",
    "gelu",
    "global_avg_pool",
    "global_max_pool",
    "group_norm",
    "hard_sigmoid",
    "hard_swish",
    "identity",
    "instance_norm",
    "layer",
    "layer_norm",
    "leaky_relu",
    "linear",
    "load_network",
    "log_softmax",
    "lrn",
    "max_pool",
    "min_pool",
    "network",
    "pad",
    "prewitt",
    "relu",
    "relu6",
    "reshape",
    "resize",
    "scope",
    "sharpen",
    "sigmoid",
    "silu",
    "sobel",
    "softmax",
    "space_to_depth",
    "split",
    "tanh",
    "transpose",
    "upsample",
]
