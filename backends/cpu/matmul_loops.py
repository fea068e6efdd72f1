"""The loop nest of products of matrices (see matmul.py for the method)."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from cnnc.backends.cpu.gemm_packed import Columns, last_columns
from cnnc.backends.cpu.matmul import VECTORS, MatMulParams, MatMulShape
from cnnc.backends.cpu.register_tile import RegisterTile, register_tile, store_sums
from cnnc.backends.cpu.row_index import at_most, position
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.cpu.transpose_block import transpose_block
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import Body

__all__ = ["MatMulLoops"]


class MatMulLoops:
    """Writes the loop nest of one product."""

    def __init__(self, shape: MatMulShape, params: MatMulParams, body: Body) -> None:
        self.shape = shape
        self.params = params
        self.body = body.bind((*shape.batch, shape.rows, shape.columns))
        self.a, self.b = self.body.operands[:2]
        self.y = self.body.output()
        self.width = VECTORS * shape.lanes
        self.panel = loops.buffer("panel", (shape.depth, self.width))
        self.split = even_split(shape.rows, params.rows)
        self.row_tiles = sum(count for _, count in self.split)

    def function(self) -> Any:
        """Make the PrimFunc."""
        shape = self.shape
        row_slices = -(-self.row_tiles // self.params.tiles)

        def one_slice(index: Any) -> Any:
            batch, panel = index // (shape.panels * row_slices), index // row_slices % shape.panels
            return self._slice(position(shape.batch, batch), panel, index % row_slices * self.params.tiles)

        slices = math.prod(shape.batch) * shape.panels * row_slices
        return loops.function([*self.body.inputs, self.y], loops.parallel(slices, one_slice))

    def _slice(self, batch: list[Any], panel: Any, first: Any) -> Any:
        """Pack a panel and run tiles of rows from number `first` on past it."""
        ragged = last_columns(self.shape.columns, self.shape.lanes, VECTORS)
        tiles = at_most(self.params.tiles, self.row_tiles, first)

        def run(part: Columns) -> Any:
            return loops.loop(tiles, lambda t: self._row_tile(first + t, batch, panel, part), "row_tile")

        full = Columns(0, VECTORS, self.shape.lanes)
        inner = loops.sequence(self._pack(batch, panel, self.width), run(full))
        if not ragged:
            return loops.sequence(loops.alloc(self.panel), inner)
        columns = self.shape.columns % self.width
        last = loops.sequence(self._pack(batch, panel, columns), *map(run, ragged))
        whole = loops.when(panel < self.shape.panels - 1, inner, last) if self.shape.panels > 1 else last
        return loops.sequence(loops.alloc(self.panel), whole)

    def _own(self, shape: tuple[int, ...], batch: list[Any]) -> list[Any]:
        """Give an operand's indices along the axes before its matrices, which broadcast."""
        own = shape[:-2]
        return [0 if size == 1 else i for size, i in zip(own, batch[len(batch) - len(own) :], strict=True)]

    # The panel

    def _pack(self, batch: list[Any], panel: Any, columns: int) -> Any:
        """Copy a panel of `columns` columns; what is beyond them becomes 0."""
        return self._transpose(batch, panel, columns) if self.shape.transpose_b else self._copy(batch, panel, columns)

    def _copy(self, batch: list[Any], panel: Any, columns: int) -> Any:
        lanes, at = self.shape.lanes, self._own(self.shape.b, batch)
        whole = columns // lanes * lanes

        def row(k: Any) -> Any:
            def vector(start: int) -> Any:
                source = loops.widened(self.b, *at, k, panel * self.width + start, lanes=lanes)
                return loops.store(self.panel, source, k, start, lanes=lanes)

            def number(i: int) -> Any:
                inside = loops.widened(self.b, *at, k, panel * self.width + i) if i < columns else _zero()
                return loops.store(self.panel, inside, k, i)

            vectors = [vector(start) for start in range(0, whole, lanes)]
            return loops.sequence(*vectors, *(number(i) for i in range(whole, self.width)))

        return loops.loop(self.shape.depth, row, "k")

    def _transpose(self, batch: list[Any], panel: Any, columns: int) -> Any:
        lanes, at, depth = self.shape.lanes, self._own(self.shape.b, batch), self.shape.depth
        blocks = depth // lanes

        def block(start: int, k: Any) -> Any:
            def load(row: int) -> Any:
                # A column beyond the last one is that one again, and never stored.
                column = panel * self.width + min(start + row, columns - 1)
                return loops.widened(self.b, *at, column, k * lanes, lanes=lanes)

            def store(row: int, vector: Any) -> Any:
                return loops.store(self.panel, vector, k * lanes + row, start, lanes=lanes)

            return transpose_block(lanes, load, store)

        def number(k: Any, i: Any) -> Any:
            column = panel * self.width + tirx.min(i, loops.const(columns - 1))
            return loops.store(self.panel, loops.widened(self.b, *at, column, k), k, i)

        def rest(k: Any) -> Any:
            return loops.loop(self.width, lambda i: number(blocks * lanes + k, i), "column")

        def all_blocks(k: Any) -> Any:
            return loops.sequence(*(block(start, k) for start in range(0, self.width, lanes)))

        return loops.sequence(
            loops.loop(blocks, all_blocks, "k") if blocks else None,
            loops.loop(depth % lanes, rest, "k") if depth % lanes else None,
        )

    # The products

    def _row_tile(self, index: Any, batch: list[Any], panel: Any, part: Columns) -> Any:
        """Write tile number `index` of the rows; the last ones may be a row lower."""
        (rows, full), *lower = self.split
        first = self._tile(index * rows, batch, panel, rows, part)
        if not lower:
            return first
        rest = self._tile(full * rows + (index - full) * lower[0][0], batch, panel, lower[0][0], part)
        return loops.when(index < full, first, rest)

    def _tile(self, first: Any, batch: list[Any], panel: Any, rows: int, part: Columns) -> Any:
        shape, lanes, at = self.shape, self.shape.lanes, self._own(self.shape.a, batch)

        def left(r: Any, k: Any) -> Any:
            return loops.widened(self.a, *at, *((k, first + r) if shape.transpose_a else (first + r, k)))

        def place(r: Any, v: Any, lane: Any) -> list[Any]:
            return [*batch, first + r, panel * self.width + part.offset + v * lanes + lane]

        def finish(total: Any) -> Any:
            return store_sums(
                size,
                part.outputs,
                lambda *sum_: self.body.value(total(*sum_), place(*sum_)),
                lambda r, v, lane, value: loops.store(self.y, value, *place(r, v, lane)),
            )

        size = RegisterTile(rows, part.vectors, lanes, shape.depth)
        return register_tile(
            size,
            left,
            lambda k, v: loops.load(self.panel, k, part.offset + v * lanes, lanes=lanes),
            finish,
        )


def _zero() -> Any:
    return tirx.const(0.0, "float32")
