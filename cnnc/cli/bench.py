"""`cnnc bench`: latency and throughput, alone or against other engines in the same run."""

from __future__ import annotations

import platform
import resource
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click
import numpy as np

from cnnc.cli.arguments import compile_options, open_model
from cnnc.cli.inputs import input_options, read_inputs
from cnnc.cli.report import print_json, print_table, seconds_text
from cnnc.errors import UsageError
from cnnc.module import Module
from cnnc.options import format_bytes
from cnnc.profiler.accuracy import relative_error
from cnnc.profiler.engines import Runner, onnxruntime_runner
from cnnc.profiler.latency import Latency, measure
from cnnc.target import cpu_model_name


@click.command("bench")
@click.argument("model")
@input_options
@click.option("--threads", default="1", show_default=True, metavar="1,2", help="Thread counts to measure.")
@click.option("--warmup-ms", type=click.IntRange(min=0), default=200, show_default=True)
@click.option("--duration", type=float, default=3.0, show_default=True, help="Seconds for each engine.")
@click.option("--against", help="Other engines, in interleaved rounds of the same run: onnxruntime.")
@compile_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: str, threads: str, warmup_ms: int, duration: float, against: str | None, as_json: bool, **arguments: Any
) -> None:
    """Measure the latency of MODEL (net.so, net.onnx, file.py:network)."""
    counts = _parse_threads(threads)
    opened = open_model(model, {**arguments, "threads": counts[0]})
    feeds = read_inputs(opened.module.inputs, arguments)
    results = []
    for count in counts:
        module = opened.module.with_threads(count)
        runners = _runners(module, model, against, count)
        wanted = module.run(feeds)
        errors = {name: _difference(run(feeds), wanted) for name, run in runners.items()}
        calls: dict[str, Callable[[], object]] = {name: _bound(run, feeds) for name, run in runners.items()}
        for name, latency in measure(calls, warmup_ms / 1000, duration).items():
            results.append((count, name, latency, errors[name]))
    machine = {
        "cpu": cpu_model_name(),
        "system": platform.platform(),
        "target": opened.module.meta["options"]["target"],
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if as_json:
        rows = [{"threads": c, "engine": n, **asdict(lat), "difference": e} for c, n, lat, e in results]
        print_json("bench", {"model": model, "machine": machine, "results": rows, "peak_memory_bytes": memory})
        return
    _print(results, opened.seconds, memory)


def _runners(module: Module, model: str, against: str | None, threads: int) -> dict[str, Runner]:
    runners: dict[str, Runner] = {"cnnc": module.run}
    for name in against.split(",") if against else ():
        if name != "onnxruntime":
            raise UsageError(f"--against {name!r} is not known; use onnxruntime")
        runners[name] = onnxruntime_runner(model, threads)
    return runners


def _difference(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    return max(relative_error(got[name], array) for name, array in wanted.items())


def _bound(run: Runner, feeds: dict[str, Any]) -> Callable[[], object]:
    return lambda: run(feeds)


def _print(results: list[tuple[int, str, Latency, float]], load: float, memory: int) -> None:
    columns = [("threads", "right"), ("engine", "left")]
    columns += [(h, "right") for h in ("min", "median", "mean", "p90", "p99", "runs/s", "cv", "against cnnc", "error")]
    rows = []
    medians = {count: latency.median for count, name, latency, _ in results if name == "cnnc"}
    for count, name, lat, error in results:
        times = [seconds_text(t) for t in (lat.minimum, lat.median, lat.mean, lat.p90, lat.p99)]
        ratio = f"{lat.median / medians[count]:.2f}x"
        rows.append([count, name, *times, f"{lat.throughput:.1f}", f"{lat.variation:.1%}", ratio, f"{error:.1e}"])
    print_table("Latency", columns, rows)
    click.echo(f"ready after {seconds_text(load)}, peak memory {format_bytes(memory)}")
    for count, name, latency, _ in results:
        for line in latency.advice():
            click.echo(f"note: {name}, {count} threads: {line}")


def _parse_threads(text: str) -> list[int]:
    try:
        counts = [int(item) for item in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"--threads {text!r} cannot be read; write counts, as 1,2")
    return counts
