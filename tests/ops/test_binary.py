"""Arithmetic, comparisons and `where`: broadcasting, layouts, integers, ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.op import Op
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops import binary, compare
from cnnc.ops.broadcast import broadcast_layouts, broadcast_shapes
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

RNG = np.random.default_rng(20240502)
BLOCKED = Layout("NCHW8c")


@pytest.mark.parametrize("shapes", [((2, 1, 3), (4, 1)), ((), (3,)), ((0, 1), (1, 5)), ((1,), (1, 1)), ((7,),)])
def test_shapes_broadcast_as_in_numpy(shapes: tuple[tuple[int, ...], ...]) -> None:
    assert broadcast_shapes("f", *shapes) == np.broadcast_shapes(*shapes)


def test_run_time_sizes_broadcast_with_themselves_and_one() -> None:
    n = Dim.symbol("n", 8)
    assert broadcast_shapes("f", (n, 3), (1, 3), (n, 1)) == (n, 3)
    with pytest.raises(ShapeError, match=r"add: shapes \[\{n<=8\}\] and \[8\] do not broadcast: axis -1"):
        broadcast_shapes("add", (n,), (8,))


def test_shapes_that_do_not_broadcast() -> None:
    with pytest.raises(ShapeError, match=r"add: shapes \[2,3\] and \[2\] do not broadcast"):
        infer_types(binary.Add(), (TensorType((2, 3)), TensorType((2,))))


def test_layouts_that_join() -> None:
    x = TensorType((2, 5, 3, 3), DType.F32, BLOCKED)
    for other in ((1, 1, 1, 1), (), (3, 3), (2, 1, 3, 3), (1, 1, 1)):
        assert broadcast_layouts("add", x, TensorType(other)) == BLOCKED
    assert broadcast_layouts("add", x, TensorType((1, 5, 1, 1), DType.F32, BLOCKED)) == BLOCKED


@pytest.mark.parametrize(
    "other",
    [
        TensorType((5, 1, 1)),
        TensorType((2, 5, 3, 3)),
        TensorType((2, 5, 3, 3), DType.F32, Layout("NCHW4c")),
        TensorType((1, 1, 1, 1, 1)),
    ],
    ids=str,
)
def test_layouts_that_do_not_join(other: TensorType) -> None:
    with pytest.raises(ShapeError, match="do not share one layout"):
        infer_types(binary.Add(), (TensorType((2, 5, 3, 3), DType.F32, BLOCKED), other))


def test_blocked_operands_with_one_channel() -> None:
    x = TensorType((2, 5, 3, 3), DType.F32, BLOCKED)
    one = TensorType((2, 1, 3, 3), DType.F32, BLOCKED)
    a, b = (RNG.uniform(-1, 1, t.static_shape).astype(np.float32) for t in (x, one))
    np.testing.assert_allclose(run_compute(binary.Add(), [x, one], [a, b])[0], a + b, rtol=1e-6)


def test_dtypes_must_agree() -> None:
    with pytest.raises(ShapeError, match=r"add: inputs .* have different element types; cast one"):
        infer_types(binary.Add(), (TensorType((2,)), TensorType((2,), DType.I32)))
    with pytest.raises(ShapeError, match="where: the condition is bool, not x : f32"):
        infer_types(compare.Where(), (TensorType((2,)), TensorType((2,)), TensorType((2,))))
    with pytest.raises(ShapeError, match="takes another number of inputs"):
        infer_types(binary.Add(), (TensorType((2,)),))


def quotient(a: int, b: int, low: int) -> int:
    """Divide as C does, 0 for 0, wrapping."""
    if b == 0:
        return 0
    exact = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
    return low if exact == -low else exact


@pytest.mark.parametrize("dtype", [DType.I8, DType.I32, DType.I64, DType.U8])
def test_integer_division(dtype: DType) -> None:
    info = np.iinfo(dtype.numpy)
    edges = [0, 1, 2, 3, 7, int(info.min), int(info.min) + 1, int(info.max)] + ([] if info.min == 0 else [-1, -2, -7])
    a, b = (m.ravel().astype(dtype.numpy) for m in np.meshgrid(edges, edges))
    want = [quotient(int(x), int(y), int(info.min) or 2**62) for x, y in zip(a, b, strict=True)]
    types = [TensorType(a.shape, dtype)] * 2
    np.testing.assert_array_equal(binary.Div().reference(a, b), np.array(want, dtype.numpy))
    np.testing.assert_array_equal(run_compute(binary.Div(), types, [a, b])[0], np.array(want, dtype.numpy))
    for fmod in (False, True):
        rests = []
        for x, y in zip(a.tolist(), b.tolist(), strict=True):
            floored = 0 if y == 0 else x % y
            rests.append((0 if y == 0 else x - y * quotient(x, y, 2**65)) if fmod else floored)
        want_mod = np.array(rests, dtype.numpy)
        np.testing.assert_array_equal(binary.Mod(fmod).reference(a, b), want_mod)
        np.testing.assert_array_equal(run_compute(binary.Mod(fmod), types, [a, b])[0], want_mod)


@pytest.mark.parametrize("op", [binary.Maximum(), binary.Minimum()], ids=str)
def test_extremes_keep_nan(op: Op) -> None:
    a = np.array([1, np.nan, 2, np.nan, -np.inf], np.float32)
    b = np.array([3, 1, np.nan, np.nan, np.inf], np.float32)
    want = op.reference(a, b)
    assert np.isnan(want).tolist() == [False, True, True, True, False]
    np.testing.assert_array_equal(run_compute(op, [TensorType((5,))] * 2, [a, b])[0], want)


@pytest.mark.parametrize("op", [compare.Equal(), compare.Less(), compare.LessEqual(), compare.Greater()], ids=str)
def test_comparisons_with_nan_are_false(op: Op) -> None:
    a = np.array([np.nan, 1, np.nan, 2], np.float32)
    b = np.array([1, np.nan, np.nan, 2], np.float32)
    want = op.reference(a, b)
    assert not want[:3].any()
    np.testing.assert_array_equal(run_compute(op, [TensorType((4,))] * 2, [a, b])[0], want)


def test_where_does_not_mix_in_the_other_branch() -> None:
    cond = np.array([True, False])
    a, b = np.array([1, np.nan], np.float32), np.array([np.nan, 2], np.float32)
    types = [TensorType((2,), DType.BOOL), TensorType((2,)), TensorType((2,))]
    np.testing.assert_array_equal(run_compute(compare.Where(), types, [cond, a, b])[0], [1, 2])


@pytest.mark.parametrize(
    "op_type", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Equal", "Less", "GreaterOrEqual", "Pow"]
)
def test_onnx_arithmetic(op_type: str) -> None:
    a = RNG.uniform(0.5, 4, (2, 1, 4)).astype(np.float32)
    b = RNG.uniform(-2, 2, (3, 1)).astype(np.float32)
    assert_agrees(op_type, [a, b])


@pytest.mark.parametrize("op_type", ["Div", "Mod", "Add", "Mul"])
def test_onnx_integers(op_type: str) -> None:
    a, b = RNG.integers(-50, 50, 300), RNG.integers(1, 9, 300) * RNG.choice([-1, 1], 300)
    assert_agrees(op_type, [a, b])
    assert_agrees(op_type, [a.astype(np.int32), b.astype(np.int32)])


def test_onnx_fmod() -> None:
    a, b = RNG.uniform(-9, 9, 50).astype(np.float32), RNG.uniform(0.5, 3, 50).astype(np.float32)
    assert_agrees("Mod", [a, b], fmod=1)
    with pytest.raises(ModelError, match="floats need fmod=1"):
        imported(one_node("Mod", [a, b]))


@pytest.mark.parametrize(
    ("base", "exponent"),
    [("f4", "i8"), ("f4", "i4"), ("f4", "f4"), ("i4", "i4"), ("i8", "i8"), ("i4", "f4"), ("i8", "f4")],
)
def test_onnx_pow_of_mixed_types(base: str, exponent: str) -> None:
    a = RNG.integers(1, 7, 40).astype(base)
    b = RNG.integers(0, 5, 40).astype(exponent)
    assert_agrees("Pow", [a, b])
    assert_agrees("Pow", [a, np.array(2, exponent)], constants=[1])


@pytest.mark.parametrize("op_type", ["Sum", "Mean", "Max", "Min"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_onnx_variadic(op_type: str, count: int) -> None:
    arrays = [RNG.uniform(-2, 2, shape).astype(np.float32) for shape in [(2, 3), (3,), (2, 1), ()][:count]]
    assert_agrees(op_type, arrays)


@pytest.mark.parametrize("op_type", ["Div", "Mod"])
def test_onnx_division_by_the_constant_zero(op_type: str) -> None:
    model = one_node(op_type, [np.arange(3), np.array([1, 0, 2])], constants=[1])
    with pytest.raises(ModelError, match=r"divide.* by the constant 0"):
        imported(model)


def test_onnx_prelu_broadcasts_one_way() -> None:
    x = RNG.uniform(-2, 2, (2, 3, 4)).astype(np.float32)
    assert_agrees("PRelu", [x, RNG.uniform(0, 1, (3, 1)).astype(np.float32)])
    with pytest.raises(ModelError, match="only one way"):
        imported(one_node("PRelu", [x[:1], x]))


@pytest.mark.parametrize("op_type", ["And", "Or", "Xor", "Equal"])
def test_logic(op_type: str) -> None:
    a, b = RNG.random((4, 5)) < 0.5, RNG.random(5) < 0.5
    assert_agrees(op_type, [a, b])


def test_onnx_where() -> None:
    cond = RNG.random((3, 1)) < 0.5
    for dtype in (np.float32, np.int64):
        assert_agrees("Where", [cond, RNG.integers(0, 9, 4).astype(dtype), RNG.integers(0, 9, (2, 3, 4)).astype(dtype)])


def numpy_shift(a: int, b: int, direction: str, bits: int) -> int:
    """Shift in unbounded integers, then cut to i8 or u8."""
    if direction == "left":
        shifted = a << b if 0 <= b < bits else 0
    else:
        shifted = a >> (b if 0 <= b < bits else 99)
    return shifted % 2**bits


@pytest.mark.parametrize("direction", ["left", "right"])
@pytest.mark.parametrize("dtype", [DType.U8, DType.I8])
def test_shifts(direction: str, dtype: DType) -> None:
    a, b = (RNG.integers(np.iinfo(dtype.numpy).min, 128, 400).astype(dtype.numpy) for _ in range(2))
    b[:300] = np.abs(b[:300]) % 10
    want = [numpy_shift(int(x), int(y), direction, 8) for x, y in zip(a, b, strict=True)]
    op = binary.BitShift(direction)
    np.testing.assert_array_equal(op.reference(a, b).view(np.uint8), want)
    np.testing.assert_array_equal(run_compute(op, [TensorType((400,), dtype)] * 2, [a, b])[0].view(np.uint8), want)


def test_16_bit_integers_are_refused_not_mangled() -> None:
    a: Any = np.arange(3, dtype=np.int16)
    with pytest.raises(UnsupportedError, match="INT16"):
        imported(one_node("Add", [a, a]))
