"""Pooling on blocked channels (NCHWc): the maximum, minimum or sum of windows, and reductions of whole images.

    y[n, c, h, w] = max (min, sum) over r, s of x[n, c, h * stride + r * dilation - pad, ...]

Padding takes part in nothing.  An average is the sum with a division after it, which is the epilogue's business.
A NaN in a window is its maximum and minimum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import row_segments
from cnnc.backends.cpu.window_shape import WindowShape
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.blocked import channel_layout
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.pool import AveragePool, MaxPool, MinPool
from cnnc.ops.reduce import ReduceMax, ReduceMean, ReduceMin, ReduceSum
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["GlobalPool", "Pool", "PoolKind", "PoolParams", "build", "build_global", "cost", "space"]

PoolKind = Literal["max", "min", "sum"]


@dataclass(frozen=True)
class PoolParams:
    """Register tiles of at most `pixels` pixels; slices of `rows` output rows of one channel block."""

    pixels: int
    rows: int


def space(shape: WindowShape, machine: Machine) -> Iterator[PoolParams]:
    """Give the tile sizes worth considering."""
    for rows in sorted({-(-shape.oh // parts) for parts in (1, 2, 4, 8) if parts <= shape.oh}):
        yield PoolParams(machine.registers // 4, rows)


def cost(shape: WindowShape, params: PoolParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    cycles = 0.0
    for segment in row_segments(
        shape.w, shape.ow, shape.kw, shape.stride[1], shape.pad[1], shape.dilation[1], params.pixels
    ):
        taps = sum((run.last - run.first) * (run.end - run.begin) for run in segment.runs)
        cycles += segment.count * (8.0 + 0.5 * segment.pixels + shape.kh * (2.0 + taps))
    row_blocks = -(-shape.oh // params.rows)
    slices = shape.n * shape.blocks * row_blocks
    waves = machine.turns(slices)
    moved = 4.0 * shape.n * shape.blocks * shape.block * (shape.h * shape.w + shape.oh * shape.ow)
    far = moved / machine.memory_bytes / machine.threads
    return max((cycles * params.rows + 40.0) * waves, far) * machine.sharing(slices) / machine.hertz


def build(shape: WindowShape, kind: PoolKind, params: PoolParams, body: Body) -> Any:
    """Make the kernel of sliding windows: a PrimFunc of the body's inputs and the output; the operand is x."""
    from cnnc.backends.cpu.windows import Sums, window_kernel

    def step(total: Any, x: Any, *_: Any) -> Any:
        return _combine(kind, total, x)

    return window_kernel(shape, body.bind(shape.output_shape), params.pixels, params.rows, Sums(_START[kind], step))


def build_global(shape: WindowShape, kind: PoolKind, body: Body) -> Any:
    """Make the kernel that reduces whole images, the window of `shape` being the input; one slice a channel block."""
    from tvm import tirx

    from cnnc.backends.lower import loops

    bound = body.bind(shape.output_shape)
    x, y = bound.operands[0], bound.output()
    pixels = shape.h * shape.w
    chains = min(CHAINS, pixels)

    def one_slice(index: Any) -> Any:
        image, block = index // shape.blocks, index % shape.blocks
        parts = loops.buffer("parts", (chains, shape.block), scope="local")

        def add(part: Any, pixel: Any) -> Any:
            value = loops.load(x, image, block, pixel // shape.w, pixel % shape.w, 0, lanes=shape.block)
            total = _combine(kind, loops.load(parts, part, 0, lanes=shape.block), value)
            return loops.store(parts, total, part, 0, lanes=shape.block)

        def clear(part: Any) -> Any:
            return loops.store(
                parts, tirx.Broadcast(tirx.const(_START[kind], "float32"), shape.block), part, 0, lanes=shape.block
            )

        def turn(first: Any) -> Any:
            return loops.unrolled(chains, lambda part: add(part, first * chains + part), "part")

        def merge(part: int) -> Any:
            """Combine two chains, one statement each: nested in one expression they would double at every step."""
            rest = loops.load(parts, part, 0, lanes=shape.block)
            total = _combine(kind, loops.load(parts, 0, 0, lanes=shape.block), rest)
            return loops.store(parts, total, 0, 0, lanes=shape.block)

        def finish(lane: Any) -> Any:
            value = bound.value(loops.load(parts, 0, lane), (image, block, 0, 0, lane))
            if shape.c % shape.block:
                value = tirx.Select(block * shape.block + lane < shape.c, value, tirx.const(0, y.dtype))
            return loops.store(y, value, image, block, 0, 0, lane)

        done = pixels // chains * chains
        return loops.sequence(
            loops.alloc(parts),
            loops.unrolled(chains, clear, "part"),
            loops.loop(pixels // chains, turn, "turn"),
            loops.unrolled(pixels - done, lambda part: add(part, done + part), "rest") if done < pixels else None,
            *(merge(part) for part in range(1, chains)),
            loops.vectorized(shape.block, finish),
        )

    return loops.function([*bound.inputs, y], loops.parallel(shape.n * shape.blocks, one_slice))


CHAINS = 8
"""Independent sums of a whole image, to hide the latency of each."""

_START = {"max": float("-inf"), "min": float("inf"), "sum": 0.0}


def _combine(kind: PoolKind, total: Any, x: Any) -> Any:
    from tvm import tirx

    if kind == "sum":
        return total + x
    # Maximum and minimum instructions give their second operand if either is NaN: right for a NaN in x.
    better = tirx.max(total, x) if kind == "max" else tirx.min(total, x)
    return tirx.Select(tirx.isnan(total), total, better)


@dataclass(frozen=True)
class Pool:
    """The template: maximum, minimum and average of windows over 2-D images."""

    name: str = "pool"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a pool on blocked channels."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, params) for params in space(_known(kernel, target)[1], machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known(kernel, target)[1], params_of(PoolParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape, kind = _known(kernel, target)
        return build(shape, kind, params_of(PoolParams, schedule), body_of(kernel, anchor))


@dataclass(frozen=True)
class GlobalPool:
    """The template: maximum, minimum, sum and mean of whole images."""

    name: str = "pool_global"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a reduction over both spatial axes, or a pool whose one window is the image."""
        return _find_global(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the one schedule there is."""
        return (Schedule(self.name),)

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run: an addition for each vector of the input."""
        shape, machine = _known_global(kernel, target)[1], machine_of(target)
        vectors = shape.n * shape.blocks * (shape.h * shape.w + 20)
        return vectors / min(machine.threads, shape.n * shape.blocks) / machine.hertz

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape, kind = _known_global(kernel, target)
        return build_global(shape, kind, body_of(kernel, anchor))


Found = tuple[Node, WindowShape, PoolKind]

_KINDS: dict[type, PoolKind] = {
    **{MaxPool: "max", MinPool: "min", AveragePool: "sum"},
    **{ReduceMax: "max", ReduceMin: "min", ReduceSum: "sum", ReduceMean: "sum"},
}


def _known(kernel: Fused, target: Target) -> Found:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"pool cannot compute kernel {kernel.anchor}")
    return found


def _known_global(kernel: Fused, target: Target) -> Found:
    found = _find_global(kernel, target)
    if found is None:
        raise VerifyError(f"pool_global cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> Found | None:
    """Give the pool, its windows and what it computes, if it is one this file can."""
    anchor = anchor_of(kernel, target, "max_pool", "min_pool", "average_pool")
    if anchor is None or not isinstance(anchor.op, MaxPool | MinPool | AveragePool):
        return None
    op, x = anchor.op, anchor.inputs[0].type
    if x.rank != 4 or x.layout != channel_layout(4, target.vector_lanes):
        return None
    (n, channels, height, width), (_, _, oh, ow) = x.static_shape, anchor.types[0].static_shape
    shape = WindowShape(
        *(n, channels, height, width, oh, ow, op.kernel[0], op.kernel[1]),
        stride=(op.stride[0], op.stride[1]),
        pad=(op.pad[0], op.pad[1]),
        dilation=(op.dilation[0], op.dilation[1]),
        block=target.vector_lanes,
    )
    return anchor, shape, _KINDS[type(op)]


@lru_cache(64)
def _find_global(kernel: Fused, target: Target) -> Found | None:
    """Give the reduction of whole images, if the kernel is one."""
    pool = _find(kernel, target)
    if pool is not None:
        shape = pool[1]
        whole = (shape.oh, shape.ow, shape.kh, shape.kw) == (1, 1, shape.h, shape.w)
        return pool if whole and shape.pad == (0, 0) and shape.dilation == (1, 1) else None
    anchor = anchor_of(kernel, target, "reduce_max", "reduce_min", "reduce_sum", "reduce_mean")
    if anchor is None or not isinstance(anchor.op, ReduceMax | ReduceMin | ReduceSum | ReduceMean):
        return None
    x = anchor.inputs[0].type
    if x.rank != 4 or x.layout != channel_layout(4, target.vector_lanes):
        return None
    if anchor.op.axes != (2, 3) or not anchor.op.keepdims:
        return None
    n, channels, height, width = x.static_shape
    shape = WindowShape(n, channels, height, width, 1, 1, height, width, block=target.vector_lanes)
    return anchor, shape, _KINDS[type(anchor.op)]
