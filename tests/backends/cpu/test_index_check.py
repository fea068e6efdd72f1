"""Indices that are data: right inside their axis, an error code outside, whatever the operator."""

from __future__ import annotations

import numpy as np
import pytest

import cnnc
from cnnc.errors import ModelError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import evaluate
from cnnc.ir.op import Op
from cnnc.ir.types import DType
from cnnc.ops.gather import Gather, GatherElements, GatherNd
from cnnc.ops.scatter import ScatterElements, ScatterNd
from cnnc.ops.source import constant, graph_input
from cnnc.ops.unary import Relu

X = (4, 5, 3)
CASES = [
    (Gather(1), (2, 3), False, (5,)),
    (Gather(0), (), False, (4,)),
    (GatherElements(2), (4, 5, 6), False, (3,)),
    (GatherNd(), (7, 2), False, (4, 5)),
    (GatherNd(1), (4, 2, 1), False, (5,)),
    (ScatterElements(0), (2, 5, 3), True, (4,)),
    (ScatterNd(), (2, 2), True, (4, 5)),
]


def network(op: Op, indices: tuple[int, ...], scatter: bool, dtype: DType) -> Graph:
    """Give relu(op(x, i[, updates])) with the indices as an input."""
    x = graph_input("x", X)
    i = graph_input("i", indices, dtype)
    inputs: tuple[Value, ...] = (x, i)
    if scatter:
        shape = indices if isinstance(op, ScatterElements) else (*indices[:-1], *X[indices[-1] :])
        inputs = (*inputs, graph_input("updates", shape))
    return Graph("net", inputs, (call(Relu(), call(op, *inputs, loc=["layer7"])),), ("y",))


@pytest.mark.parametrize("dtype", [DType.I32, DType.I64])
@pytest.mark.parametrize(("op", "indices", "scatter", "extents"), CASES, ids=str)
def test_indices_at_run_time(
    op: Op, indices: tuple[int, ...], scatter: bool, extents: tuple[int, ...], dtype: DType, rng: np.random.Generator
) -> None:
    graph = network(op, indices, scatter, dtype)
    module = cnnc.compile(graph)
    feeds = {v.op.label: rng.standard_normal(v.type.static_shape).astype(np.float32) for v in graph.inputs}  # type: ignore[attr-defined]
    bounds = np.resize(np.array(extents), indices)
    good = rng.permuted(np.arange(np.prod(indices, dtype=int))).reshape(indices) % (2 * bounds) - bounds
    if scatter:
        good = np.abs(good) % bounds
    feeds["i"] = good.astype(dtype.numpy)
    np.testing.assert_array_equal(module.run(feeds)["y"], evaluate(graph, feeds)["y"])
    for outside in (bounds.flat[-1], -bounds.flat[-1] - 1, np.iinfo(dtype.numpy).min, np.iinfo(dtype.numpy).max):
        bad = feeds["i"].copy().reshape(-1)
        bad[-1] = outside
        with pytest.raises(ModelError, match="out of range"):
            module.run({**feeds, "i": bad.reshape(indices)})
    np.testing.assert_array_equal(module.run(feeds)["y"], evaluate(graph, feeds)["y"])


def test_constant_outside_is_refused_at_compile_time() -> None:
    x = graph_input("x", X)
    y = call(Gather(0), x, constant(np.array([0, 4])), loc=["embedding"])
    with pytest.raises(ModelError, match=r"gather: index 4 is outside of extents \[4\] \(at embedding\)"):
        cnnc.compile(Graph("net", (x,), (y,)))
