"""Sliding windows: the number of windows is what counting them gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cnnc.errors import ShapeError
from cnnc.ir.types import Dim
from cnnc.ops.window import Window, split_padding


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_output_is_what_counting_gives(ceil_mode: bool) -> None:
    for size, kernel, stride, begin, end, dilation in itertools.product(
        range(1, 8), range(1, 4), range(1, 4), range(3), range(3), range(1, 3)
    ):
        window = Window((kernel,), (stride,), (begin, end), (dilation,))
        reach = window.reach[0]
        if size + begin + end < reach:
            with pytest.raises(ShapeError, match="larger than spatial axis 0"):
                window.output("pool", (size,), ceil_mode)
            continue
        if ceil_mode and max(begin, end) >= reach:
            # Pools refuse such padding.
            continue
        # A whole window fits; with ceil_mode one more may hang over, if it starts inside or in the front padding.
        starts = [s for s in range(-begin, size + end, stride) if s + reach <= size + end]
        if ceil_mode and starts[-1] + reach < size + end and starts[-1] + stride < size:
            starts.append(starts[-1] + stride)
        assert window.output("pool", (size,), ceil_mode) == (len(starts),)


def test_run_time_sizes() -> None:
    width = Dim.symbol("w", 32)
    (count,) = Window((3,), (2,), (1, 1), (1,)).output("conv", (width,))
    assert isinstance(count, Dim)
    for size in (1, 2, 7, 32):
        assert count.evaluate({"w": size}) == len(range(-1, size - 1, 2))


def test_split_padding() -> None:
    assert split_padding([3, 4], more_at_end=True) == (1, 2, 2, 2)
    assert split_padding([3, 4], more_at_end=False) == (2, 2, 1, 2)


def test_taps_see_what_windows_read() -> None:
    window = Window((2, 3), (2, 1), (1, 0, 0, 2), (1, 2))
    x = np.arange(30, dtype=np.float32).reshape(1, 1, 5, 6)
    sizes = tuple(int(str(s)) for s in window.output("pool", (5, 6)))
    padded = window.padded(x, sizes, -1)
    for tap in window.taps():
        seen = window.tap_view(padded, tap, sizes)
        for index in np.ndindex(*sizes):
            h, w = window.position(index, tap)
            inside = 0 <= h < 5 and 0 <= w < 6
            assert seen[(0, 0, *index)] == (x[0, 0, h, w] if inside else -1)
