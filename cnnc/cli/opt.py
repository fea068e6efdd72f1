"""`cnnc opt`: passes on IR text, text out."""

from __future__ import annotations

from typing import Any

import click

from cnnc.cli.arguments import compile_options, options_of
from cnnc.driver import check_dtype, load_graph, templates_for
from cnnc.ir.text import print_graph
from cnnc.target import Target


@click.command("opt")
@click.argument("model", required=False)
@click.option("--list-passes", is_flag=True, help="Print the names of all passes.")
@click.option("--print-after-each", is_flag=True, help="Print the IR after each pass, not only at the end.")
@compile_options
def command(model: str | None, list_passes: bool, print_after_each: bool, **arguments: Any) -> None:
    """Run passes on MODEL (net.ir, net.onnx, file.py:network) and print the IR."""
    from cnnc.backends.records import tuned_records
    from cnnc.passes.pipeline import pipeline, run_pipeline
    from cnnc.passes.registry import PASSES
    from cnnc.passes.weight_report import weight_type

    if list_passes:
        for name in sorted(PASSES):
            click.echo(name)
        return
    if model is None:
        raise click.UsageError("name a model, or use --list-passes")
    options = options_of(arguments)
    graph = load_graph(model, options)
    target = Target.parse(options.target)
    check_dtype(options.dtype, target)
    records = tuned_records(options.records, target)
    steps = pipeline(
        *(options.level, templates_for(target), options.passes, records),
        exact=options.exact,
        small=options.small,
        weights=weight_type(options.weights, target),
        dtype=options.dtype,
        tensor_cores=target.is_gpu,
    )
    for step in steps:
        graph = run_pipeline(graph, target, [step])
        if print_after_each:
            click.echo(f"; after {step.name}\n{print_graph(graph)}")
    if not print_after_each:
        click.echo(print_graph(graph), nl=False)
