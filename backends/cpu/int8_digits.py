"""Float32 numbers of a vector as fixed-point ones of three int8 digits, and how matrix tiles multiply these.

    x = q s,   q = 2^16 h + 2^8 m + l      h, m, l in -128 ... 127, and one s for all numbers of a row
    x y = s s' (2^32 h h' + 2^24 (h m' + m h') + 2^16 (h l' + m m' + l h') + what is left out)

A row is what a sum of products runs over: all that a window sees, as the channels of a pixel, or all weights of an
output.  Its s is as small as
the largest of its numbers allows, so that q has a sign and 23 bits.  Products of digits are added up in int32, exactly.
An error is relative to the largest numbers of both rows, not to each: up to 2^-22 of their product for rounding, and up
to 2^-21 for what is left out, of either sign.  Rows whose largest number is below 2^-104 have fewer bits.  So outputs
are as good as the largest of their row need, as with Winograd's algorithm.

Source: Ozaki, Ogita, Oishi and Rump, "Error-free transformations of matrix multiplication by using fast routines of
matrix multiplication and its applications", Numerical Algorithms 59, 2012, section 2; on integer units as in Ootomo,
Ozaki and Yokota, "DGEMM on integer matrix multiplication unit", IJHPCA 38, 2024, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

__all__ = ["biased", "digits", "larger", "scale_of", "sums_scaled", "unit_of"]

_MAGNITUDE, _EXPONENT, _INFINITY = 0x7FFFFFFF, 0xFF << 23, 0xFF << 23
_SMALLEST = 23 << 23
"""The least exponent counted with, so that scales are normal numbers."""

_LARGEST_DIGITS = 0x7F7F7F
"""The largest number of three digits: q of what is just below the next power of two."""

_HALVES = 0x808080
"""128 in each digit: added, digits do not borrow from each other, and are those of no sign."""


def larger(biggest: Any, values: Any) -> Any:
    """Give the larger of magnitudes so far and those of float32 values, as the bits of int32: NaN is the largest."""
    lanes = values.ty.dtype.lanes
    bits = tirx.reinterpret(_typed("int32", lanes), values)
    return tirx.max(biggest, tirx.bitwise_and(bits, _same(_MAGNITUDE, "int32", lanes)))


def scale_of(biggest: Any) -> Any:
    """Give 1 / s, from the bits of the largest magnitude of a row."""
    lanes = biggest.ty.dtype.lanes
    exponent = tirx.Cast(_typed("uint32", lanes), _exponent(biggest))
    power = tirx.reinterpret(_typed("float32", lanes), _same(2 * 127 + 22 << 23, "uint32", lanes) - exponent)
    return power * _same(_LARGEST_DIGITS / 2**23, "float32", lanes)


def unit_of(biggest: Any) -> Any:
    """Give the power of two that s counts 2^-22 of, but for what digits leave out: NaN unless the largest is finite."""
    lanes = biggest.ty.dtype.lanes
    nan = _same(0x7FC00000, "int32", lanes)
    bits = tirx.Select(tirx.LT(biggest, _same(_INFINITY, "int32", lanes)), _exponent(biggest), nan)
    return tirx.reinterpret(_typed("float32", lanes), bits)


def _exponent(biggest: Any) -> Any:
    lanes = biggest.ty.dtype.lanes
    return tirx.max(tirx.bitwise_and(biggest, _same(_EXPONENT, "int32", lanes)), _same(_SMALLEST, "int32", lanes))


def biased(vector: Any | None, scale: Any) -> Any:
    """Give q of a vector's numbers, their digits' signs off, as uint32; `scale` is a vector of 1 / s, None of zeros."""
    if vector is None:
        return _same(_HALVES, "uint32", 16)
    halves = _same(float(_HALVES), "float32", 16)
    return tirx.Cast("uint32x16", tirx.Cast("int32x16", tirx.nearbyint(vector * scale + halves)))


def digits(vectors: Sequence[Any]) -> list[Any]:
    """Give the digits of four vectors of `biased` numbers, the highest first: as uint32, four numbers in a lane."""
    first, second, third, fourth = vectors
    even, odd = _same(0x00FF00FF, "uint32", 16), _same(0xFF00FF00, "uint32", 16)
    low, high = _same(0x0000FFFF, "uint32", 16), _same(0xFFFF0000, "uint32", 16)

    def bytes_02(a: Any, b: Any) -> Any:
        return (a & even) | ((b << 8) & odd)

    def bytes_13(a: Any, b: Any) -> Any:
        return ((a >> 8) & even) | (b & odd)

    a, b = bytes_02(first, second), bytes_02(third, fourth)
    c, d = bytes_13(first, second), bytes_13(third, fourth)
    found = [(a >> 16) | (b & high), (c & low) | (d << 16), (a & low) | (b << 16)]
    return [_in_order(bits ^ _same(0x80808080, "uint32", 16)) for bits in found]


def _in_order(mixed: Any) -> Any:
    """Put bytes in order, of which each lane has one of each of four vectors."""
    order = [tirx.const(4 * (number % 16) + number // 16, "int32") for number in range(64)]
    return tirx.reinterpret("uint32x16", tirx.Shuffle([tirx.reinterpret("uint8x64", mixed)], order))


def sums_scaled(sums: Sequence[Any], of_pixel: Any) -> Any:
    """Give the product of a row by one of digits that count 2^-7, 2^-15 and 2^-23: as float32, in units of the other.

    `sums` are the int32 sums of their digits' products, the highest first, `of_pixel` the row's unit.
    """
    total = None
    for number, vector in reversed(list(enumerate(sums))):
        lanes = vector.ty.dtype.lanes
        weight = 2.0 ** (-13 - 8 * number) * 2**23 / _LARGEST_DIGITS
        term = tirx.Cast(_typed("float32", lanes), vector) * _same(weight, "float32", lanes)
        total = term if total is None else total + term
    return total * of_pixel


def _typed(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _same(number: float, dtype: str, lanes: int) -> Any:
    constant = tirx.const(number, dtype)
    return constant if lanes == 1 else tirx.Broadcast(constant, lanes)
