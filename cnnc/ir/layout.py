"""Layouts: how a logical tensor lies in memory, in TVM's spelling (`NCHW16c`, `OIHW16i16o`)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.attribute import attribute

_LOGICAL_ORDER = "NOCIDHW"
"""Logical axes stand in this order whatever the layout: activations N C (D) H W, weights O I (D) H W."""


@attribute
@dataclass(frozen=True)
class Layout:
    """An order of axes, some of them split into blocks.

    `NCHW16c` stores channel c at [n, c // 16, h, w, c % 16]; a blocked axis is padded to whole blocks.
    Capital letters are the axes, `16c` is the inner part of axis C; each axis splits at most once.
    """

    axes: str

    def __post_init__(self) -> None:
        if not self.axes or "".join(self.tokens) != self.axes:
            raise ShapeError(f"layout {self.axes!r} cannot be read; write it as NCHW16c")
        primal = [t for t in self.tokens if t.isupper()]
        inner = [t[-1].upper() for t in self.tokens if not t.isupper()]
        known = all(axis in _LOGICAL_ORDER for axis in primal)
        if (
            not known
            or len(set(primal)) != len(primal)
            or len(set(inner)) != len(inner)
            or not set(inner) <= set(primal)
        ):
            raise ShapeError(f"layout {self.axes!r} names an axis twice, or one that does not exist")

    @property
    def tokens(self) -> list[str]:
        """The axes in memory order, outermost first: `["N", "C", "H", "W", "16c"]`."""
        return re.findall(r"[A-Z]|[1-9]\d*[a-z]", self.axes)

    @property
    def logical_axes(self) -> str:
        """The axes in logical order, e.g. `NCHW`."""
        return "".join(axis for axis in _LOGICAL_ORDER if axis in self.axes)

    @property
    def rank(self) -> int:
        """The rank of the logical tensor."""
        return len(self.logical_axes)

    def block(self, axis: str) -> int:
        """Give the block size of an axis (1 when it is not split)."""
        for token in self.tokens:
            if token[-1] == axis.lower():
                return int(token[:-1])
        return 1

    def physical_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Give the shape in memory of a logical shape."""
        size = dict(zip(self.logical_axes, shape, strict=True))
        return tuple(-(-size[t] // self.block(t)) if t.isupper() else int(t[:-1]) for t in self.tokens)

    def physical_index(self, index: Sequence[Any]) -> tuple[Any, ...]:
        """Map a logical index (integers or TVM expressions) to the physical one."""
        position = dict(zip(self.logical_axes, index, strict=True))
        result = []
        for token in self.tokens:
            block = self.block(token[-1].upper())
            value = position[token[-1].upper()]
            if not token.isupper():
                value = value % block
            elif block > 1:
                value = value // block
            result.append(value)
        return tuple(result)

    def logical_index(self, index: Sequence[Any]) -> tuple[Any, ...]:
        """Map a physical index (integers or TVM expressions) to the logical one, the inverse of `physical_index`."""
        outer: dict[str, Any] = {}
        inner: dict[str, Any] = {}
        for token, value in zip(self.tokens, index, strict=True):
            (outer if token.isupper() else inner)[token[-1].upper()] = value
        return tuple(outer[a] * self.block(a) + inner[a] if a in inner else outer[a] for a in self.logical_axes)

    def pads(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this logical shape has pad lanes (which always hold 0)."""
        return math.prod(self.physical_shape(shape)) != math.prod(shape)

    def pack(self, array: np.ndarray) -> np.ndarray:
        """Copy a logical array into this layout; pad lanes are 0."""
        blocks = [self.block(axis) for axis in self.logical_axes]
        padding = [(0, -size % block) for size, block in zip(array.shape, blocks, strict=True)]
        padded = np.pad(array, padding) if any(after for _, after in padding) else array
        split = padded.reshape([part for s, b in zip(padded.shape, blocks, strict=True) for part in (s // b, b)])
        return np.ascontiguousarray(split.transpose(self._split_axes())).reshape(self.physical_shape(array.shape))

    def unpack(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Copy a physical array back to the logical shape, pad lanes dropped."""
        blocks = [self.block(axis) for axis in self.logical_axes]
        split_shape = [part for s, b in zip(shape, blocks, strict=True) for part in (-(-s // b), b)]
        order = self._split_axes()
        split = array.reshape([split_shape[axis] for axis in order]).transpose(np.argsort(order))
        padded = split.reshape([-(-s // b) * b for s, b in zip(shape, blocks, strict=True)])
        return np.ascontiguousarray(padded[tuple(slice(s) for s in shape)])

    def _split_axes(self) -> list[int]:
        """Positions of the physical axes in the array whose every axis is split in (outer, inner)."""
        order = []
        for token in self.tokens:
            axis = self.logical_axes.index(token[-1].upper())
            order.append(2 * axis + (0 if token.isupper() else 1))
        order += [2 * i + 1 for i, axis in enumerate(self.logical_axes) if self.block(axis) == 1]
        return order

    @staticmethod
    def parse(text: str) -> Layout:
        """Read what `str` printed."""
        return Layout(text)

    def __str__(self) -> str:
        return self.axes
