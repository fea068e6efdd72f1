"""Tensor types: dtypes, dimensions that may be known only at run time, and `TensorType`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeAlias

import ml_dtypes
import numpy as np

from cnnc.errors import LimitError, ShapeError
from cnnc.ir.layout import Layout

MAX_ELEMENTS = 2**62
"""Element counts above this are refused: byte sizes must stay exact in 64-bit arithmetic."""


class DType(StrEnum):
    """The element types of tensors."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    F64 = "f64"
    I8 = "i8"
    U8 = "u8"
    I32 = "i32"
    I64 = "i64"
    BOOL = "bool"

    @property
    def numpy(self) -> np.dtype:
        """The numpy dtype that holds such elements (`ml_dtypes` gives bf16)."""
        return _NUMPY[self]

    @property
    def itemsize(self) -> int:
        """Bytes an element takes."""
        return _NUMPY[self].itemsize

    @property
    def is_float(self) -> bool:
        """Whether elements are floating-point numbers."""
        return self in (DType.F32, DType.F16, DType.BF16, DType.F64)

    @property
    def is_integer(self) -> bool:
        """Whether elements are integers (bool is none)."""
        return not self.is_float and self is not DType.BOOL

    @staticmethod
    def of(array: np.ndarray | np.dtype) -> DType:
        """Give the dtype of a numpy array; raises `ShapeError` for one cnnc does not have."""
        dtype = array.dtype if isinstance(array, np.ndarray) else np.dtype(array)
        found = _FROM_NUMPY.get(dtype)
        if found is None:
            raise ShapeError(f"elements of type {dtype} are not supported (one of {', '.join(DType)})")
        return found


_NUMPY: dict[DType, np.dtype] = {
    DType.F32: np.dtype(np.float32),
    DType.F16: np.dtype(np.float16),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.F64: np.dtype(np.float64),
    DType.I8: np.dtype(np.int8),
    DType.U8: np.dtype(np.uint8),
    DType.I32: np.dtype(np.int32),
    DType.I64: np.dtype(np.int64),
    DType.BOOL: np.dtype(np.bool_),
}
_FROM_NUMPY = {dtype: name for name, dtype in _NUMPY.items()}


@dataclass(frozen=True, order=True)
class Extent:
    """A size known only at run time, never above `upper`."""

    name: str
    upper: int

    def __str__(self) -> str:
        return f"{{{self.name}<={self.upper}}}"


@dataclass(frozen=True)
class FloorDiv:
    """`numerator // denominator`, kept whole because it does not distribute over sums."""

    numerator: Dim
    denominator: int

    def __str__(self) -> str:
        return f"({self.numerator})//{self.denominator}"


Atom: TypeAlias = Extent | FloorDiv
Monomial: TypeAlias = tuple[Atom, ...]


@dataclass(frozen=True)
class Dim:
    """An integer polynomial over run-time extents, with proven bounds.

    Buffers are planned at `upper`, kernels loop to the value at run time.  The terms are kept in one
    canonical order, so that equal polynomials are equal objects.  Build one with `Dim.symbol`.
    """

    terms: tuple[tuple[Monomial, int], ...]
    const: int = 0

    @staticmethod
    def symbol(name: str, upper: int) -> Dim:
        """Give the dimension that is the run-time extent `name` itself, at most `upper`."""
        if upper < 1:
            raise ShapeError(f"run-time extent {name} needs a bound of at least 1, not {upper}")
        return Dim((((Extent(name, upper),), 1),))

    @property
    def upper(self) -> int:
        """The largest value it can take."""
        return self._bound(highest=True)

    @property
    def lower(self) -> int:
        """The smallest value it can take (an extent may be 0)."""
        return self._bound(highest=False)

    def _bound(self, highest: bool) -> int:
        total = self.const
        for monomial, coefficient in self.terms:
            bounds = [coefficient * bound for bound in _monomial_bounds(monomial)]
            total += max(bounds) if highest else min(bounds)
        return total

    @property
    def extents(self) -> frozenset[Extent]:
        """The run-time extents it depends on."""
        found: set[Extent] = set()
        for monomial, _ in self.terms:
            for atom in monomial:
                found |= {atom} if isinstance(atom, Extent) else atom.numerator.extents
        return frozenset(found)

    def evaluate(self, values: dict[str, int]) -> int:
        """Give its value when every extent has one."""
        total = self.const
        for monomial, coefficient in self.terms:
            total += coefficient * math.prod(_atom_value(atom, values) for atom in monomial)
        return total

    def __add__(self, other: Size) -> Size:
        if isinstance(other, int):
            return _normal(dict(self.terms), self.const + other)
        terms = dict(self.terms)
        for monomial, coefficient in other.terms:
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return _normal(terms, self.const + other.const)

    __radd__ = __add__

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + (-other)

    def __rsub__(self, other: Size) -> Size:
        return -self + other

    def __mul__(self, other: Size) -> Size:
        if isinstance(other, int):
            return _normal({m: c * other for m, c in self.terms}, self.const * other)
        product: dict[Monomial, int] = {}
        for left, a in (*self.terms, ((), self.const)):
            for right, b in (*other.terms, ((), other.const)):
                monomial = tuple(sorted(left + right, key=str))
                product[monomial] = product.get(monomial, 0) + a * b
        return _normal(product, 0)

    __rmul__ = __mul__

    def __floordiv__(self, divisor: int) -> Size:
        if divisor <= 0:
            raise ShapeError(f"a run-time size is divided by {divisor}; only positive divisors have a meaning")
        if all(c % divisor == 0 for _, c in self.terms):
            return _normal({m: c // divisor for m, c in self.terms}, self.const // divisor)
        return _normal({(FloorDiv(self, divisor),): 1}, 0)

    def __str__(self) -> str:
        text = ""
        for monomial, coefficient in self.terms:
            sign = "-" if coefficient < 0 else ("+" if text else "")
            factor = "" if abs(coefficient) == 1 else f"{abs(coefficient)}*"
            text += sign + factor + "*".join(map(str, monomial))
        return text + (f"{self.const:+d}" if self.const else "")


Size: TypeAlias = int | Dim
"""One entry of a shape."""


def _normal(terms: dict[Monomial, int], const: int) -> Size:
    const += terms.pop((), 0)
    kept = sorted(((m, c) for m, c in terms.items() if c), key=lambda item: str(item[0]))
    return Dim(tuple(kept), const) if kept else const


def _monomial_bounds(monomial: Monomial) -> tuple[int, int]:
    """Give the least and the largest product; quotients may be below zero."""
    low, high = 1, 1
    for atom in monomial:
        products = [bound * other for bound in (low, high) for other in _atom_bounds(atom)]
        low, high = min(products), max(products)
    return low, high


def _atom_bounds(atom: Atom) -> tuple[int, int]:
    if isinstance(atom, Extent):
        return 0, atom.upper
    return atom.numerator.lower // atom.denominator, atom.numerator.upper // atom.denominator


def _atom_value(atom: Atom, values: dict[str, int]) -> int:
    if isinstance(atom, Extent):
        return values[atom.name]
    return atom.numerator.evaluate(values) // atom.denominator


def upper_bound(size: Size) -> int:
    """Give the largest value of a shape entry (an `int` is its own)."""
    return size.upper if isinstance(size, Dim) else size


def product(sizes: Iterable[Size]) -> Size:
    """Multiply shape entries; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


@dataclass(frozen=True)
class TensorType:
    """Shape, dtype and layout of a tensor.

    The shape is *logical* in every layout (N C H W order); `layout` None is plain row-major.
    Raises `ShapeError` for a negative entry, `LimitError` where the element count would pass 2**62.
    """

    shape: tuple[Size, ...]
    dtype: DType = DType.F32
    layout: Layout | None = field(default=None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(s if isinstance(s, Dim) else int(s) for s in self.shape))
        for size in self.shape:
            if isinstance(size, int) and size < 0:
                raise ShapeError(f"shape {format_shape(self.shape)} has a negative entry")
        if math.prod(upper_bound(s) for s in self.shape) > MAX_ELEMENTS:
            raise LimitError(f"shape {format_shape(self.shape)} has more than 2**62 elements")
        if self.layout is not None and self.layout.rank != len(self.shape):
            raise ShapeError(f"layout {self.layout} is for rank {self.layout.rank}, not {format_shape(self.shape)}")

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def static_shape(self) -> tuple[int, ...]:
        """The shape at its upper bounds."""
        return tuple(upper_bound(s) for s in self.shape)

    @property
    def is_static(self) -> bool:
        """Whether no entry is left to run time."""
        return all(isinstance(s, int) for s in self.shape)

    @property
    def elements(self) -> int:
        """Logical element count at the upper bounds."""
        return math.prod(self.static_shape)

    @property
    def physical_shape(self) -> tuple[int, ...]:
        """The shape in memory at the upper bounds: blocked axes rounded up to whole blocks."""
        if self.layout is None:
            return self.static_shape
        return self.layout.physical_shape(self.static_shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory at the upper bounds, blocks included."""
        return math.prod(self.physical_shape) * self.dtype.itemsize

    def with_shape(self, shape: Sequence[Size]) -> TensorType:
        """Give the plain type of the same dtype with another shape."""
        return TensorType(tuple(shape), self.dtype)

    def with_dtype(self, dtype: DType) -> TensorType:
        """Give the same type with another dtype."""
        return replace(self, dtype=dtype)

    def with_layout(self, layout: Layout | None) -> TensorType:
        """Give the same logical type in another layout."""
        return replace(self, layout=layout)

    def __str__(self) -> str:
        suffix = "" if self.layout is None else f" {self.layout}"
        return f"{self.dtype}{format_shape(self.shape)}{suffix}"


def format_shape(shape: Sequence[Size]) -> str:
    """Write a shape as types are printed: `[1,3,224,224]`."""
    return "[" + ",".join(map(str, shape)) + "]"
