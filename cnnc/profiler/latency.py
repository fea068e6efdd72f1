"""Statistics over the times of single runs, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

UNSTABLE = 0.1


@dataclass(frozen=True)
class Latency:
    """Statistics over single runs, in seconds."""

    runs: int
    minimum: float
    mean: float
    median: float
    """The median of the turns' medians: a turn that other load slows down holds fewer runs, but counts as much."""
    p90: float
    p95: float
    p99: float
    spread: float
    """How far the quartiles of the turns' medians lie apart, as a share of their median."""

    @staticmethod
    def of(turns: Sequence[Sequence[float]]) -> Latency:
        """Sum up the run times of turns that were as long as each other."""
        ordered = sorted(seconds for turn in turns for seconds in turn)
        low, middle, high = quartiles([statistics.median(turn) for turn in turns])
        p90, p95, p99 = (_percentile(ordered, share) for share in (0.90, 0.95, 0.99))
        return Latency(
            runs=len(ordered),
            minimum=ordered[0],
            mean=statistics.fmean(ordered),
            median=middle,
            p90=p90,
            p95=p95,
            p99=p99,
            spread=(high - low) / middle if middle > 0 else 0.0,
        )

    @property
    def throughput(self) -> float:
        """Runs a second."""
        return 1 / self.mean if self.mean > 0 else float("inf")

    def advice(self) -> list[str]:
        """Say what stands in the way of trusting the figures."""
        if self.spread > UNSTABLE:
            return [f"unstable: its turns differ by {self.spread:.0%}; other load on the machine? trust the minimum"]
        return []


def run_for(run: Callable[[], object], duration: float) -> list[float]:
    """Run at least once, until `duration` seconds are over; gives the seconds of each run."""
    seconds = []
    end = time.perf_counter() + duration
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        seconds.append(now - start)
        if now >= end:
            return seconds


def quartiles(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Give the lower quartile, the median and the upper quartile; of a single number, itself."""
    if len(numbers) == 1:
        return numbers[0], numbers[0], numbers[0]
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return low, middle, high


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
