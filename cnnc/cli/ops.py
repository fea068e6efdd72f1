"""`cnnc ops`: which ONNX operators compile, or what a model would need."""

from __future__ import annotations

import click

import cnnc.ops  # noqa: F401  (fills the registry of operators)
from cnnc.cli.report import print_json
from cnnc.errors import UnsupportedError
from cnnc.ir.op import ONNX_READERS, OPERATORS


@click.command("ops")
@click.option("--model", help="List what this model needs and cnnc lacks; exit 4 if there is any.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(model: str | None, as_json: bool) -> int:
    """List the operators that compile."""
    if model is not None:
        return _check_model(model, as_json)
    names = sorted(f"{domain}.{name}" if domain else name for domain, name in ONNX_READERS)
    if as_json:
        print_json("ops", {"onnx": names, "ir": sorted(OPERATORS)})
        return 0
    click.echo(f"{len(names)} ONNX operators:")
    click.echo("\n".join(f"  {name}" for name in names))
    return 0


def _check_model(model: str, as_json: bool) -> int:
    from cnnc.driver import load_graph

    try:
        load_graph(model)
        problem = ""
    except UnsupportedError as error:
        problem = str(error)
    if as_json:
        print_json("ops", {"model": model, "supported": not problem, "problem": problem})
    else:
        click.echo(problem or f"{model}: every operator compiles")
    return UnsupportedError.exit_code if problem else 0
