"""The loop nest of a Winograd convolution (see winograd.py for the method)."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.cpu.winograd_shape import WinogradParams, WinogradShape
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import Body
from cnnc.backends.lower.filtering import transformed, transformed_back
from cnnc.ops.winograd import Transform

__all__ = ["WinogradLoops"]

UNROLL = 2
"""Input channels for each turn of the innermost loop."""


class WinogradLoops:
    """Writes the loop nest of one convolution."""

    def __init__(self, shape: WinogradShape, params: WinogradParams, machine: Machine, body: Body) -> None:
        self.t = loops
        self.shape = shape
        self.params = params
        self.machine = machine
        self.body = body.bind(shape.conv.output_shape)
        self.x, self.weight = self.body.operands[:2]
        self.y = self.body.output()
        block, positions = shape.conv.block, shape.positions
        self.vertical, self.horizontal = v, h = shape.vertical, shape.horizontal
        self.previous = loops.previous_slice()
        self.data = loops.buffer("data", (positions, shape.data_rows(params.tiles), block))
        self.products = loops.buffer("products", (params.group, params.tiles, positions, block))
        self.patch = loops.buffer("patch", (v.inputs * h.inputs, block), scope="local")
        self.column = loops.buffer("column", (v.inputs, block), scope="local")
        half = max(v.positions * h.inputs, v.tile * h.positions)
        self.half = loops.buffer("half", (half, block), scope="local")
        self.result = loops.buffer("result", (shape.outputs, block), scope="local")

    def function(self) -> Any:
        """Make the PrimFunc."""
        t = self.t
        chunks = -(-self.shape.tiles // self.params.tiles)
        kept = (t.alloc(buffer) for buffer in self._kept())
        body = t.sequence(*kept, t.parallel(chunks * self.params.oc_slices, self._slice))
        return t.function([*self.body.inputs, self.y, self.previous], body)

    def _kept(self) -> list[Any]:
        """Give the buffers that a slice leaves to the next, which may be of the same chunk."""
        return [self.data]

    def _slice(self, index: Any) -> Any:
        """Compute a part of the output channels of a chunk of tiles, a group of blocks at a time.

        The tiles are transformed first, unless the slice before was of the same chunk.
        """
        t, params = self.t, self.params
        chunk, oc_slice = index // params.oc_slices, index % params.oc_slices
        first = chunk * params.tiles
        exact = self.shape.tiles % params.tiles == 0
        tiles: Any = params.tiles if exact else tirx.min(t.const(params.tiles), self.shape.tiles - first)
        groups = self.shape.conv.oc_blocks // (params.group * params.oc_slices)

        def group(index: Any) -> Any:
            oc = (oc_slice * groups + index) * params.group
            return t.sequence(self._products(oc, tiles), self._outputs(oc, first, tiles))

        inputs = self._inputs(first, tiles)
        if params.oc_slices > 1:
            inputs = t.when(tirx.NE(self.previous // params.oc_slices, chunk), inputs)
        buffers = [self.products, self.patch, self.half, self.result]
        if self.x is None:
            buffers.append(self.column)
        return t.sequence(
            *(t.alloc(buffer) for buffer in buffers),
            inputs,
            t.loop(groups, group, "oc_group"),
        )

    def _place(self, tile: Any) -> tuple[Any, Any, Any]:
        """Give the image, the tile row and the tile column of a tile."""
        across, per_image = self.shape.columns, self.shape.rows * self.shape.columns
        return tile // per_image, tile % per_image // across, tile % across

    # B' x B

    def _inputs(self, first: Any, tiles: Any) -> Any:
        """Transform the input tiles of a chunk; the rest of its last register tile repeats the last."""
        t, params = self.t, self.params

        def one(channel: Any, number: Any) -> Any:
            return self._input_tile(channel, first + number, channel * params.tiles + number)

        blocks, covered = self.shape.conv.ic_blocks, self._covered(tiles)
        return t.loop(blocks, lambda c: t.loop(covered, lambda i: one(c, i), "tile"), "ic")

    def _input_tile(self, channel: Any, tile: Any, into: Any) -> Any:
        """Transform a block of channels of an input tile, or of the last there is, to place `into` of each position."""
        t, shape, v, h = self.t, self.shape, self.vertical, self.horizontal
        image, tile_row, tile_column = self._place(tirx.min(tile, t.const(shape.tiles - 1)))
        row, column = tile_row * v.step - shape.conv.pad[0], tile_column * h.step - shape.conv.pad[1]
        at = (image, channel)

        def from_input(r: int, s: Any) -> Any:
            return t.load(self.x, *at, row + r, column + s, 0, lanes=shape.conv.block)

        def from_patch(r: int, s: Any) -> Any:
            return t.load(self.patch, r * h.inputs + s, 0, lanes=shape.conv.block)

        def from_column(r: int, s: Any) -> Any:
            return t.load(self.column, r, 0, lanes=shape.conv.block)

        def computed(s: Any) -> Any:
            return t.sequence(*(self._compute(self.column, r, (*at, row + r, column + s)) for r in range(v.inputs)))

        inside = tirx.all(row >= 0, column >= 0, row + v.inputs <= shape.conv.h, column + h.inputs <= shape.conv.w)
        border = t.sequence(self._gather(at, row, column), self._transform_input(from_patch, into))
        if not shape.has_inner_tiles:
            return border
        if self.x is None:
            return t.when(inside, self._transform_input(from_column, into, computed), border)
        return t.when(inside, self._transform_input(from_input, into), border)

    def _covered(self, tiles: Any) -> Any:
        """Give how many tiles the register tiles that hold `tiles` cover."""
        if isinstance(tiles, int):
            return tiles
        covered, start = self.t.const(0), 0
        for pixels, count in self._segments():
            covered = covered + self._needed(tiles, start, pixels, count) * pixels
            start += pixels * count
        return covered

    def _segments(self) -> list[tuple[int, int]]:
        return even_split(self.params.tiles, self.params.pixels)

    def _needed(self, tiles: Any, start: int, pixels: int, count: int) -> Any:
        """Give how many of `count` register tiles of `pixels`, the first at `start`, hold any of the tiles."""
        if isinstance(tiles, int):
            return count
        needed = (tiles - start + (pixels - 1)) // pixels
        return tirx.max(self.t.const(0), tirx.min(needed, self.t.const(count)))

    def _gather(self, at: tuple[Any, Any], row: Any, column: Any) -> Any:
        """Copy a tile that overlaps the padding, with zeros there."""
        t, conv, v, h = self.t, self.shape.conv, self.vertical, self.horizontal
        block = conv.block
        zero = tirx.Broadcast(tirx.const(0.0, "float32"), block)

        def range_of(start: Any, size: int, extent: int) -> tuple[Any, Any]:
            first = tirx.max(t.const(0), -start)
            return first, tirx.max(tirx.min(t.const(size), extent - start) - first, t.const(0))

        top, height = range_of(row, v.inputs, conv.h)
        left, width = range_of(column, h.inputs, conv.w)

        def copy(r: Any, s: Any) -> Any:
            if self.x is None:
                return self._compute(self.patch, r * h.inputs + s, (*at, row + r, column + s))
            value = t.load(self.x, *at, row + r, column + s, 0, lanes=block)
            return t.store(self.patch, value, r * h.inputs + s, 0, lanes=block)

        return t.sequence(
            t.loop(v.inputs * h.inputs, lambda i: t.store(self.patch, zero, i, 0, lanes=block), "position"),
            t.loop(height, lambda r: t.loop(width, lambda s: copy(r, s), "s", left), "r", top),
        )

    def _compute(self, buffer: Any, into: Any, at: tuple[Any, ...]) -> Any:
        """Compute the input at a pixel by the prologue."""
        t = self.t
        return t.vectorized(self.shape.conv.block, lambda c: t.store(buffer, self.body.operand((*at, c)), into, c))

    def _transform_input(self, read: Any, into: Any, before: Any = lambda s: None) -> Any:
        """Write B' x D of one tile, its columns first, then its rows; `before` a column run its statements."""
        t, v, h, block = self.t, self.vertical, self.horizontal, self.shape.conv.block

        def column(s: Any) -> Any:
            sums = transformed(v, [read(r, s) for r in range(v.inputs)])
            return t.sequence(
                before(s),
                *(t.store(self.half, value, a * h.inputs + s, 0, lanes=block) for a, value in enumerate(sums)),
            )

        def row(a: Any) -> Any:
            sums = transformed(h, [t.load(self.half, a * h.inputs + s, 0, lanes=block) for s in range(h.inputs)])
            return t.sequence(
                *(t.store(self.data, value, a * h.positions + b, into, 0, lanes=block) for b, value in enumerate(sums))
            )

        return t.sequence(t.loop(h.inputs, column, "s"), t.loop(v.positions, row, "a"))

    # The products, one matrix product for each position in a tile

    def _products(self, oc: Any, tiles: Any) -> Any:
        """Multiply, position by position, the transformed tiles by the weights of a group of output channels."""

        def one(position: Any) -> Any:
            statements, start = [], 0
            for pixels, count in self._segments():
                needed = self._needed(tiles, start, pixels, count)
                # The first register tiles see the weights first; what they ask for is there for the others, too.
                statements.append(self._parts(oc, position, start, pixels, needed, count if start == 0 else 0))
                start += pixels * count
            return self.t.sequence(*statements)

        return self.t.loop(self.shape.positions, one, "position")

    def _weight_at(self, position: Any) -> tuple[Any, Any]:
        """Give the place of a position's weights; the last positions of an axis may share theirs."""
        v, h = self.vertical, self.horizontal

        def shared(axis: Transform, index: Any) -> Any:
            return index if axis.positions == axis.weights else tirx.min(index, self.t.const(axis.weights - 1))

        return shared(v, position // h.positions), shared(h, position % h.positions)

    def _parts(self, oc: Any, position: Any, start: int, pixels: int, count: Any, asking: int) -> Any:
        """Run over the register tiles: vectors outside, so that their weights stay near while tiles pass.

        `asking` of the tiles ask for the weights that are needed next, each for a share.
        """
        t = self.t
        statements, first = [], 0
        for vectors, parts in self.machine.vector_parts(pixels, self.params.group):

            def part(index: Any, first: int = first, vectors: int = vectors) -> Any:
                block = first + index * vectors

                def tile(i: Any) -> Any:
                    asks = (i, asking) if asking else None
                    return self._register_tile(oc, block, position, start + i * pixels, pixels, vectors, asks)

                return t.loop(count, tile, "tile")

            statements.append(t.loop(parts, part, "part"))
            first += vectors * parts
        return t.sequence(*statements)

    def _register_tile(
        self,
        oc: Any,
        first: Any,
        position: Any,
        tile: Any,
        pixels: int,
        vectors: int,
        asks: tuple[Any, int] | None,
    ) -> Any:
        t, shape = self.t, self.shape
        block = shape.conv.block
        weights = self._weight_at(position)
        sums = t.buffer("sums", (vectors, pixels, block), scope="local")
        zero = tirx.Broadcast(tirx.const(0.0, "float32"), block)

        def each(body: Any) -> Any:
            return t.unrolled(vectors, lambda v: t.unrolled(pixels, lambda p: body(v, p), "p"), "v")

        def reduce(channel: Any, k: Any) -> Any:
            def one(p: Any, v: Any) -> Any:
                value = t.load(self.data, position, channel * self.params.tiles + tile + p, k)
                weight = t.widened(self.weight, *weights, oc + first + v, channel, k, 0, lanes=block)
                total = t.load(sums, v, p, 0, lanes=block) + tirx.Broadcast(value, block) * weight
                return t.store(sums, total, v, p, 0, lanes=block)

            # The innermost loop runs over the smaller side, whose operands stay in registers.
            if vectors > pixels:
                return t.unrolled(vectors, lambda v: t.unrolled(pixels, lambda p: one(p, v), "p"), "v")
            return t.unrolled(pixels, lambda p: t.unrolled(vectors, lambda v: one(p, v), "v"), "p")

        step = math.gcd(block, UNROLL)

        # The weights that are needed next: of the next vectors, after the last of the group those of the next position.
        last = first + vectors >= self.params.group
        at = self._weight_at(tirx.Select(last, position + 1, position))
        next_block = oc + tirx.Select(last, t.const(0), first + vectors)

        def ahead(channel: Any, k: Any) -> Any:
            """Ask for weights early, for each line once: hardware does so up to the end of a page only."""
            if asks is None:
                return None
            number, asking = asks
            shares = min(asking, step)
            lines = range(0, step, shares)
            return t.sequence(
                *(
                    t.prefetch(self.weight, *at, next_block + v, channel, k + line + number % shares, 0)
                    for v in range(vectors)
                    for line in lines
                )
            )

        def channels(channel: Any) -> Any:
            def terms(k: Any) -> Any:
                return t.sequence(ahead(channel, k), t.unrolled(step, lambda u: reduce(channel, k + u), "u"))

            return t.loop(block // step, lambda k: terms(k * step), "k")

        def finish(v: Any, p: Any) -> Any:
            total = t.load(sums, v, p, 0, lanes=block)
            return t.store(self.products, total, first + v, tile + p, position, 0, lanes=block)

        return t.sequence(
            t.alloc(sums),
            each(lambda v, p: t.store(sums, zero, v, p, 0, lanes=block)),
            t.loop(shape.conv.ic_blocks, channels, "channel"),
            each(finish),
        )

    # A' m A, and what follows the convolution

    def _outputs(self, oc: Any, first: Any, tiles: Any) -> Any:
        """Transform the products of a group back, and store what lies inside the output."""
        t, conv = self.t, self.shape.conv
        height, width = self.vertical.tile, self.horizontal.tile

        def one(v: Any, number: Any) -> Any:
            image, tile_row, tile_column = self._place(first + number)
            row, column = tile_row * height, tile_column * width
            return t.sequence(
                self._transform_products(v, number),
                t.loop(
                    self._inside(row, height, conv.oh),
                    lambda i: t.loop(
                        self._inside(column, width, conv.ow),
                        lambda j: self._store(i * width + j, (image, oc + v, row + i, column + j)),
                        "j",
                    ),
                    "i",
                ),
            )

        return t.loop(self.params.group, lambda v: t.loop(tiles, lambda i: one(v, i), "tile"), "v")

    def _inside(self, start: Any, tile: int, extent: int) -> Any:
        """Give how many of a tile's rows or columns from `start` on lie inside the output."""
        return tile if extent % tile == 0 else tirx.min(self.t.const(tile), extent - start)

    def _transform_products(self, block_of_group: Any, number: Any) -> Any:
        """Write A' m C of one tile and one block of channels, the columns first, then the rows."""
        t, v, h, block = self.t, self.vertical, self.horizontal, self.shape.conv.block

        def column(b: Any) -> Any:
            at = (block_of_group, number)
            values = [t.load(self.products, *at, a * h.positions + b, 0, lanes=block) for a in range(v.positions)]
            sums = transformed_back(v, values)
            return t.sequence(
                *(t.store(self.half, value, i * h.positions + b, 0, lanes=block) for i, value in enumerate(sums))
            )

        def row(i: Any) -> Any:
            values = [t.load(self.half, i * h.positions + b, 0, lanes=block) for b in range(h.positions)]
            sums = transformed_back(h, values)
            return t.sequence(
                *(t.store(self.result, value, i * h.tile + j, 0, lanes=block) for j, value in enumerate(sums))
            )

        return t.sequence(t.loop(h.positions, column, "b"), t.loop(v.tile, row, "i"))

    def _store(self, position: Any, at: tuple[Any, Any, Any, Any]) -> Any:
        """Store one pixel of a block of channels, the epilogue applied; pad lanes are 0."""
        conv = self.shape.conv

        def lane(c: Any) -> Any:
            value = self.body.value(self.t.load(self.result, position, c), (*at, c))
            if conv.oc % conv.block:
                value = tirx.Select(at[1] * conv.block + c < conv.oc, value, tirx.const(0, self.y.dtype))
            return self.t.store(self.y, value, *at, c)

        return self.t.vectorized(conv.block, lane)
