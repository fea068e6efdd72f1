"""Graphs: order, users, the one door, literals, the networkx view."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
from hypothesis import given, settings

from cnnc.errors import LimitError, ShapeError, VerifyError
from cnnc.ir.build import call, located
from cnnc.ir.graph import Graph
from cnnc.ir.literal import Literal
from cnnc.ir.view import to_networkx
from cnnc.ops import Add, Expand, Relu, Split, constant, graph_input
from tests.passes.random_graphs import networks


@given(graph=networks())
@settings(max_examples=50, deadline=None)
def test_nodes_come_after_what_they_read(graph: Graph):
    seen = set()
    for node in graph.nodes:
        assert all(v.node in seen for v in node.inputs)
        seen.add(node)
    assert len(seen) == len(graph.nodes)
    reads = [(value, node) for value, users in graph.users.items() for node in users]
    assert sorted(map(str, reads)) == sorted(str((v, n)) for n in graph.nodes for v in n.inputs)


def test_depth_is_no_matter():
    y = x = graph_input("x", (2,))
    for _ in range(20_000):
        y = call(Relu(), y)
    graph = Graph("deep", (x,), (y,))
    assert len(graph.nodes) == 20_001
    assert graph.nodes[0] is x.node


def test_unused_inputs_stay_and_dead_nodes_do_not_exist():
    x, z = graph_input("x", (2,)), graph_input("z", (3,))
    call(Relu(), z)
    graph = Graph("g", (x, z), (call(Relu(), x),))
    assert graph.input_names == ("x", "z")
    assert len(graph.nodes) == 3
    assert graph.users[z] == ()


def test_users_have_one_entry_a_use():
    x = graph_input("x", (2,))
    y = call(Add(), x, x)
    assert Graph("g", (x,), (y,)).users[x] == (y.node, y.node)


def test_output_names():
    x = graph_input("x", (2,))
    assert Graph("g", (x,), (x,)).output_names == ("output",)
    assert Graph("g", (x,), (x, x)).output_names == ("output0", "output1")
    with pytest.raises(VerifyError, match="2 outputs, 1 names"):
        Graph("g", (x,), (x, x), ("y",))


def test_the_door_infers_and_locates():
    x = graph_input("x", (2, 4))
    with located(["net.py:3"]):
        y = call(Split(1, (1, 3)), x)
        assert [str(v.type) for v in y.node.values] == ["f32[2,1]", "f32[2,3]"]
        with pytest.raises(ShapeError, match=r"do not broadcast.*\(at net.py:3\)"):
            call(Add(), x, graph_input("z", (3,)))
        assert call(Relu(), x, loc=["other"]).node.loc == {"other"}
    assert y.node.loc == {"net.py:3"}
    assert call(Relu(), x).node.loc == frozenset()


def test_the_door_counts_inputs():
    x = graph_input("x", (2,))
    with pytest.raises(ShapeError, match="relu: takes another number of inputs than the 2 given"):
        call(Relu(), x, x)


def test_limits_keep_their_class():
    with pytest.raises(LimitError, match=r"more than 2\*\*62 elements.*at big"):
        call(Expand((2**40, 2**40)), constant(1.0), loc=["big"])


def test_nodes_are_themselves_values_compare():
    x = graph_input("x", (2,))
    a, b = call(Relu(), x), call(Relu(), x)
    assert a != b
    assert a == a.node.values[0]


def test_the_view_keeps_both_edges():
    x = graph_input("x", (2,))
    y = call(Add(), x, x)
    view = to_networkx(Graph("g", (x,), (y,)))
    assert view.number_of_edges(x.node, y.node) == 2
    assert sorted(data["position"] for *_, data in view.edges(data=True)) == [0, 1]
    assert networkx.is_directed_acyclic_graph(view)


def test_literals_compare_by_content():
    a = np.arange(6, dtype=np.float32)
    assert Literal(a) == Literal(a.copy())
    assert hash(Literal(a)) == hash(Literal(a.copy()))
    assert Literal(a) != Literal(a.reshape(2, 3))
    assert Literal(a) != Literal(a.astype(np.float64))
    assert Literal(np.float32([np.nan])) == Literal(np.float32([np.nan]))
    assert Literal(np.float32([0.0])) != Literal(np.float32([-0.0]))
    assert Literal(a) != "a"


def test_every_element_of_a_literal_counts(rng: np.random.Generator):
    a = rng.standard_normal((10, 20)).astype(np.float32)
    for position in range(a.size):
        b = a.copy()
        b.reshape(-1)[position] += 1
        assert Literal(a) != Literal(b)


@pytest.mark.parametrize(
    ("numbers", "largest"),
    [([], 0.0), ([2.0, -3.0], 3.0), ([1.0, -np.inf], np.inf), ([1.0, np.nan, 5.0], np.nan), ([-0.0], 0.0)],
)
def test_the_largest_magnitude_of_a_literal(numbers: list[float], largest: float):
    np.testing.assert_equal(Literal(np.array(numbers, np.float32)).largest, largest)


def test_literals_cannot_be_written():
    literal = Literal(np.zeros((2, 3), np.float32).T)
    assert literal.array.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        literal.array[0] = 1
    with pytest.raises(ShapeError, match="complex128"):
        Literal(np.zeros(1, np.complex128))
