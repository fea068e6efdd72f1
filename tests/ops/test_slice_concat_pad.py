"""Slices, concatenation, splitting and padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.concat import Concat, Split
from cnnc.ops.pad import Pad
from cnnc.ops.slice import Slice, slice_axes
from cnnc.ops.source import graph_input
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(20240506)
BLOCKED = Layout("NCHW4c")
BIG = 2**63 - 1


@pytest.mark.parametrize("seed", range(15))
def test_random_slices_equal_python(seed: int) -> None:
    rng = np.random.default_rng([20240506, seed])
    shape = tuple(rng.integers(1, 8, 3).tolist())
    x = rng.random(shape).astype(np.float32)
    starts, ends = rng.integers(-10, 11, 3).tolist(), rng.integers(-10, 11, 3).tolist()
    steps = rng.choice([-3, -2, -1, 1, 2, 3], 3).tolist()
    want = x[tuple(slice(s, e, p) for s, e, p in zip(starts, ends, steps, strict=True))]
    y = slice_axes(graph_input("x", shape), starts, ends, None, steps)
    if y.inputs:
        np.testing.assert_array_equal(y.op.reference(x), want)
        np.testing.assert_array_equal(run_compute(y.op, [TensorType(shape)], [x])[0], want)
    assert y.shape == want.shape


def test_slice_extremes() -> None:
    x = graph_input("x", (5, 6))
    assert slice_axes(x, [1], [BIG], [1], None).op == Slice((0, 1), (5, 5), (1, 1))
    assert slice_axes(x, [BIG], [-BIG - 1], [-1], [-1]).op == Slice((0, 5), (5, 6), (1, -1))
    assert slice_axes(x, [3], [1], [0], None).shape == (0, 6)
    assert slice_axes(x, [0], [BIG], [0], None) is x


def test_slice_of_a_run_time_axis() -> None:
    x = graph_input("x", (Dim.symbol("n", 4), 6))
    assert slice_axes(x, [0, 2], [BIG, 4], None, None).shape == (x.shape[0], 2)
    with pytest.raises(ShapeError, match=r"axis 0 of x .* has a run-time size; it can only be taken whole, not 1:"):
        slice_axes(x, [1], [BIG], [0], None)


def test_slice_errors() -> None:
    x = graph_input("x", (5, 6))
    with pytest.raises(ShapeError, match="the step of axis 0 is 0"):
        slice_axes(x, [0], [1], [0], [0])
    with pytest.raises(ShapeError, match="name one axis twice"):
        slice_axes(x, [0, 0], [1, 1], [0, -2], None)
    with pytest.raises(ShapeError, match="they must pair up"):
        slice_axes(x, [0, 0], [1], None, None)
    with pytest.raises(ShapeError, match="axis 4 is outside"):
        slice_axes(x, [0], [1], [4], None)
    for op in (Slice((5, 0), (1, 6), (1, 1)), Slice((0, 0), (5, 4), (1, 2)), Slice((0, 1), (5, 3), (1, -1))):
        with pytest.raises(ShapeError, match="leave axis"):
            infer_types(op, (x.type,))


def test_slice_layouts() -> None:
    x = TensorType((1, 10, 4, 4), DType.F32, BLOCKED)
    for start, size in ((0, 8), (4, 4), (8, 2), (4, 6)):
        assert infer_types(Slice((0, start, 0, 1), (1, size, 4, 2), (1, 1, 1, 2)), (x,))[0].layout == BLOCKED
    for start, size, step in ((2, 4, 1), (0, 6, 1), (0, 4, 2)):
        with pytest.raises(ShapeError, match="cut blocks"):
            infer_types(Slice((0, start, 0, 0), (1, size, 4, 4), (1, step, 1, 1)), (x,))


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_concat_of_many(count: int) -> None:
    parts = [RNG.random((2, RNG.integers(0, 4), 3)).astype(np.float32) for _ in range(count)]
    want = np.concatenate(parts, 1)
    types = [TensorType(p.shape) for p in parts]
    np.testing.assert_array_equal(run_compute(Concat(1), types, parts)[0], want)


def test_concat_errors() -> None:
    x = TensorType((2, 3))
    for other in (TensorType((3, 3)), TensorType((2, 3), DType.F16), TensorType((2, 3, 1)), TensorType((2,))):
        with pytest.raises(ShapeError, match=r"concat: input 1 is .* which does not join"):
            infer_types(Concat(1), (x, other))
    with pytest.raises(ShapeError, match="concat: there is nothing to join"):
        infer_types(Concat(0), ())
    with pytest.raises(ShapeError, match="concat: axis 2 is outside"):
        infer_types(Concat(2), (x, x))


def test_concat_and_split_layouts() -> None:
    parts = [TensorType((1, c, 2, 2), DType.F32, BLOCKED) for c in (8, 4, 6)]
    assert infer_types(Concat(1), tuple(parts)) == (TensorType((1, 18, 2, 2), DType.F32, BLOCKED),)
    with pytest.raises(ShapeError, match=r"the channels of f32\[1,6,2,2\] NCHW4c do not fill whole blocks"):
        infer_types(Concat(1), (parts[2], parts[1]))
    with pytest.raises(ShapeError, match="do not share one layout"):
        infer_types(Concat(1), (parts[0], TensorType((1, 4, 2, 2))))
    x = TensorType((1, 10, 2, 2), DType.F32, BLOCKED)
    assert all(t.layout == BLOCKED for t in infer_types(Split(1, (4, 6)), (x,)))
    with pytest.raises(ShapeError, match=r"sizes \[6,4\] cut blocks"):
        infer_types(Split(1, (6, 4)), (x,))


def test_split_errors() -> None:
    with pytest.raises(ShapeError, match=r"split: sizes \[2,2\] do not add up to size 5 of axis 1"):
        infer_types(Split(1, (2, 2)), (TensorType((2, 5)),))
    with pytest.raises(ShapeError, match=r"split: sizes \[6,-1\]"):
        infer_types(Split(1, (6, -1)), (TensorType((2, 5)),))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad_equals_numpy(mode: str) -> None:
    x = RNG.random((2, 3, 5)).astype(np.float32)
    width = [(1, 2), (0, 2), (4, 3)]
    want = np.pad(x, width, mode)  # type: ignore[call-overload]
    op = Pad((1, 0, 4, 2, 2, 3), mode)
    np.testing.assert_array_equal(op.reference(x), want)
    np.testing.assert_array_equal(run_compute(op, [TensorType(x.shape)], [x])[0], want)


@pytest.mark.parametrize("pads", [(1, 0, -1, 2), (-2, -1, 3, 0), (0, -3, 1, -1)])
def test_negative_pads_equal_pytorch(pads: tuple[int, int, int, int]) -> None:
    x = RNG.random((4, 5)).astype(np.float32)
    # PyTorch counts from the last axis: (left, right, top, bottom).
    want = torch.nn.functional.pad(torch.from_numpy(x), (pads[1], pads[3], pads[0], pads[2]), value=0.5).numpy()
    op = Pad(pads, "constant", 0.5)
    np.testing.assert_array_equal(op.reference(x), want)
    np.testing.assert_array_equal(run_compute(op, [TensorType(x.shape)], [x])[0], want)


def test_pad_errors() -> None:
    x = TensorType((3, 4))
    with pytest.raises(ShapeError, match=r"pad: -2 before and -2 after crop more than axis 0 of x"):
        infer_types(Pad((-2, 0, -2, 0)), (x,))
    with pytest.raises(ShapeError, match=r"pad: -4 before and 5 after crop more"):
        infer_types(Pad((-4, 0, 5, 0)), (x,))
    with pytest.raises(ShapeError, match="padded and cropped at once"):
        infer_types(Pad((-1, 0, 1, 0), "reflect"), (x,))
    with pytest.raises(ShapeError, match="mode edge has nothing to repeat"):
        infer_types(Pad((1, 0), "edge"), (TensorType((0,)),))
    with pytest.raises(ShapeError, match="must be 4 numbers"):
        infer_types(Pad((1, 1)), (x,))
    with pytest.raises(ShapeError, match="mode is one of constant, reflect, edge, wrap, not 'mirror'"):
        infer_types(Pad((0, 0, 0, 0), "mirror"), (x,))
    with pytest.raises(ShapeError, match="of the channels needs a plain tensor"):
        infer_types(Pad((0, 1, 0, 0, 0, 0, 0, 0)), (TensorType((1, 3, 2, 2), DType.F32, BLOCKED),))


def test_onnx_slice() -> None:
    x = RNG.random((4, 5, 6)).astype(np.float32)
    exact: dict[str, Any] = {"rtol": 0, "atol": 0}
    assert_agrees("Slice", [x], opset=9, starts=[1, 0], ends=[BIG, -2], axes=[1, 2], **exact)
    lists = [np.array(v) for v in ([-1, 0], [-BIG, BIG], [0, 2], [-2, 3])]
    assert_agrees("Slice", [x, *lists], opset=13, constants=[1, 2, 3, 4], **exact)
    assert_agrees("Slice", [x, *lists[:2]], opset=13, constants=[1, 2], **exact)
    with pytest.raises(ModelError, match="step of axis 0 is 0"):
        imported(one_node("Slice", [x, *lists[:3], np.array([0, 1])], opset=13, constants=[1, 2, 3, 4]))


def test_onnx_concat_and_split() -> None:
    x = RNG.random((4, 6)).astype(np.float32)
    assert_agrees("Concat", [x, x[:, :1], x[:, 2:4]], axis=-1)
    assert_agrees("Split", [x], opset=11, outputs=3, axis=1)
    assert_agrees("Split", [x], opset=11, outputs=2, axis=1, split=[1, 5])
    assert_agrees("Split", [x, np.array([2, 2])], opset=13, outputs=2, constants=[1])
    assert_agrees("Split", [x[:, :5]], opset=18, outputs=3, axis=1, num_outputs=3)
    with pytest.raises(ModelError, match="do not add up to size 4"):
        imported(one_node("Split", [x, np.array([2, 3])], opset=13, outputs=2, constants=[1]))
    with pytest.raises(ModelError, match="does not divide into 4 equal parts"):
        imported(one_node("Split", [x], opset=11, outputs=4, axis=1))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_onnx_pad(mode: str) -> None:
    x = RNG.random((3, 4, 5)).astype(np.float32)
    pads = np.array([0, 1, 2, 0, 2, 1])
    assert_agrees("Pad", [x, pads], opset=19, constants=[1], mode=mode)
    assert_agrees("Pad", [x, pads[[1, 2, 4, 5]], None, np.array([-2, 2])], opset=19, constants=[1, 3], mode=mode)


def test_onnx_pad_values() -> None:
    x = RNG.random((3, 4)).astype(np.float32)
    assert_agrees("Pad", [x], opset=10, pads=[1, 0, 0, 2], value=1.5)
    assert_agrees("Pad", [x, np.array([1, 0, -1, 2]), np.array(-2, np.float32)], opset=13, constants=[1, 2])
    i = RNG.integers(0, 9, (2, 2))
    assert_agrees("Pad", [i, np.array([1, 0, 0, 1]), np.array(7)], opset=13, constants=[1, 2])
    with pytest.raises(ModelError, match="crop more than axis 0"):
        imported(one_node("Pad", [x, np.array([-2, 0, -2, 0])], opset=13, constants=[1]))
