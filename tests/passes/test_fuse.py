"""fuse: which operators share a kernel, in which order a kernel takes its inputs, and what stays apart."""

from __future__ import annotations

import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.text import print_graph
from cnnc.ops import (
    Add,
    Concat,
    Constant,
    Exp,
    Expand,
    Fused,
    LayoutTransform,
    MaxPool,
    Mul,
    ReduceMean,
    ReduceSum,
    Relu,
    Reshape,
    Sigmoid,
    Softmax,
    Split,
    Sub,
    Transpose,
    constant,
)
from cnnc.passes.fuse import Fuse
from cnnc.target import Target
from tests.passes.graphs import check, conv, graph_of, image, operators, weights

FUSE = Fuse()


def kernel(graph: Graph, position: int = 0) -> Fused:
    return [n.op for n in graph.nodes if isinstance(n.op, Fused)][position]


def test_golden(rng, golden):
    x = image(1, 4, 6, 6)
    y = call(Relu(), conv(x, weights(rng, 4, 4, 3, 3), weights(rng, 4), pad=1), loc=["Relu_1"])
    y = call(Relu(), call(Add(), conv(y, weights(rng, 4, 4, 3, 3), pad=1), x), loc=["Relu_3"])
    gate = call(Sigmoid(), conv(call(ReduceMean((2, 3)), y), weights(rng, 4, 4, 1, 1)))
    y = call(Reshape((1, 144)), call(Mul(), call(Mul(), y, gate), constant(0.5)))
    graph = graph_of(y)
    done = check(FUSE, graph, rng)
    assert operators(done) == ["conv+relu", "conv+add+relu", "reduce_mean", "conv+sigmoid", "mul+mul", "reshape"]
    golden("fuse", print_graph(graph) + print_graph(done))


def test_without_growth_each_operator_is_a_kernel(rng):
    graph = graph_of(call(Relu(), call(Add(), conv(image(1, 3, 5, 5), weights(rng, 4, 3, 1, 1)), constant(1.0))))
    assert operators(check(Fuse(grow=False), graph, rng)) == ["conv", "add", "relu"]


def test_operands_of_the_anchor_come_first_and_apart(rng):
    x = image(1, 4, 6, 6)
    w = weights(rng, 4, 4, 3, 3)
    done = check(FUSE, graph_of(call(Add(), call(Mul(), x, conv(x, w, pad=1)), x)), rng)
    (node,) = (n for n in done.nodes if isinstance(n.op, Fused))
    assert [v.op.name for v in node.inputs] == ["input", "constant", "input"]
    body = kernel(done).body
    (anchor,) = (n for n in body.nodes if n.op.name == "conv")
    assert anchor.inputs == body.inputs[:2]


def test_elementwise_kernels_take_a_value_once(rng):
    x = image(3, 4)
    done = check(FUSE, graph_of(call(Add(), call(Mul(), x, x), x)), rng)
    assert operators(done) == ["mul+add"]
    assert len(kernel(done).body.inputs) == 1


def test_one_number_goes_inside_a_weight_of_one_does_not(rng):
    y = call(Mul(), conv(image(1, 1, 4, 4), weights(rng, 1, 1, 1, 1), weights(rng, 1)), constant(3.0))
    done = check(FUSE, graph_of(y), rng)
    assert len(kernel(done).body.inputs) == 3
    assert sum(isinstance(n.op, Constant) for n in kernel(done).body.nodes) == 1


def test_diamonds_fuse_whole(rng):
    y = conv(image(1, 3, 5, 5), weights(rng, 4, 3, 1, 1))
    y = call(Mul(), call(Sub(), y, call(Relu(), y)), call(Sigmoid(), call(Exp(), y)))
    assert operators(check(FUSE, graph_of(y), rng)) == ["conv+relu+sub+exp+sigmoid+mul"]


def test_a_value_with_other_readers_leaves_its_kernel(rng):
    y = conv(image(1, 3, 5, 5), weights(rng, 4, 3, 1, 1))
    done = check(FUSE, graph_of(call(Relu(), y), conv(y, weights(rng, 2, 4, 1, 1))), rng)
    assert sorted(operators(done)) == ["conv", "conv", "relu"]


def test_an_output_leaves_its_kernel(rng):
    y = conv(image(1, 3, 5, 5), weights(rng, 4, 3, 1, 1))
    assert operators(check(FUSE, graph_of(y, call(Relu(), y)), rng)) == ["conv", "relu"]


def test_no_circle_through_another_kernel(rng):
    """add reads conv both directly and through a pool: in one kernel with conv it would wait for itself."""
    y = conv(image(1, 3, 6, 6), weights(rng, 3, 3, 3, 3), pad=1)
    pooled = call(MaxPool((3, 3), (1, 1), (1,) * 4, (1, 1)), y)
    done = check(FUSE, graph_of(call(Add(), y, pooled)), rng)
    assert operators(done) == ["conv", "max_pool+add"]


def test_a_residual_joins_one_of_two_convolutions(rng):
    x = image(1, 3, 6, 6)
    done = check(FUSE, graph_of(call(Add(), conv(x, weights(rng, 4, 3, 1, 1)), conv(x, weights(rng, 4, 3, 1, 1)))), rng)
    assert sorted(operators(done)) == ["conv", "conv+add"]


def test_a_consumer_of_another_shape_stays_out(rng):
    y = conv(image(1, 3, 1, 1), weights(rng, 4, 3, 1, 1))
    assert operators(check(FUSE, graph_of(call(Add(), y, image(1, 4, 5, 5, label="z"))), rng)) == ["conv", "add"]


class Eager:
    """A template that takes every prologue."""

    def takes_prologue(self, kernel: Fused, target: Target) -> bool:
        return True


class Reluctant:
    """A template that takes prologues of one operator."""

    def takes_prologue(self, kernel: Fused, target: Target) -> bool:
        return operators(kernel.body)[1] == "conv"


WITH_PROLOGUES = Fuse(templates=(Eager(),))


def normalised(rng, x: Value) -> Value:
    channels = x.type.static_shape[1]
    return call(Relu(), call(Add(), call(Mul(), x, weights(rng, channels, 1, 1)), weights(rng, channels, 1, 1)))


def test_golden_of_prologues(rng, golden):
    x = image(1, 4, 6, 6)
    y = conv(normalised(rng, x), weights(rng, 4, 4, 3, 3), pad=1)
    joined = call(Concat(1), x, y)
    graph = graph_of(call(Add(), y, x), conv(normalised(rng, joined), weights(rng, 2, 8, 1, 1)))
    done = check(WITH_PROLOGUES, graph, rng)
    assert operators(done) == ["mul+add+relu+conv", "add", "concat", "mul+add+relu+conv"]
    golden("fuse_prologue", print_graph(graph) + print_graph(done))


def test_a_prologue_needs_a_template_that_takes_it(rng):
    x = image(1, 4, 6, 6)
    graph = graph_of(
        conv(call(Relu(), x), weights(rng, 4, 4, 1, 1)), conv(normalised(rng, x), weights(rng, 4, 4, 1, 1))
    )
    assert sorted(operators(check(FUSE, graph, rng))) == ["conv", "conv", "mul+add+relu", "relu"]
    some = Fuse(templates=(Reluctant(), object()))
    assert sorted(operators(check(some, graph, rng))) == ["conv", "mul+add+relu", "relu+conv"]


def test_what_is_no_prologue(rng):
    x = image(1, 4, 6, 6)
    w = weights(rng, 4, 4, 1, 1)
    # Two readers, or the caller, want the value itself, ...
    y = normalised(rng, x)
    assert operators(check(WITH_PROLOGUES, graph_of(conv(y, w), conv(y, w)), rng)) == ["mul+add+relu", "conv", "conv"]
    assert operators(check(WITH_PROLOGUES, graph_of(conv(y, w), y), rng))[:2] == ["mul+add+relu", "conv"]
    # ... it is the weight, or both, ...
    v = image(4, 4, 1, 1, label="v")
    assert operators(check(WITH_PROLOGUES, graph_of(conv(x, call(Relu(), v))), rng)) == ["relu", "conv"]
    # ... more than elements of one image, ...
    pooled = call(MaxPool((3, 3), (1, 1), (1,) * 4, (1, 1)), x)
    assert operators(check(WITH_PROLOGUES, graph_of(conv(pooled, w)), rng)) == ["max_pool", "conv"]
    turned = call(Transpose((0, 1, 3, 2)), x)
    assert operators(check(WITH_PROLOGUES, graph_of(conv(turned, w)), rng)) == ["transpose", "conv"]
    # ... or too many operators.
    few = Fuse(most=3, templates=(Eager(),))
    assert operators(check(few, graph_of(conv(normalised(rng, x), w)), rng)) == ["mul+add+relu", "conv"]


def test_an_image_that_dies_is_written_over_instead(rng):
    """The gate of squeeze-and-excitation is computed from the image, so nobody reads that after the product."""
    x = image(1, 4, 6, 6)
    y = call(Relu(), conv(x, weights(rng, 4, 4, 3, 3), pad=1))
    gate = call(Sigmoid(), conv(call(ReduceMean((2, 3)), y), weights(rng, 4, 4, 1, 1)))
    scaled = conv(call(Mul(), y, gate), weights(rng, 2, 4, 1, 1))
    assert operators(check(WITH_PROLOGUES, graph_of(scaled), rng))[-2:] == ["mul", "conv"]
    # A later reader keeps it: now the product would be a second image.
    done = check(WITH_PROLOGUES, graph_of(scaled, call(Exp(), y)), rng)
    assert "mul+conv" in operators(done)


def test_what_flows_into_a_prologue_joins_it(rng):
    """Two elementwise groups that meet before a convolution; what moves data stays outside."""
    x, z = image(1, 4, 6, 6), image(1, 4, 6, 6, label="z")
    both = call(Add(), normalised(rng, x), call(Exp(), call(Transpose((0, 1, 3, 2)), z)))
    done = check(WITH_PROLOGUES, graph_of(conv(both, weights(rng, 4, 4, 1, 1))), rng)
    assert operators(done) == ["transpose+exp", "mul+add+relu+add+conv"]


def test_producers_move_where_they_are_read_once(rng):
    x = image(2, 3, 8, 8)
    exp_sum = call(ReduceSum((2, 3)), call(Exp(), call(Mul(), x, constant(0.5))))
    assert operators(check(FUSE, graph_of(exp_sum), rng)) == ["mul+exp+reduce_sum"]
    moved = call(Transpose((1, 0, 2, 3)), call(Relu(), x))
    assert operators(check(FUSE, graph_of(moved), rng)) == ["relu+transpose"]
    spread = call(Add(), call(Expand((2, 3, 8, 8)), call(Transpose((0, 1, 3, 2)), image(2, 3, 1, 8, label="y"))), x)
    assert operators(check(FUSE, graph_of(spread), rng)) == ["transpose+expand+add"]


def test_producers_stay_where_they_would_be_computed_again(rng):
    x = image(2, 3, 8, 8)
    for consumer in (conv(call(Exp(), x), weights(rng, 4, 3, 3, 3)), call(Softmax(3), call(Exp(), x))):
        assert operators(check(FUSE, graph_of(consumer), rng))[0] == "exp"
    spread = call(Expand((4, 2, 3, 8, 8)), call(Exp(), x))
    assert operators(check(FUSE, graph_of(spread), rng)) == ["exp", "expand"]
    joined = call(Concat(1), call(Exp(), x), x)
    assert operators(check(FUSE, graph_of(joined), rng)) == ["exp", "concat"]


def test_what_follows_a_concat_joins_it(rng):
    x = image(2, 3, 4, 4)
    done = check(FUSE, graph_of(call(Relu(), call(Concat(1), x, x))), rng)
    assert operators(done) == ["concat+relu"]


def test_views_stay_views(rng):
    y = call(Reshape((2, 48)), conv(image(2, 3, 4, 4), weights(rng, 3, 3, 1, 1)))
    done = check(FUSE, graph_of(call(Relu(), y)), rng)
    assert operators(done) == ["conv", "reshape", "relu"]


def test_a_channel_shuffle_is_one_kernel(rng):
    x = image(2, 4, 3, 3)
    y = call(Reshape((2, 2, 4, 3, 3)), call(Concat(1), x, call(Relu(), x)))
    y = call(Reshape((2, 8, 3, 3)), call(Transpose((0, 2, 1, 3, 4)), y))
    done = check(FUSE, graph_of(*call(Split(1, (4, 4)), y).node.values), rng)
    assert operators(done) == ["relu", "concat+reshape+transpose+reshape+split"]


def test_arithmetic_does_not_move_through_views(rng):
    x = image(2, 4, 3, 3)
    moved = call(Transpose((1, 0, 2)), call(Reshape((2, 4, 9)), call(Exp(), x)))
    assert operators(check(FUSE, graph_of(moved), rng)) == ["exp", "reshape", "transpose"]
    after = call(Exp(), call(Reshape((3, 24)), call(Transpose((3, 1, 2, 0)), x)))
    assert operators(check(FUSE, graph_of(after), rng)) == ["transpose", "reshape", "exp"]
    view = call(Reshape((2, 4, 9)), call(Transpose((0, 1, 3, 2)), x))
    both = graph_of(call(Transpose((1, 0, 2)), view), call(Exp(), view))
    assert sorted(operators(check(FUSE, both, rng))) == ["exp", "reshape", "transpose", "transpose"]


def test_a_layout_that_only_renames_is_a_view(rng):
    x = call(LayoutTransform(Layout("NCHW8c")), image(2, 16, 4, 4))
    pooled = call(LayoutTransform(None), call(ReduceMean((2, 3)), x))
    done = check(FUSE, graph_of(call(Relu(), pooled)), rng)
    assert [n.op.name for n in done.nodes if n.inputs] == ["fused", "layout_transform", "fused"]


@pytest.mark.parametrize("make", [lambda x: x, lambda x: call(Reshape((6,)), x), lambda x: constant([1.0, 2.0, 3.0])])
def test_outputs_that_nobody_computes_are_copied(rng, make):
    x = image(2, 3)
    graph = graph_of(make(x), call(Relu(), x), inputs=(x,))
    done = check(FUSE, graph, rng)
    assert all(isinstance(v.op, Fused) for v in done.outputs)


def test_the_same_output_twice_is_two_kernels(rng):
    y = call(Relu(), image(2, 3))
    done = check(FUSE, graph_of(y, y, y), rng)
    assert len(set(done.outputs)) == 3
    assert all(isinstance(v.op, Fused) for v in done.outputs)


def test_kernels_with_several_outputs(rng):
    parts = call(Split(1, (1, 2, 1)), image(2, 4, 3, 3)).node.values
    done = check(FUSE, graph_of(call(Relu(), parts[2]), parts[0]), rng)
    assert operators(done) == ["split", "relu"]
    assert len(kernel(done).body.outputs) == 2


def test_a_kernel_has_a_most(rng):
    y: Value = image(2, 3)
    for _ in range(10):
        y = call(Exp(), y)
    done = check(Fuse(most=4), graph_of(y), rng)
    assert [len(names.split("+")) for names in operators(done)] == [4, 4, 2]


def test_locations_are_united(rng):
    y = call(Relu(), call(Exp(), image(3), loc=["a"]), loc=["b", "c"])
    (node,) = (n for n in check(FUSE, graph_of(y), rng).nodes if isinstance(n.op, Fused))
    assert node.loc == {"a", "b", "c"}
