"""The search for schedules: what may replace the default."""

from __future__ import annotations

import pytest

from cnnc.profiler.tune import _divides_as_well


@pytest.mark.parametrize(
    ("slices", "default", "allowed"),
    [
        (1, 4, False),  # nothing for a second thread
        (3, 4, False),
        (9, 64, False),  # 16 of 9 with 8 threads
        (15, 64, True),
        (57, 64, True),
        (4, 4, True),
        (1, 1, True),
        (5, 1, True),
    ],
)
def test_candidates_must_divide_among_threads_as_well_as_the_default(slices: int, default: int, allowed: bool):
    assert _divides_as_well(slices, default) is allowed
