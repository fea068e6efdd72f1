"""Strided views: where the elements of a value lie in a tensor it was cut out of without arithmetic.

transpose(reshape(slice(x)))[i, j, ...] = x's element number offset + i * stride_0 + j * stride_1 + ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.ir.graph import Node, Value
from cnnc.ops.concat import Split
from cnnc.ops.reshape import Reshape, Transpose
from cnnc.ops.slice import Slice

__all__ = ["Strided", "strided_views"]

MOST_STEPS = 12
"""Operators looked through: a bound on work, far above what exporters write."""


@dataclass(frozen=True)
class Strided:
    """Element [i, j, ...] of `shape` is element number offset + (i, j, ...) . strides of the plain `source`."""

    source: Value
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def walks(self, axis: int, stride: int) -> bool:
        """Whether the elements along an axis lie `stride` apart, as those of an axis of one element always do."""
        return self.shape[axis] == 1 or self.strides[axis] == stride


def strided_views(v: Value, shape: tuple[int, ...]) -> Iterator[Strided]:
    """See a plain value of fixed size, reshaped to `shape`, as a view of itself and of what it was cut out of."""
    ops: list[Reshape | Transpose | Slice] = [Reshape(shape)]
    source = v
    for _ in range(MOST_STEPS):
        view = None if source.type.layout or not source.type.is_static else _replay(source, ops)
        if view is None:
            return
        yield view
        match source.node:
            case Node(Reshape() | Transpose() | Slice() as op, (x,)):
                ops.insert(0, op)
            case Node(Split(axis, sizes), (x,)) if x.type.is_static:
                ops.insert(0, _part(x, axis, source.index, tuple(size for size in sizes if isinstance(size, int))))
            case _:
                return
        source = x


def _part(x: Value, axis: int, number: int, sizes: tuple[int, ...]) -> Slice:
    """Give the slice that one output of a split is."""
    rank, shape = x.type.rank, x.type.static_shape
    axis %= rank
    starts = tuple(sum(sizes[:number]) if i == axis else 0 for i in range(rank))
    kept = tuple(sizes[number] if i == axis else size for i, size in enumerate(shape))
    return Slice(starts, kept, (1,) * rank)


def _replay(source: Value, ops: list[Reshape | Transpose | Slice]) -> Strided | None:
    """Carry the operators out on a view of no memory; None where one would have to move data."""
    shape = source.type.static_shape
    plain = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    origin = np.zeros(1, np.int8)
    view = np.lib.stride_tricks.as_strided(origin, shape, plain)
    for op in ops:
        match op:
            case Reshape(sizes):
                counts = [int(size) for size in sizes if isinstance(size, int)]
                try:
                    view = np.reshape(view, counts, copy=False)
                except ValueError:
                    return None
            case Transpose(perm):
                view = view.transpose(perm)
            case Slice(starts, sizes, steps):
                if any(step < 1 for step in steps):
                    return None
                counts = [int(size) for size in sizes if isinstance(size, int)]
                spans = zip(starts, counts, steps, strict=True)
                index: Any = tuple(slice(start, start + (count - 1) * step + 1, step) for start, count, step in spans)
                view = view[index]
    offset = view.__array_interface__["data"][0] - origin.__array_interface__["data"][0]
    return Strided(source, offset, view.shape, view.strides)
