"""`cnnc inspect`: what is in a model or a binary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from cnnc.cli.arguments import compile_options, one_batch, open_model, options_of
from cnnc.cli.inspect_gpu import describe_kernels, print_kernels
from cnnc.cli.report import print_json, print_table
from cnnc.driver import load_graph
from cnnc.ir.graph import Graph
from cnnc.ir.text import print_graph
from cnnc.ir.view import to_dot
from cnnc.module import Module, load
from cnnc.options import format_bytes
from cnnc.target import Target


@click.command("inspect")
@click.argument("model")
@click.option(
    "--format", "form", type=click.Choice(["table", "text", "dot", "json"]), default="table", show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@compile_options
def command(model: str, form: str, as_json: bool, **arguments: Any) -> None:
    """Show the layers, shapes, parameters and multiply-adds of MODEL, or the kernels of a binary.

    Of a binary for GPUs, and of a model with such a --target, which is compiled for it, the kernels come with their
    launches, occupancy and roofline.  --batch chooses one of a binary's batch sizes, else it is the first.
    """
    form = "json" if as_json else form
    if model.endswith(".so"):
        module = load(model)
        shown = module if arguments["batch"] is None else module.with_batch(one_batch(arguments))
        _show_binary(shown, module.batches, model, form)
        return
    if form in ("table", "json") and Target.parse(arguments["target"]).is_gpu:
        module = open_model(model, arguments).module
        _show_binary(module, module.batches, model, form)
        return
    graph = load_graph(model, options_of(arguments))
    if form == "text":
        click.echo(print_graph(graph), nl=False)
    elif form == "dot":
        click.echo(to_dot(graph), nl=False)
    elif form == "json":
        print_json("inspect", {"model": model, **_describe(graph)})
    else:
        _print_graph(graph)


def _describe(graph: Graph) -> dict[str, Any]:
    layers = [
        {
            "operator": node.op.name,
            "layers": sorted(node.loc),
            "outputs": [str(t) for t in node.types],
            "parameters": _parameters(node.inputs),
            "flops": node.op.flops(*(v.type for v in node.inputs)),
        }
        for node in graph.nodes
        if node.inputs
    ]
    return {
        "name": graph.name,
        "inputs": {n: str(v.type) for n, v in zip(graph.input_names, graph.inputs, strict=True)},
        "outputs": {n: str(v.type) for n, v in zip(graph.output_names, graph.outputs, strict=True)},
        "parameters": sum(n.types[0].elements for n in graph.nodes if n.op.name == "constant"),
        "flops": sum(layer["flops"] for layer in layers),
        "layers": layers,
    }


def _parameters(inputs: Any) -> int:
    return sum(v.type.elements for v in inputs if v.op.name == "constant")


def _print_graph(graph: Graph) -> None:
    described = _describe(graph)
    rows = [
        (i, layer["operator"], ", ".join(layer["outputs"]), f"{layer['parameters']:,}", f"{layer['flops']:,}", names)
        for i, layer in enumerate(described["layers"])
        for names in [", ".join(layer["layers"])]
    ]
    columns = [("#", "right"), ("operator", "left"), ("output", "left"), ("parameters", "right"), ("flops", "right")]
    print_table(str(described["name"]), [*columns, ("layer", "left")], rows)
    for kind in ("inputs", "outputs"):
        for name, type_ in described[kind].items():
            click.echo(f"{kind[:-1]:7} {name} : {type_}")
    click.echo(f"{described['parameters']:,} parameters, {described['flops'] / 2e9:.3f} G multiply-adds")


def _show_binary(module: Module, batches: Sequence[int], path: str, form: str) -> None:
    ports = {
        kind: {p.name: f"{p.dtype}{list(p.shape)}" for p in values}
        for kind, values in (("inputs", module.inputs), ("outputs", module.outputs))
    }
    meta = {key: value for key, value in module.meta.items() if key != "launches"}
    for_gpu = "launches" in module.meta
    if form == "json":
        kernels = describe_kernels(module) if for_gpu else _kernels(module)
        print_json("inspect", {"binary": path, "batches": batches, "meta": meta, **ports, "kernels": kernels})
        return
    if for_gpu:
        print_kernels(module, path)
    else:
        _print_kernels(module, path)
    for kind, values in ports.items():
        for name, text in values.items():
            click.echo(f"{kind[:-1]:7} {name} : {text}")
    if len(batches) > 1:
        click.echo(f"batch   {module.batches[0]} of {', '.join(map(str, batches))}")
    for key, value in meta.items():
        click.echo(f"{key:7} {value}")


def _kernels(module: Module) -> list[dict[str, Any]]:
    return [
        {"symbol": k.symbol, "layers": list(k.layers), "flops": k.flops, "bytes": k.bytes, "schedule": k.schedule}
        for k in module.kernels
    ]


def _print_kernels(module: Module, path: str) -> None:
    rows = [
        (i, k.schedule, f"{k.flops:,}", format_bytes(k.bytes), ", ".join(k.layers))
        for i, k in enumerate(module.kernels)
    ]
    columns = [("#", "right"), ("schedule", "left"), ("flops", "right"), ("bytes", "right"), ("layers", "left")]
    print_table(path, columns, rows)
