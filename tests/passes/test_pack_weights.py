"""pack_weights: weights of layers with many rows, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.text import print_graph
from cnnc.ops import Dense, DigitDense, Relu, constant, graph_input
from cnnc.ops.digit_conv import weight_digits
from cnnc.passes.pack_weights import PackWeights
from cnnc.target import Target
from tests.passes.graphs import check, graph_of, weights


def weight_of(y: Value) -> Layout | None:
    return y.inputs[1].type.layout


def test_golden(rng, golden):
    x = graph_input("x", (2, 5, 8))
    y = call(Dense(), call(Relu(), call(Dense(), x, weights(rng, 20, 8, label="w"))), weights(rng, 3, 20))
    graph = graph_of(y)
    golden("pack_weights", print_graph(graph) + print_graph(check(PackWeights(), graph, rng)))


@pytest.mark.parametrize(("rows", "packed"), [((4,), True), ((2, 2), True), ((3,), False), ((1,), False), ((), False)])
def test_the_rows_decide(rng, rows, packed):
    x = graph_input("x", (*rows, 8))
    done = check(PackWeights(), graph_of(call(Dense(), x, weights(rng, 5, 8), weights(rng, 5))), rng)
    assert (weight_of(done.outputs[0]) == Layout("OI16o")) is packed


def test_a_weight_that_is_computed_stays(rng):
    x, w = graph_input("x", (9, 8)), graph_input("w", (5, 8))
    assert weight_of(check(PackWeights(), graph_of(call(Dense(), x, w)), rng).outputs[0]) is None


def test_the_block_can_be_chosen(rng):
    done = check(PackWeights(block=4), graph_of(call(Dense(), graph_input("x", (9, 8)), weights(rng, 5, 8))), rng)
    assert weight_of(done.outputs[0]) == Layout("OI4o")


def test_digits_golden(rng, golden):
    d, unit = weight_digits(rng.standard_normal((20, 8)).astype(np.float32))
    graph = graph_of(call(DigitDense(), graph_input("x", (2, 5, 8)), constant(d), constant(unit)))
    done = check(PackWeights(), graph, rng, target=Target.parse("cpu:sapphirerapids"))
    golden("pack_weights_digits", print_graph(graph) + print_graph(done))


@pytest.mark.parametrize("batches", [(9,), (1, 9)])
def test_a_gpu_reads_plain_weights(rng, batches):
    weight = weights(rng, 5, 8)
    graphs = [graph_of(call(Dense(), graph_input("x", (batch, 8)), weight)) for batch in batches]
    done = PackWeights().run_together(graphs, Target.parse("cuda:sm_90"))
    assert [weight_of(graph.outputs[0]) for graph in done] == [None] * len(batches)
