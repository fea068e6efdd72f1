"""What contests on many networks come to: ratios to the best peer, and their geometric mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cnnc.profiler.contest import Outcome, Ratio, ratio


@dataclass(frozen=True)
class Contest:
    """How all engines did on one network with so many threads."""

    model: str
    target: str
    threads: int
    ours: Outcome
    peers: tuple[Outcome, ...]

    def ratio_to(self, engine: str) -> Ratio | None:
        """Give the ratio to that peer; None unless it and ours both ran and gave right numbers."""
        peer = next((peer for peer in self.peers if peer.engine == engine), None)
        return ratio(peer, self.ours) if peer is not None and peer.status == self.ours.status == "ok" else None

    @property
    def best(self) -> str | None:
        """The peer that ours is least ahead of; where ours has no time, the peer with the least."""
        ahead = {peer.engine: self.ratio_to(peer.engine) for peer in self.peers}
        fit = {engine: ratio.median for engine, ratio in ahead.items() if ratio is not None}
        fit = fit or {peer.engine: peer.latency.median for peer in self.peers if peer.latency is not None}
        return min(fit, key=fit.__getitem__) if fit else None

    @property
    def ratio_to_best(self) -> Ratio | None:
        """Give the ratio to the best peer; None where one of the two is missing."""
        return self.ratio_to(self.best) if self.best is not None else None


@dataclass(frozen=True)
class Mean:
    """Geometric mean of the ratios to an engine (to the best of each network: `best`) over so many networks."""

    threads: int
    engine: str
    models: int
    ratio: float


def geometric_means(contests: Sequence[Contest]) -> list[Mean]:
    """Give the means by thread count, for the best peer and for each peer, over the networks that have a ratio."""
    means = []
    for threads in dict.fromkeys(contest.threads for contest in contests):
        chosen = [contest for contest in contests if contest.threads == threads]
        means += _mean(threads, "best", (contest.ratio_to_best for contest in chosen))
        for engine in dict.fromkeys(peer.engine for contest in chosen for peer in contest.peers):
            means += _mean(threads, engine, (contest.ratio_to(engine) for contest in chosen))
    return means


def _mean(threads: int, engine: str, ratios: Iterable[Ratio | None]) -> list[Mean]:
    known = [ratio.median for ratio in ratios if ratio is not None]
    if not known:
        return []
    return [Mean(threads, engine, len(known), math.exp(math.fsum(map(math.log, known)) / len(known)))]
