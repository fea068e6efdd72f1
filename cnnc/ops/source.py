"""Where values come from: graph inputs, parameters that have no numbers yet, and constants."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.op import Op
from cnnc.ir.types import DType, TensorType


@dataclass(frozen=True)
class Input(Op):
    """A tensor handed in at run time."""

    label: str
    type: TensorType

    def infer(self) -> TensorType:
        """Give the declared type."""
        return self.type

    def infer_layout(self) -> tuple[Layout | None, ...]:
        """Give the declared layout (kernel bodies have blocked inputs)."""
        return (self.type.layout,)

    def flops(self) -> int:
        """No arithmetic."""
        return 0


@dataclass(frozen=True)
class Parameter(Op):
    """A trained tensor known by its `state_dict` name, its numbers not given yet."""

    label: str
    type: TensorType

    def infer(self) -> TensorType:
        """Give the declared type."""
        return self.type

    def flops(self) -> int:
        """No arithmetic."""
        return 0


class Literal:
    """An immutable array that compares and hashes by content.

    The digest is computed when first needed: networks carry hundreds of megabytes.
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
        head = f"{self.array.dtype}{self.array.shape}".encode()
        return hashlib.sha256(head + b"\0" + self.array.tobytes()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Literal):
            return NotImplemented
        same_type = self.array.dtype == other.array.dtype and self.array.shape == other.array.shape
        return self.array is other.array or (same_type and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash((self.array.dtype.str, self.array.shape, self.digest))

    def __repr__(self) -> str:
        return f"Literal({self.array.dtype}{list(self.array.shape)})"


@dataclass(frozen=True)
class Constant(Op):
    """A tensor known at compile time; `label` is its name in the model, if it has one.

    `layout` says how the tensor lies in memory; the array itself is always logical.
    """

    value: Literal
    label: str = ""
    layout: Layout | None = None

    def infer(self) -> TensorType:
        """Give the array's type."""
        return TensorType(self.value.array.shape, DType.of(self.value.array))

    def infer_layout(self) -> tuple[Layout | None, ...]:
        """Give the layout asked for."""
        return (self.layout,)

    def reference(self) -> np.ndarray:
        """Give the array."""
        return self.value.array

    def flops(self) -> int:
        """No arithmetic."""
        return 0


def constant(array: np.ndarray | Sequence[Any] | float, dtype: DType | None = None, label: str = "") -> Value:
    """Make a constant value from an array or numbers; `dtype` defaults to the array's (Python floats are f32)."""
    if not isinstance(array, np.ndarray):
        array = np.asarray(array)
        if dtype is None and array.dtype == np.float64:
            dtype = DType.F32
    if dtype is not None:
        array = array.astype(dtype.numpy)
    return call(Constant(Literal(array), label))


def graph_input(label: str, shape: Sequence[Any], dtype: DType = DType.F32) -> Value:
    """Make a graph input."""
    return call(Input(label, TensorType(tuple(shape), dtype)))
