"""Rounding to the precision that matrix tiles multiply with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from cnnc.ir.layout import Layout
from cnnc.ir.op import Example, random_array
from cnnc.ir.types import DType, TensorType
from cnnc.ops.broadcast import _Elementwise
from cnnc.ops.numeric import cast_to


@dataclass(frozen=True)
class RoundBf16(_Elementwise):
    """y = x rounded to bf16: f32's exponent and 7 bits of fraction, halves to even; the type stays.

    f64 is rounded to f32 first.
    """

    def infer(self, x: TensorType) -> TensorType:
        """Give x's type."""
        return self._infer(x)

    def _numpy(self, x: np.ndarray) -> Any:
        return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(x.dtype)

    def _expression(self, te: Any, dtype: DType, x: Any) -> Any:
        narrow = cast_to(te, x, dtype, DType.F32)
        bits = te.reinterpret(narrow, DType.I32)
        # Half of what is dropped, or one less: then a half goes up only from an odd number.
        rounded = te.reinterpret((bits + 0x7FFF + ((bits >> 16) & 1)) & -(1 << 16), DType.F32)
        return cast_to(te, te.select(te.isnan(narrow), narrow, rounded), DType.F32, dtype)

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Show each float type, halves, large and special numbers, and a blocked layout."""

        def special(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
            numbers = [1 + 2**-8, -1 - 2**-8, 1 + 3 * 2**-8, 3.4e38, -np.inf, np.inf, np.nan, -0.0, 1e-40, 1e-42]
            return (np.asarray([*numbers, *rng.standard_normal(6)], np.float32),)

        for dtype in (DType.F32, DType.F64, DType.F16, DType.BF16):
            yield Example(cls(), (TensorType((3, 7), dtype),))
        yield Example(cls(), (TensorType((16,)),), special)
        yield Example(
            cls(),
            (TensorType((1, 5, 2, 3), layout=Layout("NCHW4c")),),
            lambda rng: (random_array(rng, TensorType((1, 5, 2, 3))),),
        )
