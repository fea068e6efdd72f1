"""How `cnnc bench` reports: every engine on one network, or one row a network and thread count, and JSON with all."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cnnc.cli.report import print_table, seconds_text
from cnnc.options import format_bytes
from cnnc.profiler.contest import Outcome, Plan, Ratio
from cnnc.profiler.machine import Machine
from cnnc.profiler.standings import Contest, geometric_means


def print_report(contests: Sequence[Contest], machine: Machine, reference: str | None) -> None:
    """Print the machine, the table that fits, and what stands in the way of trusting it."""
    outcomes = [outcome for contest in contests for outcome in (contest.ours, *contest.peers)]
    # OpenVINO's goes on with the hash and branch it was built from.
    versions = {o.engine: o.version.partition("-")[0] for o in outcomes if o.version}
    targets = ", ".join(dict.fromkeys(contest.target for contest in contests if contest.target))
    click.echo(f"{machine.cpu}, {machine.cpus} CPUs, {machine.system}, Python {machine.python}, {machine.date}")
    click.echo(f"{', '.join(f'{engine} {text}' for engine, text in versions.items())}; target {targets}")
    if len({contest.model for contest in contests}) == 1:
        _print_engines(contests)
    else:
        _print_networks(contests)
    if reference is not None:
        click.echo(f"errors: relative L2 against {reference}, the worst output; ratios: medians over the rounds")
    for line in (*machine.advice(), *_notes(contests)):
        click.echo(f"note: {line}")


def describe(contests: Sequence[Contest], machine: Machine, plan: Plan, reference: str | None) -> dict[str, Any]:
    """Give the JSON report."""
    return {
        "machine": asdict(machine),
        "plan": asdict(plan),
        "error_against": reference,
        "results": [_describe_outcome(contest, o) for contest in contests for o in (contest.ours, *contest.peers)],
        "standings": [
            {"model": c.model, "threads": c.threads, "best_peer": c.best, "ratio": _describe_ratio(c.ratio_to_best)}
            for c in contests
        ],
        "geometric_means": [asdict(mean) for mean in geometric_means(contests)],
    }


def threads_text(count: int) -> str:
    """Write a number of threads for people."""
    return "1 thread" if count == 1 else f"{count} threads"


def _describe_outcome(contest: Contest, outcome: Outcome) -> dict[str, Any]:
    latency = outcome.latency
    return {
        "model": contest.model,
        "target": contest.target,
        "threads": contest.threads,
        "engine": outcome.engine,
        "version": outcome.version,
        "status": outcome.status,
        "reason": outcome.reason,
        # JSON has no infinity; the reason tells it.
        "error": outcome.error if outcome.error != float("inf") else None,
        **(asdict(latency) if latency else {}),
        "round_medians": [statistics.median(turn) for turn in outcome.rounds],
        "ratio": _describe_ratio(contest.ratio_to(outcome.engine)),
        "startup": asdict(outcome.startup) if outcome.startup else None,
        "peak_bytes": outcome.peak_bytes,
    }


def _describe_ratio(ratio: Ratio | None) -> dict[str, float] | None:
    return asdict(ratio) if ratio is not None else None


def _print_engines(contests: Sequence[Contest]) -> None:
    """Print one row for each engine and thread count."""
    headings = ("median", "min", "p90", "p99", "runs/s", "against cnnc", "by round", "error", "to 1st result", "memory")
    columns = [("threads", "right"), ("engine", "left"), *((heading, "right") for heading in headings)]
    rows = []
    for contest in contests:
        for outcome in (contest.ours, *contest.peers):
            ratio = contest.ratio_to(outcome.engine)
            startup = outcome.startup
            rows.append(
                [
                    contest.threads,
                    outcome.engine,
                    *_times(outcome),
                    f"{ratio.median:.2f}x" if ratio else "",
                    f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else "",
                    _error_text(outcome),
                    seconds_text(startup.seconds) if startup else "",
                    format_bytes(outcome.peak_bytes) if outcome.peak_bytes else "",
                ]
            )
    print_table(contests[0].model, columns, rows)


def _times(outcome: Outcome) -> list[str]:
    lat = outcome.latency
    if lat is None:
        return [outcome.status, "", "", "", ""]
    return [*(seconds_text(t) for t in (lat.median, lat.minimum, lat.p90, lat.p99)), f"{lat.throughput:.1f}"]


def _print_networks(contests: Sequence[Contest]) -> None:
    """Print one row for each network and thread count, and below them the geometric means."""
    peers = list(dict.fromkeys(peer.engine for contest in contests for peer in contest.peers))
    columns = [("model", "left"), ("threads", "right"), *((name, "right") for name in ("cnnc", *peers))]
    columns += [("best peer", "left"), ("ratio", "right"), ("by round", "right"), ("error", "right")]
    rows: list[list[object]] = []
    for contest in contests:
        medians = {outcome.engine: _times(outcome)[0] for outcome in (contest.ours, *contest.peers)}
        ratio = contest.ratio_to_best
        rows.append(
            [
                Path(contest.model).name,
                contest.threads,
                *(medians.get(name, "") for name in ("cnnc", *peers)),
                contest.best or "",
                f"{ratio.median:.2f}x" if ratio else "",
                f"{ratio.low:.2f} to {ratio.high:.2f}" if ratio else "",
                _error_text(contest.ours),
            ]
        )
    print_table("Median times, and how many times faster than its best peer cnnc is", columns, rows)
    for line in _means_text(contests):
        click.echo(line)


def _means_text(contests: Sequence[Contest]) -> list[str]:
    """Write the geometric means, one line for each thread count, with how many networks each is over."""
    means = geometric_means(contests)
    lines = []
    for threads in dict.fromkeys(mean.threads for mean in means):
        count = len([contest for contest in contests if contest.threads == threads])
        ratios = [
            f"{mean.ratio:.2f}x {'the best peer' if mean.engine == 'best' else mean.engine} ({mean.models} of {count})"
            for mean in means
            if mean.threads == threads
        ]
        lines.append(f"geometric mean over networks, {threads_text(threads)}: {', '.join(ratios)}")
    return lines


def _error_text(outcome: Outcome) -> str:
    return f"{outcome.error:.1e}" if outcome.error is not None else ""


def _notes(contests: Sequence[Contest]) -> list[str]:
    """Say of every engine that did not do well why."""
    notes = []
    for contest in contests:
        for outcome in (contest.ours, *contest.peers):
            who = f"{outcome.engine} on {Path(contest.model).name}, {threads_text(contest.threads)}"
            if outcome.status != "ok":
                notes.append(f"{who}: {outcome.status}: {outcome.reason}")
            if outcome.latency is not None:
                notes += [f"{who}: {line}" for line in outcome.latency.advice()]
    return notes
