"""What the templates of a back end estimate for a convolution by one algorithm or another, alone in a kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ops.conv import Conv
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input
from cnnc.ops.winograd import WinogradWeight, winograd_rows_layout, winograd_tile
from cnnc.passes.tile import KernelTemplate, candidates
from cnnc.target import Target


def kernel_seconds(node: Node, algorithm: str, templates: Sequence[KernelTemplate], target: Target) -> float:
    """Estimate a convolution of plain tensors by an algorithm, whose weights lie as `pack_weights` has them for a GPU.

    It is infinite where no template takes it.
    """
    conv, weight, tile = node.op, node.inputs[1].type, winograd_tile(algorithm)
    assert isinstance(conv, Conv)
    if tile is not None:
        transform = WinogradWeight(tile, (conv.stride[0], conv.stride[1]))
        weight = transform.infer(weight).with_layout(winograd_rows_layout())
    types = (node.inputs[0].type, weight, *(value.type for value in node.inputs[2:]))
    inputs: tuple[Value, ...] = tuple(call(Input(f"x{i}", type_)) for i, type_ in enumerate(types))
    output = call(replace(conv, algorithm=algorithm), *inputs)
    kernel = Fused(Graph("kernel", inputs, (output,)), "conv")
    return min((seconds for seconds, _ in candidates(kernel, templates, target)), default=math.inf)
