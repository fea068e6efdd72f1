"""Elementwise operators of one input against PyTorch and ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cnnc.errors import ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.op import Op
from cnnc.ir.types import DType, TensorType
from cnnc.ops import unary
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

torch = pytest.importorskip("torch")
functional = torch.nn.functional

RNG = np.random.default_rng(20240501)

TORCH: list[tuple[Op, Callable[[torch.Tensor], torch.Tensor], float, float]] = [
    (unary.Relu(), torch.relu, -5, 5),
    (unary.Clip(-1.5, 2), lambda x: torch.clamp(x, -1.5, 2), -5, 5),
    (unary.LeakyRelu(0.2), lambda x: functional.leaky_relu(x, 0.2), -5, 5),
    (unary.ThresholdedRelu(0.7), lambda x: functional.threshold(x, 0.7, 0.0), -5, 5),
    (unary.Elu(1.3), lambda x: functional.elu(x, 1.3), -5, 5),
    (unary.Selu(), functional.selu, -5, 5),
    (unary.Celu(0.6), lambda x: functional.celu(x, 0.6), -5, 5),
    (unary.Sigmoid(), torch.sigmoid, -30, 30),
    (unary.HardSigmoid(1 / 6), functional.hardsigmoid, -5, 5),
    (unary.HardSwish(), functional.hardswish, -5, 5),
    (unary.Silu(), functional.silu, -30, 30),
    (unary.Gelu(), functional.gelu, -6, 6),
    (unary.Gelu("tanh"), lambda x: functional.gelu(x, approximate="tanh"), -6, 6),
    (unary.Mish(), functional.mish, -40, 40),
    (unary.Softplus(), functional.softplus, -15, 15),
    (unary.Softsign(), functional.softsign, -5, 5),
    (unary.Shrink(0.5, 0.5), lambda x: functional.softshrink(x, 0.5), -2, 2),
    (unary.Shrink(0.5), lambda x: functional.hardshrink(x, 0.5), -2, 2),
    (unary.Neg(), torch.neg, -5, 5),
    (unary.Abs(), torch.abs, -5, 5),
    (unary.Sign(), torch.sign, -5, 5),
    (unary.Floor(), torch.floor, -5, 5),
    (unary.Ceil(), torch.ceil, -5, 5),
    (unary.Round(), torch.round, -5, 5),
    (unary.Reciprocal(), torch.reciprocal, 0.1, 5),
    (unary.Sqrt(), torch.sqrt, 0, 5),
    (unary.Rsqrt(), torch.rsqrt, 0.1, 5),
    (unary.Exp(), torch.exp, -20, 20),
    (unary.Log(), torch.log, 1e-3, 50),
    (unary.Erf(), torch.erf, -4, 4),
    (unary.Sin(), torch.sin, -10, 10),
    (unary.Cos(), torch.cos, -10, 10),
    (unary.Tan(), torch.tan, -1.5, 1.5),
    (unary.Asin(), torch.asin, -1, 1),
    (unary.Acos(), torch.acos, -1, 1),
    (unary.Atan(), torch.atan, -9, 9),
    (unary.Sinh(), torch.sinh, -5, 5),
    (unary.Cosh(), torch.cosh, -5, 5),
    (unary.Tanh(), torch.tanh, -9, 9),
    (unary.Asinh(), torch.asinh, -9, 9),
    (unary.Acosh(), torch.acosh, 1, 9),
    (unary.Atanh(), torch.atanh, -0.99, 0.99),
]


@pytest.mark.parametrize(("op", "theirs", "low", "high"), TORCH, ids=[str(op) for op, *_ in TORCH])
def test_equals_pytorch(op: Op, theirs: Callable[[torch.Tensor], torch.Tensor], low: float, high: float) -> None:
    x = RNG.uniform(low, high, 1000)
    want = theirs(torch.from_numpy(x)).numpy()
    scale = np.abs(want).max()
    np.testing.assert_allclose(op.reference(x), want, rtol=1e-12, atol=1e-14 * scale)
    single = x.astype(np.float32)
    want = theirs(torch.from_numpy(single)).numpy()
    np.testing.assert_allclose(op.reference(single), want, rtol=3e-6, atol=3e-7 * scale)
    (compiled,) = run_compute(op, [TensorType((1000,))], [single])
    np.testing.assert_allclose(compiled, want, rtol=5e-6, atol=1e-6 * scale)


@pytest.mark.parametrize(
    "op",
    [
        unary.Relu(),
        unary.Clip(-1, 1),
        unary.HardSigmoid(),
        unary.Sign(),
        unary.IsNan(),
        unary.IsInf(),
        unary.Softplus(),
    ],
    ids=str,
)
def test_special_values_survive_compilation(op: Op) -> None:
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3.4e38], np.float32)
    with np.errstate(all="ignore"):
        want = op.reference(x)
    (compiled,) = run_compute(op, [TensorType(x.shape)], [x])
    np.testing.assert_array_equal(compiled, want)
    if not isinstance(op, unary.IsNan | unary.IsInf):
        assert np.isnan(want[0])


def test_halves_are_rounded_once() -> None:
    x = RNG.uniform(-4, 4, 4096).astype(np.float16)
    want = torch.from_numpy(x.astype(np.float32)).sigmoid().numpy().astype(np.float16)
    got = unary.Sigmoid().reference(x)
    assert got.dtype == np.float16
    ulps = np.abs(got.view(np.int16).astype(int) - want.view(np.int16).astype(int))
    assert ulps.max() <= 1


def test_smallest_integer_has_no_absolute_value() -> None:
    x = np.array([-128, -1, 127], np.int8)
    (compiled,) = run_compute(unary.Abs(), [TensorType((3,), DType.I8)], [x])
    np.testing.assert_array_equal(compiled, [-128, 1, 127])
    np.testing.assert_array_equal(unary.Abs().reference(x), [-128, 1, 127])


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("Relu", {}),
        ("LeakyRelu", {"alpha": 0.3}),
        ("LeakyRelu", {}),
        ("ThresholdedRelu", {}),
        ("Elu", {"alpha": 0.4}),
        ("Selu", {}),
        ("Selu", {"alpha": 1.1, "gamma": 2.0}),
        ("Celu", {"alpha": 2.0}),
        ("HardSigmoid", {}),
        ("HardSwish", {}),
        ("Gelu", {}),
        ("Gelu", {"approximate": "tanh"}),
        ("Mish", {}),
        ("Softplus", {}),
        ("Softsign", {}),
        ("Shrink", {"bias": 0.5, "lambd": 0.8}),
        ("Erf", {}),
        ("Round", {}),
        ("Reciprocal", {}),
        ("IsNaN", {}),
        ("IsInf", {"detect_negative": 0}),
    ],
)
def test_onnx_reader(op_type: str, attributes: dict[str, Any]) -> None:
    x = RNG.uniform(-4, 4, (2, 3, 5)).astype(np.float32)
    x[0, 0, 0] = np.inf if op_type == "IsInf" else x[0, 0, 0]
    assert_agrees(op_type, [x], **attributes)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (None, 0.5), (0.5, None), (2.0, 1.0)])
def test_clip_by_inputs(low: float | None, high: float | None) -> None:
    x = RNG.uniform(-4, 4, (3, 5)).astype(np.float32)
    bounds = [None if b is None else np.array(b, np.float32) for b in (low, high)]
    present = [i + 1 for i, b in enumerate(bounds) if b is not None]
    assert_agrees("Clip", [x, *bounds], opset=13, constants=present)
    assert_agrees("Clip", [x, *bounds], opset=13)


def test_clip_by_attributes() -> None:
    x = RNG.uniform(-4, 4, (3, 5)).astype(np.float32)
    assert_agrees("Clip", [x], opset=10, min=-0.5, max=2.0)
    assert_agrees("Clip", [x], opset=10, max=2.0)


def test_clip_of_integers() -> None:
    x = RNG.integers(-9, 9, 40)
    assert_agrees("Clip", [x, np.array(-2), np.array(4)], opset=13, constants=[1, 2])


def test_clip_folds_constant_bounds_into_the_operator() -> None:
    x = np.zeros(3, np.float32)
    model = one_node("Clip", [x, np.array(0, np.float32), np.array(6, np.float32)], opset=13, constants=[1, 2])
    assert imported(model).outputs[0].op == unary.Clip(0.0, 6.0)


def test_errors_name_operator_and_type() -> None:
    with pytest.raises(ShapeError, match=r"^sigmoid: takes elements of f32, f16, bf16, f64, not x : i32\[3\]$"):
        infer_types(unary.Sigmoid(), (TensorType((3,), DType.I32),))
    with pytest.raises(ShapeError, match=r"not: takes elements of bool, not x : f32\[3\]"):
        infer_types(unary.Not(), (TensorType((3,)),))
    with pytest.raises(ShapeError, match="clip: bound 300 is no number of x : u8"):
        infer_types(unary.Clip(0, 300), (TensorType((3,), DType.U8),))
    with pytest.raises(ShapeError, match="clip: bound nan"):
        infer_types(unary.Clip(math.nan), (TensorType((3,)),))
    with pytest.raises(ShapeError, match="celu: alpha is 0"):
        infer_types(unary.Celu(0.0), (TensorType((3,)),))
    with pytest.raises(ShapeError, match="gelu: approximate"):
        infer_types(unary.Gelu("fast"), (TensorType((3,)),))


def test_pad_lanes_stay_zero() -> None:
    type_ = TensorType((1, 5, 2, 2), DType.F32, Layout("NCHW8c"))
    x = RNG.uniform(-1, 1, type_.shape).astype(np.float32)
    # `run_compute` checks the lanes; e^0 is not 0, so they must be masked.
    (y,) = run_compute(unary.Exp(), [type_], [x])
    np.testing.assert_allclose(y, np.exp(x), rtol=1e-6)
    assert infer_types(unary.Exp(), (type_,)) == (type_,)
