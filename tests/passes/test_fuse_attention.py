"""fuse_attention: however exporters cut the heads, and what only looks like it."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.text import print_graph
from cnnc.ops import Add, Dense, Div, MatMul, Mul, Reshape, Slice, Softmax, Split, Transpose, constant, graph_input
from cnnc.passes.fuse_attention import FuseAttention
from cnnc.passes.simplify import Simplify
from tests.passes.graphs import TARGET, assert_same_numbers, check, graph_of, operators, weights

B, N, H, D = 2, 5, 3, 4


def number(value: float) -> Value:
    return constant(np.array([value], np.float32))


def joined(rng: np.random.Generator, batch: int = B) -> list[Value]:
    """Cut q, k, v [B,H,N,D] out of one projection, as timm does."""
    x = call(Dense(), graph_input("x", (batch, N, 6)), weights(rng, 3 * H * D, 6))
    moved = call(Transpose((2, 0, 3, 1, 4)), call(Reshape((batch, N, 3, H, D)), x))
    parts = call(Split(0, (1, 1, 1)), moved).node.values
    return [call(Reshape((batch, H, N, D)), part) for part in parts]


def swapped(v: Value) -> Value:
    rank = v.type.rank
    return call(Transpose((*range(rank - 2), rank - 1, rank - 2)), v)


def plain(q: Value, k: Value, v: Value, scale: float = 0.5) -> Value:
    scores = call(Mul(), call(MatMul(), q, swapped(k)), number(scale))
    return call(MatMul(), call(Softmax(-1), scores), v)


def merged(y: Value) -> Value:
    batch, heads, tokens, size = y.type.static_shape
    return call(Reshape((batch, tokens, heads * size)), call(Transpose((0, 2, 1, 3)), y))


def attention_of(graph):
    (found,) = [node for node in graph.nodes if node.op.name == "attention"]
    return found


def test_golden(rng, golden):
    q, k, v = joined(rng, batch=1)
    q, k = call(Mul(), q, number(0.7)), call(Mul(), swapped(k), number(0.7))
    graph = graph_of(merged(call(MatMul(), call(Softmax(3), call(MatMul(), q, k)), v)))
    done = check(FuseAttention(), graph, rng)
    simple = Simplify().run(done, TARGET)
    golden("fuse_attention", print_graph(graph) + print_graph(done) + print_graph(simple))
    assert operators(simple) == ["dense", "attention"]


def test_heads_of_one_projection_are_read_where_they_lie(rng):
    done = check(FuseAttention(), graph_of(plain(*joined(rng))), rng)
    node = attention_of(done)
    assert len(set(node.inputs)) == 1
    assert (node.op.starts, node.op.steps) == ((0, H * D, 2 * H * D), (D, D, D))


def test_heads_that_alternate_with_their_kind(rng):
    x = call(Reshape((B, N, H, 3, D)), graph_input("x", (B, N, 3 * H * D)))
    parts = [call(Slice((0, 0, 0, i, 0), (B, N, H, 1, D), (1,) * 5), x) for i in range(3)]
    q, k, v = (call(Transpose((0, 2, 1, 3)), call(Reshape((B, N, H, D)), part)) for part in parts)
    node = attention_of(check(FuseAttention(), graph_of(merged(plain(q, k, v))), rng))
    assert (node.op.starts, node.op.steps) == ((0, D, 2 * D), (3 * D,) * 3)


def test_images_and_heads_in_one_axis(rng):
    """As torch's multi-head attention: [tokens, batch * heads, size], batch first in memory only for one image."""
    parts = [graph_input(name, (N, 1, H * D)) for name in "qkv"]
    q, k, v = (call(Transpose((1, 0, 2)), call(Reshape((N, H, D)), part)) for part in parts)
    node = attention_of(check(FuseAttention(), graph_of(plain(q, k, v)), rng))
    assert node.op.heads == H


@pytest.mark.parametrize("shape", [(B, H, N, D), (H, N, D)])
def test_heads_that_are_images_of_their_own(rng, shape):
    done = check(FuseAttention(), graph_of(plain(*(graph_input(name, shape) for name in "qkv"))), rng)
    assert attention_of(done).op.heads == 1
    assert "transpose" not in operators(done)


def test_heads_are_moved_where_they_do_not_agree(rng):
    q, k = (call(Transpose((0, 2, 1, 3)), graph_input(name, (B, n, H, D))) for name, n in (("q", N), ("k", 7)))
    done = check(FuseAttention(), graph_of(merged(plain(q, k, graph_input("v", (B, H, 7, 2))))), rng)
    assert attention_of(done).op.heads == H
    assert operators(Simplify().run(done, TARGET)).count("transpose") == 1
    other = call(Transpose((0, 2, 1, 3)), graph_input("q", (B, N, H, D)))
    done = check(
        FuseAttention(), graph_of(plain(other, graph_input("k", (B, H, 7, D)), graph_input("v", (B, H, 7, 2)))), rng
    )
    assert attention_of(done).op.heads == 1
    assert operators(done).count("transpose") == 1


def test_transposed_operands_and_division(rng):
    q, k, v = joined(rng)
    scores = call(Div(), call(MatMul(transpose_a=True), swapped(q), swapped(k)), number(2.0))
    done = check(FuseAttention(), graph_of(call(MatMul(transpose_b=True), call(Softmax(3), scores), swapped(v))), rng)
    assert attention_of(done).op.scale == 0.5
    scores = call(MatMul(transpose_b=True), q, k)
    done = check(FuseAttention(), graph_of(call(MatMul(), call(Softmax(3), scores), v)), rng)
    assert attention_of(done).op.scale == 1.0


@pytest.mark.parametrize("shape", [(N,), (N, 1), (1, 1, N, N), (B, 1, 1, N), (1, H, N, N), (B, H, N, N)])
def test_masks(rng, shape):
    q, k, v = joined(rng)
    mask = graph_input("mask", shape)
    for pair in (lambda s: (s, mask), lambda s: (mask, s)):
        scores = call(Add(), *pair(call(Mul(), call(MatMul(), q, swapped(k)), number(0.5))))
        attention_of(check(FuseAttention(), graph_of(call(MatMul(), call(Softmax(3), scores), v)), rng))


@pytest.mark.parametrize("shape", [(N,), (1, N, N), (H, N, N), (H, 1, 1)])
def test_masks_of_three_axes(rng, shape):
    q, k, v = (graph_input(name, (H, N, D)) for name in "qkv")
    scores = call(Add(), call(MatMul(), q, swapped(k)), graph_input("mask", shape))
    attention_of(check(FuseAttention(), graph_of(call(MatMul(), call(Softmax(2), scores), v)), rng))


def refused(graph) -> bool:
    done = FuseAttention().run(graph, TARGET)
    assert_same_numbers(graph, done, np.random.default_rng(1))
    return operators(done) == operators(graph)


def test_what_only_looks_like_it_stays(rng):
    q, k, v = joined(rng)
    shares = call(Softmax(3), call(MatMul(), q, swapped(k)))
    assert refused(graph_of(call(MatMul(), shares, v), shares))
    assert refused(graph_of(call(MatMul(), call(Softmax(2), call(MatMul(), q, swapped(k))), v)))
    assert refused(
        graph_of(call(MatMul(), call(Softmax(3), call(MatMul(), q, swapped(k))), graph_input("o", (1, H, N, D))))
    )
    assert refused(graph_of(call(MatMul(), call(Softmax(3), graph_input("s", (B, H, N, N))), v)))
    wide = graph_input("mask", (B, H, N, N))
    narrow = call(MatMul(), graph_input("a", (1, H, N, D)), graph_input("c", (1, H, D, N)))
    assert refused(graph_of(call(MatMul(), call(Softmax(3), call(Add(), narrow, wide)), v)))
    small = call(MatMul(), graph_input("r", (N, D)), graph_input("t", (D, N)))
    assert refused(graph_of(call(MatMul(), call(Softmax(1), small), graph_input("u", (N, D)))))
