"""The exponential as a GPU has it: an instruction for powers of two, no branch."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from cnnc.backends.cuda import tensor_cores

__all__ = ["exp_of_difference", "rough_exp_of_difference"]


def exp_of_difference(x: Any) -> Any:
    """e**x for x <= 0, 0 for -inf, NaN for NaN: the terms of a softmax.

    2**(x / ln 2), whose relative error is 2 units in the last place, and as many times 2**-24 as x is below 0.
    """
    return tirx.call_pure_extern("float32", "exp2f", x * tirx.const(math.log2(math.e), "float32"))


def rough_exp_of_difference(x: Any, scale: float = 1.0) -> Any:
    """e**(scale * x) for scale * x <= 0, as terms that are rounded to 16 bits need it: 0 for all below 2**-126.

    A product and one instruction; otherwise as exact as the other.
    """
    factor = tirx.const(scale * math.log2(math.e), "float32")
    return tirx.call_pure_extern("float32", tensor_cores.EXP2, x * factor)
