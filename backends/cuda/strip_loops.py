"""The threads of windows in strips: each reads row after row, and a row goes into all results that need it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.launches import launch, position, within
from cnnc.backends.cuda.strips import THREADS, StripParams, Windows
from cnnc.backends.lower import loops
from cnnc.ir.graph import Value
from cnnc.ops.fused import Fused

__all__ = ["Gather", "strip_func"]


@dataclass(frozen=True)
class Gather:
    """What is made of a window: it begins as `start`, which is also what padding is, and takes in each tap by `step`.

    `step` is given what there is so far, the input, and the tap's weight; None where there is no `weight`.
    """

    start: float
    step: Callable[[Any, Any, Any], Any]
    weight: Value | None = None

    @property
    def nothing(self) -> Any:
        """The start, as an expression."""
        return tirx.const(self.start, "float32")


def strip_func(kernel: Fused, windows: Windows, strip: StripParams, gather: Gather) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    shape = windows.node.types[0]
    body = body_around(kernel, windows.node).bind(shape.physical_shape)
    buffers = dict(zip(kernel.body.inputs, body.inputs, strict=True))
    output = body.output()
    counts, height = windows.counts(strip), shape.static_shape[2]
    total, each = math.prod(counts), strip.columns * windows.lanes
    # Pad lanes of a block have conditions of their own, which vectors have not.
    neighbours = loops.unrolled if shape.static_shape[1] % windows.block else loops.vectorized

    def work(thread: Any, block: Any) -> Any:
        number = block * THREADS + thread
        image, channels, row, column, part = position(counts, number)
        place = _Place(image, channels, row * strip.rows, column * strip.columns, part * windows.lanes)
        sums = loops.buffer("sums", (strip.rows, each), scope="local")
        weights = None if gather.weight is None else buffers[gather.weight]
        reader = _Reader(windows, strip, gather, place, buffers[windows.image], weights, sums)

        def clear(p: Any) -> Any:
            return loops.vectorized(each, lambda lane: loops.store(sums, gather.nothing, p, lane))

        def store(p: Any) -> Any:
            def one(lane: Any) -> Any:
                index = place.output(windows, p, lane)
                return loops.store(output, body.value(loops.load(sums, p, lane), index), *index)

            stored = neighbours(each, one)
            return stored if height % strip.rows == 0 else loops.when(place.row + p < height, stored)

        done = loops.sequence(
            loops.alloc(sums),
            loops.unrolled(strip.rows, clear, "p"),
            reader.gather_blocked() if windows.block > 1 else reader.gather_plain(),
            loops.unrolled(strip.rows, store, "p"),
        )
        return done if total % THREADS == 0 else loops.when(number < total, done)

    return loops.function([*body.inputs, output], launch((math.ceil(total / THREADS),), THREADS, work))


@dataclass(frozen=True)
class _Place:
    """Where a strip is: image, channel or block of channels, first row, first column, first channel of the block."""

    image: Any
    channels: Any
    row: Any
    column: Any
    lane: Any

    def output(self, windows: Windows, row: Any, position: Any) -> tuple[Any, ...]:
        """Give where a sum goes, by its row in the strip and its column, or its channel."""
        if windows.block > 1:
            return self.image, self.channels, self.row + row, self.column, self.lane + position
        return self.image, self.channels, self.row + row, self.column + position


@dataclass(frozen=True)
class _Reader:
    """The sums of a strip, and what they are made from; `w` is None where there are no weights."""

    windows: Windows
    strip: StripParams
    gather: Gather
    place: _Place
    x: Any
    w: Any
    sums: Any

    def gather_blocked(self) -> Any:
        """Take in four channels: for a column of the kernel its weights, then the rows that meet it."""
        kh, kw = self.windows.taps
        lanes = self.windows.lanes
        weights = loops.buffer("weights", (kh, lanes), scope="local")
        pixel = loops.buffer("pixel", (1, lanes), scope="local")
        (stride, left, dilation), width = self._across, self.windows.node.types[0].static_shape[3]

        def load_weight(column: int) -> Any:
            def tap(row: Any) -> Any:
                def one(lane: Any) -> Any:
                    value = loops.widened(self.w, self.place.channels, 0, row, column, self.place.lane + lane)
                    return loops.store(weights, value, row, lane)

                return loops.vectorized(lanes, one)

            return loops.unrolled(kh, tap, "row")

        def load_pixel(offset: int, column: int) -> Any:
            h, conditions = self._row(offset)
            first = column * dilation - left
            w = self.place.column * stride + first
            conditions += within(w, first, (width - 1) * stride + first, self.windows.image.type.static_shape[3])

            def one(lane: Any) -> Any:
                value = loops.widened(self.x, self.place.image, self.place.channels, h, w, self.place.lane + lane)
                return loops.store(pixel, self._chosen(conditions, value), 0, lane)

            return loops.vectorized(lanes, one)

        def take(p: int, row: int) -> Any:
            def one(lane: Any) -> Any:
                weight = None if self.w is None else loops.load(weights, row, lane)
                return self._step(loops.load(pixel, 0, lane), weight, p, lane)

            return loops.vectorized(lanes, one)

        return loops.sequence(
            None if self.w is None else loops.alloc(weights),
            loops.alloc(pixel),
            *(
                loops.sequence(
                    None if self.w is None else load_weight(column),
                    *(
                        loops.sequence(load_pixel(offset, column), *(take(p, row) for p, row in pairs))
                        for offset, pairs in self._rows()
                    ),
                )
                for column in range(kw)
            ),
        )

    def gather_plain(self) -> Any:
        """Take in neighbouring columns of a channel: all its weights, then every row once."""
        kh, kw = self.windows.taps
        columns = self.strip.columns
        starts = self.windows.vectors(self.strip)
        weights = loops.buffer("weights", (kh, kw), scope="local")
        line = loops.buffer("line", (len(starts), columns), scope="local")
        (stride, left, dilation), width = self._across, self.windows.node.types[0].static_shape[3]

        def load_weight(row: Any) -> Any:
            def one(column: Any) -> Any:
                value = loops.widened(self.w, self.place.channels, 0, row, column)
                return loops.store(weights, value, row, column)

            return loops.unrolled(kw, one, "column")

        def load_vector(offset: int, number: int) -> Any:
            h, conditions = self._row(offset)
            w = self.place.column * stride + starts[number]
            last = (width - columns) * stride + starts[number]
            # Rows are whole vectors, so that a vector is in the padding as a whole.
            conditions += within(w, starts[number], last, self.windows.image.type.static_shape[3])

            def one(lane: Any) -> Any:
                value = loops.widened(self.x, self.place.image, self.place.channels, h, w + lane)
                return loops.store(line, self._chosen(conditions, value), number, lane)

            return loops.vectorized(columns, one)

        def take(p: int, row: int) -> Any:
            def one(column: int, tap: int) -> Any:
                read = column * stride + tap * dilation - left - starts[0]
                weight = None if self.w is None else loops.load(weights, row, tap)
                return self._step(loops.load(line, read // columns, read % columns), weight, p, column)

            return loops.sequence(*(one(column, tap) for tap in range(kw) for column in range(columns)))

        return loops.sequence(
            None if self.w is None else loops.alloc(weights),
            loops.alloc(line),
            None if self.w is None else loops.unrolled(kh, load_weight, "row"),
            *(
                loops.sequence(
                    *(load_vector(offset, number) for number in range(len(starts))),
                    *(take(p, row) for p, row in pairs),
                )
                for offset, pairs in self._rows()
            ),
        )

    @property
    def _across(self) -> tuple[int, int, int]:
        """Give stride, padding and dilation along a row."""
        return self.windows.stride[1], self.windows.pad[1], self.windows.dilation[1]

    def _rows(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """List the rows that a strip reads, each with the sums and the rows of the kernel that meet in it."""
        (stride, dilation), (kh, _) = (self.windows.stride[0], self.windows.dilation[0]), self.windows.taps
        meet: dict[int, list[tuple[int, int]]] = {}
        for p in range(self.strip.rows):
            for row in range(kh):
                meet.setdefault(p * stride + row * dilation, []).append((p, row))
        yield from sorted(meet.items())

    def _row(self, offset: int) -> tuple[Any, list[Any]]:
        """Give a row of the image, and the conditions for it to be there."""
        stride, strips = self.windows.stride[0], self.windows.counts(self.strip)[2]
        first = offset - self.windows.pad[0]
        h = self.place.row * stride + first
        last = (strips - 1) * self.strip.rows * stride + first
        return h, within(h, first, last, self.windows.image.type.static_shape[2])

    def _chosen(self, conditions: list[Any], value: Any) -> Any:
        """Read a value where all conditions hold, or take what padding is."""
        return tirx.if_then_else(tirx.all(*conditions), value, self.gather.nothing) if conditions else value

    def _step(self, value: Any, weight: Any, p: Any, lane: Any) -> Any:
        """Take a tap into a result."""
        return loops.store(self.sums, self.gather.step(loops.load(self.sums, p, lane), value, weight), p, lane)
