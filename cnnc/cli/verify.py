"""`cnnc verify`: the compiled network against a reference that shares no code with it."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from cnnc.cli.arguments import compile_options, open_model, options_of, threads_option
from cnnc.cli.inputs import input_options, read_inputs
from cnnc.cli.precision import BUDGET, precision_of
from cnnc.cli.report import print_json, print_table
from cnnc.driver import load_graph
from cnnc.errors import UsageError
from cnnc.ir.interp import evaluate
from cnnc.profiler.accuracy import relative_error
from cnnc.profiler.engines import Runner, onnxruntime_runner


@click.command("verify")
@click.argument("model")
@click.argument("binary", required=False)
@input_options
@click.option("--against", default="numpy", show_default=True, help="numpy (in float64), onnxruntime, or both.")
@click.option(
    "--tolerance",
    type=float,
    help="Relative L2 error that still agrees; by default 1e-4, with f16 or tf32 5e-3, with bf16 3e-2.",
)
@threads_option
@compile_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: str, binary: str | None, against: str, tolerance: float | None, as_json: bool, **arguments: Any
) -> int:
    """Compare MODEL compiled (or BINARY made of it) with references; exit 1 if an output differs.

    Every batch size is compared, or that which --batch chooses.
    """
    module = open_model(binary or model, arguments).module
    tolerance = BUDGET[precision_of(module)] if tolerance is None else tolerance
    rows = []
    for batch in module.batches or (None,):
        feeds = read_inputs((module if batch is None else module.with_batch(batch)).inputs, arguments)
        got = module.run(feeds)
        for name in against.split(","):
            wanted = _reference(name, model, {**arguments, "batch": batch or arguments["batch"]})(feeds)
            rows += [(batch, name, output, relative_error(got[output], wanted[output])) for output in got]
    passed = all(error <= tolerance for *_, error in rows)
    if as_json:
        names = ("batch", "against", "output", "relative_l2")
        results = [dict(zip(names, row, strict=True)) for row in rows]
        print_json("verify", {"model": model, "tolerance": tolerance, "passed": passed, "results": results})
    else:
        _print(model, tolerance, rows)
        click.echo("PASSED" if passed else "FAILED")
    return int(not passed)


def _print(model: str, tolerance: float, rows: list[tuple[int | None, str, str, float]]) -> None:
    columns = [("batch", "right"), ("against", "left"), ("output", "left")]
    columns += [("relative L2 error", "right"), ("verdict", "left")]
    table = [
        (batch or "", *names, f"{error:.2e}", "agrees" if error <= tolerance else "DIFFERS")
        for batch, *names, error in rows
    ]
    if not any(batch for batch, *_ in rows):
        columns, table = columns[1:], [row[1:] for row in table]
    print_table(f"{model}, tolerance {tolerance:.0e}", columns, table)


def _reference(name: str, model: str, arguments: dict[str, Any]) -> Runner:
    if model.endswith(".so"):
        raise UsageError("verify needs the model itself; write cnnc verify MODEL BINARY")
    if name == "onnxruntime":
        return onnxruntime_runner(model, 1, optimise=False)
    if name == "numpy":
        graph = load_graph(model, options_of(arguments))

        def run(feeds: Any) -> dict[str, np.ndarray]:
            return evaluate(graph, feeds, precise=True)

        return run
    raise UsageError(f"--against {name!r} is not known; use numpy or onnxruntime")
