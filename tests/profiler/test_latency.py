"""Statistics over turns, and ratios of what was measured in the same rounds."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from cnnc.profiler.contest import Outcome, ratio
from cnnc.profiler.latency import Latency, quartiles, run_for


def test_a_turn_counts_as_much_as_another_however_many_runs_it_holds() -> None:
    turns = [[1.0] * 1000, [5.0, 5.0], [7.0], [6.0, 4.0, 5.0]]
    latency = Latency.of(turns)
    assert latency.median == 5.0
    assert latency.runs == 1006
    assert latency.minimum == 1.0
    assert latency.throughput == pytest.approx(1 / statistics.fmean([*[1.0] * 1000, 5, 5, 7, 6, 4, 5]))


def test_statistics_agree_with_numpy(rng: np.random.Generator) -> None:
    turns = rng.exponential(1.0, (9, 40))
    latency = Latency.of([list(turn) for turn in turns])
    medians = np.median(turns, axis=1)
    low, middle, high = np.quantile(medians, (0.25, 0.5, 0.75))
    assert latency.median == pytest.approx(middle)
    assert latency.spread == pytest.approx((high - low) / middle)
    assert latency.mean == pytest.approx(turns.mean())
    assert latency.p90 == pytest.approx(np.quantile(turns, 0.9, method="higher"))
    assert quartiles(list(medians)) == pytest.approx((low, middle, high))


def test_one_turn_is_its_own_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert Latency.of([[2.0, 4.0]]).spread == 0


def test_only_turns_that_differ_are_called_unstable() -> None:
    # A run that is interrupted now and then does not move a turn's median.
    steady = [[1.0] * 9 + [50.0]] * 8
    assert Latency.of(steady).advice() == []
    (line,) = Latency.of([[1.0], [2.0], [1.0], [2.0]]).advice()
    assert "differ by 67%" in line


def test_a_round_that_is_slow_for_both_leaves_their_ratio_alone() -> None:
    slowed = [1.0, 3.0, 1.0, 2.0, 8.0]
    ours = Outcome("ours", rounds=tuple((2.0 * s,) for s in slowed))
    peer = Outcome("peer", rounds=tuple((3.0 * s, 3.0 * s, 90.0) for s in slowed))
    found = ratio(peer, ours)
    assert (found.low, found.median, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_runs_at_least_once_and_until_the_time_is_over() -> None:
    assert len(run_for(lambda: None, 0.0)) == 1
    seconds = run_for(lambda: None, 0.01)
    assert len(seconds) > 1
    assert 0 < sum(seconds) <= 0.5
