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

from tvm import s_tir, tirx

from cnnc.backends.cuda.generic import LONG_SUM, MANY_OUTPUTS, THREADS
from cnnc.backends.cuda.machine import LANES
from cnnc.backends.lower.stages import (
    REDUCED,
    SPATIAL,
    consumer_names,
    extents,
    inline_stages,
    output_names,
    stage_block,
    stage_names,
    uses,
    volume,
)

TERMS = 16
"""Terms a thread should have to add up by itself, where a sum is long enough."""


def schedule_generic(func: Any) -> Any:
    """Schedule an s_tir PrimFunc of TE stages for a GPU, and give the new PrimFunc."""
    sch = s_tir.Schedule(func)
    inline_stages(sch)
    for name in stage_names(sch):
        if name not in stage_names(sch):
            continue
        block = stage_block(sch, name)
        if _is_long_sum(block):
            _bind_sum(sch, name)
        elif _epilogue_of(sch, name) is None:
            _bind_elements(sch, name)
    return sch.mod["main"]


def _is_long_sum(node: Any) -> bool:
    """Tell whether a stage is a reduction that a block of threads should share."""
    outputs, terms = math.prod(extents(node, SPATIAL)), math.prod(extents(node, REDUCED))
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
    node = stage_block(sch, name)
    consumers = consumer_names(sch, name)
    if not extents(node, REDUCED) or len(node.writes) != 1 or len(consumers) != 1 or name in output_names(sch):
        return None
    consumer = stage_block(sch, consumers[0])
    if extents(consumer, REDUCED) or volume(consumer) != math.prod(extents(node, SPATIAL)):
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
    spatial = [loop for loop, axis in zip(loops, axes, strict=True) if axis.iter_type == SPATIAL]
    reduced = [loop for loop, axis in zip(loops, axes, strict=True) if axis.iter_type == REDUCED]
    return spatial or [sch.add_unit_loop(loops[0] if loops else block)], reduced


def _bind_elements(sch: Any, name: str) -> None:
    """Give every output of a stage a thread, which also computes the reduction that the stage finishes."""
    if extents(stage_block(sch, name), REDUCED) and len(stage_block(sch, name).writes) == 1:
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
    return _epilogue_of(sch, producer) == name and not _is_long_sum(stage_block(sch, producer))


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
        axis.iter_type == REDUCED and uses(value, variable)
        for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)
    )


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
    threads = min(THREADS, max(LANES, 1 << shares.bit_length()))
    output = sch.fuse(*spatial)
    _, lane = sch.split(terms, [None, threads])
    sch.bind(output, "blockIdx.x")
    sch.bind(lane, "threadIdx.x")
