"""A small vision transformer as a whole: which template computes each layer, and the numbers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.types import Size
from cnnc.ops import Add, Dense, Gelu, LayerNorm, ReduceMean, Reshape, Softmax, Split, Transpose, constant, graph_input
from tests.backends.cuda.artifacts import FakeGpu
from tests.backends.cuda.emulator import needs_gxx
from tests.backends.cuda.test_artifact import check_graph
from tests.passes.graphs import graph_of, weights
from tests.passes.test_fuse_attention import merged, plain

pytestmark = [needs_gxx, pytest.mark.usefixtures("emulating_nvcc")]

TOKENS, HEADS, SIZE = 10, 2, 16
WIDTH = HEADS * SIZE


def vit(batch: int) -> Graph:
    """Give one block of a transformer on tokens, and a layer that classifies their mean."""
    rng = np.random.default_rng(2)

    def dense(x: Value, outputs: int) -> Value:
        inputs = x.type.static_shape[-1]
        return call(Dense(), x, matrix(rng, outputs, inputs), weights(rng, outputs))

    def norm(x: Value) -> Value:
        return call(LayerNorm(x.type.rank - 1), x, weights(rng, WIDTH), weights(rng, WIDTH))

    x = graph_input("x", (batch, TOKENS, WIDTH))
    cut: tuple[Size, ...] = (batch, TOKENS, 3, HEADS, SIZE)
    parts = call(Split(0, (1, 1, 1)), call(Transpose((2, 0, 3, 1, 4)), call(Reshape(cut), dense(norm(x), 3 * WIDTH))))
    q, k, v = (call(Reshape((batch, HEADS, TOKENS, SIZE)), part) for part in parts.node.values)
    x = call(Add(), x, dense(merged(plain(q, k, v)), WIDTH))
    x = call(Add(), x, dense(call(Gelu(), dense(norm(x), 4 * WIDTH)), WIDTH))
    return graph_of(call(Softmax(1), dense(call(ReduceMean((1,), False), norm(x)), 12)))


def matrix(rng: np.random.Generator, outputs: int, inputs: int) -> Value:
    """Draw a matrix that keeps the magnitude of what it multiplies."""
    return constant((rng.standard_normal((outputs, inputs)) * inputs**-0.5).astype(np.float32))


@pytest.mark.parametrize(("dtype", "bound"), [("f32", 1e-5), pytest.param("f16", 2e-3, marks=pytest.mark.slow)])
def test_every_layer_has_a_template_of_its_own(dtype: str, bound: float, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    graph = vit(2)
    module = cnnc.compile(graph, target="cuda:sm_90", dtype=dtype)
    assert module.build is not None
    used = Counter(call.algorithm for call in module.build.program.calls)
    assert used["attention" if dtype == "f32" else "attention_mma"] == 1
    assert used["rows"] == 4
    # Of the five layers one has few rows; in 16 bits, tensor cores have the others.
    others = "matmul_ffma" if dtype == "f32" else "matmul_mma"
    assert used["matvec"] + used[others] == 5
    assert used[others] >= 4
    check_graph(graph, fake_gpu, tmp_path, dtype, bound)
