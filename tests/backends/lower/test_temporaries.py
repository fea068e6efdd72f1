"""Chains of functions compile in time, to the same numbers."""

from __future__ import annotations

import time

import numpy as np

import cnnc
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate
from cnnc.ops.source import graph_input
from cnnc.ops.unary import Exp, Log, Sigmoid, Silu, Tanh


def test_a_chain_of_functions_compiles_in_linear_time(rng: np.random.Generator) -> None:
    x = graph_input("x", (2, 9, 7))
    y = x
    for op in (Silu(), Sigmoid(), Exp(), Tanh(), Log(), Sigmoid(), Tanh(), Silu()) * 3:
        y = call(op, y)
    graph = Graph("chain", (x,), (y,), ("y",))
    start = time.process_time()
    module = cnnc.compile(graph, cache=False)
    # Exponential in the depth it would take longer than the universe has.
    assert time.process_time() - start < 60
    feeds = {"x": rng.standard_normal((2, 9, 7)).astype(np.float32)}
    np.testing.assert_allclose(module.run(feeds)["y"], evaluate(graph, feeds, precise=True)["y"], rtol=1e-5, atol=1e-6)
