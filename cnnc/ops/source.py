"""Where values come from: graph inputs, parameters that have no numbers yet, and constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.layout import Layout
from cnnc.ir.literal import Literal
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
