"""Axes and lists of integers as users write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from cnnc.errors import ShapeError


def integers(array: Any) -> list[int]:
    """Give a constant's elements as Python integers, in which no product overflows."""
    return [int(n) for n in np.ravel(array).tolist()]


def normal_axis(name: str, axis: int, rank: int) -> int:
    """Give an axis in [0, rank), negative ones counted from the end; raises `ShapeError` outside [-rank, rank)."""
    if not -rank <= axis < rank:
        raise ShapeError(f"{name}: axis {axis} is outside [{-rank}, {rank - 1}], the axes of a tensor of rank {rank}")
    return int(axis) % rank


def normal_axes(name: str, axes: Iterable[int], rank: int) -> tuple[int, ...]:
    """Give axes in [0, rank), sorted; raises `ShapeError` also where one is named twice."""
    given = [int(axis) for axis in axes]
    normal = sorted(normal_axis(name, axis, rank) for axis in given)
    if len(set(normal)) != len(normal):
        raise ShapeError(f"{name}: axes {given} name one axis twice")
    return tuple(normal)
