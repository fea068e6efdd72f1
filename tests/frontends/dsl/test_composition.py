"""How layers compose, and how they are named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.errors import ModelError, UsageError
from cnnc.frontends.dsl import (
    Network,
    Role,
    Site,
    Tensor,
    batch_norm,
    concat,
    conv,
    flatten,
    global_avg_pool,
    identity,
    layer,
    linear,
    max_pool,
    network,
    relu,
    reshape,
    scope,
    sigmoid,
    split,
    tanh,
    transpose,
)
from cnnc.ir.interp import evaluate
from cnnc.ir.parse import parse_graph
from cnnc.ir.text import print_graph, weights_of
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ir.verify import verify
from cnnc.ops.binary import Mul


def build(function: Any, *shape: int) -> Network:
    """Make a network of a function of one tensor."""

    @network(x=shape)
    def made(x: Tensor) -> Any:
        return function(x)

    result: Network = made()
    return result


def outputs(net: Network, x: np.ndarray) -> dict[str, np.ndarray]:
    """Run a network in float64."""
    return evaluate(net.graph(), {"x": x}, precise=True)


X = np.random.default_rng(0).standard_normal((1, 4, 6, 6))


def test_layers_compose_before_they_see_an_input() -> None:
    block = conv(4, 3, pad=1, name="a") >> relu >> conv(4, 1, name="b")
    late = build(lambda x: x >> block >> tanh, 4, 6, 6).init(1)
    early = build(lambda x: tanh(conv(4, 1, name="b")(relu(conv(x, 4, 3, pad=1, name="a")))), 4, 6, 6).init(1)
    assert list(late.parameters) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    np.testing.assert_array_equal(outputs(late, X)["output"], outputs(early, X)["output"])


def test_chaining_is_associative() -> None:
    a, b, c = conv(3, 3, name="a"), relu, conv(2, 1, name="c")
    left, right = build((a >> b) >> c, 4, 6, 6).init(1), build(a >> (b >> c), 4, 6, 6).init(1)
    assert print_graph(left.structure).splitlines()[1:] == print_graph(right.structure).splitlines()[1:]


def test_functions_chain_like_layers() -> None:
    def double(x: Tensor) -> Tensor:
        return x + x

    net = build(relu >> double >> relu, 4, 6, 6)
    np.testing.assert_array_equal(outputs(net, X)["output"], 2 * np.maximum(X, 0))
    net = build(double >> relu, 4, 6, 6)
    np.testing.assert_array_equal(outputs(net, X)["output"], 2 * np.maximum(X, 0))


def test_sums_products_and_concats_of_layers_run_side_by_side() -> None:
    np.testing.assert_array_equal(outputs(build(relu + identity, 4, 6, 6), X)["output"], np.maximum(X, 0) + X)
    np.testing.assert_allclose(outputs(build(identity * sigmoid, 4, 6, 6), X)["output"], X / (1 + np.exp(-X)))
    both = outputs(build(concat(relu, identity, relu >> tanh), 4, 6, 6), X)["output"]
    np.testing.assert_allclose(both, np.concatenate([np.maximum(X, 0), X, np.tanh(np.maximum(X, 0))], axis=1))
    wide = outputs(build(concat(relu, identity, axis=-1), 4, 6, 6), X)["output"]
    np.testing.assert_array_equal(wide, np.concatenate([np.maximum(X, 0), X], axis=3))


def test_arithmetic_takes_numbers_and_arrays_on_both_sides() -> None:
    scale = np.arange(1, 5, dtype=np.float32).reshape(4, 1, 1)

    def everything(x: Tensor) -> Tensor:
        return 1 - ((scale * x + x * scale) / 2 + (2 + x) - -x) / scale + (x * x + 1) ** 0.5 + 3 / (x * x + 1)

    got = outputs(build(everything, 4, 6, 6), X)["output"]
    wanted = 1 - (scale * X + 2 + 2 * X) / scale + np.sqrt(X * X + 1) + 3 / (X * X + 1)
    np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_split_gives_the_parts() -> None:
    halves = build(lambda x: split(x, 2), 4, 6, 6)
    assert halves.structure.output_names == ("output0", "output1")
    got = outputs(halves, X)
    np.testing.assert_array_equal(got["output0"], X[:, :2])
    np.testing.assert_array_equal(got["output1"], X[:, 2:])
    parts = build(lambda x: dict(zip("abc", split(x, (1, 2, 3), axis=2), strict=True)), 4, 6, 6)
    assert {name: array.shape[2] for name, array in outputs(parts, X).items()} == {"a": 1, "b": 2, "c": 3}


def test_reshape_and_transpose_keep_the_order_of_numbers() -> None:
    net = build(reshape(2, -1, 9) >> transpose(0, 2, 1, 3), 4, 6, 6)
    np.testing.assert_array_equal(outputs(net, X)["output"], X.reshape(1, 2, 8, 9).transpose(0, 2, 1, 3))


def test_scopes_nest_and_hold_where_layers_are_made() -> None:
    def block(x: Tensor) -> Tensor:
        with scope("inner"):
            return x >> conv(4, 1, name="conv") >> batch_norm(name="bn")

    with scope("stem", 0):
        stem = conv(4, 1, name="conv")

    def whole(x: Tensor) -> Tensor:
        x = x >> stem
        with scope("layer1"), scope(3):
            return block(x) >> relu

    net = build(whole, 4, 6, 6)
    names = ["stem.0.conv.weight", "stem.0.conv.bias", "layer1.3.inner.conv.weight", "layer1.3.inner.conv.bias"]
    names += [f"layer1.3.inner.bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    assert list(net.parameters) == names
    assert list(net.layers)[-1] == "layer1.3.relu1"


def test_a_scope_needs_a_name() -> None:
    with pytest.raises(UsageError, match="every part of a name"), scope("a", ""):
        pass


def test_layers_without_a_name_are_numbered() -> None:
    net = build(conv(4, 1) >> conv(4, 1, name="conv2") >> conv(4, 1) >> relu >> relu, 4, 6, 6)
    assert list(net.layers) == ["conv1", "conv2", "conv3", "relu1", "relu2"]


def test_a_layer_applied_twice_shares_its_parameters() -> None:
    twice = conv(4, 3, pad=1, name="twice")
    net = build(twice >> relu >> twice, 4, 6, 6).init(1)
    assert list(net.parameters) == ["twice.weight", "twice.bias"]
    unrolled = build(conv(4, 3, pad=1, name="a") >> relu >> conv(4, 3, pad=1, name="b"), 4, 6, 6)
    part = {part: net.weights[f"twice.{part}"] for part in ("weight", "bias")}
    unrolled.load_state_dict({f"{name}.{key}": array for name in "ab" for key, array in part.items()})
    np.testing.assert_array_equal(outputs(net, X)["output"], outputs(unrolled, X)["output"])


def test_a_layer_without_parameters_may_be_used_anywhere() -> None:
    pool = max_pool(2)
    net = build(pool >> relu >> pool, 4, 8, 8)
    assert list(net.layers) == ["max_pool1", "relu1", "max_pool2"]


def test_two_layers_cannot_have_one_name() -> None:
    with pytest.raises(ModelError, match=r"conv: the name a is taken by a layer at .*test_composition.py:\d+"):
        build(conv(4, 1, name="a") >> conv(4, 1, name="a"), 4, 6, 6)


def test_own_layers_are_one_function() -> None:
    @layer
    def scale(at: Site, x: Tensor, start: float = 1.0, *, name: str = "") -> Tensor:
        gamma = at.parameter("gamma", (x.channels, 1, 1), Role.GAMMA)
        return at.call(Mul(), x, gamma) + start

    net = build(scale(name="s") >> scale(2.0, name="t"), 4, 6, 6).init(1)
    gamma = {name: array.astype(np.float64) for name, array in net.weights.items()}
    assert list(gamma) == ["s.gamma", "t.gamma"]
    np.testing.assert_allclose(outputs(net, X)["output"], (X * gamma["s.gamma"] + 1) * gamma["t.gamma"] + 2)


def test_a_network_is_a_layer_of_another() -> None:
    @network(x=(4, 6, 6))
    def body(x: Tensor) -> Tensor:
        return x >> conv(5, 3, name="conv") >> relu

    def detector(image: Tensor) -> dict[str, Tensor]:
        with scope("backbone"):
            features = image >> body
        pooled = features >> global_avg_pool >> flatten
        return {"scores": pooled >> linear(7, name="classes"), "box": pooled >> linear(4, name="box")}

    net = network(image=(4, 6, 6))(detector)(batch=3)
    assert net.structure.output_names == ("scores", "box")
    assert [value.shape for value in net.outputs] == [(3, 7), (3, 4)]
    assert next(iter(net.parameters)) == "backbone.conv.weight"


def test_several_inputs_dtypes_and_no_batch() -> None:
    @network(image=(3, 4, 4), mask=TensorType((1, 4, 4), DType.BOOL), number=(1, 1, 1))
    def many(image: Tensor, mask: Tensor, number: Tensor) -> Tensor:
        assert mask.dtype is DType.BOOL
        return image * number

    net = many(batch=None)
    assert net.structure.input_names == ("image", "mask", "number")
    assert [str(value.type) for value in net.inputs] == ["f32[3,4,4]", "bool[1,4,4]", "f32[1,1,1]"]
    assert str(many(batch=2, image=(3, 8, 4)).inputs[0].type) == "f32[2,3,8,4]"


def test_the_batch_may_be_left_to_run_time() -> None:
    @network(x=(4, 6, 6))
    def small(x: Tensor) -> Tensor:
        return x >> conv(8, 3, name="a") >> relu >> max_pool(2) >> flatten >> linear(3, name="b")

    net = small(batch=Dim.symbol("n", 8)).init(3)
    assert str(net.outputs[0].type) == "f32[{n<=8},3]"
    x = np.random.default_rng(20).standard_normal((5, 4, 6, 6)).astype(np.float32)
    one = small().load_state_dict(net.weights).graph()
    wanted = np.concatenate([evaluate(one, {"x": x[i : i + 1]})["output"] for i in range(5)])
    np.testing.assert_allclose(evaluate(net.graph(), {"x": x})["output"], wanted, rtol=1e-5, atol=1e-6)


def test_the_graph_is_sound_carries_lines_and_reads_back() -> None:
    net = build(conv(4, 3, pad=1, name="a") >> batch_norm(name="b") + identity, 4, 6, 6).init(1)
    graph = verify(net.graph())
    assert parse_graph(print_graph(graph), weights_of(graph)).outputs[0].type == graph.outputs[0].type
    for node in graph.nodes:
        if node.op.name in ("conv", "batch_norm", "add"):
            (place,) = node.loc
            assert "(test_composition.py:" in place
