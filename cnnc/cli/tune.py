"""`cnnc tune`: find the fastest schedules of a network's kernels by measuring them on this machine."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import cnnc
from cnnc.cli.arguments import model_options, open_model, threads_option
from cnnc.cli.inputs import read_inputs
from cnnc.cli.progress import Search
from cnnc.cli.report import print_json, print_table, seconds_text
from cnnc.errors import UsageError
from cnnc.module import Module
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.build import Build
    from cnnc.profiler.tune import Outcome, TunableKernel

_PROFILED_RUNS = 10
_COMPARED_SECONDS = 3.0
_FEWEST_RUNS = 5
_FAULTY = 70
_SHOWN_LAYERS = 3
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


@click.command("tune")
@click.argument("model")
@click.option("--time", "limit", metavar="10m", help="Stop after so long (s, m, h); no limit by default.")
@click.option("--resume", is_flag=True, help="Leave out kernels that already have a complete record.")
@click.option("--records", "file", type=click.Path(path_type=Path), help="Where records go instead of your own file.")
@click.option("--candidates", type=click.IntRange(min=2), default=24, show_default=True, help="Schedules a kernel.")
@threads_option
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: str, limit: str | None, resume: bool, file: Path | None, candidates: int, as_json: bool, **arguments: Any
) -> int:
    """Measure schedules for the kernels of MODEL (net.onnx, file.py:network) and keep the best ones.

    Kernels come in the order of their share of the run time, and each is kept as soon as it is measured: what an
    interrupted search found is used by the next compile, and --resume goes on from there.  The records go to
    $CNNC_RECORDS, or to your user data folder, and are used by every compile for the same target and threads.

    Exit code 70 says that some schedule gave other numbers than the default, or did not compile; such a schedule is
    never kept.  It is a bug of cnnc: please report what is printed.
    """
    from cnnc.backends.records import user_file
    from cnnc.profiler.tune import tunable_kernels, without_record

    target = Target.parse(arguments["target"], arguments["threads"])
    if target.is_gpu:
        raise UsageError(f"tune measures schedules on this machine's CPU; {target} has one schedule for each kernel")
    if isinstance(arguments["batch"], tuple):
        raise UsageError("a search is for one batch size; tune each by itself, the records are kept side by side")
    deadline = time.monotonic() + _parse_time(limit)
    path = user_file() if file is None else file
    untuned = open_model(model, {**arguments, "no_records": True}).module
    feeds = _feeds(untuned)
    all_kernels = tunable_kernels(_build_of(untuned), untuned.profile(feeds, _PROFILED_RUNS), target)
    kernels = without_record(all_kernels, path, target) if resume else all_kernels
    outcomes = _search(kernels, target, path, candidates, deadline)
    runs = _compare(model, untuned, arguments, path, feeds) if outcomes else {}
    counts = {"distinct": len(all_kernels), "left_out": len(all_kernels) - len(kernels), "tuned": len(outcomes)}
    if as_json:
        _print_json(model, path, counts, outcomes, runs)
    else:
        _print(path, counts, outcomes, runs)
    return _report_faults(outcomes, target)


def _search(
    kernels: Sequence[TunableKernel], target: Target, path: Path, candidates: int, deadline: float
) -> list[Outcome]:
    """Tune the kernels, with progress on stderr."""
    from cnnc.profiler.tune import Step, tune

    with Search(deadline - time.monotonic()) as search:

        def show(step: Step) -> None:
            search(f"{step.kernel.layers[0]} {step.ratio:.2f}x", step.done, step.total)

        found = tune(
            *(kernels, target, path),
            candidates=candidates,
            version=cnnc.__version__,
            deadline=deadline,
            progress=show,
        )
        try:
            return list(found)
        except KeyboardInterrupt:
            click.echo(f"cnnc: the records so far are in {path}; --resume goes on", err=True)
            raise


def _parse_time(text: str | None) -> float:
    """Read a duration such as 90s, 10m or 1.5h as seconds."""
    if text is None:
        return math.inf
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise UsageError(f"--time {text!r} is no duration; write it as 90s, 10m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def _build_of(module: Module) -> Build:
    if module.build is None:
        raise UsageError("a loaded binary cannot be tuned; tune the model it was made from")
    return module.build


def _feeds(module: Module) -> dict[str, Any]:
    return read_inputs(module.inputs, {"inputs": (), "seed": 0, "mean": "0,0,0", "std": "1,1,1"})


def _compare(
    model: str, untuned: Module, arguments: dict[str, Any], path: Path, feeds: dict[str, Any]
) -> dict[str, float]:
    """Give the least seconds of a run without the records and with them, in turns."""
    tuned = open_model(model, {**arguments, "records": path}).module
    seconds: dict[str, list[float]] = {"untuned": [], "tuned": []}
    end = time.perf_counter() + _COMPARED_SECONDS
    while len(seconds["tuned"]) < _FEWEST_RUNS or time.perf_counter() < end:
        for name, module in (("untuned", untuned), ("tuned", tuned)):
            start = time.perf_counter()
            module.run(feeds)
            seconds[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in seconds.items()}


def _layers(kernel: TunableKernel) -> str:
    rest = len(kernel.layers) - _SHOWN_LAYERS
    return ", ".join(kernel.layers[:_SHOWN_LAYERS]) + (f", +{rest} more" if rest > 0 else "")


def _print(path: Path, counts: dict[str, int], outcomes: Sequence[Outcome], runs: dict[str, float]) -> None:
    from cnnc.profiler.tune import tuned_ratio

    if not outcomes:
        done = counts["left_out"] == counts["distinct"]
        reason = f"all {counts['distinct']} kernels have a record in {path}" if done else "time ran out before it began"
        click.echo(f"nothing to tune: {reason}")
        return
    columns = [("share", "right"), ("calls", "right"), ("untuned", "right"), ("tuned", "right"), ("ratio", "right")]
    columns += [("tried", "right"), ("schedule", "left"), ("layers", "left")]
    rows = [
        [
            f"{o.kernel.share:.1%}",
            o.kernel.calls,
            seconds_text(o.default_seconds),
            seconds_text(o.seconds),
            f"{o.ratio:.3f}",
            o.tried,
            "as untuned" if o.best == o.default else str(o.best),
            _layers(o.kernel),
        ]
        for o in outcomes
    ]
    print_table("Kernels", columns, rows)
    share = sum(o.kernel.share for o in outcomes)
    click.echo(f"tuned {counts['tuned']} of {counts['distinct']} kernels ({share:.0%} of the run time)")
    click.echo(f"the untuned choice reaches {tuned_ratio(outcomes):.1%} of the tuned speed in these kernels")
    before, after = runs["untuned"], runs["tuned"]
    click.echo(f"a run takes {seconds_text(after)}, untuned {seconds_text(before)} (the least of interleaved runs)")
    click.echo(f"wrote {path}")


def _print_json(
    model: str, path: Path, counts: dict[str, int], outcomes: Sequence[Outcome], runs: dict[str, float]
) -> None:
    kernels = [
        {
            "layers": o.kernel.layers,
            "calls": o.kernel.calls,
            "share": o.kernel.share,
            "default": str(o.default),
            "default_seconds": o.default_seconds,
            "schedule": str(o.best),
            "seconds": o.seconds,
            "tried": o.tried,
            "complete": o.complete,
            "faults": {str(schedule): what for schedule, what in o.faults.items()},
        }
        for o in outcomes
    ]
    print_json("tune", {"model": model, "records": str(path), **counts, "kernels": kernels, "run_seconds": runs})


def _report_faults(outcomes: Sequence[Outcome], target: Target) -> int:
    """Print every schedule that was wrong, with what is needed to see it again."""
    from cnnc.backends.records import kernel_text

    count = 0
    for outcome in outcomes:
        for schedule, what in outcome.faults.items():
            count += 1
            click.echo(f"cnnc: bug: {schedule} {what}; default {outcome.default}, {target}, kernel", err=True)
            click.echo(kernel_text(outcome.kernel.kernel), err=True)
    return _FAULTY if count else 0
