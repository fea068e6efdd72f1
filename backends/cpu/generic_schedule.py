"""Loop nests for kernels without a template of their own, found from the shape of their TE stages.

    stages  ->  inlined as far as that repeats no work
    output  ->  parallel(outer axes) [producers] (inner axes) vector(last axis)

Outer axes are those along which no element of a producer is needed twice, so each slice computes the producers it
needs into a small buffer.  A reduction keeps whole vectors of accumulators: of neighbouring outputs where the last
axis is an output's, of parts of the sum (`rfactor`) where it is reduced.  An innermost extent that is no multiple
of the vector is left to LLVM's vectoriser, which peels the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import ir, s_tir, tirx
from tvm_ffi import structural

from cnnc.backends.lower.stages import REDUCED, SPATIAL, inline_stages, output_names, stage_block, stage_names, uses

CHUNK = 4096
"""Elements of a flat loop that make a slice, at most."""

ACCUMULATORS = 2
"""Vectors of partial sums of one long sum: more hide the latency of additions better, but must be added up."""

ENOUGH_SLICES = 64
"""Slices from which it is better to give each more to do."""

ACCUMULATOR_ROW = 8
"""Vectors of neighbouring sums kept at once."""


def schedule_generic(func: Any, lanes: int) -> Any:
    """Schedule an s_tir PrimFunc of TE stages for vectors of `lanes` float32, and give the new PrimFunc.

    It has the attribute `cnnc.independent_loops` where several outermost loops may run in any order.
    """
    sch = s_tir.Schedule(func)
    inline_stages(sch)
    for name in stage_names(sch):
        _split_long_sum(sch, name, lanes)
    outputs = output_names(sch)
    if len(outputs) == 1:
        _schedule_output(sch, outputs[0], lanes)
    elif _are_independent(sch, outputs):
        for name in outputs:
            _schedule_output(sch, name, lanes)
        return sch.mod["main"].with_attr("cnnc.independent_loops", 1)
    else:
        for name in stage_names(sch):
            _vectorise_stage(sch, sch.get_sblock(name), 0, lanes)
    return sch.mod["main"]


@dataclass(frozen=True)
class _Stage:
    """What a block computes: its iteration space, and which elements it reads."""

    node: Any
    spatial: tuple[Any, ...]
    reduced: tuple[Any, ...]

    @staticmethod
    def of(sch: Any, name: str) -> _Stage:
        node = stage_block(sch, name)
        spatial = tuple(axis for axis in node.iter_vars if axis.iter_type == SPATIAL)
        reduced = tuple(axis for axis in node.iter_vars if axis.iter_type == REDUCED)
        return _Stage(node, spatial, reduced)

    @property
    def output(self) -> Any:
        return self.node.writes[0].source

    @property
    def extents(self) -> tuple[int, ...]:
        return tuple(_extent(axis) for axis in self.spatial)

    def reads_of(self, buffer: Any) -> list[Sequence[Any]]:
        """List the regions read of a buffer; several accesses are one region."""
        return [read.region for read in self.node.reads if read.source.same_as(buffer)]


def _extent(axis: Any) -> int:
    return int(axis.dom.extent)


def _are_independent(sch: Any, outputs: list[str]) -> bool:
    """Tell whether the outputs are all there is, and none reads another."""
    reads_none = all(not sch.get_producers(sch.get_sblock(name)) for name in outputs)
    return reads_none and len(stage_names(sch)) == len(outputs)


def _split_long_sum(sch: Any, name: str, lanes: int) -> None:
    """Turn a reduction along contiguous memory into a vector of partial results, reduced in the end."""
    stage = _Stage.of(sch, name)
    if len(stage.node.writes) > 1 or not stage.spatial:
        return
    run = _contiguous_reduced_axes(stage)
    width = _divisor(math.prod(_extent(axis) for axis in run), lanes, ACCUMULATORS * lanes)
    if width < min(lanes, 4):
        return
    loops = sch.get_loops(sch.get_sblock(name))
    mine = [loop for axis, loop in zip(stage.node.iter_vars, loops, strict=True) if any(axis.same_as(a) for a in run)]
    chunks, inner = sch.split(sch.fuse(*mine), [None, width])
    try:
        sch.rfactor(inner, factor_axis=len(stage.spatial))
    except s_tir.ScheduleError:
        # TVM cannot split a maximum that minds NaN: it runs one element at a time.
        sch.fuse(chunks, inner)


def _contiguous_reduced_axes(stage: _Stage) -> list[Any]:
    """List the reduced axes that together step through memory in the largest read; none if an output axis does."""
    if not stage.reduced:
        return []
    read = max(stage.node.reads, key=lambda read: math.prod(int(extent) for extent in read.source.shape))
    run: list[Any] = []
    for r, extent in zip(reversed(read.region), reversed(read.source.shape), strict=True):
        if int(extent) == 1:
            continue
        axis = next((axis for axis in stage.reduced if r.min.same_as(axis.var)), None)
        if axis is None or _int_or(r.extent) != 1:
            break
        run.insert(0, axis)
        if _extent(axis) != int(extent):
            break
    return run if run == list(stage.reduced[-len(run) :]) else run[-1:]


def _divisor(number: int, step: int, most: int) -> int:
    """Give the largest divisor up to `most`, of the multiples of `step` if there is one."""
    divisors = [d for d in range(1, most + 1) if number % d == 0]
    return max((d for d in divisors if d % step == 0), default=divisors[-1])


def _schedule_output(sch: Any, name: str, lanes: int) -> None:
    """Schedule an output stage and, in its loops, the producers it needs."""
    if _Stage.of(sch, name).reduced:
        name = sch.get(sch.cache_write(sch.get_sblock(name), 0, "global")).name_hint
    stage = _Stage.of(sch, name)
    producers = _all_producers(sch, name)
    wide = [i for i, extent in enumerate(stage.extents) if extent > 1]
    if not wide:
        return
    if not producers:
        _schedule_elementwise(sch, name, lanes)
        return
    free = [i for i in wide if _is_pointwise(sch, stage, stage.spatial[i].var)]
    _schedule_with_producers(sch, name, producers, free, wide, lanes)


def _all_producers(sch: Any, name: str) -> list[str]:
    """List the stages an output needs, in the order they run."""
    needed: set[str] = set()
    stack = [name]
    while stack:
        for block in sch.get_producers(sch.get_sblock(stack.pop())):
            producer = sch.get(block).name_hint
            if producer not in needed:
                needed.add(producer)
                stack.append(producer)
    return [stage for stage in stage_names(sch) if stage in needed]


def _is_pointwise(sch: Any, stage: _Stage, var: Any) -> bool:
    """Tell whether no two iterations of an output axis need the same element of a producer."""
    for block in sch.get_producers(sch.get_sblock(stage.node.name_hint)):
        producer = _Stage.of(sch, sch.get(block).name_hint)
        for region in stage.reads_of(producer.output):
            at = [d for d, r in enumerate(region) if _int_or(r.extent) == 1 and r.min.same_as(var)]
            moving = sum(uses(r.min, var) or uses(r.extent, var) for r in region)
            if len(at) != 1 or moving != 1:
                return False
            if not _is_pointwise(sch, producer, producer.node.writes[0].region[at[0]].min):
                return False
    return True


def _int_or(value: Any) -> int | None:
    """Give a constant's value, None for an expression."""
    return int(value) if isinstance(value, tirx.IntImm) else None


def _schedule_with_producers(
    sch: Any, name: str, producers: list[str], free: list[int], wide: list[int], lanes: int
) -> None:
    """Order the output's loops as parallel(free) [producers] rest vector(last), and move the producers in."""
    loops = list(sch.get_loops(sch.get_sblock(name)))
    last = wide[-1]
    outer = [loop for i, loop in enumerate(loops) if i not in wide or (i in free and i != last)]
    rest = [loops[i] for i in wide if i not in free and i != last]
    vector = loops[last]
    if last in free:
        extents = _Stage.of(sch, name).extents
        extent = extents[last]
        slices = math.prod(extents[i] for i in free if i != last)
        row = ACCUMULATOR_ROW if slices >= ENOUGH_SLICES else 1
        width = _divisor(extent, lanes, row * lanes)
        if width < min(extent, lanes):
            width = extent
        chunk, vector = sch.split(vector, [None, width])
        outer.append(chunk)
    sch.reorder(*outer, *rest, vector)
    depth = 0
    if outer:
        place = _parallelise(sch, outer)
        for producer in reversed(producers):
            sch.compute_at(sch.get_sblock(producer), place, preserve_unit_loops=True)
        depth = len(sch.get_loops(sch.get_sblock(name))) - len(rest) - 1
    for producer in producers:
        _vectorise_stage(sch, sch.get_sblock(producer), depth, lanes)
    _vectorise(sch, vector, lanes)


def _vectorise_stage(sch: Any, block: Any, depth: int, lanes: int) -> None:
    """Put a vector of neighbouring elements innermost in a stage, below `depth` outer loops."""
    stage = _Stage.of(sch, sch.get(block).name_hint)
    spatial, reduced = _own_loops(sch, block, depth)
    vector = _last_loop(sch, block, stage, spatial)
    if vector is not None and not _contiguous_reduced_axes(stage):
        others = [loop for loop in spatial if not loop.same_as(vector)]
        if reduced:
            width = _divisor(_loop_extent(sch, vector), lanes, ACCUMULATOR_ROW * lanes)
            if width >= lanes:
                row, vector = sch.split(vector, [None, width])
                others.append(row)
        sch.reorder(*others, *reduced, vector)
        _vectorise(sch, vector, lanes)
        if reduced:
            sch.decompose_reduction(block, reduced[0])
    elif reduced:
        sch.decompose_reduction(block, reduced[0])


def _own_loops(sch: Any, block: Any, depth: int) -> tuple[list[Any], list[Any]]:
    """List a block's loops below `depth`, those of output axes (longer than 1) and those of reduced axes."""
    loops = list(sch.get_loops(block))
    realize = sch.get(loops[-1]).body
    spatial, reduced = [], []
    for loop in loops[depth:]:
        axes = [
            axis
            for axis, value in zip(realize.block.iter_vars, realize.iter_values, strict=True)
            if uses(value, sch.get(loop).loop_var)
        ]
        if any(axis.iter_type == REDUCED for axis in axes):
            reduced.append(loop)
        elif _loop_extent(sch, loop) > 1:
            spatial.append(loop)
    return spatial, reduced


def _last_loop(sch: Any, block: Any, stage: _Stage, loops: list[Any]) -> Any:
    """Give, of these loops, the one that steps through the memory a stage writes."""
    realize = sch.get(sch.get_loops(block)[-1]).body
    values = list(zip(realize.block.iter_vars, realize.iter_values, strict=True))
    for written in reversed(stage.node.writes[0].region):
        for axis, value in values:
            if not uses(written.min, axis.var):
                continue
            mine = [loop for loop in loops if uses(value, sch.get(loop).loop_var)]
            if mine:
                return mine[-1]
    return None


def _loop_extent(sch: Any, loop: Any) -> int:
    return int(sch.get(loop).extent)


def _vectorise(sch: Any, loop: Any, lanes: int) -> None:
    """Make a loop of whole vectors one of vector statements; LLVM's vectoriser sees to the others."""
    extent = _loop_extent(sch, loop)
    if extent % lanes:
        return
    vectors, lane = sch.split(loop, [None, lanes])
    if 1 < extent // lanes <= ACCUMULATOR_ROW:
        sch.unroll(vectors)
    sch.vectorize(lane)


def _schedule_elementwise(sch: Any, name: str, lanes: int) -> None:
    """Schedule a stage without producers: parallel over chunks, trailing axes flattened into one."""
    _flatten(sch, name, _flat_axes(_Stage.of(sch, name)))
    *outer, inner = sch.get_loops(sch.get_sblock(name))
    chunk, inner = _split_flat(sch, inner, lanes)
    _parallelise(sch, [*outer, chunk])
    _vectorise(sch, inner, lanes)


def _parallelise(sch: Any, loops: Sequence[Any]) -> Any:
    """Make the first of these nested loops one parallel loop with slices enough; give the innermost loop."""
    taken, slices = 0, 1
    while taken < len(loops) and slices < ENOUGH_SLICES:
        slices *= _loop_extent(sch, loops[taken])
        taken += 1
    parallel = sch.fuse(*loops[:taken])
    sch.parallel(parallel)
    return loops[-1] if taken < len(loops) else parallel


def _flatten(sch: Any, name: str, count: int) -> None:
    """Make one axis of the `count` trailing ones, in the loops and in the buffers that move along them.

    Fusing loops alone would leave quotients and remainders in the indices that TVM cannot always cancel.
    """
    stage = _Stage.of(sch, name)
    if count < 2:
        return
    extents = stage.extents[-count:]

    def flat(*index: Any) -> list[Any]:
        position = index[-count]
        for i, extent in zip(index[len(index) - count + 1 :], extents[1:], strict=True):
            position = position * extent + i
        return [*index[:-count], position]

    moving = [read.source for read in stage.node.reads if _moves(read, stage.spatial[-count:])]
    for buffer in (*moving, stage.output):
        sch.transform_layout(sch.get_sblock(name), buffer.name, _index_map(flat, len(buffer.shape)))
    sch.transform_block_layout(sch.get_sblock(name), _index_map(flat, len(stage.spatial)))


def _index_map(function: Any, rank: int) -> Any:
    return tirx.IndexMap.from_func(function, ndim=rank, index_dtype="int32")


def _split_flat(sch: Any, loop: Any, lanes: int) -> Any:
    """Split a flat loop into slices of whole vectors, equal ones if the extent has divisors."""
    extent = _loop_extent(sch, loop)
    width = _divisor(extent, lanes, CHUNK)
    if width < extent and width < CHUNK // 16:
        width = CHUNK
    return sch.split(loop, [None, width])


def _flat_axes(stage: _Stage) -> int:
    """Count the trailing axes that are one contiguous run in every tensor that is read along them."""
    for count in range(len(stage.spatial), 1, -1):
        axes = stage.spatial[-count:]
        if not _uses_outside_reads(stage.node.body.value, axes) and all(
            _is_flat(read, axes) for read in stage.node.reads
        ):
            return count
    return 1


def _uses_outside_reads(tree: Any, axes: Sequence[Any]) -> bool:
    """Tell whether an expression needs an axis for itself, as the guards of pad lanes do."""
    found: list[Any] = []

    def visit(node: Any, _: Any) -> None:
        found.append(node)

    structural.structural_visit(tree, [(ir.TensorLoad, lambda load, visitor: None), (tirx.Var, visit)])
    return any(node.same_as(axis.var) for node in found for axis in axes)


def _moves(read: Any, axes: Sequence[Any]) -> bool:
    """Tell whether what is read depends on any of the axes."""
    return any(uses(r.min, axis.var) or uses(r.extent, axis.var) for r in read.region for axis in axes)


def _is_flat(read: Any, axes: Sequence[Any]) -> bool:
    """Tell whether a read does not move along the axes, or steps through memory as they do."""
    region, shape = list(read.region), [int(extent) for extent in read.source.shape]
    if not _moves(read, axes):
        return True
    if len(region) < len(axes):
        return False
    lead, tail = region[: -len(axes)], list(zip(region, shape, strict=True))[-len(axes) :]
    if any(uses(r.min, axis.var) or uses(r.extent, axis.var) for r in lead for axis in axes):
        return False
    for position, (axis, (r, extent)) in enumerate(zip(axes, tail, strict=True)):
        same = r.min.same_as(axis.var) or (extent == _extent(axis) == 1)
        if not same or _int_or(r.extent) != 1 or (position > 0 and extent != _extent(axis)):
            return False
    return True
