"""The loop nest of a convolution on matrix tiles (see conv_bf16x3.py for the method)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from cnnc.backends.cpu import amx
from cnnc.backends.cpu.bf16_parts import paired_parts
from cnnc.backends.cpu.conv_bf16x3_shape import MatrixParams, is_flat, part_products, reshaped
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.epilogue import SIDE_BY_SIDE, finish
from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS
from cnnc.backends.cpu.plane_parts import PlaneParts
from cnnc.backends.cpu.planes import Planes
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import Body

__all__ = ["MatrixLoops"]

SPLIT_AHEAD = 2
"""Steps for which weights are split early: a tile that was stored just before is slow to load."""

AHEAD = 8
"""Steps for which weights are asked for early."""

MOST_ASKED = 8
"""Lines of input to ask for beside the products of a tile; with more, asking is in the way."""


class MatrixLoops:
    """Writes the loop nest of one convolution."""

    def __init__(
        self, shape: ConvShape, params: MatrixParams, body: Body, output_shape: Sequence[int] | None = None
    ) -> None:
        self.params = params
        self.body = body.bind(output_shape or shape.output_shape)
        self.x, self.weight = self.body.operands[:2]
        self.y = self.body.output()
        self.logical = shape
        self.shape = shape = reshaped(shape)
        self.planes = planes = Planes(shape, params.rows)
        pairs = -(-shape.ic_blocks // 2)
        self.pairs = params.pairs or pairs
        self.passes = pairs // self.pairs
        self.row_blocks = -(-shape.oh // params.rows)
        self.oc_slices = -(-shape.oc_blocks // params.oc_blocks)
        self.previous = loops.previous_slice()
        self.steps = self.pairs * shape.kh * shape.kw
        self.ahead = min(SPLIT_AHEAD, self.steps)
        self.next_pixel = shape.block
        """Numbers of the output from a pixel to the next."""
        x_parts, self.w_parts = shape.parts
        self.input = PlaneParts(planes, self.pairs, x_parts, shape.ic_blocks)
        self.weights = loops.buffer("weights", (self.steps, self.w_parts, TILE_ROWS, TILE_LINE), "uint32")
        self.sums = loops.buffer("sums", (params.tiles * TILE_ROWS, TILE_LINE))
        waiting = (params.oc_blocks, -(-planes.outputs // TILE_ROWS) * TILE_ROWS, TILE_LINE)
        self.waiting = loops.buffer("waiting", waiting)

    def function(self) -> Any:
        """Make the PrimFunc."""
        body = loops.parallel(self.shape.n * self.row_blocks * self.oc_slices, self._slice)
        return loops.function(
            [*self.body.inputs, self.y, self.previous], loops.sequence(loops.alloc(self.input.buffer), body)
        )

    def _slice(self, index: Any) -> Any:
        """Compute some blocks of output channels on some rows, one block after the other."""
        shape, params = self.shape, self.params
        image, block = index // self.oc_slices // self.row_blocks, index // self.oc_slices % self.row_blocks
        first_oc = index % self.oc_slices * params.oc_blocks
        first = block * params.rows
        left = shape.oh % params.rows

        def one_block(number: Any, index: Any) -> Any:
            place = (image, first_oc + index, index, number)
            outputs = self._outputs(*place, first, params.rows)
            if left:
                outputs = loops.when(first + params.rows <= shape.oh, outputs, self._outputs(*place, first, left))
            return outputs

        def read(block: Any, row: Any, column: Any, lane: Any) -> Any:
            return self.body.operand(self._input_at(image, block, *self._position(row, column), lane))

        def fill(number: Any) -> Any:
            filled = self.input.fill(first, number * self.pairs, read)
            if self.passes > 1 or self.oc_slices == 1:
                return filled
            return loops.when(tirx.NE(self.previous // self.oc_slices, index // self.oc_slices), filled)

        def one_pass(number: Any) -> Any:
            early = (self._split_weights(first_oc, number, loops.const(step)) for step in range(self.ahead))
            return loops.sequence(
                fill(number),
                *early,
                loops.loop(blocks, lambda i: one_block(number, i), "oc"),
            )

        blocks: Any = params.oc_blocks
        if shape.oc_blocks % params.oc_blocks:
            blocks = tirx.min(loops.const(params.oc_blocks), shape.oc_blocks - first_oc)
        buffers = [self.weights, self.sums] + [self.waiting] * (self.passes > 1)
        return loops.sequence(
            *(loops.alloc(buffer) for buffer in buffers), amx.configured(loops.loop(self.passes, one_pass, "pass"))
        )

    # Weights, and what comes from far

    def _split_weights(self, oc: Any, number: Any, step: Any, begin: int = 0, end: int = TILE_ROWS) -> Any:
        """Write the parts of the weights of a block of output channels for a step of a pass, or some of them."""
        shape = self.shape
        taps = shape.kh * shape.kw
        block, r, s = (number * self.pairs + step // taps) * 2, step % taps // shape.kw, step % shape.kw

        def one(channel: Any) -> Any:
            def read(half: int) -> Any:
                return self._read_weight(oc, block + half, r, s, channel)

            def put(parts: Any) -> Any:
                return loops.sequence(
                    *(
                        loops.store(self.weights, value, step, part, channel, 0, lanes=TILE_LINE)
                        for part, value in enumerate(parts)
                    )
                )

            both = put(paired_parts(read(0), read(1), self.w_parts))
            if not shape.ic_blocks % 2:
                return both
            zero = tirx.Broadcast(tirx.const(0.0, "float32"), TILE_LINE)
            return loops.when(block + 1 < shape.ic_blocks, both, put(paired_parts(read(0), zero, self.w_parts)))

        return loops.loop(end - begin, one, "channel", begin)

    def _ask_for_weights(self, oc: Any, number: Any, step: Any, begin: int, end: int) -> Any:
        """Ask for weights of the step that is `AHEAD` of this one; where there are passes, of the next block's."""
        line = 64 // self.shape.weight_bytes
        lines = self.shape.block * 2 * TILE_LINE // line

        ahead = step + AHEAD if self.passes == 1 else number * self.steps + step

        def ask(which: Any) -> Any:
            return self._ask_for_weight(oc + (self.passes > 1), (ahead * lines + which) * line)

        first, last = begin * lines // TILE_ROWS, end * lines // TILE_ROWS
        return loops.unrolled(last - first, ask, "line", first)

    def _ask_for_input(self, image: Any, number: Any, first: Any, done: Any, tiles: int) -> Any:
        """Ask for a share of the input that the next pass or slice reads, `done` tiles being multiplied so far."""
        shape, planes = self.shape, self.planes
        pixels = self.params.rows * shape.stride[0] * shape.w
        blocks = shape.ic_blocks if self.passes == 1 else 2 * self.pairs
        turns = self.params.oc_blocks if self.passes > 1 else shape.oc_blocks
        share = -(-blocks * pixels // (turns * self.steps * tiles))
        if self.x is None or share > MOST_ASKED or (self.passes == 1 and self.params.rows >= shape.oh):
            return None
        after = planes.height if self.passes == 1 else 0
        start = ((first + after) * shape.stride[0] - shape.pad[0]) * shape.w
        first_block = (number + 1) * blocks if self.passes > 1 else 0

        def ask(which: int) -> Any:
            line = done * share + which
            pixel = start + line % pixels
            position = self._position(pixel // shape.w, pixel % shape.w)
            return loops.prefetch(self.x, *self._input_at(image, first_block + line // pixels, *position, 0))

        return loops.sequence(*(ask(which) for which in range(share)))

    def _ask_for_outputs(self, image: Any, oc: Any, first: Any, number: Any, step: Any, pixel: Any, after: int) -> Any:
        """Ask for a share of the output lines of the tile `after` a pixel, and of what the epilogue reads beside sums.

        So the cores that had them are asked, or memory, while the sums are not known yet.
        """
        shape, width = self.shape, self.planes.width
        beside = [x for x in self.body.inputs if x not in (self.x, self.weight) and x.shape == self.y.shape]
        share = -(-TILE_ROWS // self.steps)
        if not is_flat(shape):
            return None

        def ask(which: int) -> Any:
            # Pixels lie in order, so a number of them is an offset, which needs no division.
            here, offset = pixel + step * share, (after + which) * self.next_pixel
            at = self._output_at(image, oc, *self._position(first + here // width, here % width), offset)
            return loops.sequence(
                loops.prefetch(self.y, *at, write=True), *(loops.prefetch(operand, *at) for operand in beside)
            )

        asked = loops.sequence(*(ask(which) for which in range(share)))
        if self.steps > TILE_ROWS:
            asked = loops.when(step < TILE_ROWS, asked)
        return asked if self.passes == 1 else loops.when(number == self.passes - 1, asked)

    # Multiplying

    def _outputs(self, image: Any, oc: Any, index: Any, number: Any, first: Any, rows: int) -> Any:
        """Compute block `index` of a slice's output channels in pass `number`, on `rows` rows, some tiles at a time."""
        tiles = -(-((rows - 1) * self.planes.width + self.shape.ow) // TILE_ROWS)

        def split_beside(first_group: bool, last_group: Any) -> Callable[[Any, int, int], Any]:
            """Split the weights of later steps beside the first group, and the first of the next block beside the last.

            `last_group` is None for a group that never is.
            """
            next_block = tirx.min(oc + 1, loops.const(self.shape.oc_blocks - 1))

            def beside(step: Any, part: int, parts: int) -> Any:
                share = (part * TILE_ROWS // parts, (part + 1) * TILE_ROWS // parts)
                later = step + self.ahead
                statements = []
                if first_group:
                    statements.append(self._ask_for_weights(oc, number, step, *share))
                    statements.append(loops.when(later < self.steps, self._split_weights(oc, number, later, *share)))
                if last_group is not None:
                    split = self._split_weights(next_block, number, later - self.steps, *share)
                    statements.append(loops.when(tirx.all(last_group, later >= self.steps), split))
                return loops.sequence(*statements)

            return beside

        def group(tile: Any, count: int, also: Callable[[Any, int, int], Any]) -> Any:
            pixel = tile * TILE_ROWS

            def beside(step: Any, part: int, parts: int) -> Any:
                turn = index if self.passes > 1 else oc
                done = (turn * self.steps + step) * tiles + tile + part
                return loops.sequence(
                    also(step, part, parts),
                    self._ask_for_input(image, number, first, done, tiles),
                    self._ask_for_outputs(image, oc, first, number, step, pixel, part * TILE_ROWS),
                )

            def each(instruction: Callable[..., Any], buffer: Any, *at: Any) -> Any:
                *outer, row = at
                return loops.sequence(
                    *(instruction(t, buffer, *outer, row + t * TILE_ROWS, 0) for t in range(count)),
                )

            zeros = loops.sequence(*(amx.zero(t) for t in range(count)))
            finish = loops.sequence(
                each(amx.store, self.sums, loops.const(0)),
                self._finish(image, oc, first, rows, pixel, count * TILE_ROWS),
            )
            products = self._products(pixel, count, beside)
            if self.passes == 1:
                return loops.sequence(zeros, products, finish)
            return loops.sequence(
                loops.when(number == 0, zeros, each(amx.load, self.waiting, index, pixel)),
                products,
                loops.when(number == self.passes - 1, finish, each(amx.store, self.waiting, index, pixel)),
            )

        def groups(first_tile: int, size: int, count: int) -> Any:
            is_last_size = first_tile + size * count == tiles

            def one(i: Any) -> Any:
                last_group = tirx.EQ(i, loops.const(count - 1)) if is_last_size else None
                return group(first_tile + i * size, size, split_beside(False, last_group))

            return loops.loop(count, one, "group") if count else None

        (size, count), *smaller = even_split(tiles, self.params.tiles)
        return loops.sequence(
            group(loops.const(0), size, split_beside(True, tirx.const(True) if size == tiles else None)),
            groups(size, size, count - 1),
            *(groups(size * count, *part) for part in smaller),
        )

    def _products(self, pixel: Any, tiles: int, also: Callable[[Any, int, int], Any]) -> Any:
        """Add up the products of all channels and taps for some tiles of pixels, a register each.

        What is to be done beside, `also` gives for each step.
        """
        shape, planes = self.shape, self.planes
        a, first_b = tiles, tiles + 1

        def step(pair: Any, r: Any, s: Any) -> Any:
            at = planes.shift(r, s) + pixel
            number = (pair * shape.kh + r) * shape.kw + s
            statements = [amx.load(first_b + part, self.weights, number, part, 0, 0) for part in range(self.w_parts)]
            for tile in range(tiles):
                for part, others in enumerate(part_products(self.input.parts, self.w_parts)):
                    line = self.input.line(pair, part, at + tile * TILE_ROWS)
                    statements.append(amx.load(a, self.input.buffer, line, 0))
                    statements += [amx.multiply_add(tile, a, first_b + other) for other in others]
                statements.append(also(number, tile, tiles))
            return loops.sequence(*statements)

        def nest(pair: Any) -> Any:
            return loops.loop(
                shape.kh, lambda r: loops.loop(shape.kw, lambda s: step(pair, r, s), "kernel_column"), "kernel_row"
            )

        return loops.loop(self.pairs, nest, "pair")

    def _finish(self, image: Any, oc: Any, first: Any, rows: int, pixel: Any, count: int) -> Any:
        """Store what is computed for `count` pixels, the epilogue applied, where they are pixels of the output."""
        shape, width = self.shape, self.planes.width
        together = math.gcd(SIDE_BY_SIDE, shape.ow * rows) if is_flat(shape) else 1

        def some(start: Any) -> Any:
            here = pixel + start
            row, column = here // width, here % width

            def at(place: tuple[int, ...], lane: Any) -> tuple[Any, ...]:
                if is_flat(shape):
                    position = self._position((here + place[0]) // width + first, (here + place[0]) % width)
                else:
                    position = (first + row, column)
                return self._output_at(image, oc, *position, lane)

            def value(place: tuple[int, ...], lane: Any) -> Any:
                value = self.body.value(loops.load(self.sums, start + place[0], lane), at(place, lane))
                if shape.oc % shape.block:
                    value = tirx.Select(oc * shape.block + lane < shape.oc, value, tirx.const(0, self.y.dtype))
                return value

            def store(place: tuple[int, ...], lane: Any, value: Any) -> Any:
                return loops.store(self.y, value, *at(place, lane))

            stored = finish([(p,) for p in range(together)], shape.block, value, store)
            if is_flat(shape):
                return stored
            return loops.when(tirx.all(row < rows, column < shape.ow), stored)

        if not is_flat(shape):
            return loops.loop(count, some, "pixel")
        present = tirx.min(loops.const(count), rows * shape.ow - pixel)
        return loops.loop(present // together, lambda number: some(number * together), "pixel")

    # Where things lie

    def _input_at(self, image: Any, block: Any, row: Any, column: Any, lane: Any) -> tuple[Any, ...]:
        """Give the place of an input number, of block `block` of the channels."""
        return (image, block, row, column, lane)

    def _output_at(self, image: Any, block: Any, row: Any, column: Any, lane: Any) -> tuple[Any, ...]:
        """Give the place of an output number."""
        return (image, block, row, column, lane)

    def _read_weight(self, oc: Any, block: Any, r: Any, s: Any, channel: Any) -> Any:
        """Read the weights of a block of output channels for one input channel and tap."""
        return loops.widened(self.weight, oc, block, r, s, channel, 0, lanes=TILE_LINE)

    def _ask_for_weight(self, oc: Any, number: Any) -> Any:
        """Ask for the line with a weight of a block of output channels, in the order they lie in memory."""
        return loops.prefetch(self.weight, oc, 0, 0, 0, 0, number)

    def _position(self, row: Any, column: Any) -> tuple[Any, Any]:
        """Give a pixel in the rows of the tensors, which those of the loops may not be."""
        if self.shape == self.logical:
            return row, column
        return row // self.logical.w, row % self.logical.w
