"""The threads of pools: what is made of a window, and how threads share an image."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.launches import barrier, launch
from cnnc.backends.cuda.pool import FEW, ImageParams, Images, PoolKind
from cnnc.backends.cuda.strip_loops import Gather
from cnnc.backends.lower import loops
from cnnc.backends.lower.reducers import nan_max, nan_min
from cnnc.ops.fused import Fused

__all__ = ["gather_of", "images_func"]


def gather_of(kind: PoolKind) -> Gather:
    """Tell what a pool makes of its windows."""
    if kind == "sum":
        return Gather(0.0, lambda total, x, _: total + x)
    if kind == "max":
        return Gather(float("-inf"), lambda total, x, _: nan_max(total, x))
    return Gather(float("inf"), lambda total, x, _: nan_min(total, x))


def images_func(kernel: Fused, images: Images, params: ImageParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    shape = images.node.types[0]
    body = body_around(kernel, images.node).bind(shape.physical_shape)
    buffers = dict(zip(kernel.body.inputs, body.inputs, strict=True))
    x, output, gather = buffers[images.image], body.output(), gather_of(images.kind)
    lanes, parts, threads = images.lanes, images.parts, params.threads
    width = lanes if images.block > 1 else 1
    _, blocks, _, across, *_ = images.image.type.physical_shape
    channels = images.image.type.static_shape[1]

    def work(thread: Any, block: Any) -> Any:
        number = block * params.images + thread // threads
        part, first = thread % parts, thread % threads // parts
        found = loops.buffer("found", (1, lanes), scope="local")
        once, twice = (
            loops.buffer(name, (params.images * threads, width), scope="shared") for name in ("once", "twice")
        )

        def take(item: Any) -> Any:
            def one(lane: Any) -> Any:
                at: tuple[Any, ...]
                if images.block > 1:
                    at = (item // across, item % across, part * lanes + lane)
                else:
                    # Rows follow one another: all of an image is one.
                    at = (0, item * lanes + lane)
                value = loops.widened(x, number // blocks, number % blocks, *at)
                return loops.store(found, gather.step(loops.load(found, 0, lane), value, None), 0, lane)

            return loops.vectorized(lanes, one)

        def rest(item: Any) -> Any:
            return loops.when(item < images.items, take(item))

        each = threads // parts
        turns = images.items // each
        gathered = loops.sequence(
            loops.loop(turns, lambda turn: take(turn * each + first), "turn") if turns else None,
            rest(turns * each + first) if images.items % each else None,
        )
        present = number < images.count
        whole = images.count % params.images == 0

        def merge(lane: int) -> Any:
            total = gather.step(loops.load(found, 0, 0), loops.load(found, 0, lane), None)
            return loops.store(found, total, 0, 0)

        def add_up(source: Any, target: Any, count: int, step: int) -> Any:
            """Take what `count` threads found, every `step`th, into what this one did."""

            def one(other: Any) -> Any:
                def each_lane(lane: Any) -> Any:
                    value = loops.load(source, thread + other * step * parts, lane)
                    return loops.store(found, gather.step(loops.load(found, 0, lane), value, None), 0, lane)

                return loops.vectorized(width, each_lane)

            return loops.sequence(
                loops.unrolled(count - 1, one, "other", start=1),
                None if target is None else hand_over(target),
            )

        def hand_over(target: Any) -> Any:
            return loops.vectorized(width, lambda lane: loops.store(target, loops.load(found, 0, lane), thread, lane))

        def store(lane: Any) -> Any:
            where = (0,) * (shape.rank - 2) + ((part * lanes + lane,) if images.block > 1 else ())
            index = (number // blocks, number % blocks, *where)
            return loops.store(output, body.value(loops.load(found, 0, lane), index), *index)

        # Pad lanes of a block have conditions of their own, which vectors have not.
        neighbours = loops.unrolled if channels % images.block else loops.vectorized
        ends = first == 0 if whole else tirx.all(first == 0, present)
        # Two steps where there are many: no thread adds up more than FEW.
        groups = max(each // FEW, 1)
        return loops.sequence(
            loops.alloc(found),
            loops.alloc(once),
            loops.alloc(twice) if groups > 1 else None,
            loops.vectorized(lanes, lambda lane: loops.store(found, gather.nothing, 0, lane)),
            gathered if whole else loops.when(present, gathered),
            *(merge(lane) for lane in range(1, lanes) if images.block == 1),
            hand_over(once),
            barrier(),
            loops.when(first < groups, add_up(once, twice, FEW, groups)) if groups > 1 else None,
            barrier() if groups > 1 else None,
            loops.when(
                ends,
                loops.sequence(
                    add_up(twice if groups > 1 else once, None, groups if groups > 1 else each, 1),
                    neighbours(width, store),
                ),
            ),
        )

    grid = (math.ceil(images.count / params.images),)
    return loops.function([*body.inputs, output], launch(grid, params.images * threads, work))
