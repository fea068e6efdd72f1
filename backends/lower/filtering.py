"""The sums of Winograd's minimal filtering, of values of any number of lanes (the matrices: `cnnc.ops.winograd`)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from tvm import tirx

from cnnc.ops.winograd import Transform

__all__ = ["transformed", "transformed_back"]


def transformed(axis: Transform, values: Sequence[Any]) -> list[Any]:
    """Write axis.data @ values."""
    sums = []
    for row in axis.data:
        # All inputs of a filter are a stride apart; the others have no part in it.
        phase = next(index for index, c in enumerate(row) if c) % axis.stride
        sums.append(_by_parity(row[phase :: axis.stride], values[phase :: axis.stride]))
    return sums


def transformed_back(axis: Transform, values: Sequence[Any]) -> list[Any]:
    """Write axis.output @ values."""
    return [_by_pairs(row, values) for row in axis.output]


def _scaled(value: Any, factor: Fraction) -> Any:
    if factor == 1:
        return value
    number, lanes = tirx.const(float(factor), "float32"), value.ty.dtype.lanes
    return value * (tirx.Broadcast(number, lanes) if lanes > 1 else number)


def _sum(terms: Sequence[Any]) -> Any:
    """Add up terms, at least one."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _by_parity(row: Sequence[Fraction], values: Sequence[Any]) -> Any:
    """Write row @ values as even part + odd part.

    Rows of opposite points differ in the sign between the parts only, so that compilers compute those once.
    """
    even = [_scaled(v, c) for c, v in list(zip(row, values, strict=True))[0::2] if c]
    odd = [(v, c) for c, v in list(zip(row, values, strict=True))[1::2] if c]
    if not odd or not even:
        return _sum(even or [_scaled(v, c) for v, c in odd])
    negative = odd[0][1] < 0
    part = _sum([_scaled(v, -c if negative else c) for v, c in odd])
    return _sum(even) - part if negative else _sum(even) + part


def _by_pairs(row: Sequence[Fraction], values: Sequence[Any]) -> Any:
    """Write row @ values with the values of opposite points added or subtracted first, which all rows share."""
    terms = []
    left = [(c, v) for c, v in zip(row, values, strict=True) if c]
    while left:
        c, v = left.pop(0)
        if left and abs(left[0][0]) == abs(c):
            other, w = left.pop(0)
            v = v + w if other == c else v - w
        terms.append(_scaled(v, c))
    return _sum(terms)
