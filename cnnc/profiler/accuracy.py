"""Measures of agreement between outputs."""

from __future__ import annotations

import numpy as np


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Give the relative L2 error |got - wanted| / |wanted|; infinite where NaN or Inf stand in other places.

    Elements that are NaN or the same infinity in both count as equal.
    """
    a = got.astype(np.float64)
    b = wanted.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if not np.array_equal(np.isfinite(a), np.isfinite(b)) or not same[~np.isfinite(b)].all():
        return float("inf")
    finite = np.isfinite(b)
    error = float(np.linalg.norm((a - b)[finite]))
    size = float(np.linalg.norm(b[finite]))
    if error == 0:
        return 0.0
    return error / size if size > 0 else float("inf")
