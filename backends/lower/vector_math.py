"""exp, log, tanh, ... in float32 as straight-line code that stays in vector registers.

TVM's own forms call libm once for every lane.  Here each function is an operator of its own (`cnnc.exp`), which
TVM carries through inlining and vectorising as one call; the last lowering step puts the expressions below in
its place, for whole vectors.  There is no branch and no table: every function is a clamp, a reduction to a short
interval, a polynomial and a selection.

Largest errors, against float64 over all magnitudes (tests/backends/lower/test_vector_math.py asserts them):

    exp 1, expm1 2, log 2, log1p 3, tanh 3, sigmoid 3, erf 2   units in the last place
    gelu 3 units in the last place of x, 0 below -5.42

Zeros keep their sign, subnormals are exact inputs and rounded outputs, infinities and NaN are as in numpy.
float64 and rarer functions call libm, which is right but lane by lane.

Sources: Cephes (expf, logf), Kahan's log1p as told by Higham, Accuracy and Stability (2nd ed.), section 1.14.1,
N. Juffa's minimax erf, and Eigen's rational erf, its coefficients refined here as float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from tvm import tirx

from cnnc.backends.lower.operators import register_operator

_LOG2_E = 1.4426950408889634
# ln 2 = _LN2_HI + _LN2_LO; _LN2_HI has nine bits, so that n * _LN2_HI is exact for every exponent n.
_LN2_HI = 0.693359375
_LN2_LO = -2.12194440054690583e-4
# Adding 1.5 * 2**23 leaves the nearest integer in the low bits of the sum.
_ROUNDER = 12582912.0
_ROUNDER_BITS = 0x4B400000
_SMALLEST_NORMAL = 2.0**-126
_TINY = -87.0

_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# e**r, relative error 5e-9 for |r| <= ln2 / 2 as rounded to float32.
_EXP_SHORT = (1.3814286794e-3, 8.3687463775e-3, 4.1668396443e-2, 1.6666519642e-1, 4.9999994040e-1, 1.0, 1.0)
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_ERF_SMALL = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
_NORMAL_NUMERATOR = (5.06135257e-6, 1.50626613e-4, 4.50388948e-3, 3.27405147e-2, 3.98942262e-1)
_NORMAL_DENOMINATOR = (*(-1.8424392e-9, 7.35873925e-7, 6.36226614e-5, 1.75880885e-3, 2.7746262e-2, 2.48734608e-1, 1.0),)
_NORMAL_END = 5.42
_ERF_LARGE = (
    *(-1.72853470e-5, 3.83197126e-4, -3.88396438e-3, 2.42546219e-2),
    *(-1.06777877e-1, -6.34846687e-1, -1.28717512e-1),
)


def exp(x: Any) -> Any:
    """e**x = 2**n * e**r with x = n ln2 + r, |r| <= ln2 / 2."""
    return _reduce(x, -104.0, 89.0, lambda n, r: _scale(_expm1_near_zero(r) + 1.0, n))


def exp_nonpositive(x: Any) -> Any:
    """e**x for x <= 0 as `exp` gives it, but 0 where that is below e**-87: the terms of a softmax, in less time.

    Takes and gives an expression, whole vectors as well; it is no operator.
    """
    tiny = x < _const(x, _TINY)
    clamped = tirx.Select(tiny, _const(x, _TINY), x)
    power = _split(clamped, lambda n, r: (_expm1_near_zero(r) + 1.0) * _power_of_two(n))
    return tirx.Select(tiny, _const(x, 0.0), power)


def expm1(x: Any) -> Any:
    """e**x - 1 = 2 * (2**(n-1) * (e**r - 1) + (2**(n-1) - 1/2)), which cancels nothing."""

    def assemble(n: Any, r: Any) -> Any:
        return _let(_power_of_two(n - 1), lambda half: (_expm1_near_zero(r) * half + (half - 0.5)) * 2.0)

    return tirx.Select(_magnitude(x) < 1e-10, x, _reduce(x, -30.0, 89.0, assemble))


def log(x: Any) -> Any:
    """ln x = n ln2 + ln m with m in [sqrt(1/2), sqrt(2))."""

    def of_normal(a: Any, exponent: Any) -> Any:
        # Moving sqrt(1/2) to a power of two puts the mantissa into [sqrt(1/2), sqrt(2)).
        return _let(_as_int(a) + (0x3F800000 - 0x3F3504F3), lambda shifted: split(shifted, exponent))

    def split(shifted: Any, exponent: Any) -> Any:
        n = tirx.Cast(_type(x), _shift_right(shifted, 23) - 127 - exponent)
        mantissa = _as_float((shifted & 0x7FFFFF) + 0x3F3504F3) - 1.0
        return _let(n, lambda n: _let(mantissa, lambda f: _log_near_one(f, n)))

    subnormal = x < _SMALLEST_NORMAL
    scaled = tirx.Select(subnormal, x * 2.0**23, x)
    exponent = tirx.Select(subnormal, _int_const(x, 23), _int_const(x, 0))
    finite = _let(scaled, lambda a: of_normal(a, exponent))
    at_ends = tirx.Select(x == 0.0, _const(x, -math.inf), _const(x, math.nan))
    return tirx.Select(x > 0.0, tirx.Select(x == math.inf, x, finite), at_ends)


def log1p(x: Any) -> Any:
    """ln(1 + x) = ln u * x / (u - 1) with u = 1 + x as rounded (Kahan)."""

    def correct(u: Any) -> Any:
        tiny = tirx.Select(u == 1.0, x, log(u) * (x / (u - 1.0)))
        return tirx.Select(u == math.inf, u, tiny)

    return _let(x + 1.0, correct)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e**-x) = 2**-64 / (2**-64 + 2**(n-64) * e**r) with -x = n ln2 + r; so scaled, nothing overflows."""
    tiny = _const(x, 2.0**-64)
    # The bits of this sum with n end with those of n + 63, the exponent of 2**(n-64).
    rounder = _ROUNDER + 63.0

    def assemble(a: Any, t: Any, n: Any) -> Any:
        r = n * -_LN2_LO + (n * -_LN2_HI - a)
        power = _as_float(_as_int(t) << _int_const(x, 23))
        return _let(r, lambda r: tiny / (_polynomial(r, _EXP_SHORT) * power + tiny))

    def split(a: Any) -> Any:
        return _let(a * -_LOG2_E + rounder, lambda t: _let(t - rounder, lambda n: assemble(a, t, n)))

    # From 40 on the result is 1; below -104 it is 0.
    return _let(_clamped(x, -104.0, 40.0), split)


def tanh(x: Any) -> Any:
    """-m / (m + 2) with m = e**(-2|x|) - 1, the sign put back."""
    return _copy_sign(_let(expm1(_magnitude(x) * -2.0), lambda m: m / (m + 2.0)), x)


def erf(x: Any) -> Any:
    """A polynomial near 0; 1 - e**polynomial beyond 0.9277."""
    t = _magnitude(x)
    square = x * x
    near = _polynomial(square, _ERF_SMALL) * x + x
    # Clamped: from 4 on the result is 1, and the polynomial would turn round far outside.
    far = _let(tirx.Select(t > 4.0, _const(x, 4.0), t), lambda a: 1.0 - exp(_polynomial(a, _ERF_LARGE) * a - a))
    return tirx.Select(t > 0.927734375, _copy_sign(far, x), near)


def gelu(x: Any) -> Any:
    """x * P(normal <= x), where P - 1/2 is odd and a quotient of polynomials of x * x."""

    def inside(a: Any) -> Any:
        return _let(a * a, lambda z: _polynomial(z, _NORMAL_NUMERATOR) * a / _polynomial(z, _NORMAL_DENOMINATOR))

    above = tirx.Select(x > _NORMAL_END, _const(x, _NORMAL_END), x)
    clamped = tirx.Select(x < -_NORMAL_END, _const(x, -_NORMAL_END), above)
    return x * tirx.Select(x < -_NORMAL_END, _const(x, 0.0), _let(clamped, inside) + 0.5)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "exp": exp,
    "expm1": expm1,
    "log": log,
    "log1p": log1p,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "erf": erf,
    "gelu": gelu,
}
"""The functions with a vectorised form, by name."""


@cache
def register() -> None:
    """Make `cnnc.<name>` operators of TVM: pure, vectorisable, lowered by the functions here.  Idempotent."""
    for name, function in FUNCTIONS.items():
        register_operator(f"cnnc.{name}", 1, _lowering(function), function.__doc__ or "")


def call(name: str, x: Any) -> Any:
    """Apply a function of `FUNCTIONS` to a float32 expression."""
    return tirx.call_intrin("float32", f"cnnc.{name}", x)


def _lowering(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda call: _let(call.args[0], function)


def _type(x: Any) -> str:
    return str(x.ty.dtype)


def _lanes(x: Any) -> str:
    return _type(x).removeprefix("float32").removeprefix("int32")


def _const(x: Any, value: float) -> Any:
    return tirx.const(value, _type(x))


def _int_const(x: Any, value: int) -> Any:
    return tirx.const(value, "int32" + _lanes(x))


def _let(value: Any, body: Callable[[Any], Any]) -> Any:
    """Name an expression that `body` uses more than once."""
    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def _as_int(x: Any) -> Any:
    return tirx.reinterpret("int32" + _lanes(x), x)


def _as_float(x: Any) -> Any:
    return tirx.reinterpret("float32" + _lanes(x), x)


def _magnitude(x: Any) -> Any:
    return _as_float(_as_int(x) & 0x7FFFFFFF)


def _copy_sign(magnitude: Any, x: Any) -> Any:
    """Give `magnitude` (of any sign) the sign of x."""
    return _as_float((_as_int(magnitude) & 0x7FFFFFFF) | (_as_int(x) & -0x80000000))


def _shift_right(x: Any, bits: int) -> Any:
    return x >> _int_const(x, bits)


def _power_of_two(n: Any) -> Any:
    """2**n for -127 < n < 128."""
    return _as_float((n + 127) << _int_const(n, 23))


def _scale(y: Any, n: Any) -> Any:
    """y * 2**n in two steps, so that overflow and subnormals round once and correctly."""
    return _let(_shift_right(n, 1), lambda half: y * _power_of_two(half) * _power_of_two(n - half))


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    """Evaluate by Horner's rule, highest power first."""
    result: Any = _const(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result


def _reduce(x: Any, low: float, high: float, then: Callable[[Any, Any], Any]) -> Any:
    """Clamp x, split it into n ln2 + r, and give `then(n, r)`."""
    return _split(_clamped(x, low, high), then)


def _clamped(x: Any, low: float, high: float) -> Any:
    """Bring x to [low, high]; NaN passes."""
    above = tirx.Select(x > high, _const(x, high), x)
    return tirx.Select(x < low, _const(x, low), above)


def _split(x: Any, then: Callable[[Any, Any], Any]) -> Any:
    """Split x, |x| < 128, into n ln2 + r, and give `then(n, r)`."""

    def split(a: Any) -> Any:
        return _let(a * _LOG2_E + _ROUNDER, lambda t: _let(t - _ROUNDER, lambda n: remainder(a, t, n)))

    def remainder(a: Any, t: Any, n: Any) -> Any:
        r = n * -_LN2_LO + (n * -_LN2_HI + a)
        return _let(_as_int(t) - _ROUNDER_BITS, lambda i: _let(r, lambda r: then(i, r)))

    return _let(x, split)


def _expm1_near_zero(r: Any) -> Any:
    """e**r - 1 for |r| <= ln2 / 2."""
    return _polynomial(r, _EXP) * (r * r) + r


def _log_near_one(f: Any, n: Any) -> Any:
    """ln(1 + f) + n ln2."""
    square = f * f
    tail = _polynomial(f, _LOG) * f * square + n * _LN2_LO - square * 0.5
    return n * _LN2_HI + (f + tail)
