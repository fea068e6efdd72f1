"""Rows numbered through all axes before the last: where one lies, and how many are left for a slice."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["at_most", "position"]


def position(extents: tuple[int, ...], row: Any) -> list[Any]:
    """Give the indices along leading axes of row number `row`."""
    found: list[Any] = []
    wide = [axis for axis, extent in enumerate(extents) if extent > 1]
    for axis, extent in enumerate(extents):
        index = row // math.prod(extents[axis + 1 :])
        found.append(0 if axis not in wide else index if axis == wide[0] else index % extent)
    return found


def at_most(count: int, total: int, first: Any) -> Any:
    """Give how many of `count` there are from `first` on, of `total`."""
    from tvm import tirx

    from cnnc.backends.lower import loops

    return count if total % count == 0 else tirx.min(loops.const(count), total - first)
