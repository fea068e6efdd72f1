"""`cnnc profile`: where the time goes, by kernel, in the user's own layer names."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from cnnc.cli.arguments import compile_options, open_model, threads_option
from cnnc.cli.inputs import input_options, read_feeds
from cnnc.cli.report import print_json, print_table, seconds_text
from cnnc.module import KernelTiming, Module
from cnnc.profiler.roofline import Roofline, machine_roofline

_SHOWN_LAYERS = 4


@click.command("profile")
@click.argument("model")
@input_options
@click.option("--repeats", type=click.IntRange(min=1), default=20, show_default=True, help="Runs to average over.")
@click.option("--sort", type=click.Choice(["order", "time"]), default="order", show_default=True)
@threads_option
@compile_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(model: str, repeats: int, sort: str, as_json: bool, **arguments: Any) -> None:
    """Profile the kernels of MODEL (net.so, net.onnx, file.py:network).

    --batch chooses one of a binary's batch sizes, else it is the first.
    """
    module = open_model(model, arguments).module
    feeds = read_feeds(module, arguments)
    times = module.profile(feeds, repeats)
    wall = _wall_nanoseconds(module, feeds, repeats)
    # The roofline is that of this machine's CPU, and says nothing of kernels on a GPU.
    roofline = None if module.target.startswith("cuda:") else machine_roofline()
    if sort == "time":
        times = sorted(times, key=lambda t: -t.nanoseconds)
    if as_json:
        kernels = [{**asdict(t), "share": t.nanoseconds / wall, "roofline": _efficiency(t, roofline)} for t in times]
        print_json(
            "profile",
            {
                "model": model,
                "wall_nanoseconds": wall,
                "roofline": asdict(roofline) if roofline else None,
                "kernels": kernels,
            },
        )
        return
    if len(module.batches) > 1:
        click.echo(f"batch size {module.batch_of(feeds)} of {', '.join(map(str, module.batches))}")
    _print(times, wall, roofline, module.threads)


def _wall_nanoseconds(module: Module, feeds: dict[str, Any], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        module.run(feeds)
        seconds.append(time.perf_counter_ns() - start)
    return sum(seconds) / len(seconds)


def _efficiency(kernel: KernelTiming, roofline: Roofline | None) -> float | None:
    """Give the share of the roofline of one thread that the kernel reaches, where one is known."""
    return None if roofline is None else roofline.attainable(kernel.flops, kernel.bytes) / (kernel.nanoseconds * 1e-9)


def _print(times: Sequence[KernelTiming], wall: float, roofline: Roofline | None, threads: int) -> None:
    columns = [("#", "right"), ("time", "right"), ("share", "right"), ("GFLOP/s", "right"), ("GB/s", "right")]
    columns += [("roofline", "right"), ("algorithm", "left"), ("layers", "left")]
    rows = []
    for kernel in times:
        nanoseconds = max(kernel.nanoseconds, 1)
        rows.append(
            [
                kernel.index,
                seconds_text(nanoseconds * 1e-9),
                f"{nanoseconds / wall:.1%}",
                f"{kernel.flops / nanoseconds:.1f}",
                f"{kernel.bytes / nanoseconds:.1f}",
                _percent(_efficiency(kernel, roofline)),
                kernel.algorithm,
                _layers(kernel),
            ]
        )
    print_table("Kernels", columns, rows)
    total = sum(t.nanoseconds for t in times)
    flops = sum(t.flops for t in times)
    click.echo(
        f"{len(times)} kernels take {seconds_text(total * 1e-9)}, a run {seconds_text(wall * 1e-9)}:"
        f" {1 - total / wall:.1%} is spent between kernels and on the way in and out"
    )
    if roofline is None:
        click.echo(f"{flops / wall:.1f} GFLOP/s over all")
        return
    click.echo(
        f"{flops / wall:.1f} GFLOP/s over all; one core here: {roofline.flops / 1e9:.0f} GFLOP/s f32,"
        f" {roofline.bandwidth / 1e9:.0f} GB/s read; {threads} thread(s) used"
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _layers(kernel: KernelTiming) -> str:
    shown = ", ".join(kernel.layers[:_SHOWN_LAYERS])
    rest = len(kernel.layers) - _SHOWN_LAYERS
    return shown + (f", +{rest} more" if rest > 0 else "")
