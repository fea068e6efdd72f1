"""The blocks of `conv_first`: a patch of the image and weights into shared memory, then sums in registers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.bodies import body_around
from cnnc.backends.cuda.conv_first import FirstConv, FirstParams, Patch, patch_of, shared_numbers, weight_pitch
from cnnc.backends.cuda.direct import VECTOR
from cnnc.backends.cuda.launches import barrier, launch, position, within
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import BoundBody
from cnnc.ops.fused import Fused

__all__ = ["conv_first_func"]


def conv_first_func(kernel: Fused, found: FirstConv, tile: FirstParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output."""
    body = body_around(kernel, found.node, found.node.inputs[:2]).bind(found.node.types[0].physical_shape)
    output = body.output()
    memory = loops.buffer("memory", (shared_numbers(found, tile),), scope="shared.dyn")
    stages = found.weight[2] // tile.taps
    groups = found.grid(tile)[2] // found.output[0]

    def work(thread: Any, across: Any, down: Any, number: Any) -> Any:
        sums = loops.buffer("sums", (tile.rows, tile.channels), scope="local")
        place = _Place(number // groups, number % groups * tile.outputs, down * tile.height, across * tile.width)
        block = _Block(found, tile, patch_of(found, tile), body, memory, sums, place, thread)

        def stage(number: Any) -> Any:
            # Nothing may be put in the place of what other threads still read.
            again = barrier() if stages > 1 else None
            return loops.sequence(again, block.load_patch(number), block.load_weights(number), barrier(), block.add())

        return loops.sequence(
            loops.alloc(memory),
            loops.alloc(sums),
            loops.unrolled(tile.rows, lambda row: _each_vector(tile.channels, lambda c: _clear(sums, row, c)), "row"),
            loops.loop(stages, stage, "stage"),
            loops.unrolled(tile.rows, lambda row: block.store(output, row), "row"),
        )

    return loops.function([*body.inputs, output], launch(found.grid(tile), tile.threads, work))


def _zero() -> Any:
    return tirx.const(0.0, "float32")


def _clear(sums: Any, row: Any, channel: Any) -> Any:
    return loops.store(sums, _zero(), row, channel)


def _each_vector(count: int, one: Callable[[Any], Any]) -> Any:
    """Run statements for all channels of a thread, vector by vector."""
    return loops.unrolled(
        count // VECTOR, lambda vector: loops.vectorized(VECTOR, lambda lane: one(vector * VECTOR + lane)), "vector"
    )


@dataclass(frozen=True)
class _Place:
    """Where a block's outputs begin."""

    image: Any
    channel: Any
    row: Any
    column: Any


@dataclass(frozen=True)
class _Block:
    """What a thread of a block does."""

    found: FirstConv
    tile: FirstParams
    patch: Patch
    body: BoundBody
    memory: Any
    sums: Any
    place: _Place
    thread: Any

    @property
    def _whole(self) -> bool:
        """Whether all rows of the kernel are one stage."""
        return self.tile.taps == self.found.weight[2]

    def load_patch(self, stage: Any) -> Any:
        """Put the image's part into shared memory, 0 where it is padding."""
        patch, conv = self.patch, self.found.conv
        (_, _, height, width), oh = self.found.image, self.found.output[2]
        (down, across), (top, left, *_) = conv.stride, conv.pad
        counts = (patch.channels, patch.rows, patch.columns // patch.vector)
        read = loops.buffer("read", (1, patch.vector), scope="local")
        start = -left - patch.lead

        def one(number: Any) -> Any:
            channel, row, vector = position(counts, number)
            if self._whole:
                h, last = self.place.row * down + row - top, (oh - 1) * down + patch.rows - 1
            else:
                h = (self.place.row + row) * down + stage * conv.dilation[0] - top
                last = (oh + self.tile.height) * down + (self.found.weight[2] - 1) * conv.dilation[0]
            w = self.place.column * across + vector * patch.vector + start
            most = (self.found.grid(self.tile)[0] - 1) * self.tile.width * across + patch.columns - patch.vector + start
            inside = [*within(h, -top, last - top, height), *within(w, start, most, width)]

            def load(lane: Any) -> Any:
                value = self._operand(0, (self.place.image, channel, h, w + lane))
                value = tirx.if_then_else(tirx.all(*inside), value, _zero()) if inside else value
                return loops.store(read, value, 0, lane)

            def keep(lane: Any) -> Any:
                column = vector * patch.vector + lane
                at = (channel * patch.rows + row) * patch.pitch + column % across * patch.phase + column // across
                return loops.store(self.memory, loops.load(read, 0, lane), at)

            return loops.sequence(loops.vectorized(patch.vector, load), loops.unrolled(patch.vector, keep, "lane"))

        return loops.sequence(loops.alloc(read), self._together(math.prod(counts), one))

    def load_weights(self, stage: Any) -> Any:
        """Put the weights of the block's channels into shared memory, by terms; 0 beyond the last channel."""
        outputs, channels, _, kw = self.found.weight
        block = self.found.block
        lanes = min(block, VECTOR)
        counts = (self.tile.outputs // block, channels, self.tile.taps, kw, block // lanes)

        def one(number: Any) -> Any:
            group, channel, row, column, part = position(counts, number)
            term = (channel * self.tile.taps + row) * kw + column
            tap = row if self._whole else stage
            output = self.place.channel // block + group
            blocks = math.ceil(outputs / block)

            def copy(lane: Any) -> Any:
                index = (output, channel, tap, column, *((part * lanes + lane,) if block > 1 else ()))
                value = self._operand(1, index)
                if blocks * block % self.tile.outputs:
                    value = tirx.if_then_else(output < blocks, value, _zero())
                at = self.patch.numbers + term * weight_pitch(self.tile) + group * block + part * lanes + lane
                return loops.store(self.memory, value, at)

            # Pad lanes of a block have conditions of their own, which vectors have not.
            return (loops.unrolled if outputs % block else loops.vectorized)(lanes, copy)

        return self._together(math.prod(counts), one)

    def add(self) -> Any:
        """Add the products of a stage to the sums."""
        tile, patch, conv = self.tile, self.patch, self.found.conv
        _, channels, _, kw = self.found.weight
        (down, across), (dh, dw) = conv.stride, conv.dilation
        weights = loops.buffer("weights", (tile.channels,), scope="local")
        pixel = loops.buffer("pixel", (1,), scope="local")
        lane_row, lane_column = self._pixel
        first = self.patch.numbers + self._warp * tile.channels

        def column(channel: Any, row: Any, tap: int) -> Any:
            term = (channel * tile.taps + row) * kw + tap

            def load(c: Any) -> Any:
                return loops.store(weights, loops.load(self.memory, first + term * weight_pitch(tile) + c), c)

            def pixels(i: Any) -> Any:
                line = i * tile.lane_rows + lane_row
                line = line * down + row * dh if self._whole else line
                at = (channel * patch.rows + line) * patch.pitch + lane_column
                first_column = patch.lead + tap * dw
                skipped = first_column % across * patch.phase + first_column // across

                def product(c: Any) -> Any:
                    total = loops.load(self.sums, i, c) + loops.load(pixel, 0) * loops.load(weights, c)
                    return loops.store(self.sums, total, i, c)

                return loops.sequence(
                    loops.store(pixel, loops.load(self.memory, at + skipped), 0),
                    _each_vector(tile.channels, product),
                )

            return loops.sequence(_each_vector(tile.channels, load), loops.unrolled(tile.rows, pixels, "i"))

        def row(channel: Any, row: Any) -> Any:
            return loops.sequence(*(column(channel, row, tap) for tap in range(kw)))

        return loops.sequence(
            loops.alloc(weights),
            loops.alloc(pixel),
            loops.loop(channels, lambda c: loops.loop(tile.taps, lambda r: row(c, r), "r"), "c"),
        )

    def store(self, output: Any, i: Any) -> Any:
        """Finish and store a row of the thread: vectors where channels lie together, as far as there are any."""
        tile, block = self.tile, self.found.block
        _, outputs, oh, ow = self.found.output
        lane_row, lane_column = self._pixel
        row = self.place.row + i * tile.lane_rows + lane_row
        column = self.place.column + lane_column
        channel = self.place.channel + self._warp * tile.channels

        def one(c: Any) -> Any:
            where = (channel // block + c // block, row, column, c % block) if block > 1 else (channel + c, row, column)
            index = (self.place.image, *where)
            return loops.store(output, self.body.value(loops.load(self.sums, i, c), index), *index)

        def several(vector: Any) -> Any:
            # Pad lanes of a block have conditions of their own, which vectors have not.
            make = loops.unrolled if block == 1 or outputs % block else loops.vectorized
            whole = math.ceil(outputs / block) * block
            present = whole % tile.outputs == 0

            def lane(number: Any) -> Any:
                c = vector * VECTOR + number
                return one(c) if present or block > 1 else loops.when(channel + c < outputs, one(c))

            stored = make(VECTOR, lane)
            return stored if present or block == 1 else loops.when(channel + vector * VECTOR < whole, stored)

        stored = loops.unrolled(tile.channels // VECTOR, several, "vector")
        inside = [
            *within(row, 0, self.found.grid(tile)[1] * tile.height - 1, oh),
            *within(column, 0, self.found.grid(tile)[0] * tile.width - 1, ow),
        ]
        return loops.when(tirx.all(*inside), stored) if inside else stored

    @property
    def _warp(self) -> Any:
        return self.thread // 32

    @property
    def _pixel(self) -> tuple[Any, Any]:
        """Give a lane's row among those side by side, and its column."""
        lane = self.thread % 32
        return lane // self.tile.width, lane % self.tile.width

    def _operand(self, which: int, index: tuple[Any, ...]) -> Any:
        value = self.body.operand(index, which)
        return value if str(value.ty.dtype) == "float32" else tirx.Cast("float32", value)

    def _together(self, count: int, one: Callable[[Any], Any]) -> Any:
        """Have the threads of the block share what is to be done `count` times."""
        threads = self.tile.threads

        def turn(index: Any) -> Any:
            number = index * threads + self.thread
            return one(number) if count % threads == 0 else loops.when(number < count, one(number))

        return loops.loop(math.ceil(count / threads), turn, "turn")
