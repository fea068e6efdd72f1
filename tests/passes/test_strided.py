"""strided_views: every view holds the elements of the value, wherever it is cut out of."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import evaluate_all
from cnnc.ir.layout import Layout
from cnnc.ops import LayoutTransform, Relu, Reshape, Slice, Split, Transpose, graph_input
from cnnc.passes.strided import Strided, strided_views


def elements(view: Strided, source: np.ndarray) -> np.ndarray:
    """Read a view."""
    index = np.full(view.shape, view.offset)
    for axis, stride in enumerate(view.strides):
        extent = view.shape[axis]
        index += stride * np.arange(extent).reshape(-1, *(1,) * (len(view.shape) - axis - 1))
    return source.reshape(-1)[index]


@st.composite
def moved(draw: st.DrawFn) -> Value:
    """Draw moves of an input."""
    v = graph_input("x", (2, 3, 4, 6))
    for _ in range(draw(st.integers(0, 5))):
        shape = v.type.static_shape
        match draw(st.sampled_from(("transpose", "slice", "split", "reshape"))):
            case "transpose":
                v = call(Transpose(tuple(draw(st.permutations(range(len(shape)))))), v)
            case "slice":
                spans = [(draw(st.integers(0, n - 1)), draw(st.integers(1, 2))) for n in shape]
                sizes = tuple(-(-(n - start) // step) for n, (start, step) in zip(shape, spans, strict=True))
                v = call(Slice(tuple(a for a, _ in spans), sizes, tuple(b for _, b in spans)), v)
            case "split" if shape[0] > 1:
                v = draw(st.sampled_from(call(Split(0, (1, shape[0] - 1)), v).node.values))
            case "reshape":
                count = math.prod(shape)
                shapes = [(count,), (*shape, 1), *([(2, count // 2)] if count % 2 == 0 else [])]
                v = call(Reshape(draw(st.sampled_from(shapes))), v)
    return v


@given(moved())
def test_views_hold_the_value(v: Value) -> None:
    (x,) = (u for node in Graph("g", (), (v,)).nodes if node.op.name == "input" for u in node.values)
    graph = Graph("g", (x,), (v,))
    array = np.arange(x.type.elements, dtype=np.float32).reshape(x.type.static_shape)
    values = evaluate_all(graph, [array])
    views = list(strided_views(v, v.type.static_shape))
    assert views[0].source == v
    for view in views:
        np.testing.assert_array_equal(elements(view, values[view.source]), values[v])


def test_it_ends_at_arithmetic_and_at_moves_of_data() -> None:
    x = graph_input("x", (4, 6))
    y = call(Transpose((1, 0)), call(Relu(), x))
    assert [view.source.op.name for view in strided_views(y, (6, 4))] == ["transpose", "relu"]
    merged = call(Reshape((24,)), y)
    assert [view.source.op.name for view in strided_views(merged, (24,))] == ["reshape", "transpose"]
    backwards = call(Slice((3, 0), (4, 6), (-1, 1)), x)
    assert [view.source.op.name for view in strided_views(backwards, (4, 6))] == ["slice"]


@pytest.mark.parametrize("axis", [0, 3])
def test_parts_of_a_split(axis: int) -> None:
    x = graph_input("x", (3, 2, 2, 5))
    sizes = (1, 2) if axis == 0 else (2, 3)
    part = call(Split(axis, sizes), x).node.values[1]
    view = list(strided_views(part, part.type.static_shape))[-1]
    assert view.source == x
    assert view.offset == (20 if axis == 0 else 2)


def test_blocked_values_are_not_looked_into() -> None:
    x = call(LayoutTransform(Layout("NCHW4c")), graph_input("x", (1, 8, 2, 2)))
    assert list(strided_views(x, (1, 8, 2, 2))) == []
