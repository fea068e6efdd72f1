"""Several engines on one GPU by turns: how long a run takes, alone and among others of its kind."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

ROUNDS = 5
SINGLE_RUNS = 20
"""Runs waited for one by one, in each round."""


class Engine(Protocol):
    """A network ready to run, its data on the GPU."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    def start(self) -> None:
        """Put a run into the engine's stream."""

    def wait(self) -> None:
        """Return when all runs are done."""


@dataclass(frozen=True)
class Timing:
    """Seconds from asking for a run to its end, and seconds of one of many runs in a row: medians over rounds."""

    latency: float
    interval: float


def take_turns(engines: Sequence[Engine], seconds: float) -> dict[str, Timing]:
    """Measure each engine for some seconds, by turns, A B C A B C; the first runs are not counted."""
    counts = {engine.name: _runs_in(engine, seconds / ROUNDS / 2) for engine in engines}
    latencies: dict[str, list[float]] = {engine.name: [] for engine in engines}
    intervals: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for _ in range(ROUNDS):
        for engine in engines:
            count = counts[engine.name]
            latencies[engine.name].append(statistics.median(_time(engine, 1) for _ in range(min(count, SINGLE_RUNS))))
            intervals[engine.name].append(_time(engine, count) / count)
    return {name: Timing(statistics.median(latencies[name]), statistics.median(intervals[name])) for name in latencies}


def _runs_in(engine: Engine, seconds: float) -> int:
    """Count how many runs take so long, from a few of them, after as many that warm the GPU up."""
    _time(engine, 3)
    each = _time(engine, 3) / 3
    return max(1, min(10_000, math.ceil(seconds / max(each, 1e-7))))


def _time(engine: Engine, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        engine.start()
    engine.wait()
    return time.perf_counter() - start
