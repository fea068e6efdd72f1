"""Exact coordinates: where an output element lies in the input is a rational number.

Coordinates are (a*i + b) / c in integers, so that ties and floors come out as they do on paper, on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, lcm
from typing import Any

import numpy as np

from cnnc.ir.types import DType


def exact_scale(scale: float) -> Fraction:
    """Give the simplest fraction that rounds to the same float32: 0.6 in float32 means 3/5.

    Scales reach a model as float32; taken to the letter, 0.6 would be 10066330/16777216, and five pixels times
    three fifths would not be three.
    """
    single = np.float32(scale)
    below = (Fraction(float(single)) + Fraction(float(np.nextafter(single, np.float32(-np.inf))))) / 2
    above = (Fraction(float(single)) + Fraction(float(np.nextafter(single, np.float32(np.inf))))) / 2
    return _simplest(below, above)


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """Give the fraction of the smallest denominator between two positive ones (Stern and Brocot)."""
    whole = ceil(low)
    if whole <= high:
        return Fraction(whole)
    return floor(low) + 1 / _simplest(1 / (high - floor(low)), 1 / (low - floor(low)))


def exact(value: float) -> Fraction:
    """Give the simplest fraction for a float32 that may also be zero or negative."""
    if value == 0:
        return Fraction(0)
    return exact_scale(value) if value > 0 else -exact_scale(-value)


@dataclass(frozen=True)
class Coordinate:
    """The input coordinate of output index i along one axis: (a*i + b) / c, c positive."""

    a: int
    b: int
    c: int

    @staticmethod
    def of(slope: Fraction, offset: Fraction) -> Coordinate:
        """Give slope * i + offset."""
        c = lcm(slope.denominator, offset.denominator)
        return Coordinate(int(slope * c), int(offset * c), c)

    def at(self, index: np.ndarray) -> np.ndarray:
        """Give the numerators for output indices, as exact Python integers."""
        return np.asarray(index.astype(object) * self.a + self.b)

    def nearest(self, mode: str) -> Coordinate:
        """Give the coordinate whose floor is the nearest index."""
        if mode == "floor":
            return self
        if mode == "ceil":
            return Coordinate(self.a, self.b + self.c - 1, self.c)
        half = self.c if mode == "round_prefer_ceil" else self.c - 1
        return Coordinate(2 * self.a, 2 * self.b + half, 2 * self.c)

    def floor_and_fraction(self, te: Any, index: Any, count: int, dtype: DType) -> tuple[Any, Any]:
        """Write floor and fraction of the coordinate of an output index below `count`."""
        numerator = self._numerator(te, index, count)
        return te.floordiv(numerator, self.c), te.cast(te.floormod(numerator, self.c), dtype) / te.const(self.c, dtype)

    def floor(self, te: Any, index: Any, count: int) -> Any:
        """Write the floor of the coordinate of an output index below `count`."""
        return te.floordiv(self._numerator(te, index, count), self.c)

    def outside(self, te: Any, index: Any, size: int, count: int) -> Any:
        """Write the condition that the coordinate is outside [0, size - 1]."""
        last = (size - 1) * self.c
        numerator = self._numerator(te, index, count, last)
        return te.logical_or(numerator < 0, numerator > last)

    def _numerator(self, te: Any, index: Any, count: int, beside: int = 0) -> Any:
        """Write a*i + b, in i64 if it, or `beside`, could pass 2**31."""
        largest = max(abs(self.a) * count + abs(self.b) + self.c, beside)
        return (index if largest < 2**31 else te.cast(index, DType.I64)) * self.a + self.b
