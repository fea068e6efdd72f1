"""Questions about an element, and its bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.ir.op import Op
from cnnc.ir.types import DType
from cnnc.ops.broadcast import BOOLS, INTEGERS
from cnnc.ops.unary.one_input import _Unary


class IsNan(_Unary):
    """y = whether x is no number."""

    gives = DType.BOOL

    def _numpy(self, x: np.ndarray) -> Any:
        return np.isnan(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.isnan(x)


@dataclass(frozen=True)
class IsInf(_Unary):
    """y = whether x is -infinity (if `negative`) or +infinity (if `positive`)."""

    negative: bool = True
    positive: bool = True
    gives = DType.BOOL

    def _numpy(self, x: np.ndarray) -> Any:
        return (np.isneginf(x) & self.negative) | (np.isposinf(x) & self.positive)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        found = te.isinf(x)
        if not self.negative:
            found = te.logical_and(found, x > 0)
        return found if self.positive else te.logical_and(found, x < 0)

    @classmethod
    def _variants(cls) -> tuple[Op, ...]:
        return (cls(), cls(negative=False), cls(positive=False))


class Not(_Unary):
    """y = not x."""

    takes = BOOLS

    def _numpy(self, x: np.ndarray) -> Any:
        return np.logical_not(x)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return te.logical_not(x)


class BitwiseNot(_Unary):
    """y = x with every bit flipped."""

    takes = INTEGERS

    def _numpy(self, x: np.ndarray) -> Any:
        return ~x

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        return ~x
