"""Latency of one or more engines on the same inputs, measured in interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

ROUNDS = 10
"""Each engine's time is spread over so many turns, A B C A B C, so that drift of the machine meets all alike."""

UNSTABLE = 0.1


@dataclass(frozen=True)
class Latency:
    """Statistics over single runs, in seconds."""

    runs: int
    minimum: float
    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    variation: float
    """Standard deviation over mean."""

    @staticmethod
    def of(seconds: Sequence[float]) -> Latency:
        """Sum up a list of run times."""
        ordered = sorted(seconds)
        mean = statistics.fmean(ordered)
        spread = statistics.pstdev(ordered) / mean if mean > 0 else 0.0
        p90, p95, p99 = (_percentile(ordered, share) for share in (0.90, 0.95, 0.99))
        return Latency(len(ordered), ordered[0], mean, statistics.median(ordered), p90, p95, p99, spread)

    @property
    def throughput(self) -> float:
        """Runs a second."""
        return 1 / self.mean if self.mean > 0 else float("inf")

    def advice(self) -> list[str]:
        """Say what stands in the way of trusting the figures."""
        if self.variation > UNSTABLE:
            return [
                f"unstable: times vary by {self.variation:.0%}; other load on the machine? use the median or minimum"
            ]
        return []


def measure(engines: Mapping[str, Callable[[], object]], warmup: float, duration: float) -> dict[str, Latency]:
    """Time each engine for `duration` seconds after `warmup` seconds, in interleaved rounds."""
    for run in engines.values():
        _run_for(run, warmup)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(ROUNDS):
        for name, run in engines.items():
            times[name] += _run_for(run, duration / ROUNDS)
    return {name: Latency.of(seconds) for name, seconds in times.items()}


def _run_for(run: Callable[[], object], duration: float) -> list[float]:
    """Run at least once, until `duration` seconds are over."""
    seconds = []
    end = time.perf_counter() + duration
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        seconds.append(now - start)
        if now >= end:
            return seconds


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
