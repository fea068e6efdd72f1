"""Best peers and geometric means; what failed or was wrong is never counted."""

from __future__ import annotations

import math

import pytest

from cnnc.profiler.contest import Outcome, Status
from cnnc.profiler.standings import Contest, Mean, geometric_means


def outcome(engine: str, seconds: float, status: Status = "ok") -> Outcome:
    return Outcome(engine, status=status, rounds=((seconds,), (seconds,)))


def contest(model: str, ours: Outcome, *peers: Outcome, threads: int = 1) -> Contest:
    return Contest(model, "cpu", threads, ours, peers)


def test_the_best_peer_is_the_fastest_that_was_right() -> None:
    found = contest("m", outcome("cnnc", 2.0), outcome("a", 1.0, "wrong"), outcome("b", 5.0), outcome("c", 3.0))
    assert found.best == "c"
    assert found.ratio_to_best is not None
    assert found.ratio_to_best.median == 1.5
    assert found.ratio_to("a") is None
    assert found.ratio_to("d") is None


@pytest.mark.parametrize("status", ["wrong", "failed", "hung", "crashed"])
def test_without_right_numbers_of_ours_there_is_no_ratio(status: Status) -> None:
    found = contest("m", outcome("cnnc", 0.1, status), outcome("a", 1.0), outcome("b", 0.5))
    assert found.best == "b"
    assert found.ratio_to_best is None
    assert geometric_means([found]) == []


def test_without_a_peer_that_is_right_nothing_is_won() -> None:
    found = contest("m", outcome("cnnc", 0.1), outcome("a", 1.0, "crashed"))
    assert found.best is None
    assert found.ratio_to_best is None


def test_means_are_geometric_and_by_thread_count() -> None:
    contests = [
        contest("m", outcome("cnnc", 1.0), outcome("a", 2.0), outcome("b", 3.0)),
        contest("n", outcome("cnnc", 1.0), outcome("a", 5.0), outcome("b", 4.0)),
        contest("o", outcome("cnnc", 1.0), outcome("a", 9.0), outcome("b", 9.0, "hung")),
        contest("p", outcome("cnnc", 1.0, "wrong"), outcome("a", 1000.0), outcome("b", 1000.0)),
        contest("q", Outcome("cnnc", status="failed")),
        contest("m", outcome("cnnc", 1.0), outcome("a", 0.5), outcome("b", 0.25), threads=2),
    ]
    assert geometric_means(contests) == [
        Mean(1, "best", 3, pytest.approx(math.cbrt(2 * 4 * 9))),
        Mean(1, "a", 3, pytest.approx(math.cbrt(2 * 5 * 9))),
        Mean(1, "b", 2, pytest.approx(math.sqrt(3 * 4))),
        Mean(2, "best", 1, pytest.approx(0.25)),
        Mean(2, "a", 1, pytest.approx(0.5)),
        Mean(2, "b", 1, pytest.approx(0.25)),
    ]
