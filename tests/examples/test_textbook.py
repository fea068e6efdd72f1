"""What the papers and textbooks say: sizes, counts, receptive fields, worked examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cnnc.frontends.dsl import (
    Network,
    Tensor,
    concat,
    conv,
    correlate,
    flatten,
    linear,
    load_network,
    max_pool,
    network,
    relu,
)
from cnnc.frontends.dsl.receptive_field import receptive_fields
from cnnc.frontends.dsl.summary import multiply_adds
from cnnc.ir.interp import evaluate


def build(layer: Any, *shape: int) -> Network:
    """Make a network of one layer."""

    @network(x=shape)
    def one(x: Tensor) -> Tensor:
        return x >> layer

    made: Network = one()
    return made


def field(net: Network) -> Any:
    """Give the receptive field of the output."""
    return receptive_fields(net.structure)[net.outputs[0]]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad", "dilation"),
    [(32, 5, 1, 2, 1), (7, 3, 2, 0, 1), (7, 3, 3, 0, 1), (10, 3, 1, 1, 3), (227, 11, 4, 0, 1), (5, 5, 1, 0, 1)],
)
def test_output_sizes_follow_the_formula(size: int, kernel: int, stride: int, pad: int, dilation: int) -> None:
    layer = conv(2, kernel, stride=stride, pad=pad, dilation=dilation)
    wanted = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    assert build(layer, 1, size, size).outputs[0].shape == (1, 2, wanted, wanted)


def test_ten_filters_of_five_on_a_small_picture() -> None:
    net = build(conv(10, 5, pad=2), 3, 32, 32)
    assert net.outputs[0].shape == (1, 10, 32, 32)
    assert net.parameter_count == 760


def test_the_first_layers_of_vgg() -> None:
    first = conv(64, 3, pad=1, name="first")
    net = build(first >> relu >> max_pool(2) >> conv(128, 3, pad=1, name="second"), 3, 224, 224)
    assert net.output_of("first").shape == (1, 64, 224, 224)
    assert net.output_of("max_pool1").shape == (1, 64, 112, 112)
    assert net.outputs[0].shape == (1, 128, 112, 112)
    assert net.parameters["first.weight"].elements + net.parameters["first.bias"].elements == 1_792
    assert net.parameters["second.weight"].elements + net.parameters["second.bias"].elements == 73_856


def test_padding_same_puts_the_odd_row_at_the_end() -> None:
    net = build(conv(1, 4, pad="same"), 1, 9, 9)
    assert net.outputs[0].shape == (1, 1, 9, 9)
    assert net.outputs[0].op.pad == (1, 1, 2, 2)
    assert build(conv(1, 3, stride=2, pad="same"), 1, 9, 8).outputs[0].shape == (1, 1, 5, 4)
    assert build(conv(1, 3, pad="valid"), 1, 9, 9).outputs[0].shape == (1, 1, 7, 7)


def test_the_worked_correlation(example_path: Callable[[str], str]) -> None:
    rows = ["10210", "01011", "10100", "00110", "11001"]
    picture = np.array([[float(digit) for digit in row] for row in rows], np.float32).reshape(1, 1, 5, 5)
    net = build(correlate(np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]]), pad="valid"), 1, 5, 5)
    example = load_network(example_path("filters.py:cross"))
    for graph in (net.graph(), example.graph()):
        got = evaluate(graph, {"x": picture})["output"][0, 0]
        assert ["".join(str(int(number)) for number in row) for row in got] == ["614", "142", "323"]


def test_naive_inception_costs_854_million_and_bottlenecks_271() -> None:
    naive = concat(conv(128, 1), conv(192, 3, pad=1), conv(96, 5, pad=2), max_pool(3, stride=1, pad=1))
    net = build(naive, 256, 28, 28)
    assert net.outputs[0].shape == (1, 672, 28, 28)
    assert round(multiply_adds(net.structure.nodes) / 1e6) == 854
    thin = concat(
        conv(128, 1),
        conv(64, 1) >> conv(192, 3, pad=1),
        conv(64, 1) >> conv(96, 5, pad=2),
        max_pool(3, stride=1, pad=1) >> conv(64, 1),
    )
    net = build(thin, 256, 28, 28)
    assert net.outputs[0].shape == (1, 480, 28, 28)
    weights = 128 * 256 + 3 * 64 * 256 + 192 * 64 * 9 + 96 * 64 * 25
    assert multiply_adds(net.structure.nodes) == 28 * 28 * weights == 271_351_808


def test_three_small_windows_have_fewer_weights_than_a_large_one() -> None:
    c = 12
    small = build(conv(c, 3, bias=False) >> conv(c, 3, bias=False) >> conv(c, 3, bias=False), c, 20, 20)
    large = build(conv(c, 7, bias=False), c, 20, 20)
    assert (small.parameter_count, large.parameter_count) == (27 * c * c, 49 * c * c)
    assert field(small) == field(large) == (7, 7)


def test_three_small_windows_and_a_pool_see_eight() -> None:
    assert field(build(conv(4, 3) >> conv(4, 3) >> conv(4, 3) >> max_pool(2), 3, 32, 32)) == (8, 8)


def test_receptive_fields_of_published_networks(example: Callable[..., Network]) -> None:
    def of(name: str, layer: str) -> Any:
        net = example(name).cut(layer)
        return field(net)

    assert of("alexnet_2012", "max_pool3") == (195, 195)
    assert of("vgg16", "features.28") == (196, 196)
    assert of("vgg16", "max_pool5") == (212, 212)
    # Published as 483 for the form with strides in the 1x1 convolutions; here the 3x3 ones have them.
    windows = [(7, 1), (3, 2), *[(3, 4)] * 4, *[(3, 8)] * 4, *[(3, 16)] * 6, *[(3, 32)] * 2]
    assert of("resnet50", "layer4") == (1 + sum((kernel - 1) * jump for kernel, jump in windows),) * 2 == (427, 427)
    assert of("resnet50", "fc") is None


def test_a_receptive_field_is_what_a_change_of_one_input_reaches() -> None:
    net = build(conv(2, 3, stride=2, pad=1) >> conv(2, (3, 1), dilation=(2, 1)) >> max_pool((1, 2)), 1, 31, 31).init(1)
    seen = field(net)
    base = np.random.default_rng(20).standard_normal((1, 1, 31, 31)).astype(np.float32)
    row, column = 4, 3
    reached = np.zeros((31, 31), bool)
    before = evaluate(net.graph(), {"x": base})["output"][0, :, row, column]
    for i in range(31):
        for j in range(31):
            changed = base.copy()
            changed[0, 0, i, j] += 100
            after = evaluate(net.graph(), {"x": changed})["output"][0, :, row, column]
            reached[i, j] = not np.array_equal(before, after)
    rows, columns = np.nonzero(reached.any(1))[0], np.nonzero(reached.any(0))[0]
    assert rows[-1] - rows[0] + 1 <= seen[0]
    assert columns[-1] - columns[0] + 1 <= seen[1]
    assert seen == (11, 5)
    assert rows[-1] - rows[0] + 1 == seen[0]


def test_convolution_is_a_product_with_a_toeplitz_matrix() -> None:
    net = build(conv(3, (3, 2), pad=(1, 0), bias=False, name="c"), 2, 6, 5).init(7)
    weight = net.weights["c.weight"].astype(np.float64)
    rng = np.random.default_rng(20)
    x = rng.standard_normal((1, 2, 6, 5))
    toeplitz = np.zeros((3, 6, 4, 2, 6, 5))
    for o, p, q, c, k, m in np.ndindex(3, 6, 4, 2, 3, 2):
        if 0 <= p + k - 1 < 6:
            toeplitz[o, p, q, c, p + k - 1, q + m] += weight[o, c, k, m]
    wanted = (toeplitz.reshape(72, 60) @ x.reshape(60)).reshape(1, 3, 6, 4)
    got = evaluate(net.graph(), {"x": x}, precise=True)["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_a_fully_connected_layer_is_a_convolution_over_the_whole_map() -> None:
    dense = build(flatten >> linear(7, name="f"), 4, 3, 5).init(2)
    whole = build(conv(7, (3, 5), name="f"), 4, 3, 5)
    shaped = {"f.weight": dense.weights["f.weight"].reshape(7, 4, 3, 5), "f.bias": dense.weights["f.bias"]}
    whole.load_state_dict(shaped)
    x = np.random.default_rng(20).standard_normal((1, 4, 3, 5))
    wanted = evaluate(dense.graph(), {"x": x}, precise=True)["output"]
    got = evaluate(whole.graph(), {"x": x}, precise=True)["output"]
    np.testing.assert_allclose(got.reshape(1, 7), wanted, rtol=1e-12)


def test_simple_cnn_classifies_a_batch(example: Callable[..., Network]) -> None:
    net = example("simple_cnn", batch=4)
    assert net.output_of("flatten1").shape == (4, 4096)
    assert net.outputs[0].shape == (4, 10)


def test_maps_of_alexnet(example: Callable[..., Network]) -> None:
    net = example("alexnet_2012")
    shapes = {name: net.output_of(name).shape[1:] for name in ("conv1", "max_pool1", "max_pool2", "max_pool3")}
    assert shapes == {
        "conv1": (96, 55, 55),
        "max_pool1": (96, 27, 27),
        "max_pool2": (256, 13, 13),
        "max_pool3": (256, 6, 6),
    }


def test_googlenet_has_22_layers_with_weights(example: Callable[..., Network]) -> None:
    """Counted along the longest way: 3 at the stem, 2 in each of 9 modules, 1 at the end."""
    graph = example("googlenet_2014").structure
    depth: dict[Any, int] = {}
    for node in graph.nodes:
        below = max((depth[v.node] for v in node.inputs), default=0)
        depth[node] = below + (node.op.name in ("conv", "dense"))
    assert max(depth.values()) == 22


def test_every_efficientnet_follows_the_scaling_rule(example: Callable[..., Network]) -> None:
    sizes = [example(f"efficientnet_b{i}").inputs[0].shape[2] for i in range(8)]
    assert sizes == [224, 240, 260, 300, 380, 456, 528, 600]
    blocks = [
        len({n.split(".conv")[0] for n in example(f"efficientnet_b{i}").layers if ".conv_dw" in n}) for i in range(8)
    ]
    assert blocks == [16, 23, 23, 26, 32, 39, 45, 55]
