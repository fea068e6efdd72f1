"""The interpreter: names, precision, run-time sizes, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import UsageError, VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate, evaluate_all, run
from cnnc.ir.op import OPERATORS, Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops import Add, Cast, Div, Exp, Fused, Mul, Parameter, Relu, Split, constant, graph_input


def test_by_name(rng):
    x, z = graph_input("x", (2, 3)), graph_input("z", (3,))
    graph = Graph("g", (x, z), (call(Add(), x, z), x), ("sum", "same"))
    a, b = rng.standard_normal((2, 3)).astype(np.float32), rng.standard_normal(3).astype(np.float32)
    outputs = evaluate(graph, {"z": b, "x": a})
    np.testing.assert_array_equal(outputs["sum"], a + b)
    np.testing.assert_array_equal(outputs["same"], a)


def test_precision():
    x = graph_input("x", (1,))
    graph = Graph("g", (x,), (call(Div(), x, constant(3.0)),))
    (single,), (double,) = (run(graph, [np.float32([1])], precise=p) for p in (False, True))
    assert single.dtype == np.float32
    assert double.dtype == np.float64
    assert double[0] == 1 / 3
    assert single[0] == np.float32(1) / np.float32(3)


def test_precise_runs_leave_integers_alone():
    x = graph_input("x", (2,), DType.I32)
    graph = Graph("g", (x,), (call(Add(), x, x), call(Cast(DType.F16), x)))
    whole, half = run(graph, [np.int32([3, -4])], precise=True)
    assert whole.dtype == np.int32
    assert half.dtype == np.float64


def test_several_outputs_and_kernels(rng):
    x = graph_input("x", (4, 2))
    inside = graph_input("x0", (4, 2))
    body = Graph("split", (inside,), call(Split(0, (1, 3)), inside).node.values)
    parts = call(Fused(body, "split"), x).node.values
    a = rng.standard_normal((4, 2)).astype(np.float32)
    first, second = run(Graph("g", (x,), parts), [a])
    np.testing.assert_array_equal(np.concatenate([first, second]), a)


def test_precise_runs_are_precise_inside_kernels():
    x, inside = graph_input("x", (1,)), graph_input("x0", (1,))
    third = call(Div(), inside, constant(3.0))
    kernel = Fused(Graph("div", (inside,), (call(Mul(), third, third),)), "div")
    (y,) = run(Graph("g", (x,), (call(kernel, x),)), [np.float32([1])], precise=True)
    assert y[0] == (1 / 3) * (1 / 3)
    (y,) = run(Graph("g", (x,), (call(kernel, x),)), [np.float32([1])])
    assert y.dtype == np.float32


def test_every_value():
    x = graph_input("x", (2,))
    y = call(Relu(), x)
    graph = Graph("g", (x,), (call(Exp(), call(Mul(), y, y)),))
    values = evaluate_all(graph, [np.float32([-1, 2])])
    assert len(values) == 4
    np.testing.assert_array_equal(values[y], [0, 2])


def test_run_time_sizes():
    n = Dim.symbol("n", 3)
    x = graph_input("x", (n, 2))
    graph = Graph("g", (x,), (call(Relu(), x),))
    for size in (0, 2, 3):
        assert run(graph, [np.zeros((size, 2), np.float32)])[0].shape == (size, 2)
    with pytest.raises(UsageError, match=r"input x is f32\[\{n<=3\},2\], the array given is \[4,2\]"):
        run(graph, [np.zeros((4, 2), np.float32)])


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 1), ()])
def test_arrays_of_another_shape(shape):
    x = graph_input("x", (2, 3))
    with pytest.raises(UsageError, match="input x is"):
        run(Graph("g", (x,), (x,)), [np.zeros(shape, np.float32)])


def test_names_that_are_missing_or_unknown():
    x = graph_input("x", (2,))
    graph = Graph("g", (x,), (x,))
    with pytest.raises(UsageError, match=r"takes inputs \['x'\]; missing \['x'\], unknown \['y'\]"):
        evaluate(graph, {"y": np.zeros(2, np.float32)})


def test_parameters_without_numbers():
    w = call(Parameter("fc.weight", TensorType((2,))))
    with pytest.raises(UsageError, match=r"parameter fc.weight has no numbers yet"):
        run(Graph("g", (), (call(Relu(), w),)), [])


@pytest.fixture
def liar():
    class Liar(Op):
        """y = half of what infer promises."""

        def infer(self, x: TensorType) -> TensorType:
            return x

        def reference(self, x: np.ndarray) -> np.ndarray:
            return x[:1]

    yield Liar()
    del OPERATORS["liar"]


def test_a_reference_that_contradicts_inference(liar):
    x = graph_input("x", (2,))
    with pytest.raises(VerifyError, match=r"liar: reference gives \[1\], inference says f32\[2\]"):
        run(Graph("g", (x,), (call(liar, x),)), [np.zeros(2, np.float32)])
