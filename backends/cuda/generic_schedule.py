"""Threads and blocks for kernels without a template of their own, found from the shape of their TE stages.

    stages    ->  inlined as far as that repeats no work
    each left ->  a launch of its own: blocks of threads over its flattened output, a thread an element

A reduction that only an elementwise stage of its shape reads is computed in that stage's thread, in registers.  One
with few outputs but long sums gets a block of threads for each output, which add up what they found.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from tvm import ir, s_tir, tirx
from tvm_ffi import structural

from cnnc.backends.lower import exact

THREADS = 256
"""Threads of a block, at most."""

INLINE_NODES = 300
"""Size of an expression up to which a stage is inlined into one that reads it more than once."""

MANY_OUTPUTS = 1 << 16
"""Outputs from which a thread for each fills a GPU."""

LONG_SUM = 64
"""Terms from which a sum is worth a block of threads."""

WARP = 32
"""Threads that hand each other numbers without a barrier: no fewer share a sum."""

TERMS = 16
"""Terms a thread should have to add up by itself, where a sum is long enough."""

_SPATIAL, _REDUCED = 0, 2


def schedule_generic(func: Any) -> Any:
    """Schedule an s_tir PrimFunc of TE stages for a GPU, and give the new PrimFunc."""
    sch = s_tir.Schedule(func)
    _inline(sch)
    for name in _stage_names(sch):
        if name not in _stage_names(sch):
            continue
        stage = _node(sch, name)
        if _is_long_sum(stage):
            _bind_sum(sch, name)
        elif _epilogue_of(sch, name) is None:
            _bind_elements(sch, name)
    return sch.mod["main"]


def _stage_names(sch: Any) -> list[str]:
    """List the stages in the order they run."""
    return [sch.get(block).name_hint for block in sch.get_child_blocks(sch.get_sblock("root"))]


def _node(sch: Any, name: str) -> Any:
    return sch.get(sch.get_sblock(name))


def _extents(node: Any, kind: int) -> list[int]:
    return [int(axis.dom.extent) for axis in node.iter_vars if axis.iter_type == kind]


def _volume(node: Any) -> int:
    """How often the body runs."""
    return math.prod(_extents(node, _SPATIAL)) * math.prod(_extents(node, _REDUCED))


def _consumers(sch: Any, name: str) -> list[str]:
    return [sch.get(block).name_hint for block in sch.get_consumers(sch.get_sblock(name))]


def _outputs(sch: Any) -> set[str]:
    return {sch.get(block).name_hint for block in sch.get_output_blocks("root")}


def _inline(sch: Any) -> None:
    """Inline every elementwise stage whose elements are cheap or needed only once."""
    outputs = _outputs(sch)
    for name in _stage_names(sch):
        node = _node(sch, name)
        consumers = [_node(sch, consumer) for consumer in _consumers(sch, name)]
        if name in outputs or _extents(node, _REDUCED) or not consumers:
            continue
        written = node.writes[0].source
        uses = max(_count_loads(consumer.body, written) for consumer in consumers)
        repeats = sum(map(_volume, consumers)) > _volume(node) and _has_calls(node.body)
        if repeats or (uses > 1 and uses * _count(node.body, object) > INLINE_NODES):
            continue
        sch.compute_inline(sch.get_sblock(name))


def _count(tree: Any, kind: type) -> int:
    """Count the nodes of a type in a tree."""
    found: list[None] = []
    structural.structural_walk(tree, [(kind, lambda _: found.append(None))])
    return len(found)


def _count_loads(tree: Any, buffer: Any) -> int:
    found: list[None] = []

    def visit(load: Any) -> None:
        if load.source.same_as(buffer):
            found.append(None)

    structural.structural_walk(tree, [(ir.TensorLoad, visit)])
    return len(found)


def _has_calls(tree: Any) -> bool:
    """Tell whether an expression calls a function that is more than an instruction."""
    found: list[None] = []

    def visit(call: Any) -> None:
        if not call.op.name.startswith(exact.PREFIX):
            found.append(None)

    structural.structural_walk(tree, [(ir.Call, visit)])
    return bool(found)


def _is_long_sum(node: Any) -> bool:
    """Tell whether a stage is a reduction that a block of threads should share."""
    outputs, terms = math.prod(_extents(node, _SPATIAL)), math.prod(_extents(node, _REDUCED))
    return terms >= LONG_SUM and outputs < MANY_OUTPUTS and _combiner(node) is not None


_SIMPLE = (tirx.Add, tirx.Mul, tirx.Min, tirx.Max)


def _combiner(node: Any) -> type | None:
    """Give how a reduction combines two partial results; None unless it is a single operation TVM knows."""
    if len(node.writes) != 1 or not isinstance(node.body, tirx.BufferStore):
        return None
    value = node.body.value
    return next((kind for kind in _SIMPLE if isinstance(value, kind)), None)


def _epilogue_of(sch: Any, name: str) -> str | None:
    """Give the stage that computes a reduction in its own thread; None if there is none."""
    node = _node(sch, name)
    consumers = _consumers(sch, name)
    if not _extents(node, _REDUCED) or len(node.writes) != 1 or len(consumers) != 1 or name in _outputs(sch):
        return None
    consumer = _node(sch, consumers[0])
    if _extents(consumer, _REDUCED) or _volume(consumer) != math.prod(_extents(node, _SPATIAL)):
        return None
    written = node.writes[0].source
    reads = [read.region for read in consumer.reads if read.source.same_as(written)]
    if len(reads) != 1:
        return None
    axes = [axis for axis in consumer.iter_vars if int(axis.dom.extent) > 1]
    positions = [r for r, extent in zip(reads[0], written.shape, strict=True) if int(extent) > 1]
    same = len(axes) == len(positions) and all(r.min.same_as(axis.var) for r, axis in zip(positions, axes, strict=True))
    return consumers[0] if same else None


def _loops(sch: Any, name: str) -> tuple[list[Any], list[Any]]:
    """List a stage's loops: those over outputs (at least one), those over what is reduced."""
    block = sch.get_sblock(name)
    loops = list(sch.get_loops(block))
    # A stage of one element may have an axis without a loop.
    axes = sch.get(block).iter_vars if loops else []
    spatial = [loop for loop, axis in zip(loops, axes, strict=True) if axis.iter_type == _SPATIAL]
    reduced = [loop for loop, axis in zip(loops, axes, strict=True) if axis.iter_type == _REDUCED]
    return spatial or [sch.add_unit_loop(loops[0] if loops else block)], reduced


def _bind_elements(sch: Any, name: str) -> None:
    """Give every output of a stage a thread, which also computes the reduction that the stage finishes."""
    if _extents(_node(sch, name), _REDUCED) and len(_node(sch, name).writes) == 1:
        # The sum is kept in a register, and written by a stage that copies it.
        name = sch.get(sch.cache_write(sch.get_sblock(name), 0, "local")).name_hint
    spatial, reduced = _loops(sch, name)
    producers = [sch.get(block).name_hint for block in sch.get_producers(sch.get_sblock(name))]
    inner = [producer for producer in producers if _is_private(sch, producer, name)]
    thread = _over_threads(sch, spatial)
    if reduced:
        sch.reorder(thread, *reduced)
    for producer in inner:
        block = sch.get_sblock(producer)
        sch.set_scope(block, 0, "local")
        sch.compute_at(block, thread)
        _start_apart(sch, producer)
    if reduced:
        _start_apart(sch, name)


def _is_private(sch: Any, producer: str, name: str) -> bool:
    return _epilogue_of(sch, producer) == name and not _is_long_sum(_node(sch, producer))


def _start_apart(sch: Any, name: str) -> None:
    """Set a sum to its first value before the loops that add to it, not in them."""
    block = sch.get_sblock(name)
    first = next((loop for loop in sch.get_loops(block) if _is_reduced(sch, block, loop)), None)
    if first is None or len(sch.get(block).writes) != 1:
        return
    # Where TVM made indices it no longer understands of flat ones, the first turn of the loops sets the value.
    with contextlib.suppress(s_tir.ScheduleError):
        sch.decompose_reduction(block, first)


def _is_reduced(sch: Any, block: Any, loop: Any) -> bool:
    """Tell whether a loop runs over an axis that a block reduces."""
    realize = sch.get(sch.get_loops(block)[-1]).body
    variable = sch.get(loop).loop_var
    # A block in the loops of others shares the body of the last one, and has no loop of its own.
    return hasattr(realize, "iter_values") and any(
        axis.iter_type == _REDUCED and _uses(value, variable)
        for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)
    )


def _uses(tree: Any, variable: Any) -> bool:
    found: list[None] = []

    def visit(node: Any) -> None:
        if node.same_as(variable):
            found.append(None)

    structural.structural_walk(tree, [(tirx.Var, visit)])
    return bool(found)


def _over_threads(sch: Any, loops: list[Any]) -> Any:
    """Run loops as one, over blocks of threads; gives the threads' loop."""
    loop = sch.fuse(*loops)
    extent = int(sch.get(loop).extent)
    blocks, threads = sch.split(loop, [None, min(THREADS, extent)])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")
    return threads


def _bind_sum(sch: Any, name: str) -> None:
    """Give every output of a reduction a block of threads, which share its terms."""
    spatial, reduced = _loops(sch, name)
    terms = sch.fuse(*reduced)
    shares = int(sch.get(terms).extent) // TERMS
    threads = min(THREADS, max(WARP, 1 << shares.bit_length()))
    output = sch.fuse(*spatial)
    _, lane = sch.split(terms, [None, threads])
    sch.bind(output, "blockIdx.x")
    sch.bind(lane, "threadIdx.x")
