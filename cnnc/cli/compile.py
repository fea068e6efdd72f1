"""`cnnc compile`: a model in, a binary out."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnnc.artifact import check_output
from cnnc.backends.cpu.compile_process import compile_process
from cnnc.cli.arguments import compile_options, open_model, options_of
from cnnc.cli.report import print_json, print_table, seconds_text
from cnnc.errors import UsageError
from cnnc.options import format_bytes

if TYPE_CHECKING:
    from cnnc.cli.precision import MeasuredError
    from cnnc.driver import Report
    from cnnc.module import Module


@click.command("compile")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The file to write, net.so.")
@click.option("--emit", default="so,header", show_default=True, help="Some of so, header, exe, obj, ir.")
@compile_options
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Threads to choose tile sizes for; the binary runs with any number of them.",
)
@click.option("--time-passes", is_flag=True, help="Print the seconds of each pass.")
@click.option("--why", metavar="RULE", help="Print where a rewrite rule applied and where it nearly did.")
@click.option(
    "--measure-error/--no-measure-error",
    default=True,
    show_default=True,
    help="With narrow weights or products: compile in f32 too, and compare.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: str, output: Path, emit: str, time_passes: bool, why: str | None, as_json: bool, **arguments: Any
) -> None:
    """Compile MODEL (net.onnx, file.py:network or net.ir) to a binary without any dependency."""
    start = time.perf_counter()
    report, error, files = _compile(model, output, emit.split(","), arguments)
    if as_json:
        print_json("compile", _content(report, error, files, time.perf_counter() - start))
        return
    if time_passes:
        rows = [(name, seconds_text(seconds)) for name, seconds in report.passes]
        print_table("Passes", [("pass", "left"), ("time", "right")], rows)
    if why is not None:
        _print_why(report, why)
    _print_summary(report, error, files)
    click.echo(f"PASSED in {seconds_text(time.perf_counter() - start)}")


def _compile(
    model: str, output: Path, kinds: Sequence[str], arguments: dict[str, Any]
) -> tuple[Report, MeasuredError | None, list[Path]]:
    """Compile, write and, with narrow types, measure; while this process imports, another one imports TVM."""
    for_cpu = arguments["target"].startswith("cpu") and not model.endswith(".so")
    with compile_process(wanted=for_cpu) as helper, _no_garbage_search():
        check_output(output, kinds, len(options_of(arguments).batches))
        if model.endswith(".so"):
            raise UsageError(f"{model} is compiled already")
        opened = open_model(model, arguments, output.stem, helper)
        if helper is not None:
            helper.dismiss()
        assert opened.report is not None
        linking = time.perf_counter()
        files = opened.module.save(output, emit=kinds)
        opened.report.phases["link"] = time.perf_counter() - linking
    return opened.report, _error(opened.module, model, arguments, opened.report), files


@contextmanager
def _no_garbage_search() -> Iterator[None]:
    """Leave garbage in circles where it is: there is little, and to look for it takes a tenth of the time."""
    searches = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # All that is new would be looked through at once; frozen and thawed, it is among what is old.
        gc.freeze()
        gc.unfreeze()
        if searches:
            gc.enable()


def _error(module: Module, model: str, arguments: dict[str, Any], report: Report) -> MeasuredError | None:
    """Measure what narrow weights or products do to the outputs; None where nothing is narrow."""
    if report.stored is None and arguments["dtype"] == "f32":
        return None
    from cnnc.cli.precision import MeasuredError, measure_error

    if not arguments["measure_error"]:
        return MeasuredError({}, "--no-measure-error")
    start = time.perf_counter()
    error = measure_error(module, model, arguments)
    report.phases["error"] = time.perf_counter() - start
    return error


def _content(report: Report, error: MeasuredError | None, files: list[Path], seconds: float) -> dict[str, Any]:
    return {
        "files": {str(file): file.stat().st_size for file in files},
        "phases": report.phases,
        "passes": [{"pass": name, "seconds": taken} for name, taken in report.passes],
        "batches": report.batches,
        "kernels": report.kernels,
        "kernels_compiled": report.kernels_compiled,
        "arena_bytes": report.arena_bytes,
        "weight_bytes": report.weight_bytes,
        **_narrow_content(report, error),
        "seconds": seconds,
    }


def _narrow_content(report: Report, error: MeasuredError | None) -> dict[str, Any]:
    if error is None:
        return {}
    from cnnc.cli.precision import describe

    return describe(report.stored, error)


def _print_summary(report: Report, error: MeasuredError | None, files: list[Path]) -> None:
    phases = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in report.phases.items())
    click.echo(f"phases   {phases}")
    if report.batches:
        click.echo(f"batch    {', '.join(map(str, report.batches))}")
    click.echo(f"kernels  {report.kernels}, {report.kernels_compiled} of them compiled, the rest from the cache")
    click.echo(f"memory   {format_bytes(report.arena_bytes)} arena, {format_bytes(report.weight_bytes)} weights")
    if error is not None:
        from cnnc.cli.precision import print_error, print_stored

        if report.stored is not None:
            print_stored(report.stored)
        print_error(error, "f32 weights" if report.stored else "f32")
    for file in files:
        click.echo(f"wrote    {file} ({format_bytes(file.stat().st_size)})")


def _print_why(report: Report, rule: str) -> None:
    fired = [f for f in report.rewrites.fired if f.rule == rule]
    missed = [m for m in report.rewrites.missed if m.rule == rule]
    click.echo(f"rule {rule}: applied {len(fired)} times, nearly applied {len(missed)} times")
    for firing in fired:
        click.echo(f"  applied at {', '.join(sorted(firing.loc)) or '?'}: {firing.before} -> {firing.after}")
    for near in missed:
        click.echo(f"  not at {', '.join(sorted(near.loc)) or '?'}: {near.reason}")
