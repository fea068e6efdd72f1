"""Rounding to the precision that tensor cores multiply f32 numbers with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, random_array
from cnnc.ir.types import DType, TensorType
from cnnc.ops.broadcast import _Elementwise
from cnnc.ops.numeric import cast_to

_DROPPED_BITS = 13
"""Of the 23 bits of an f32's fraction, tf32 keeps 10."""


@dataclass(frozen=True)
class RoundTf32(_Elementwise):
    """y = x rounded to f32's exponent and 10 bits of fraction, halves away from zero; the type stays.

    That is the format tf32 of NVIDIA's tensor cores, and how `cvt.rna.tf32.f32` rounds to it (PTX ISA, "cvt").
    f64 is rounded to f32 first.
    """

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type."""
        return self._infer(x)

    def _numpy(self, x: np.ndarray) -> Any:
        narrow = np.asarray(x, np.float32)
        bits = narrow.view(np.uint32) + np.uint32(1 << (_DROPPED_BITS - 1))
        rounded = (bits & ~np.uint32((1 << _DROPPED_BITS) - 1)).view(np.float32)
        return np.where(np.isnan(narrow), narrow, rounded).astype(x.dtype)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        narrow = cast_to(te, x, dtype, DType.F32)
        bits = te.reinterpret(narrow, DType.I32) + (1 << (_DROPPED_BITS - 1))
        rounded = te.reinterpret(bits & -(1 << _DROPPED_BITS), DType.F32)
        return cast_to(te, te.select(te.isnan(narrow), narrow, rounded), DType.F32, dtype)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show each float type, halves, large and special numbers, and a blocked layout."""

        def special(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            half = np.float32(1 + 2**-11)
            numbers = [half, -half, np.float32(1 + 3 * 2**-11), 3.4e38, -np.inf, np.inf, np.nan, -0.0, 1e-40, 1e-42]
            return (np.asarray([*numbers, *rng.standard_normal(6)], np.float32),)

        for dtype in (DType.F32, DType.F64, DType.F16, DType.BF16):
            yield Example(cls(), (TensorType((3, 7), dtype),))
        yield Example(cls(), (TensorType((16,)),), special)
        yield Example(
            cls(),
            (TensorType((1, 5, 2, 3), layout=Layout("NCHW4c")),),
            lambda rng: (random_array(rng, TensorType((1, 5, 2, 3))),),
        )
