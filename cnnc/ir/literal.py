"""Literals: immutable arrays that compare and hash by content."""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from cnnc.ir.types import DType

_SAMPLED = 32


class Literal:
    """An immutable array that compares and hashes by content.

    The digest is computed when first needed: networks carry hundreds of megabytes.  Some elements are mostly enough to
    tell arrays apart.
    """

    def __init__(self, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array).reshape(array.shape)
        if array.flags.writeable:
            array = array.view()
            array.flags.writeable = False
        DType.of(array)
        self.array = array

    @cached_property
    def digest(self) -> str:
        """SHA-256 over dtype, shape and bytes, in hex."""
        head = f"{self.array.dtype}{self.array.shape}\0".encode()
        state = hashlib.sha256(head)
        state.update(self.array.reshape(-1).view(np.uint8).data)
        return state.hexdigest()

    @cached_property
    def largest(self) -> float:
        """The largest magnitude, 0 if there are no elements: not finite where any of them is not."""
        # NaN is both the least and the largest to numpy.
        return max(abs(float(self.array.min(initial=0))), abs(float(self.array.max(initial=0))))

    @cached_property
    def _sample(self) -> bytes:
        """Every so-and-so-many-th element."""
        flat = self.array.reshape(-1)
        return flat[:: flat.size // _SAMPLED + 1].tobytes()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Literal):
            return NotImplemented
        if self.array is other.array:
            return True
        same_type = self.array.dtype == other.array.dtype and self.array.shape == other.array.shape
        return same_type and self._sample == other._sample and self.digest == other.digest

    def __hash__(self) -> int:
        return hash((self.array.dtype.str, self.array.shape, self._sample))

    def __repr__(self) -> str:
        return f"Literal({self.array.dtype}{list(self.array.shape)})"
