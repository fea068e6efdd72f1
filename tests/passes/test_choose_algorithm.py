"""choose_algorithm: the cheapest within the error budget."""

from __future__ import annotations

from cnnc.ir.build import call
from cnnc.ir.text import print_graph
from cnnc.ops import Conv
from cnnc.passes.choose_algorithm import ALGORITHMS, Algorithm, ChooseAlgorithm, cheapest
from tests.passes.graphs import TARGET, check, conv, graph_of, image, operators, weights

FAST = Algorithm(
    "fast", error=11.0, applies=lambda node: node.inputs[1].shape[2] == 3, seconds=lambda node, target: 0.0
)


def test_golden(rng, golden):
    x = image(1, 3, 6, 6)
    w = weights(rng, 4, 3, 3, 3)
    graph = graph_of(call(Conv((1, 1), (0,) * 4, (1, 1), algorithm="slow"), x, w))
    done = check(ChooseAlgorithm(), graph, rng)
    golden("choose_algorithm", print_graph(graph) + print_graph(done))
    assert operators(done) == ["conv"]


def test_the_budget_decides(rng):
    x = image(1, 3, 6, 6)
    node = conv(x, weights(rng, 4, 3, 3, 3)).node
    table = (*ALGORITHMS, FAST)
    assert cheapest(node, TARGET, 64.0, table) == "fast"
    assert cheapest(node, TARGET, 8.0, table) == "direct"
    assert cheapest(node, TARGET, 0.0, table) == "direct"


def test_where_it_applies_decides(rng):
    node = conv(image(1, 3, 6, 6), weights(rng, 4, 3, 1, 1)).node
    assert cheapest(node, TARGET, 64.0, (*ALGORITHMS, FAST)) == "direct"
