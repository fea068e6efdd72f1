"""Transformer kernels as the pipeline makes them: which templates take them, and the numbers of whole networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cnnc
from cnnc.backends.cpu.templates import TEMPLATES
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import run
from cnnc.ops import (
    Add,
    Conv,
    Dense,
    Fused,
    Gather,
    Gelu,
    LayerNorm,
    MatMul,
    Mul,
    Reshape,
    Softmax,
    Transpose,
    constant,
    graph_input,
)
from cnnc.passes.pipeline import pipeline, run_pipeline
from cnnc.target import Target

TOKENS, WIDTH, HEADS = 13, 24, 2


def weights(rng: np.random.Generator, *shape: int) -> Value:
    return constant((rng.standard_normal(shape) / shape[-1] ** 0.5).astype(np.float32))


def linear(rng: np.random.Generator, x: Value, outputs: int) -> Value:
    return call(Dense(), x, weights(rng, outputs, x.type.static_shape[-1]), weights(rng, outputs))


def normed(rng: np.random.Generator, x: Value) -> Value:
    return call(LayerNorm(-1), x, weights(rng, WIDTH), weights(rng, WIDTH))


def transformer(rng: np.random.Generator) -> Graph:
    """Make two blocks of a vision transformer that classifies by its first token."""
    x = graph_input("x", (2, TOKENS, WIDTH))
    y = x
    for _ in range(2):
        split = call(Reshape((2, TOKENS, 3, HEADS, WIDTH // HEADS)), linear(rng, normed(rng, y), 3 * WIDTH))
        moved = call(Transpose((2, 0, 3, 1, 4)), split)
        q, k, v = (call(Gather(0), moved, constant(np.array(i))) for i in range(3))
        scores = call(Mul(), call(MatMul(transpose_b=True), q, k), constant(np.array([0.3], np.float32)))
        heads = call(MatMul(), call(Softmax(-1), scores), v)
        merged = call(Reshape((2, TOKENS, WIDTH)), call(Transpose((0, 2, 1, 3)), heads))
        y = call(Add(), y, linear(rng, merged, WIDTH))
        y = call(Add(), y, linear(rng, call(Gelu(), linear(rng, normed(rng, y), 4 * WIDTH)), WIDTH))
    return Graph("transformer", (x,), (linear(rng, call(Gather(1), y, constant(np.array(0))), 5),))


def convnext(rng: np.random.Generator) -> Graph:
    """Make a block of ConvNeXt: depthwise convolution, norm of the channels, two layers of each pixel."""
    x = graph_input("x", (1, 12, 9, 7))
    y = call(Conv((1, 1), (3,) * 4, (1, 1), 12), x, weights(rng, 12, 1, 7, 7), weights(rng, 12))
    last = call(LayerNorm(3), call(Transpose((0, 2, 3, 1)), y), weights(rng, 12), weights(rng, 12))
    y = call(Transpose((0, 3, 1, 2)), last)
    y = call(Gelu(), call(Conv((1, 1), (0,) * 4, (1, 1)), y, weights(rng, 48, 12, 1, 1)))
    return Graph(
        "convnext", (x,), (call(Add(), x, call(Conv((1, 1), (0,) * 4, (1, 1)), y, weights(rng, 12, 48, 1, 1))),)
    )


def products(rng: np.random.Generator) -> Graph:
    """Multiply what is computed, and take shares that somebody reads."""
    a, b = graph_input("a", (3, 11, 17)), graph_input("b", (17, 21))
    shares = call(Softmax(2), call(MatMul(), a, b))
    return Graph("products", (a, b), (shares, call(MatMul(transpose_b=True), shares, call(Add(), shares, shares))))


def algorithms(graph: Graph) -> list[str]:
    """List the templates that the kernels of a graph get."""
    target = Target.parse("cpu:x86-64-v3")
    done = run_pipeline(graph, target, pipeline(3, TEMPLATES))
    return [n.op.schedule.template for n in done.nodes if isinstance(n.op, Fused) and n.op.schedule]


@pytest.mark.parametrize(
    ("make", "expected", "rare"),
    [
        (transformer, {"dense_packed", "attention", "norm", "dense"}, {"generic"}),
        (convnext, {"depthwise", "norm", "conv_direct"}, {"generic"}),
        (products, {"mat_mul", "softmax"}, {"generic"}),
    ],
)
def test_templates_take_them(make: Any, expected: set[str], rare: set[str]) -> None:
    chosen = algorithms(make(np.random.default_rng(0)))
    assert expected <= set(chosen) <= expected | rare
    assert sum(name in rare for name in chosen) <= 3


@pytest.mark.parametrize("make", [transformer, convnext, products])
def test_whole_networks_are_right_with_any_threads(make: Any) -> None:
    rng = np.random.default_rng(1)
    graph = make(rng)
    arrays = [rng.standard_normal(v.type.static_shape).astype(np.float32) for v in graph.inputs]
    feeds = dict(zip(graph.input_names, arrays, strict=True))
    results = [cnnc.compile(graph, target="cpu", threads=threads).run(feeds) for threads in (1, 2, 3)]
    for name, wanted in zip(graph.output_names, run(graph, arrays, precise=True), strict=True):
        np.testing.assert_allclose(results[0][name], wanted, rtol=1e-4, atol=1e-5)
        for other in results[1:]:
            np.testing.assert_array_equal(other[name], results[0][name])
