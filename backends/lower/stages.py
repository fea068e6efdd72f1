"""Stages of a kernel's tensor expressions, as blocks of a TVM schedule: what they are, and which are inlined.

y[i] = exp(x[i]);  z[i] = y[i] + 1   ->   z[i] = exp(x[i]) + 1
"""

from __future__ import annotations

import math
from typing import Any

from tvm import ir, tirx
from tvm_ffi import structural

from cnnc.backends.lower import exact

INLINE_NODES = 300
"""Size of an expression up to which a stage is inlined into one that reads it more than once."""

SPATIAL, REDUCED = 0, 2
"""Kinds of axes, by TVM's numbers: of the output, of what is reduced."""


def stage_names(sch: Any) -> list[str]:
    """List the stages in the order they run."""
    return [sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))]


def stage_block(sch: Any, name: str) -> Any:
    """Give a stage's block."""
    return sch.get(sch.get_sblock(name))


def output_names(sch: Any) -> list[str]:
    """List the stages that write what the kernel is called for."""
    return [sch.get(block).name_hint for block in sch.get_output_blocks("root")]


def consumer_names(sch: Any, name: str) -> list[str]:
    """List the stages that read a stage."""
    return [sch.get(block).name_hint for block in sch.get_consumers(sch.get_sblock(name))]


def extents(block: Any, kind: int) -> list[int]:
    """Give the extents of a stage's axes of a kind."""
    return [int(axis.dom.extent) for axis in block.iter_vars if axis.iter_type == kind]


def volume(block: Any) -> int:
    """Count how often a stage's body runs."""
    return math.prod(int(axis.dom.extent) for axis in block.iter_vars)


def inline_stages(sch: Any) -> None:
    """Inline every elementwise stage whose elements are cheap or needed only once."""
    outputs = output_names(sch)
    for name in stage_names(sch):
        block = stage_block(sch, name)
        consumers = [stage_block(sch, consumer) for consumer in consumer_names(sch, name)]
        if name in outputs or extents(block, REDUCED) or not consumers:
            continue
        written = block.writes[0].source
        loads = max(_count_loads(consumer.body, written) for consumer in consumers)
        repeats = sum(map(volume, consumers)) > volume(block) and _has_calls(block.body)
        if repeats or (loads > 1 and loads * _count_nodes(block.body) > INLINE_NODES):
            continue
        sch.compute_inline(sch.get_sblock(name))


def _count_nodes(tree: Any) -> int:
    found: list[None] = []
    structural.structural_walk(tree, [(object, lambda _: found.append(None))])
    return len(found)


def _has_calls(tree: Any) -> bool:
    """Tell whether an expression calls a function that is more than an instruction."""
    found: list[None] = []

    def visit(call: Any) -> None:
        if not call.op.name.startswith(exact.PREFIX):
            found.append(None)

    structural.structural_walk(tree, [(ir.Call, visit)])
    return bool(found)


def _count_loads(tree: Any, buffer: Any) -> int:
    found: list[None] = []

    def visit(load: Any) -> None:
        if load.source.same_as(buffer):
            found.append(None)

    structural.structural_walk(tree, [(ir.TensorLoad, visit)])
    return len(found)


def uses(tree: Any, variable: Any) -> bool:
    """Tell whether an expression depends on a variable."""
    found: list[None] = []

    def visit(node: Any) -> None:
        if node.same_as(variable):
            found.append(None)

    structural.structural_walk(tree, [(tirx.Var, visit)])
    return bool(found)
