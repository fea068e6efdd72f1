"""The verifier: everything that cannot come through the door is noticed, at its node."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.layout import Layout
from cnnc.ir.types import TensorType
from cnnc.ir.verify import verify
from cnnc.ops import Add, Fused, Relu, graph_input
from tests.passes.random_graphs import networks

X = graph_input("x", (2, 3))


@given(graph=networks())
@settings(max_examples=50, deadline=None)
def test_networks_are_well_formed(graph: Graph):
    assert verify(graph) is graph


def forged(*types: TensorType, inputs: tuple[Value, ...] = (X,)) -> Value:
    """Make a relu around the door."""
    return Value(Node(Relu(), inputs, types, frozenset(["Relu_3"])))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (forged(TensorType((2, 4))), r"relu: has types \(f32\[2,4\]\), inference gives \(f32\[2,3\]\) \(at Relu_3\)"),
        (forged(TensorType((2, 3), layout=Layout("NC4c"))), "has types"),
        (forged(TensorType((2, 3)), TensorType((2, 3))), "has types"),
        (forged(TensorType((2, 3)), inputs=(Value(X.node, 1),)), "input 0 is output 1 of input, which has 1"),
        (forged(TensorType((2, 3)), inputs=(X, X)), "inference refuses it"),
    ],
)
def test_forged_nodes(value, message):
    with pytest.raises(VerifyError, match=message) as caught:
        verify(Graph("g", (X,), (value,)), "fuse")
    assert "after fuse" in str(caught.value)
    assert "; ^ " in str(caught.value), "the graph is printed with the message at the node"


def test_a_sound_node_does_not_vouch_for_those_that_read_it():
    x = call(Relu(), X)
    verify(Graph("g", (X,), (x,)))
    with pytest.raises(VerifyError, match="has types"):
        verify(Graph("g", (X,), (forged(TensorType((2, 4)), inputs=(x,)),)))


def test_inputs_that_are_not_declared():
    z = graph_input("z", (2, 3))
    verify(Graph("g", (X, z), (call(Add(), X, z),)))
    with pytest.raises(VerifyError, match="input: is reached but is not an input of the graph"):
        verify(Graph("g", (X,), (call(Add(), X, z),)))


def test_inputs_that_are_none():
    with pytest.raises(VerifyError, match="relu stands among the inputs"):
        verify(Graph("g", (call(Relu(), X),), (X,)))


def test_names_used_twice():
    z = graph_input("x", (2, 3))
    with pytest.raises(VerifyError, match="input name 'x' is used twice"):
        verify(Graph("g", (X, z), (X,)))
    with pytest.raises(VerifyError, match="output name 'y' is used twice"):
        verify(Graph("g", (X,), (X, X), ("y", "y")))


def test_bodies_of_kernels():
    inside = graph_input("x0", (2, 3))
    wrong = Value(Node(Relu(), (inside,), (TensorType((2, 4)),)))
    kernel = call(Fused(Graph("relu", (inside,), (wrong,)), "relu"), X)
    with pytest.raises(VerifyError, match="relu: has types"):
        verify(Graph("g", (X,), (kernel,)))


def test_kernels_take_what_their_body_takes():
    inside = graph_input("x0", (2, 4))
    body = Graph("relu", (inside,), (call(Relu(), inside),))
    kernel = Value(Node(Fused(body, "relu"), (X,), (TensorType((2, 4)),)))
    with pytest.raises(VerifyError, match=r"the body takes \(f32\[2,4\]\) but is given \(f32\[2,3\]\)"):
        verify(Graph("g", (X,), (kernel,)))
