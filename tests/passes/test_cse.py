"""cse: equal things once, and what merely looks equal twice."""

from __future__ import annotations

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.layout import Layout
from cnnc.ir.literal import Literal
from cnnc.ir.text import print_graph
from cnnc.ops import Add, Clip, Constant, Pad, Relu, Split, Sub, constant
from cnnc.passes.cse import Cse
from tests.passes.graphs import check, conv, graph_of, image, operators, weights

CSE = Cse()


def test_golden(rng, golden):
    x = image(1, 3, 6, 6)
    w = rng.standard_normal((4, 3, 3, 3)).astype(np.float32)
    twins = [call(Relu(), conv(x, constant(w.copy(), label=f"w{i}")), loc=[f"Relu_{i}"]) for i in range(2)]
    graph = graph_of(call(Add(), *twins))
    golden("cse", print_graph(graph) + print_graph(check(CSE, graph, rng)))


def test_locations_are_united(rng):
    x = image(3)
    graph = graph_of(call(Add(), call(Relu(), x, loc=["a"]), call(Relu(), x, loc=["b"]), loc=["sum"]))
    (relu,) = (n for n in check(CSE, graph, rng).nodes if n.op.name == "relu")
    assert relu.loc == {"a", "b"}


def test_all_outputs_of_a_node(rng):
    x = image(4, 2)
    parts = [call(Split(0, (1, 3)), x).node.values for _ in range(2)]
    done = check(CSE, graph_of(call(Sub(), parts[0][1], parts[1][1]), parts[0][0], parts[1][0]), rng)
    assert operators(done) == ["split", "sub"]


def test_what_differs_stays(rng):
    x = image(1, 8, 2, 2)
    w = rng.standard_normal((8, 8, 1, 1)).astype(np.float32)
    other = w.copy()
    other[3, 4, 0, 0] += 1
    same = [call(Constant(Literal(w), "", layout)) for layout in (None, Layout("OIHW4o"))]
    assert len(check(CSE, graph_of(*same, constant(other), x), rng).nodes) == 4
    for ops in ((Clip(0, 1), Clip(0, 2)), (Pad((0,) * 8, value=0.0), Pad((0,) * 8, value=-0.0))):
        graph = graph_of(*(call(op, x) for op in ops))
        assert operators(check(CSE, graph, rng)) == operators(graph)
    typed = graph_of(constant(np.zeros(3, np.int32)), constant(np.zeros(3, np.float32)), x)
    assert len(check(CSE, typed, rng).nodes) == 3


def test_operands_have_their_order(rng):
    x, y = image(3), image(3, label="y")
    graph = graph_of(call(Sub(), x, y), call(Sub(), y, x))
    assert operators(check(CSE, graph, rng)) == ["sub", "sub"]


def test_equal_inputs_are_two_inputs(rng):
    x, y = image(3), image(3, label="y")
    assert len(check(CSE, graph_of(call(Add(), x, y)), rng).inputs) == 2
    assert operators(check(CSE, graph_of(call(Relu(), x), call(Relu(), y)), rng)) == ["relu", "relu"]


def test_large_weights_are_told_apart_by_all_their_elements(rng):
    a = rng.standard_normal(10_000).astype(np.float32)
    b = a.copy()
    b[4_999] += 1
    x = image(10_000)
    graph = graph_of(*(call(Add(), x, constant(c)) for c in (a, a.copy(), b)))
    assert operators(check(CSE, graph, rng)) == ["add", "add"]


def test_weights_of_layers(rng):
    x = image(1, 3, 4, 4)
    graph = graph_of(conv(x, weights(rng, 2, 3, 1, 1)), conv(x, weights(rng, 2, 3, 1, 1)))
    assert operators(check(CSE, graph, rng)) == ["conv", "conv"]
