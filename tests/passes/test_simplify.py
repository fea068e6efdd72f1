"""simplify: every rule where it applies and, beside it, where it must not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.text import print_graph
from cnnc.ir.types import Dim, DType
from cnnc.ops import (
    Add,
    AveragePool,
    Cast,
    Clip,
    Concat,
    Dense,
    Div,
    Erf,
    Expand,
    Gather,
    Gelu,
    HardSigmoid,
    HardSwish,
    LayerNorm,
    LayoutTransform,
    Lrn,
    MatMul,
    Maximum,
    MaxPool,
    Minimum,
    Mul,
    Neg,
    Not,
    Pad,
    Pow,
    ReduceMax,
    ReduceMean,
    Relu,
    Reshape,
    ShuffleChannels,
    Sigmoid,
    Silu,
    Slice,
    Split,
    Sqrt,
    Sub,
    Tanh,
    Tile,
    Transpose,
    constant,
    graph_input,
)
from cnnc.passes.fold_pad import FoldPad
from cnnc.passes.simplify import Simplify
from tests.passes.graphs import TARGET, check, graph_of, image, operators, weights

SIMPLIFY = Simplify()


def number(value: float, *shape: int) -> Value:
    return constant(np.full(shape, value, np.float32))


def test_golden(rng, golden):
    x = image(1, 4, 6, 6)
    y = call(Mul(), call(Add(), x, number(0)), call(Sigmoid(), call(Mul(), x, number(1, 1, 1, 1))))
    y = call(Transpose((0, 3, 2, 1)), call(Transpose((0, 2, 3, 1)), y))
    graph = graph_of(call(Reshape((4, 36)), call(Reshape((36, 4)), y)))
    golden("simplify", print_graph(graph) + print_graph(check(SIMPLIFY, graph, rng)))


# Algebra


@pytest.mark.parametrize(
    "build",
    [
        lambda x: call(Add(), x, number(0)),
        lambda x: call(Add(), number(0, 1, 4, 1, 1), x),
        lambda x: call(Sub(), x, number(0)),
        lambda x: call(Mul(), x, number(1, 4, 1, 1)),
        lambda x: call(Mul(), number(1), x),
        lambda x: call(Div(), x, number(1)),
        lambda x: call(Pow(), x, number(1)),
        lambda x: call(Neg(), call(Neg(), x)),
        lambda x: call(Cast(DType.F32), x),
        lambda x: call(Clip(), x),
        lambda x: call(Expand((2, 4, 3, 3)), x),
        lambda x: call(Reshape((2, 4, 3, 3)), x),
        lambda x: call(Reshape((2, 4, 3, 3)), call(Reshape((72,)), x)),
        lambda x: call(Slice((0,) * 4, (2, 4, 3, 3), (1,) * 4), x),
        lambda x: call(Pad((0,) * 8), x),
        lambda x: call(Tile((1,) * 4), x),
        lambda x: call(Concat(1), x),
        lambda x: call(Split(1, (4,)), x),
        lambda x: call(Transpose((0, 1, 2, 3)), x),
        lambda x: call(Transpose((2, 1, 0, 3)), call(Transpose((2, 1, 0, 3)), x)),
        lambda x: call(LayoutTransform(None), call(LayoutTransform(Layout("NCHW4c")), x)),
    ],
)
def test_nothing_remains(rng, build):
    assert operators(check(SIMPLIFY, graph_of(build(image(2, 4, 3, 3))), rng)) == []


@pytest.mark.parametrize(
    "build",
    [
        lambda x: call(Add(), x, number(0, 2, 2, 4, 1, 1)),
        lambda x: call(Add(), x, constant(np.array([0, 0, 1], np.float32))),
        lambda x: call(Sub(), number(0), x),
        lambda x: call(Div(), number(1), x),
        lambda x: call(Pow(), number(1), x),
        lambda x: call(Mul(), x, number(math.nan)),
        lambda x: call(Cast(DType.F64), x),
        lambda x: call(Slice((0, 0, 0, 2), (2, 4, 3, 3), (1, 1, 1, -1)), x),
        lambda x: call(Pad((1, 0, 0, 0, -1, 0, 0, 0)), x),
        lambda x: call(Transpose((0, 2, 1, 3)), x),
        lambda x: call(Neg(), x),
    ],
)
def test_something_remains(rng, build):
    graph = graph_of(build(image(2, 4, 3, 3)))
    assert operators(check(SIMPLIFY, graph, rng)) == operators(graph)


def test_not_not(rng):
    x = graph_input("x", (3,), DType.BOOL)
    assert operators(check(SIMPLIFY, graph_of(call(Not(), call(Not(), x))), rng)) == []


def test_small_powers_are_products(rng):
    x = image(2, 3)
    assert operators(check(SIMPLIFY, graph_of(call(Pow(), x, number(2))), rng)) == ["mul"]
    assert operators(check(SIMPLIFY, graph_of(call(Pow(), x, number(3))), rng)) == ["mul", "mul"]
    assert operators(check(SIMPLIFY, graph_of(call(Pow(), x, number(2.5))), rng)) == ["pow"]
    assert operators(check(SIMPLIFY, graph_of(call(Pow(), x, number(0.5))), rng)) == ["pow"]


def shuffled(x: Value, groups: int, *perm: int) -> Value:
    n, c, *rest = x.type.static_shape
    parts = call(Reshape((n, groups, c // groups, *rest)), x)
    return call(Reshape(x.shape), call(Transpose(perm or (0, 2, 1, *range(3, 3 + len(rest)))), parts))


@pytest.mark.parametrize("shape", [(2, 6, 3, 5), (1, 8, 4), (1, 4, 2, 1, 3)])
def test_channel_shuffles(rng, shape):
    done = check(SIMPLIFY, graph_of(shuffled(image(*shape), 2)), rng)
    assert [n.op for n in done.nodes[1:]] == [ShuffleChannels(2, 0, shape[1])]


def test_what_is_no_channel_shuffle(rng):
    for y in (shuffled(image(1, 4, 4, 4), 2, 0, 1, 3, 2, 4), shuffled(image(2, 4, 2, 2), 2, 1, 2, 0, 3, 4)):
        assert "shuffle_channels" not in operators(check(SIMPLIFY, graph_of(y), rng))
    # The rows, not the channels, are dealt out.
    parts = call(Transpose((0, 2, 1, 3)), call(Reshape((4, 2, 3, 5)), image(4, 6, 5)))
    assert "shuffle_channels" not in operators(check(SIMPLIFY, graph_of(call(Reshape((2, 12, 5)), parts)), rng))


def test_shuffles_take_in_what_is_joined_before_and_split_behind(rng):
    a, b = image(2, 3, 4, 4, label="a"), image(2, 5, 4, 4, label="b")
    y = shuffled(call(Concat(1), a, b), 4)
    done = check(SIMPLIFY, graph_of(*call(Split(1, (2, 6)), y).node.values), rng)
    assert [n.op for n in done.nodes if n.inputs] == [ShuffleChannels(4, 0, 2), ShuffleChannels(4, 2, 6)]
    assert all(len(n.inputs) == 2 for n in done.nodes if n.inputs)
    cut = call(Slice((0, 3, 0, 0), (2, 4, 4, 4), (1, 1, 1, 1)), y)
    assert [n.op for n in check(SIMPLIFY, graph_of(cut), rng).nodes if n.inputs] == [ShuffleChannels(4, 3, 4)]


def test_what_shuffles_do_not_take_in(rng):
    joined = call(Concat(1), image(2, 4, 4, 4, label="a"), image(2, 4, 4, 4, label="b"))
    done = check(SIMPLIFY, graph_of(shuffled(joined, 2), call(Relu(), joined)), rng)
    assert sorted(operators(done)) == ["concat", "relu", "shuffle_channels"]
    y = shuffled(image(2, 8, 4, 4), 2)
    for starts, sizes, steps in (
        ((0, 0, 1, 0), (2, 8, 2, 4), (1, 1, 1, 1)),
        ((0, 0, 0, 0), (2, 4, 4, 4), (1, 2, 1, 1)),
    ):
        done = check(SIMPLIFY, graph_of(call(Slice(starts, sizes, steps), y)), rng)
        assert operators(done) == ["shuffle_channels", "slice"]
    assert "split" in operators(check(SIMPLIFY, graph_of(*call(Split(2, (1, 3)), y).node.values), rng))


@pytest.mark.parametrize("dtype", [DType.F32, DType.I32])
def test_bounds(rng, dtype):
    x = graph_input("x", (2, 5), dtype)

    def c(value: float) -> Value:
        return constant(np.array(value, dtype.numpy))

    relu6 = graph_of(call(Minimum(), call(Maximum(), x, c(0)), c(6)))
    assert [n.op for n in check(SIMPLIFY, relu6, rng).nodes[1:]] == [Clip(0.0, 6.0)]
    assert operators(check(SIMPLIFY, graph_of(call(Maximum(), c(0), x)), rng)) == ["relu"]
    assert operators(check(SIMPLIFY, graph_of(call(Clip(low=0), x)), rng)) == ["relu"]
    twice = graph_of(call(Clip(-2, 3), call(Clip(-5, 1), x)))
    assert [n.op for n in check(SIMPLIFY, twice, rng).nodes[1:]] == [Clip(-2, 1)]
    apart = graph_of(call(Clip(-7, -4), call(Relu(), x)))
    assert [n.op for n in check(SIMPLIFY, apart, rng).nodes[1:]] == [Clip(-4, -4)]
    assert operators(check(SIMPLIFY, graph_of(call(Relu(), call(Relu(), x))), rng)) == ["relu"]


def test_bounds_the_wrong_way_round_stay(rng):
    graph = graph_of(call(Clip(0, 6), call(Clip(5, -5), image(2, 5))))
    assert operators(check(SIMPLIFY, graph, rng)) == ["clip", "clip"]


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_matmul_by_a_weight(rng, shape, transposed):
    w = weights(rng, *((5, 8) if transposed else (8, 5)), label="w")
    graph = graph_of(call(MatMul(transpose_b=transposed), image(*shape), w))
    assert operators(check(SIMPLIFY, graph, rng)) == ["dense"]


def test_other_matmuls_stay(rng):
    x = image(4, 8)
    for op, a, b in (
        (MatMul(), x, image(8, 5, label="y")),
        (MatMul(), weights(rng, 5, 4), x),
        (MatMul(), x, weights(rng, 2, 8, 5)),
        (MatMul(transpose_a=True), x, weights(rng, 4, 5)),
    ):
        assert operators(check(SIMPLIFY, graph_of(call(op, a, b)), rng)) == ["mat_mul"]


def test_pools_of_the_whole_image(rng):
    x = image(2, 3, 5, 4)
    whole = {"kernel": (5, 4), "stride": (3, 1), "pad": (0,) * 4, "dilation": (1, 1)}
    assert operators(check(SIMPLIFY, graph_of(call(AveragePool(**whole), x)), rng)) == ["reduce_mean"]
    assert operators(check(SIMPLIFY, graph_of(call(MaxPool(**whole), x)), rng)) == ["reduce_max"]


def test_pools_of_less_or_more_stay(rng):
    x = image(2, 3, 5, 4)
    for op in (
        AveragePool((5, 3), (1, 1), (0,) * 4, (1, 1)),
        AveragePool((5, 4), (1, 1), (1, 0, 0, 0), (1, 1)),
        MaxPool((5, 4), (1, 1), (0,) * 4, (1, 1), with_indices=True),
    ):
        assert operators(check(SIMPLIFY, graph_of(call(op, x)), rng)) == [op.name]


# Movement


def test_moves_are_merged(rng):
    x = image(2, 3, 4, 5)
    moved = call(Transpose((1, 0, 3, 2)), call(Transpose((0, 2, 3, 1)), x))
    assert operators(check(SIMPLIFY, graph_of(moved), rng)) == ["transpose"]
    sliced = call(
        Slice((0, 2, 1, 1), (2, 1, 2, 2), (1, 1, 1, 2)), call(Slice((0, 2, 0, 0), (2, 3, 4, 5), (1, -1, 1, 1)), x)
    )
    assert operators(check(SIMPLIFY, graph_of(sliced), rng)) == ["slice"]
    joined = call(Concat(1), x, call(Concat(1), x, x), x)
    assert operators(check(SIMPLIFY, graph_of(joined), rng)) == ["concat"]


def test_a_concat_with_other_readers_or_axes_stays(rng):
    x = image(2, 3, 4, 5)
    inner = call(Concat(1), x, x)
    assert operators(check(SIMPLIFY, graph_of(call(Concat(1), inner, x), inner), rng)) == ["concat", "concat"]
    other = call(Concat(1), call(Concat(2), x, x), call(Concat(2), x, x))
    assert operators(check(SIMPLIFY, graph_of(other), rng)) == ["concat", "concat", "concat"]


def test_transposing_axes_of_one_is_a_reshape(rng):
    x = image(2, 7, 1, 1)
    assert operators(check(SIMPLIFY, graph_of(call(Transpose((0, 2, 3, 1)), x)), rng)) == ["reshape"]
    assert operators(check(SIMPLIFY, graph_of(call(Transpose((1, 2, 3, 0)), x)), rng)) == ["transpose"]


def test_spatial_reductions_keep_their_axes(rng):
    x = image(2, 3, 4, 5)
    graph = graph_of(call(ReduceMean((2, 3), False), x), call(ReduceMax((1,), False), x))
    assert operators(check(SIMPLIFY, graph, rng)) == ["reduce_mean", "reshape", "reduce_max"]


def test_run_time_sizes(rng):
    x = graph_input("x", (Dim.symbol("n", 4), 6))
    graph = graph_of(call(Reshape((Dim.symbol("n", 4), 3, 2)), call(Reshape((Dim.symbol("n", 4), 2, 3)), x)))
    assert operators(SIMPLIFY.run(graph, TARGET)) == ["reshape"]


# Patterns


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_silu(rng, swapped, alpha):
    x = image(2, 5)
    gate = call(Sigmoid(), call(Mul(), x, number(alpha)))
    y = call(Mul(), gate, x) if swapped else call(Mul(), x, gate)
    done = check(SIMPLIFY, graph_of(y), rng)
    assert [type(n.op) for n in done.nodes[1:]] == [Silu]


def test_a_gate_of_something_else_stays(rng):
    x, z = image(2, 5), image(2, 5, label="z")
    assert operators(check(SIMPLIFY, graph_of(call(Mul(), x, call(Sigmoid(), z))), rng)) == ["sigmoid", "mul"]


def test_hard_swish(rng):
    x = image(2, 5)
    gate = call(Clip(0.0, 6.0), call(Add(), x, number(3)))
    for y in (
        call(Div(), call(Mul(), x, gate), number(6)),
        call(Mul(), x, call(Div(), gate, number(6))),
        call(Mul(), call(Mul(), gate, number(1 / 6)), x),
        call(Mul(), x, call(HardSigmoid(1 / 6, 0.5), x)),
    ):
        done = check(SIMPLIFY, graph_of(y), rng)
        assert [n.op for n in done.nodes[1:]] == [HardSwish()]
    done = check(SIMPLIFY, graph_of(call(Div(), gate, number(6))), rng)
    assert [n.op for n in done.nodes[1:]] == [HardSigmoid(1 / 6, 0.5)]


@pytest.mark.parametrize(("shift", "high", "divisor"), [(2, 6, 6), (3, 5, 6), (3, 6, 5)])
def test_other_clips_are_no_hard_swish(rng, shift, high, divisor):
    x = image(2, 5)
    y = call(Div(), call(Mul(), x, call(Clip(0, high), call(Add(), x, number(shift)))), number(divisor))
    assert "hard_swish" not in operators(check(SIMPLIFY, graph_of(y), rng))


def gelu_pieces(x: Value, constant_: float = math.sqrt(2)) -> list[Value]:
    gate = call(Add(), call(Erf(), call(Div(), x, number(constant_))), number(1))
    return [
        call(Mul(), call(Mul(), x, gate), number(0.5)),
        call(Mul(), call(Mul(), x, number(0.5)), gate),
        call(Mul(), gate, call(Div(), x, number(2))),
    ]


@pytest.mark.parametrize("case", range(3))
def test_gelu(rng, case):
    done = check(SIMPLIFY, graph_of(gelu_pieces(image(2, 5))[case]), rng)
    assert [n.op for n in done.nodes[1:]] == [Gelu()]
    assert "erf" in operators(check(SIMPLIFY, graph_of(gelu_pieces(image(2, 5), 1.5)[case]), rng))


def test_gelu_by_tanh(rng):
    x = image(2, 5)
    cubic = call(Add(), x, call(Mul(), call(Pow(), x, number(3)), number(0.044715)))
    gate = call(Add(), call(Tanh(), call(Mul(), cubic, number(math.sqrt(2 / math.pi)))), number(1))
    done = check(SIMPLIFY, graph_of(call(Mul(), call(Mul(), number(0.5), x), gate)), rng)
    assert [n.op for n in done.nodes[1:]] == [Gelu("tanh")]


def layer_norm_pieces(x: Value, axes: tuple[int, ...]) -> Value:
    centred = call(Sub(), x, call(ReduceMean(axes), x))
    var = call(ReduceMean(axes), call(Pow(), centred, number(2)))
    return call(Div(), centred, call(Sqrt(), call(Add(), var, number(1e-3))))


@pytest.mark.parametrize("axes", [(2,), (1, 2)])
def test_layer_norm(rng, axes):
    x = image(2, 5, 8)
    shape = (5, 8)[-len(axes) :]
    y = call(Mul(), layer_norm_pieces(x, axes), weights(rng, *shape))
    done = check(SIMPLIFY, graph_of(call(Add(), y, weights(rng, 1, *shape))), rng)
    assert operators(done) == ["layer_norm"]
    assert len(done.outputs[0].inputs) == 3
    assert operators(check(SIMPLIFY, graph_of(layer_norm_pieces(x, axes)), rng)) == ["layer_norm"]


def test_layer_norm_with_other_factors(rng):
    x = image(2, 5, 8)
    rows = call(Mul(), layer_norm_pieces(x, (2,)), weights(rng, 5, 8))
    assert operators(check(SIMPLIFY, graph_of(rows), rng)) == ["layer_norm", "mul"]
    one = call(Mul(), layer_norm_pieces(x, (2,)), number(0.5))
    assert operators(check(SIMPLIFY, graph_of(one), rng)) == ["layer_norm"]
    twice = call(Mul(), call(LayerNorm(2), x, weights(rng, 8)), weights(rng, 8))
    assert operators(check(SIMPLIFY, graph_of(twice), rng)) == ["layer_norm", "mul"]


def test_a_norm_over_the_first_axes_stays(rng):
    assert "layer_norm" not in operators(check(SIMPLIFY, graph_of(layer_norm_pieces(image(2, 5, 8), (1,))), rng))


@pytest.mark.parametrize("index", [np.array(0), np.array(-1), np.array([3]), np.array([[2]])])
def test_a_gather_of_one_index_is_a_slice(rng, index):
    graph = graph_of(call(Gather(1), image(2, 5, 3), constant(index)))
    assert "gather" not in operators(check(SIMPLIFY, graph, rng))


def test_other_gathers_stay(rng):
    several = graph_of(call(Gather(0), image(3, 6), constant(np.array([0, 2]))))
    assert operators(check(SIMPLIFY, several, rng)) == ["gather"]
    outside = graph_of(call(Gather(0), image(3, 6), constant(np.array(3))))
    assert operators(SIMPLIFY.run(outside, TARGET)) == ["gather"]


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 3), (1, 3, 2, 2, 2)])
@pytest.mark.parametrize("shifted", [False, True])
def test_channel_norm(rng, shape, shifted):
    rank = len(shape)
    last, first = (0, *range(2, rank), 1), (0, rank - 1, *range(1, rank - 1))
    vectors = [weights(rng, shape[1]) for _ in range(2 if shifted else 1)]
    y = call(Transpose(first), call(LayerNorm(rank - 1), call(Transpose(last), image(*shape)), *vectors))
    assert operators(check(SIMPLIFY, graph_of(y), rng)) == ["channel_norm"]


def test_a_norm_of_other_axes_or_that_others_read_is_no_channel_norm(rng):
    x = call(Transpose((0, 2, 3, 1)), image(2, 4, 4, 4))
    norm = call(LayerNorm(3), x, weights(rng, 4))
    back = call(Transpose((0, 3, 1, 2)), norm)
    assert "channel_norm" not in operators(check(SIMPLIFY, graph_of(back, norm), rng))
    other = call(Transpose((0, 2, 1, 3)), norm)
    assert "channel_norm" not in operators(check(SIMPLIFY, graph_of(other), rng))
    wide = call(LayerNorm(2), x, weights(rng, 4, 4))
    assert "channel_norm" not in operators(check(SIMPLIFY, graph_of(call(Transpose((0, 3, 1, 2)), wide)), rng))


def torch_lrn(x: Value, size: int, alpha: float, beta: float, bias: float) -> Value:
    """Build what PyTorch's exporter through TorchScript makes of local_response_norm."""
    n, c, *rest = x.type.static_shape
    rank = 3 if len(rest) == 2 else 2
    rows = call(Reshape((n, 1, c, *rest)), call(Mul(), x, x))
    zeros = (0,) * (rank - 1)
    rows = call(Pad((0, 0, size // 2, *zeros, 0, 0, (size - 1) // 2, *zeros)), rows)
    ones = (1,) * (rank - 1)
    mean = call(AveragePool((size, *ones), (1,) * rank, (0,) * (2 * rank), (1,) * rank, False, True), rows)
    mean = call(Reshape((n, c, *rest)), mean)
    return call(Div(), x, call(Pow(), call(Add(), call(Mul(), mean, number(alpha)), number(bias)), number(beta)))


@pytest.mark.parametrize("shape", [(2, 7, 3, 4), (2, 7, 5)])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_lrn_as_pytorch_exports_it(rng, shape, size):
    graph = graph_of(torch_lrn(image(*shape), size, 1e-2, 0.75, 2.0))
    done = check(SIMPLIFY, FoldPad().run(graph, TARGET), rng)
    assert operators(done) == ["lrn"]
    (node,) = (n for n in done.nodes if isinstance(n.op, Lrn))
    assert node.op.size == size


def test_lrn_of_even_size_is_not_centred_alike(rng):
    graph = FoldPad().run(graph_of(torch_lrn(image(2, 7, 3, 4), 4, 1e-2, 0.75, 2.0)), TARGET)
    assert "lrn" not in operators(check(SIMPLIFY, graph, rng))


def test_a_dense_layer_stays(rng):
    assert operators(check(SIMPLIFY, graph_of(call(Dense(), image(2, 3, 8), weights(rng, 5, 8))), rng)) == ["dense"]
