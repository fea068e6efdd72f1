"""What operators are handed as `te`: exact types, NaN as in numpy, and mistakes refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cnnc.backends.cpu.codegen import compile_kernel
from cnnc.backends.load_tvm import load_tvm
from cnnc.errors import UnsupportedError, VerifyError
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.target import Target
from tests.backends.running import aligned, link, poisoned, run

load_tvm()

from tvm import te as tvm_te  # noqa: E402  (after load_tvm, which keeps torch out)

from cnnc.backends.cpu.generic_schedule import schedule_generic  # noqa: E402
from cnnc.backends.lower.expr import TVM_DTYPES, Expr, Tensor  # noqa: E402
from cnnc.backends.lower.vocabulary import Vocabulary  # noqa: E402

TARGET = Target.parse("cpu")
NAN, INF = np.nan, np.inf


def evaluate(tmp_path: Path, describe: Callable[..., Tensor], *arrays: np.ndarray) -> np.ndarray:
    """Compile `describe(te, x...)` and run it."""
    te = Vocabulary()
    inputs = [
        Tensor(tvm_te.placeholder(array.shape, TVM_DTYPES[DType.of(array)], f"x{i}")) for i, array in enumerate(arrays)
    ]
    result = describe(te, *inputs)
    func = tvm_te.create_prim_func([*(x.raw for x in inputs), result.raw])
    kernel = compile_kernel(schedule_generic(func, TARGET.vector_lanes), "kernel", TARGET)
    output = poisoned(result.shape, result.dtype.numpy)
    run(link([kernel], tmp_path), kernel, [*(aligned(array) for array in arrays), output])
    return output


def along_rows(reduce: str, **options: Any) -> Callable[[Vocabulary, Tensor], Tensor]:
    def describe(te: Vocabulary, x: Tensor) -> Tensor:
        rows, columns = x.shape
        k = te.reduce_axis(columns, "k")
        return te.compute((rows,), lambda i: getattr(te, reduce)(x[i, k], [k], **options), "y")

    return describe


def each(function: Callable[..., Expr]) -> Callable[..., Tensor]:
    def describe(te: Vocabulary, *xs: Tensor) -> Tensor:
        return te.compute(xs[0].shape, lambda *i: function(te, *(x[i] for x in xs)), "y")

    return describe


SPECIAL = np.array([[1, NAN, 3], [-INF, -INF, -INF], [NAN, NAN, NAN], [INF, 2, -0.0], [3, 2, NAN]], np.float32)


@pytest.mark.parametrize("name", ["max", "min"])
def test_extremes_keep_nan(name: str, tmp_path: Path) -> None:
    y = evaluate(tmp_path, along_rows(name), SPECIAL)
    np.testing.assert_array_equal(y, getattr(SPECIAL, name)(axis=1))


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_the_extreme_of_two_keeps_nan(name: str, tmp_path: Path) -> None:
    a, b = (g.reshape(-1) for g in np.meshgrid(np.array([1, 2, NAN, INF, -INF], np.float32), SPECIAL))
    y = evaluate(tmp_path, each(lambda te, x, y: getattr(te, name)(x, y)), a.copy(), b.copy())
    np.testing.assert_array_equal(y, getattr(np, name)(a, b))


@pytest.mark.parametrize("first", [True, False])
def test_the_extreme_of_a_number_keeps_nan(first: bool, tmp_path: Path) -> None:
    x = SPECIAL.reshape(-1).copy()
    y = evaluate(tmp_path, each(lambda te, v: te.maximum(0.5, v) if first else te.maximum(v, 0.5)), x)
    np.testing.assert_array_equal(y, np.maximum(x, 0.5))


@pytest.mark.parametrize("name", ["argmax", "argmin"])
def test_positions_of_extremes(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    x = rng.choice(np.array([1, 2, 3, NAN, INF, -INF], np.float32), (200, 6))
    y = evaluate(tmp_path, along_rows(name), x)
    assert y.dtype == np.int64
    np.testing.assert_array_equal(y, getattr(np, name)(x, axis=1))
    last = evaluate(tmp_path, along_rows(name, select_last=True), x)
    np.testing.assert_array_equal(last, 5 - getattr(np, name)(x[:, ::-1], axis=1))


def test_sums_of_halves_run_in_f32(tmp_path: Path) -> None:
    x = np.full((3, 5000), 1.0, np.float16)
    np.testing.assert_array_equal(evaluate(tmp_path, along_rows("sum"), x), np.full(3, 5000, np.float16))
    b = np.full((3, 5000), 1.0, ml_dtypes.bfloat16)
    y = evaluate(tmp_path, along_rows("sum"), b)
    np.testing.assert_array_equal(y, np.full(3, 5000).astype(ml_dtypes.bfloat16))


def test_integer_sums_wrap_as_the_type_does(tmp_path: Path) -> None:
    x = np.random.default_rng(2).integers(-(2**62), 2**62, (4, 64))
    np.testing.assert_array_equal(evaluate(tmp_path, along_rows("sum"), x), x.sum(axis=1))


def test_reductions_of_nothing_are_the_identity(tmp_path: Path) -> None:
    def empty(reduce: str) -> Callable[[Vocabulary, Tensor], Tensor]:
        def describe(te: Vocabulary, x: Tensor) -> Tensor:
            k = te.reduce_axis(0, "k")
            return te.compute(x.shape, lambda i: getattr(te, reduce)(x[i], [k]), "y")

        return describe

    x = np.ones(3, np.float32)
    for reduce, identity in (("sum", 0), ("prod", 1), ("max", -INF), ("min", INF)):
        np.testing.assert_array_equal(evaluate(tmp_path, empty(reduce), x), np.full(3, identity, np.float32))
    with pytest.raises(UnsupportedError, match="no elements"):
        evaluate(tmp_path, empty("argmax"), x)


def test_nan_and_inf_are_told_apart(tmp_path: Path) -> None:
    for dtype in (np.float32, np.float64, np.float16):
        x = SPECIAL.reshape(-1).astype(dtype)
        np.testing.assert_array_equal(evaluate(tmp_path, each(lambda te, v: te.isnan(v)), x), np.isnan(x))
        np.testing.assert_array_equal(evaluate(tmp_path, each(lambda te, v: te.isinf(v)), x), np.isinf(x))


@pytest.mark.parametrize("exponent", [2, 3, -1, 0.5, 0.75, 1.7, -0.75, 0.0])
def test_powers(exponent: float, tmp_path: Path) -> None:
    x = np.array([0.0, -0.0, 1, 2.5, 1e-20, 1e18, INF, -INF, NAN, -2, 0.3], np.float32)
    y = evaluate(tmp_path, each(lambda te, v: te.pow(v, te.const(exponent, DType.F32))), x)
    with np.errstate(all="ignore"):
        # An array of exponents: numpy takes shortcuts for numbers, which treat -0.0 and -inf differently.
        exponents = np.full(x.shape, np.float32(exponent), np.float64)
        want = np.power(x.astype(np.float64), exponents).astype(np.float32)
    np.testing.assert_allclose(y, want, rtol=3e-7)
    np.testing.assert_array_equal(np.signbit(y[want == 0]), np.signbit(want[want == 0]))


ROUNDINGS = {"floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "round": np.round}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rounding(name: str, tmp_path: Path) -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -0.2, 0.0, -0.0, 1e9, 8388609.0, INF, -INF, NAN, 0.49999997], np.float32)
    y = evaluate(tmp_path, each(lambda te, v: getattr(te, name)(v)), x)
    np.testing.assert_array_equal(y, ROUNDINGS[name](x))
    np.testing.assert_array_equal(np.signbit(y), np.signbit(ROUNDINGS[name](x)))


DIVISIONS = {
    "floordiv": np.floor_divide,
    "floormod": np.mod,
    "truncdiv": lambda a, b: np.trunc(a / b).astype(a.dtype),
    "truncmod": np.fmod,
}


@pytest.mark.parametrize("name", DIVISIONS)
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.int8])
def test_integer_divisions(name: str, dtype: Any, tmp_path: Path) -> None:
    a, b = (g.reshape(-1).astype(dtype) for g in np.meshgrid(np.arange(-12, 13), [-5, -2, -1, 1, 3, 7]))
    y = evaluate(tmp_path, each(lambda te, x, y: getattr(te, name)(x, y)), a, b)
    np.testing.assert_array_equal(y, DIVISIONS[name](a, b))


DOUBLES = {"exp": np.exp, "log": np.log, "tanh": np.tanh, "sin": np.sin, "atan": np.arctan, "sigmoid": None}


@pytest.mark.parametrize("name", DOUBLES)
def test_doubles_are_as_exact_as_libm(name: str, tmp_path: Path) -> None:
    x = np.random.default_rng(4).uniform(0.1, 9, 500)
    reference = DOUBLES[name] or (lambda v: 1 / (1 + np.exp(-v)))
    y = evaluate(tmp_path, each(lambda te, v: getattr(te, name)(v)), x)
    np.testing.assert_allclose(y, reference(x), rtol=1e-15)


def test_negation_keeps_the_sign_of_zero(tmp_path: Path) -> None:
    x = np.array([0.0, -0.0, 1.0, INF], np.float32)
    np.testing.assert_array_equal(np.signbit(evaluate(tmp_path, each(lambda te, v: -v), x)), np.signbit(-x))


def test_reading_by_logical_index_in_any_layout(tmp_path: Path) -> None:
    type_ = TensorType((2, 5, 3, 4), layout=Layout("NCHW4c"))
    x = np.random.default_rng(1).random((2, 5, 3, 4), np.float32)

    def describe(te: Vocabulary, packed: Tensor) -> Tensor:
        return te.compute((2, 4, 3, 5), lambda n, w, h, c: te.at(packed, type_, n, c, h, w), "y")

    assert type_.layout is not None
    y = evaluate(tmp_path, describe, type_.layout.pack(x))
    np.testing.assert_array_equal(y, x.transpose(0, 3, 2, 1))


def test_where_reads_only_what_it_gives(tmp_path: Path) -> None:
    x = np.arange(5, dtype=np.float32)

    def shifted(te: Vocabulary, x: Tensor) -> Tensor:
        far = 10**8
        return te.compute((5,), lambda i: te.where(i < 3, x[i + 2], te.where(i > 9, x[i * far], -1.0)), "y")

    np.testing.assert_array_equal(evaluate(tmp_path, shifted, x), [2, 3, 4, -1, -1])


def test_where_becomes_a_selection_where_reads_are_safe() -> None:
    te = Vocabulary()
    x = Tensor(tvm_te.placeholder((4, 10), "float32", "x"))
    kinds: dict[str, str] = {}

    def note(name: str, value: Expr) -> Expr:
        kinds[name] = type(value.node).__name__
        return value

    zero = te.const(0, DType.F32)
    te.compute((4, 10), lambda i, j: note("inside", te.where(j < 7, x[i, j], zero)), "y")
    te.compute((4, 10), lambda i, j: note("beyond", te.where(j < 7, x[i, j + 1], zero)), "y")
    te.compute((4, 10), lambda i, j: note("before", te.where(j > 0, x[i, j - 1], zero)), "y")
    assert kinds == {"inside": "Select", "beyond": "Call", "before": "Call"}


MISTAKES: dict[str, tuple[Callable[[Vocabulary, Expr, Expr], Any], str]] = {
    "mixed types": (lambda te, x, i: x + te.cast(x, DType.F64), "mixes f32 and f64"),
    "float and index": (lambda te, x, i: x * i, "mixes f32 and i32"),
    "a fraction for an index": (lambda te, x, i: i * 0.5, "0.5 is no i32"),
    "dividing integers": (lambda te, x, i: i / 2, "use te.floordiv"),
    "no dtype": (lambda te, x, i: te.maximum(1, 2), "use te.const"),
    "truth": (lambda te, x, i: x if x > 0 else -x, "use te.where"),
    "exp of an integer": (lambda te, x, i: te.exp(i), "use te.cast"),
    "no expression": (lambda te, x, i: "x", "no expression"),
    "no axis": (lambda te, x, i: te.sum(x, []), "at least one axis"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused(name: str) -> None:
    te = Vocabulary()
    x = Tensor(tvm_te.placeholder((4,), "float32", "x"))
    function, message = MISTAKES[name]
    with pytest.raises(VerifyError, match=message):
        te.compute((4,), lambda i: function(te, x[i], i), "y")


TRICKY = np.array([0, -0.0, 1, -2.5, 3e38, INF, -INF, NAN], np.float32)

REAL_NUMBER_RULES: dict[str, tuple[Callable[..., Expr], Callable[[np.ndarray], np.ndarray]]] = {
    "x - x": (lambda te, x: x - x, lambda x: x - x),
    "x + c - c": (lambda te, x: x + 1e4 - 1e4, lambda x: (x + x.dtype.type(1e4)) - x.dtype.type(1e4)),
    "x + c - x": (lambda te, x: x + 1.0 - x, lambda x: x + 1 - x),
    "x - (x + c)": (lambda te, x: x - (x + 1.0), lambda x: x - (x + 1)),
    "x * 0": (lambda te, x: x * 0.0, lambda x: x * 0),
    "0 * x": (lambda te, x: 0.0 * x, lambda x: 0 * x),
    "0 / x": (lambda te, x: 0.0 / x, lambda x: 0 / x),
    "x + 0": (lambda te, x: x + 0.0, lambda x: x + x.dtype.type(0)),
    "x == x": (lambda te, x: te.cast(te.equal(x, x), x.dtype), lambda x: x == x),
    "x != x": (lambda te, x: te.cast(x != x, x.dtype), lambda x: x != x),
    "x >= x": (lambda te, x: te.cast(te.greater_equal(x, x), x.dtype), lambda x: x >= x),
    "not x < c": (lambda te, x: te.cast(te.logical_not(x < 1.0), x.dtype), lambda x: ~(x < 1)),
    "not x >= c": (lambda te, x: te.cast(~(x >= 1.0), x.dtype), lambda x: ~(x >= 1)),
    "x < c or x >= c": (lambda te, x: te.cast(te.logical_or(x < 1.0, x >= 1.0), x.dtype), lambda x: (x < 1) | (x >= 1)),
    "select": (lambda te, x: te.select(te.equal(x, x), x, 7.0), lambda x: np.where(np.isnan(x), x.dtype.type(7), x)),
}
"""What TVM takes for granted of real numbers, and numpy's answer for floats."""


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("rule", REAL_NUMBER_RULES)
def test_floats_are_no_real_numbers(rule: str, dtype: type, tmp_path: Path) -> None:
    function, wanted = REAL_NUMBER_RULES[rule]
    with np.errstate(all="ignore"):
        x = np.repeat(TRICKY, 5).astype(dtype)
        expected = wanted(x).astype(dtype)
    y = evaluate(tmp_path, each(function), x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y[~np.isnan(y)]), np.signbit(expected[~np.isnan(y)]))


def test_a_weight_that_turns_out_to_be_zero_still_meets_nan(tmp_path: Path) -> None:
    def describe(te: Vocabulary, x: Tensor) -> Tensor:
        return te.compute(x.shape, lambda i: x[i] * te.cast(i * 2 % 2, DType.F32), "y")

    wanted = np.where(np.isfinite(TRICKY), 0, np.float32(NAN))
    np.testing.assert_array_equal(evaluate(tmp_path, describe, TRICKY), wanted)


def test_a_read_inside_a_guard_is_guarded_outside_too(tmp_path: Path) -> None:
    """Nested choices must not become selections: one of them alone does not keep a read inside its tensor."""
    te = Vocabulary()
    parts = [Tensor(tvm_te.placeholder((12, 3), "float32", f"x{i}")) for i in range(4)]

    def pick(i: Expr, j: Expr) -> Expr:
        low = te.where(i < 12, parts[0][i, j], parts[1][i - 12, j])
        high = te.where(i < 36, parts[2][i - 24, j], parts[3][i - 36, j])
        return te.where(i < 24, low, high)

    text = str(tvm_te.create_prim_func([*(p.raw for p in parts), te.compute((48, 3), pick, "y").raw]).script())
    assert "if_then_else(v_i0 < 24" in text
    assert "Select" not in text
