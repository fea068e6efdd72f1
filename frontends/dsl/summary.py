"""The table of a network's layers."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cnnc.frontends.dsl.receptive_field import receptive_fields
from cnnc.ir.graph import Node
from cnnc.ir.types import format_shape

if TYPE_CHECKING:
    from cnnc.frontends.dsl.network import Network


def summary(net: Network) -> str:
    """Give a table: layer, kind, output shape, trained parameters, multiply-adds, receptive field.

    Multiply-adds are those of convolutions and matrix products, for the whole batch; a receptive field is in
    inputs, "all" where a number sees the whole input.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    reached = set(net.structure.nodes)
    fields = receptive_fields(net.structure)
    table = Table(box=box.SIMPLE, title=f"{net.name}: {_inputs(net)}", title_justify="left", show_footer=True)
    table.add_column("layer", "total")
    table.add_column("kind")
    table.add_column("output")
    table.add_column("parameters", f"{net.parameter_count:,}", justify="right")
    table.add_column("multiply-adds", f"{multiply_adds(net.structure.nodes):,}", justify="right")
    table.add_column("field", justify="right")
    for name, layer in net.layers.items():
        output = layer.outputs[0]
        if output.node not in reached:
            continue
        count = sum(net.parameters[p].elements for p in layer.parameters if net.initials[p].role.trained)
        field = fields.get(output, ())
        table.add_row(
            name,
            layer.kind,
            format_shape(output.shape),
            f"{count:,}" if count and "@" not in name else "",
            f"{adds:,}" if (adds := multiply_adds(layer.nodes)) else "",
            "all" if field is None else "x".join(map(str, dict.fromkeys(field))),
        )
    wide = Console(file=io.StringIO(), width=10_000, color_system=None)
    text = io.StringIO()
    Console(file=text, width=wide.measure(table).maximum, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def multiply_adds(nodes: Iterable[Node]) -> int:
    """Count the multiply-adds of convolutions and matrix products, as papers do."""
    return sum(_multiply_adds(node) for node in nodes)


def _multiply_adds(node: Node) -> int:
    match node.op.name:
        case "conv":
            return node.types[0].elements * math.prod(node.inputs[1].type.static_shape[1:])
        case "conv_transpose":
            return node.inputs[0].type.elements * math.prod(node.inputs[1].type.static_shape[1:])
        case "dense":
            return node.types[0].elements * node.inputs[1].type.static_shape[1]
        case "mat_mul":
            return node.op.flops(*(v.type for v in node.inputs)) // 2
    return 0


def _inputs(net: Network) -> str:
    names = net.structure.input_names
    return ", ".join(f"{name} : {value.type}" for name, value in zip(names, net.inputs, strict=True))
