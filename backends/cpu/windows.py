"""Sliding windows that keep the channel: the loop nest shared by depthwise convolution and pooling (NCHWc).

    y[n, c, h, w] = finish(step over r, s of x[n, c, h * stride + r * dilation - pad, ...])

A register tile is a few neighbours in a row of one channel block, each with one sum or several (`Sums`).  Windows at
the borders skip what is padding (see segments.py), so nothing is copied, and padding takes part in nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm import tirx

from cnnc.backends.cpu.epilogue import finish
from cnnc.backends.cpu.segments import Run, Segment, row_segments
from cnnc.backends.cpu.window_shape import WindowShape
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import BoundBody

__all__ = ["Step", "Sums", "Tap", "window_kernel"]


class Tap(NamedTuple):
    """Where a window meets the kernel: channel block, row and column of the kernel, and which of the pixel's sums."""

    channel: Any
    row: Any
    column: Any
    part: Any


Step = Callable[[Any, Any, Tap], Any]
"""(vector so far, input vector, tap) -> vector."""


@dataclass(frozen=True)
class Sums:
    """What a pixel gathers: `parts` vectors that begin as `start`, take in each input by `step`, and end as one.

    `merge` makes one of them, given as expressions.  `prepare` gives statements that a slice begins with, for its
    channel block.
    """

    start: float
    step: Step
    parts: int = 1
    merge: Callable[[list[Any]], Any] = lambda totals: totals[0]
    prepare: Callable[[Any], Any] = lambda channel: None


def window_kernel(shape: WindowShape, body: BoundBody, pixels: int, rows: int, gather: Sums) -> Any:
    """Make the kernel: tiles of at most `pixels` outputs, slices of `rows` output rows of a channel block.

    The first operand of the body is the input.
    """
    x, y = body.operands[0], body.output()
    segments = row_segments(shape.w, shape.ow, shape.kw, shape.stride[1], shape.pad[1], shape.dilation[1], pixels)
    row_blocks = -(-shape.oh // rows)

    def one_slice(index: Any) -> Any:
        image = index // (shape.blocks * row_blocks)
        channel = index // row_blocks % shape.blocks
        first = index % row_blocks * rows
        count = rows if shape.oh % rows == 0 else tirx.min(loops.const(rows), shape.oh - first)
        lines = loops.loop(count, lambda row: one_row(image, channel, first + row), "row")
        return loops.sequence(gather.prepare(channel), lines)

    def one_row(image: Any, channel: Any, row: Any) -> Any:
        def tiles(segment: Segment) -> Any:
            def tile(index: Any) -> Any:
                return one_tile(image, channel, row, segment.start + index * segment.pixels, segment)

            return loops.loop(segment.count, tile, "tile")

        return loops.sequence(*(tiles(segment) for segment in segments))

    def one_tile(image: Any, channel: Any, row: Any, column: Any, segment: Segment) -> Any:
        sums = loops.buffer("sums", (gather.parts, segment.pixels, shape.block), scope="local")
        initial = tirx.Broadcast(tirx.const(gather.start, "float32"), shape.block)
        top = row * shape.stride[0] - shape.pad[0]

        def kernel_row(tap: Any) -> Any:
            at = (image, channel, top + tap * shape.dilation[0])
            return loops.sequence(*(one_run(sums, at, tap, column, run) for run in segment.runs))

        def clear(part: Any, p: Any) -> Any:
            return loops.store(sums, initial, part, p, 0, lanes=shape.block)

        def merge(p: Any) -> Any:
            totals = [loops.load(sums, part, p, 0, lanes=shape.block) for part in range(gather.parts)]
            return loops.store(sums, gather.merge(totals), 0, p, 0, lanes=shape.block)

        def at(place: tuple[int, ...], lane: Any) -> tuple[Any, ...]:
            return (image, channel, row, column + place[0], lane)

        def result(place: tuple[int, ...], lane: Any) -> Any:
            return value(loops.load(sums, 0, *place, lane), at(place, lane))

        def store(place: tuple[int, ...], lane: Any, value: Any) -> Any:
            return loops.store(y, value, *at(place, lane))

        return loops.sequence(
            loops.alloc(sums),
            _each(gather.parts, 0, segment.pixels, clear),
            _kernel_rows(shape, top, kernel_row) if segment.runs else None,
            loops.unrolled(segment.pixels, merge, "p") if gather.parts > 1 else None,
            finish([(p,) for p in range(segment.pixels)], shape.block, result, store),
        )

    def one_run(sums: Any, at: tuple[Any, Any, Any], kernel_row: Any, column: Any, run: Run) -> Any:
        def add(tap: Any, part: Any, p: Any) -> Any:
            source = (column + p) * shape.stride[1] - shape.pad[1] + tap * shape.dilation[1]
            value = loops.load(x, *at, source, 0, lanes=shape.block)
            total = loops.load(sums, part, p, 0, lanes=shape.block)
            total = gather.step(total, value, Tap(at[1], kernel_row, tap, part))
            return loops.store(sums, total, part, p, 0, lanes=shape.block)

        def column_taps(tap: Any) -> Any:
            return _each(gather.parts, run.begin, run.end, lambda part, p: add(tap, part, p))

        make = loops.unrolled if run.last - run.first <= MOST_UNROLLED else loops.loop
        return make(run.last - run.first, column_taps, "kernel_column", run.first)

    def value(total: Any, at: tuple[Any, ...]) -> Any:
        value = body.value(total, at)
        if shape.c % shape.block:
            inside = at[1] * shape.block + at[-1] < shape.c
            value = tirx.Select(inside, value, tirx.const(0, y.dtype))
        return value

    return loops.function([*body.inputs, y], loops.parallel(shape.n * shape.blocks * row_blocks, one_slice))


def _each(parts: int, begin: int, end: int, statement: Callable[[Any, Any], Any]) -> Any:
    """Write `statement(part, pixel)` for all of them; innermost the fewer, whose operands stay in registers."""

    def pixels(body: Callable[[Any], Any]) -> Any:
        return loops.unrolled(end - begin, body, "p", begin)

    if parts > end - begin:
        return loops.unrolled(parts, lambda part: pixels(lambda p: statement(part, p)), "part")
    return pixels(lambda p: loops.unrolled(parts, lambda part: statement(part, p), "part"))


MOST_UNROLLED = 7
"""Kernel columns that are unrolled, so that neighbouring pixels share what they read."""


def _kernel_rows(shape: WindowShape, top: Any, kernel_row: Callable[[Any], Any]) -> Any:
    """Loop over the kernel rows that read input rows, not padding."""
    dilation = shape.dilation[0]
    lowest = (shape.oh - 1) * shape.stride[0] - shape.pad[0] + (shape.kh - 1) * dilation
    if shape.pad[0] == 0 and lowest < shape.h:
        return loops.loop(shape.kh, kernel_row, "kernel_row")
    first = tirx.max(loops.const(0), (dilation - 1 - top) // dilation)
    last = tirx.min(loops.const(shape.kh), (shape.h - top + dilation - 1) // dilation)
    return loops.loop(last - first, kernel_row, "kernel_row", first)
