"""Conversions between element types, their limits above all."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from cnnc.errors import UnsupportedError
from cnnc.ir.types import DType, TensorType
from cnnc.ops.cast import Cast
from tests.ops.kernels import run_compute
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

RNG = np.random.default_rng(20240503)
EDGES = [0.0, -0.0, 0.5, -0.5, 1.9, -1.9, 127.9, 128.0, -128.9, -129.0, 255.9, 256.0, 2.0**31, -(2.0**31), 2.0**63]
EDGES += [2147483520.0, 9.2e18, -9.3e18, 1e30, -1e30, np.inf, -np.inf, np.nan]


def truncated(x: float, dtype: DType) -> int:
    """The definition in Python's unbounded integers."""
    info = np.iinfo(dtype.numpy)
    if np.isnan(x):
        return 0
    if np.isinf(x):
        return int(info.max if x > 0 else info.min)
    return min(max(int(x), int(info.min)), int(info.max))


@pytest.mark.parametrize("source", [DType.F32, DType.F64, DType.F16])
@pytest.mark.parametrize("target", [DType.I8, DType.U8, DType.I32, DType.I64])
def test_floats_truncate_and_saturate(source: DType, target: DType) -> None:
    with np.errstate(over="ignore"):
        x = np.array([*EDGES, *RNG.uniform(-300, 300, 50)]).astype(source.numpy)
    want = np.array([truncated(float(value), target) for value in x], target.numpy)
    np.testing.assert_array_equal(Cast(target).reference(x), want)
    np.testing.assert_array_equal(run_compute(Cast(target), [TensorType(x.shape, source)], [x])[0], want)


@pytest.mark.parametrize("source", [DType.F32, DType.I64, DType.U8])
def test_bool_is_whether_not_zero(source: DType) -> None:
    x = np.array([0, 1, 2, 0]).astype(source.numpy)
    if source.is_float:
        x = np.array([0, -0.0, 1e-45, np.nan, np.inf, -3], np.float32)
    want = [value != 0 for value in x.tolist()]
    np.testing.assert_array_equal(Cast(DType.BOOL).reference(x), want)
    np.testing.assert_array_equal(run_compute(Cast(DType.BOOL), [TensorType(x.shape, source)], [x])[0], want)


def test_integers_keep_their_low_bits() -> None:
    x = np.array([300, -1, 2**40 + 5, -(2**63)], np.int64)
    for target, want in ((DType.U8, [44, 255, 5, 0]), (DType.I8, [44, -1, 5, 0]), (DType.I32, [300, -1, 5, 0])):
        np.testing.assert_array_equal(Cast(target).reference(x), want)
        np.testing.assert_array_equal(run_compute(Cast(target), [TensorType((4,), DType.I64)], [x])[0], want)


@pytest.mark.parametrize("target", [DType.F16, DType.BF16])
def test_halves_round_to_even(target: DType) -> None:
    x = np.concatenate([RNG.uniform(-9, 9, 500), RNG.normal(0, 1e4, 500), [65504, 65519, 65520, 1e6, 6e-8, 2e-8]])
    single = x.astype(np.float32)
    with np.errstate(over="ignore"):
        want = single.astype(target.numpy)
    got = Cast(target).reference(single)
    assert got.dtype == target.numpy
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    np.testing.assert_array_equal(Cast(DType.F32).reference(want), want.astype(np.float32))


def test_bf16_rounds_as_its_definition_says() -> None:
    # bf16 is the upper half of f32; 1 + 2^-8 lies halfway between two of them and goes to the even one.
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8], np.float32)
    np.testing.assert_array_equal(Cast(DType.BF16).reference(x), np.array([1, 1 + 2.0**-6], ml_dtypes.bfloat16))


@pytest.mark.parametrize("target", [np.float64, np.float16, np.int32, np.int64, np.bool_, np.uint8])
def test_onnx_cast(target: type) -> None:
    x = RNG.uniform(0, 100, (3, 4)).astype(np.float32)
    number = {np.float64: 11, np.float16: 10, np.int32: 6, np.int64: 7, np.bool_: 9, np.uint8: 2}[target]
    assert_agrees("Cast", [x], to=number)
    assert_agrees("CastLike", [x, np.zeros(1, target)])


def test_onnx_cast_to_what_there_is_not() -> None:
    for number in (17, 8, 12):
        with pytest.raises(UnsupportedError, match=f"element type {number} of ONNX"):
            imported(one_node("Cast", [np.zeros(3, np.float32)], to=number))
