"""Types: polynomial dimensions, their bounds, tensor types and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnc.errors import LimitError, ShapeError
from cnnc.ir.layout import Layout
from cnnc.ir.types import Dim, DType, Size, TensorType, format_shape, product, upper_bound

NAMES = {"n": 5, "m": 7}

sizes = st.recursive(
    st.one_of(st.integers(-4, 9), st.sampled_from([Dim.symbol(name, upper) for name, upper in NAMES.items()])),
    lambda inner: st.one_of(
        st.tuples(st.sampled_from("+-*"), inner, inner), st.tuples(st.just("//"), inner, st.integers(1, 4))
    ),
    max_leaves=6,
)


def build(tree: object) -> Size:
    """Compute a tree of operations with dimensions."""
    if not isinstance(tree, tuple):
        return tree
    op, left, right = tree
    a, b = build(left), build(right)
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "//": lambda: a // b}[op]()


def plain(tree: object, values: dict[str, int]) -> int:
    """Compute the same tree with integers."""
    if isinstance(tree, Dim):
        return tree.evaluate(values)
    if not isinstance(tree, tuple):
        return tree
    op, left, right = tree
    a, b = plain(left, values), plain(right, values)
    return {"+": lambda: a + b, "-": lambda: a - b, "*": lambda: a * b, "//": lambda: a // b}[op]()


def value_of(size: Size, values: dict[str, int]) -> int:
    return size.evaluate(values) if isinstance(size, Dim) else size


@given(sizes, st.integers(0, NAMES["n"]), st.integers(0, NAMES["m"]))
def test_arithmetic_is_that_of_integers(tree, n, m):
    values = {"n": n, "m": m}
    assert value_of(build(tree), values) == plain(tree, values)


@given(sizes, st.integers(0, NAMES["n"]), st.integers(0, NAMES["m"]))
def test_bounds_hold(tree, n, m):
    size = build(tree)
    if isinstance(size, Dim):
        assert size.lower <= size.evaluate({"n": n, "m": m}) <= size.upper


def test_bounds_hold_of_products_with_a_factor_below_zero():
    n = Dim.symbol("n", 5)
    product = n * ((0 - n) // 2)
    assert [product.evaluate({"n": number}) for number in range(6)] == [0, -1, -2, -6, -8, -15]
    assert (product.lower, product.upper) == (-15, 0)


def test_equal_polynomials_are_equal_objects():
    n, m = Dim.symbol("n", 5), Dim.symbol("m", 7)
    assert (n + m) * (n - m) == n * n - m * m
    assert hash(n * 2 + 3) == hash(3 + n + n)
    assert n - n == 0
    assert n * 0 == 0
    assert (n * 4 + 8) // 4 == n + 2
    assert (n + 1) // 2 != n // 2


def test_printing():
    n, m = Dim.symbol("n", 5), Dim.symbol("m", 7)
    assert str(n) == "{n<=5}"
    assert str(2 * n * m - 3) == "2*{m<=7}*{n<=5}-3"
    assert str((n + 1) // 2) == "({n<=5}+1)//2"


def test_extents():
    n, m = Dim.symbol("n", 5), Dim.symbol("m", 7)
    assert {e.name for e in ((n + 1) // 2 * m).extents} == {"n", "m"}


@pytest.mark.parametrize("bad", [0, -1])
def test_an_extent_needs_a_bound(bad):
    with pytest.raises(ShapeError, match="run-time extent n needs a bound of at least 1"):
        Dim.symbol("n", bad)


@pytest.mark.parametrize("bad", [0, -2])
def test_division_by_what_is_not_positive(bad):
    with pytest.raises(ShapeError, match="only positive divisors"):
        Dim.symbol("n", 3) // bad


def test_products_and_bounds():
    n = Dim.symbol("n", 5)
    assert product([]) == 1
    assert product([2, n, 3]) == 6 * n
    assert upper_bound(n * 2 + 1) == 11
    assert upper_bound(4) == 4


def test_tensor_types():
    t = TensorType((Dim.symbol("n", 3), 5, 2, 2), DType.F16, Layout("NCHW4c"))
    assert str(t) == "f16[{n<=3},5,2,2] NCHW4c"
    assert (t.rank, t.elements, t.is_static) == (4, 60, False)
    assert t.physical_shape == (3, 2, 2, 2, 4)
    assert t.nbytes == 3 * 2 * 2 * 2 * 4 * 2
    assert t.with_shape((4, 5)) == TensorType((4, 5), DType.F16)
    assert t.with_layout(None).with_dtype(DType.F32) == TensorType(t.shape)
    assert TensorType((np.int64(3),)).shape == (3,)
    assert format_shape(()) == "[]"


def test_shapes_that_are_none():
    with pytest.raises(ShapeError, match=r"shape \[2,-1\] has a negative entry"):
        TensorType((2, -1))
    with pytest.raises(ShapeError, match="layout NCHW4c is for rank 4"):
        TensorType((2, 3), layout=Layout("NCHW4c"))
    with pytest.raises(LimitError, match=r"more than 2\*\*62 elements"):
        TensorType((2**31, 2**31, 2))
    assert TensorType((2**31, 2**31)).elements == 2**62
    assert TensorType((0, 2**40)).elements == 0


@pytest.mark.parametrize("dtype", list(DType))
def test_dtypes_and_numpy(dtype):
    assert DType.of(np.zeros(2, dtype.numpy)) is dtype
    assert np.zeros(1, dtype.numpy).itemsize == dtype.itemsize
    assert dtype.is_float + dtype.is_integer + (dtype is DType.BOOL) == 1


def test_a_dtype_that_is_not_ours():
    with pytest.raises(ShapeError, match="elements of type complex64 are not supported"):
        DType.of(np.zeros(1, np.complex64))
