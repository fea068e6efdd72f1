"""push_slices: products compute what is read of them."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.text import print_graph
from cnnc.ops import (
    Add,
    Attention,
    Dense,
    Gelu,
    LayerNorm,
    MatMul,
    Mul,
    Relu,
    Reshape,
    Slice,
    Softmax,
    Transpose,
    graph_input,
)
from cnnc.passes.push_slices import PushSlices
from tests.passes.graphs import check, graph_of, operators, weights


def cut(v: Value, *spans: tuple[int, int, int] | None) -> Value:
    """Slice: (start, size, step) for each axis, None for all of it."""
    whole = [span or (0, size, 1) for span, size in zip(spans, v.shape, strict=True)]
    return call(Slice(*(tuple(field) for field in zip(*whole, strict=True))), v)


def computed(graph) -> dict[str, list[tuple[int, ...]]]:
    """Give the shapes each operator computes."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for node in graph.nodes:
        found.setdefault(node.op.name, []).append(node.types[0].static_shape)
    return found


def block(rng: np.random.Generator, x: Value) -> Value:
    """Make a small transformer block."""
    vectors = [weights(rng, 8) for _ in range(4)]
    qkv = call(Dense(), call(LayerNorm(2), x, *vectors[:2]), weights(rng, 24, 8))
    y = call(Attention(2, 4, 4, 0.5, (0, 8, 16), (4, 4, 4)), qkv, qkv, qkv)
    x = call(Add(), x, call(Dense(), y, weights(rng, 8, 8)))
    hidden = call(Gelu(), call(Dense(), call(LayerNorm(2), x, *vectors[2:]), weights(rng, 16, 8)))
    return call(Add(), x, call(Dense(), hidden, weights(rng, 8, 16)))


def test_golden(rng, golden):
    x = block(rng, block(rng, graph_input("x", (1, 5, 8))))
    graph = graph_of(cut(x, None, (0, 1, 1), None))
    done = check(PushSlices(), graph, rng)
    golden("push_slices", print_graph(graph) + print_graph(done))
    assert computed(done)["attention"] == [(1, 5, 8), (1, 1, 8)]
    assert computed(done)["gelu"] == [(1, 5, 16), (1, 1, 16)]


def test_leading_axes_of_a_layer(rng):
    y = call(Dense(), graph_input("x", (3, 6, 4)), weights(rng, 5, 4), weights(rng, 5))
    done = check(PushSlices(), graph_of(cut(y, (1, 2, 1), (5, 3, -2), None)), rng)
    assert computed(done)["dense"] == [(2, 3, 5)]


def test_what_is_reduced_stays_whole(rng):
    x = graph_input("x", (3, 6))
    for y in (
        call(Dense(), x, weights(rng, 6, 6)),
        call(LayerNorm(1), x, weights(rng, 6)),
        call(Softmax(1), x),
        call(MatMul(), x, graph_input("z", (6, 6))),
    ):
        assert operators(check(PushSlices(), graph_of(cut(y, None, (1, 2, 1))), rng))[-1] == "slice"
        assert operators(check(PushSlices(), graph_of(cut(y, (1, 2, 1), None)), rng))[-1] == y.op.name


def test_what_others_read_stays_whole(rng):
    y = call(Dense(), graph_input("x", (3, 6)), weights(rng, 5, 6))
    graph = graph_of(cut(y, (0, 1, 1), None), y)
    assert computed(check(PushSlices(), graph, rng))["dense"] == [(3, 5)]


def test_through_moves_and_broadcasts(rng):
    y = call(Dense(), graph_input("x", (2, 6, 4)), weights(rng, 6, 4))
    y = call(Add(), call(Mul(), y, graph_input("rows", (6, 1))), graph_input("number", ()))
    y = call(Reshape((2, 6, 3, 2)), call(Relu(), y))
    y = call(Transpose((2, 1, 0, 3)), y)
    done = check(PushSlices(), graph_of(cut(y, None, (2, 2, 3), (1, 1, 1), None)), rng)
    assert computed(done)["dense"] == [(1, 2, 6)]
    done = check(PushSlices(), graph_of(cut(y, (1, 1, 1), None, None, None)), rng)
    assert computed(done)["dense"] == [(2, 6, 6)]


def test_elementwise_operators_alone_stay(rng):
    y = call(Relu(), graph_input("x", (3, 6)))
    assert operators(check(PushSlices(), graph_of(cut(y, (0, 1, 1), None)), rng)) == ["relu", "slice"]


@pytest.mark.parametrize("mask", [(5,), (1, 5), (4, 5), (2, 4, 1), (1, 2, 4, 5)])
def test_queries_and_their_masks(rng, mask):
    q, k = graph_input("q", (2, 4, 6)), graph_input("k", (2, 5, 6))
    y = call(Attention(2, 3, 3, 0.5, (0, 0, 0), (3, 3, 3)), q, k, k, graph_input("mask", mask))
    done = check(PushSlices(), graph_of(cut(y, None, (1, 2, 2), None)), rng)
    assert computed(done)["attention"] == [(2, 2, 6)]
    assert operators(check(PushSlices(), graph_of(cut(y, (0, 1, 1), None, None)), rng)) == ["attention", "slice"]


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_matrices(rng, transposed):
    a = graph_input("a", (2, 4, 6) if transposed else (2, 6, 4))
    y = call(MatMul(transpose_a=transposed), a, graph_input("b", (4, 3)))
    done = check(PushSlices(), graph_of(cut(y, None, (1, 3, 2), None)), rng)
    assert computed(done)["mat_mul"] == [(2, 3, 3)]


@pytest.mark.parametrize("span", [(1, 2, 1), (0, 2, 1), (5, 1, 1)])
def test_a_softmax_along_another_axis_is_cut_along_the_last(rng, span):
    y = call(Softmax(1), call(Dense(), graph_input("x", (2, 5, 6)), weights(rng, 6, 6)))
    done = check(PushSlices(), graph_of(cut(y, None, None, span)), rng)
    assert computed(done)["softmax"] == [(2, 5, span[1])]
