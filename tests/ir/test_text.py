"""The text form: what it looks like, that it reads back as what it was, and what cannot be read."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnc.errors import ModelError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import run
from cnnc.ir.layout import Layout
from cnnc.ir.literal import Literal
from cnnc.ir.op import OPERATORS, Op, random_array
from cnnc.ir.parse import parse_attributes, parse_graph
from cnnc.ir.text import print_graph, weights_of
from cnnc.ir.types import Dim, DType, Size, TensorType
from cnnc.ops import Add, Constant, Parameter, Relu, Reshape, constant, graph_input
from cnnc.passes.registry import parse_passes
from tests.passes.graphs import TARGET
from tests.passes.random_graphs import networks

SOME = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def again(graph: Graph) -> Graph:
    return parse_graph(print_graph(graph), weights_of(graph))


@given(graph=networks(), passes=st.sampled_from(("", "fuse", "assign_layouts,fuse", "simplify,fold_batch_norm")))
@SOME
def test_networks_read_back(graph: Graph, passes: str):
    for step in parse_passes(passes):
        graph = step.run(graph, TARGET)
    read = again(graph)
    assert print_graph(read) == print_graph(graph)
    rng = np.random.default_rng(0)
    arrays = [random_array(rng, v.type) for v in graph.inputs]
    for a, b in zip(run(graph, arrays), run(read, arrays), strict=True):
        np.testing.assert_array_equal(a, b)


texts = st.text(max_size=8)
numbers = st.one_of(st.floats(width=32), st.integers(-(2**40), 2**40), st.booleans(), st.none())
n = Dim.symbol("n", 5)
extents = st.sampled_from([n, n * 2 + 1, (n + 1) // 2, n * Dim.symbol("m", 3) - 4, -n])
leaves = st.one_of(numbers, texts, extents, st.sampled_from(list(DType)), st.sampled_from([Layout("NCHW4c")]))
attributes = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@pytest.fixture
def carrier():
    """Give an operator that carries any attribute."""

    @dataclass(frozen=True)
    class Carrier(Op):
        """y = x."""

        payload: object = field(default=None)

        def infer(self, x: TensorType) -> TensorType:
            return x

    yield Carrier
    del OPERATORS["carrier"]


@given(payload=attributes, loc=st.sets(texts, max_size=2), name=texts)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_attributes_read_back(carrier, payload, loc, name):
    x = graph_input(name, (2, n))
    graph = Graph(name, (x,), (call(carrier(payload), x, loc=loc),), (name,))
    read = again(graph)
    assert print_graph(read) == print_graph(graph)
    (node,) = (v.node for v in read.outputs)
    assert node.loc == frozenset(loc)
    assert repr(node.op.payload) == repr(payload)


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("shape", [(), (1,), (0,), (4,), (2, 2), (5,), (2, 3)])
def test_constants_read_back(dtype, shape):
    array = random_array(np.random.default_rng(1), TensorType(shape, dtype))
    graph = Graph("g", (), (constant(array, label="w"),))
    (read,) = again(graph).outputs
    assert isinstance(read.op, Constant)
    assert read.type == TensorType(shape, dtype)
    np.testing.assert_array_equal(read.op.value.array, array)


@pytest.mark.parametrize("dtype", [d for d in DType if d.is_float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 1e-30, 65504.0])
def test_special_numbers_read_back(dtype, value):
    with np.errstate(over="ignore"):
        array = np.asarray([value], np.float64).astype(dtype.numpy)
    (read,) = again(Graph("g", (), (constant(array),))).outputs
    assert isinstance(read.op, Constant)
    assert read.op.value.array.tobytes() == array.tobytes()


def test_a_blocked_constant_and_a_parameter_read_back():
    blocked = call(Constant(Literal(np.arange(32, dtype=np.float32).reshape(8, 4, 1, 1)), "w", Layout("OIHW4i8o")))
    parameter = call(Parameter("fc.weight", TensorType((3, 4), DType.F16)))
    graph = Graph("g", (), (blocked, parameter))
    assert print_graph(again(graph)) == print_graph(graph)
    assert again(graph).outputs[0].op == blocked.op


def test_what_it_looks_like():
    x = graph_input("x", (Dim.symbol("n", 4), 2))
    y = call(Relu(), call(Add(), x, constant([1.0, 2.0])), loc=["Relu_1", 'od"d'])
    y = call(Reshape((Dim.symbol("n", 4) * 2,)), y)
    assert print_graph(Graph("net", (x,), (y, x), ("y", "same"))) == (
        'graph "net" {\n'
        '  %0 = input {label="x"} : f32[{n<=4},2]\n'
        "  %1 = constant {value=<1.0,2.0>} : f32[2]\n"
        "  %2 = add(%0, %1) : f32[{n<=4},2]\n"
        '  %3 = relu(%2) : f32[{n<=4},2] @ "Relu_1", "od\\"d"\n'
        "  %4 = reshape(%3) {shape=[2*{n<=4}]} : f32[2*{n<=4}]\n"
        '  return %4 as "y", %0 as "same"\n'
        "}\n"
    )


def test_without_locations():
    x = graph_input("x", (2,))
    a, b = (Graph("g", (x,), (call(Relu(), x, loc=[loc]),)) for loc in ("a", "b"))
    assert print_graph(a) != print_graph(b)
    assert print_graph(a, locations=False) == print_graph(b, locations=False)


def test_notes_are_comments():
    x = graph_input("x", (2,))
    graph = Graph("g", (x,), (call(Relu(), x),))
    text = print_graph(graph, {graph.nodes[1]: "mind this"})
    assert "  ; ^ mind this\n" in text
    assert print_graph(parse_graph(text)) == print_graph(graph)


HEAD = 'graph "g" {\n  %0 = input {label="x"} : f32[2]\n'


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "'graph' is wanted here"),
        ('graph "g" {}', 1, "'return' is wanted here"),
        (HEAD + '  return %1 as "y"\n}', 3, "this value is not defined above"),
        (HEAD + '  return %0 as "y"\n} more', 4, "nothing may follow the graph"),
        (HEAD + "  %1 = frobnicate(%0) : f32[2]\n", 3, "there is no such operator"),
        (HEAD + "  %1 = relu(%0) {alpha=1} : f32[2]\n", 3, "relu has no attribute alpha"),
        (HEAD + "  %1 = relu(%0) : f32[3]\n", 3, r"relu gives f32\[2\], not f32\[3\]"),
        (HEAD + "  %1, %2 = relu(%0) : f32[2]\n", 3, "relu has 1 outputs, 2 are named"),
        (HEAD + "  %1 = relu(%0, %0) : f32[2]\n", 3, "takes another number of inputs"),
        (HEAD + "  %1 = reshape(%0) : f32[2]\n", 3, "reshape:.*shape"),
        (HEAD + "  %1 = relu(%0) : f33[2]\n", 3, "a dtype is wanted here"),
        (HEAD + "  %1 = relu(%0) : f32[2\n", 4, "is wanted here"),
        (HEAD + "  %1 = relu(%0) : f32[2] NCH\n", 3, "layout NCH"),
        (HEAD + "  %1 = relu(%0) : f32[-2]\n", 3, "negative"),
        (HEAD + "  %1 = reshape(%0) {shape=[({n<=0})//2]} : f32[2]\n", 3, "bound of at least 1"),
        (HEAD + "  %1 = reshape(%0) {shape=Nowhere<1>} : f32[2]\n", 3, "there is no Nowhere"),
        (HEAD + "  %1 = constant {value=#0123} : f32[9]\n", 3, "the weights file has no constant #0123"),
        (HEAD + "  %1 = constant {value=<1,2,3>} : f32[2]\n", 3, "constant"),
        (HEAD + "  %1 = constant {value=<one>} : f32[1]\n", 3, "constant"),
        (HEAD + "  ~", 3, "cannot be read"),
        ('graph "g', 1, "cannot be read"),
    ],
)
def test_what_cannot_be_read(text, line, message):
    with pytest.raises(ModelError, match=f"IR text line {line}, at .*{message}"):
        parse_graph(text)


def test_wrong_weights_are_noticed():
    graph = Graph("g", (), (constant(np.arange(9, dtype=np.float32)),))
    (digest,) = weights_of(graph)
    with pytest.raises(ModelError, match="the weights file has other numbers"):
        parse_graph(print_graph(graph), {digest: np.ones(9, np.float32)})
    with pytest.raises(ModelError, match="the weights file has other numbers"):
        parse_graph(print_graph(graph), {digest: np.ones(8, np.float32)})


@given(st.text(alphabet='graph "{}%0=input(label)<>:[]f32#,-1.@', max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_ends_in_another_error(text):
    with contextlib.suppress(ModelError):
        parse_graph(text)


def test_attributes_alone():
    assert parse_attributes('{a=1, b=[True,2.5,"x"], c=f16}') == {"a": 1, "b": (True, 2.5, "x"), "c": DType.F16}
    with pytest.raises(ModelError, match="nothing may follow"):
        parse_attributes("{a=1} 2")


def test_sizes_of_every_form() -> None:
    sizes: list[Size] = [n, -n, n * n, 3 - n, (n * 3 + 1) // 2 * 5 - n + 7, ((n + 1) // 2 + n) // 3]
    for size in sizes:
        assert parse_attributes(f"{{s={size}}}")["s"] == size
