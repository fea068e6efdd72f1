"""The roofline of this machine: measured peak of f32 multiply-adds and of memory reads, one thread.

Source: Williams, Waterman, Patterson, "Roofline", CACM 2009.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import numpy as np

_READ_BYTES = 64 << 20
_REPEATS = 7


@dataclass(frozen=True)
class Roofline:
    """`flops` is f32 operations a second (a multiply-add is 2), `bandwidth` bytes read a second."""

    flops: float
    bandwidth: float

    def attainable(self, flops: int, moved: int) -> float:
        """Give the least seconds that so much arithmetic and memory traffic can take."""
        return max(flops / self.flops, moved / self.bandwidth)


@cache
def machine_roofline() -> Roofline:
    """Measure this machine (about 0.2 s)."""
    return Roofline(_measure_flops(), _measure_bandwidth())


def _measure_flops() -> float:
    """Time a kernel of nothing but independent multiply-adds in registers, built by LLVM for this CPU."""
    from cnnc.backends.host.fma_peak import measure_fma_peak

    return measure_fma_peak()


def _measure_bandwidth() -> float:
    data = np.ones(_READ_BYTES // 8, np.float64)
    return max(data.nbytes / _seconds(data) for _ in range(_REPEATS))


def _seconds(data: np.ndarray) -> float:
    start = time.perf_counter()
    data.sum()
    return time.perf_counter() - start
