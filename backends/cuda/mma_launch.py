"""The launches of a product of matrices in tiles: one, or one for parts of the depth and one to add them up.

Sums over parts go through scratch memory and are added in order, so that every run gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from cnnc.backends.cuda.ffma_params import FfmaParams
from cnnc.backends.cuda.ffma_tile import ffma_product
from cnnc.backends.cuda.launches import launch
from cnnc.backends.cuda.mma_params import BlockTile, MmaShape, TmaParams, WgmmaParams
from cnnc.backends.cuda.mma_ring import Operand, Order, Sums
from cnnc.backends.cuda.mma_tile import tile_product
from cnnc.backends.cuda.operands import vector_of
from cnnc.backends.cuda.tensor_maps import MappedBuffer, with_maps
from cnnc.backends.cuda.tma_tile import BoxedOperand, boxed_product
from cnnc.backends.cuda.wgmma_tile import warpgroup_product
from cnnc.backends.lower import loops
from cnnc.backends.lower.body import BoundBody
from cnnc.ir.types import DType

__all__ = ["Product", "product_func"]

_THREADS = 256
"""Of the blocks that add parts up."""


@dataclass(frozen=True)
class Product:
    """A kernel as a product of matrices: `rows` by `columns`, and what is made of the sums.

    Columns lie in memory in blocks of `width`, an even number for tensor cores, which have pairs of neighbours.
    `index` gives the place in the output from row, block, and column in the block.  Where there are several products,
    `rows` and `columns` are given which one, and the blocks of each follow one another.  Operands come in boxes where
    the tile says so.
    """

    body: BoundBody
    shape: MmaShape
    rows: Callable[[Any], Operand | BoxedOperand]
    columns: Callable[[Any], Operand | BoxedOperand]
    width: int
    index: Callable[[Any, Any, Any], Sequence[Any]]

    @property
    def blocks(self) -> int:
        """The blocks of columns, of all products."""
        return self.shape.batches * math.ceil(self.shape.columns / self.width)


def product_func(product: Product, tile: BlockTile | FfmaParams) -> Any:
    """Give the PrimFunc over the kernel's inputs, then its output; the tile says which instructions multiply."""
    output = product.body.output()
    shape = product.shape
    columns = product.blocks // shape.batches * product.width
    neighbours = vector_of(product.width, DType.F32) if isinstance(tile, FfmaParams) else 2
    parts = loops.buffer("parts", (tile.splits, product.blocks, shape.rows, product.width), scope="global")

    maps: list[MappedBuffer] = []

    def block(thread: Any, across: Any, down: Any, number: Any) -> Any:
        batch, part = number // tile.splits, number % tile.splits
        first_row, first_column = across * tile.rows, down * tile.columns
        steps = _steps(math.ceil(shape.chunks / tile.depth), tile.splits, part)
        operands = product.rows(batch), product.columns(batch)
        maps.extend(operand.map for operand in operands if isinstance(operand, BoxedOperand))
        sums = _sums(tile, shape.dtype, operands, (first_row, first_column), thread, steps, neighbours)

        def store(row: Any, column: Any, take: Callable[[Any], Any]) -> Any:
            row, column = first_row + row, first_column + column
            place = (row, batch * (columns // product.width) + column // product.width, column % product.width)
            if tile.splits == 1:
                stored = _finished(product, output, place, take, neighbours)
            else:
                stored = _put(parts, part, place, take, neighbours)
            return loops.when(tirx.all(row < shape.rows, column < columns), stored)

        return loops.sequence(sums.compute, sums.finish(store))

    grid = (
        math.ceil(shape.rows / tile.rows),
        math.ceil(shape.columns / tile.columns),
        tile.splits * shape.batches,
    )
    statement = launch(grid, tile.threads, block)
    if tile.splits > 1:
        statement = loops.sequence(loops.alloc(parts), statement, _add_up(product, output, parts, neighbours))
    return with_maps([*product.body.inputs, output], maps, statement)


def _sums(
    tile: BlockTile | FfmaParams,
    dtype: DType,
    operands: tuple[Operand | BoxedOperand, Operand | BoxedOperand],
    first: tuple[Any, Any],
    thread: Any,
    steps: tuple[Any, Any],
    neighbours: int,
) -> Sums:
    """Write the product of a tile from a row and a column on."""
    left, right = operands
    if isinstance(left, BoxedOperand) or isinstance(right, BoxedOperand):
        assert isinstance(left, BoxedOperand)
        assert isinstance(right, BoxedOperand)
        assert isinstance(tile, TmaParams)
        return boxed_product(tile, dtype, (left, right), first, thread, steps)
    left, right = _shifted(left, first[0]), _shifted(right, first[1])
    if isinstance(tile, WgmmaParams):
        return warpgroup_product(tile, dtype, left, right, thread, steps)
    if isinstance(tile, FfmaParams):
        return ffma_product(tile, left, right, thread, steps, neighbours)
    return tile_product(tile, dtype, left, right, thread, steps)


_Place = tuple[Any, Any, Any]
"""Of a sum: row, block of columns, column in the block."""


def _shifted(operand: Operand, first: Any) -> Operand:
    """Give an operand whose rows are counted from a tile's first one; of those across, by what is copied at once."""
    first = first // (operand.numbers // operand.pieces) if operand.order is Order.ACROSS else first
    return replace(operand, chunk=lambda row, chunk: operand.chunk(first + row, chunk))


def _steps(steps: int, splits: int, part: Any) -> tuple[Any, Any]:
    """Give the steps of a part of the depth."""
    if splits == 1:
        return 0, steps
    each = math.ceil(steps / splits)
    return part * each, tirx.min((part + 1) * each, steps)


def _finished(product: Product, output: Any, place: _Place, take: Callable[[Any], Any], neighbours: int) -> Any:
    """Store what the epilogue makes of neighbouring sums."""
    row, block, column = place

    def one(which: Any) -> Any:
        index = product.index(row, block, column + which)
        return loops.store(output, product.body.value(take(which), index), *index)

    return loops.vectorized(neighbours, one)


def _put(parts: Any, part: Any, place: _Place, take: Callable[[Any], Any], neighbours: int) -> Any:
    row, block, column = place
    return loops.vectorized(neighbours, lambda which: loops.store(parts, take(which), part, block, row, column + which))


def _add_up(product: Product, output: Any, parts: Any, neighbours: int) -> Any:
    """Launch the sum of the parts, each thread that of some neighbouring columns."""
    splits, blocks, rows, width = (int(extent) for extent in parts.shape)
    across = width // neighbours
    groups = blocks * rows * across
    total = loops.buffer("total", (neighbours,), scope="local")

    def work(thread: Any, group: Any) -> Any:
        number = group * _THREADS + thread
        row, block = number // across % rows, number // across // rows
        column = number % across * neighbours

        def read(part: Any, which: Any) -> Any:
            return loops.load(parts, part, block, row, column + which)

        def add(part: Any) -> Any:
            return loops.vectorized(
                neighbours, lambda which: loops.store(total, loops.load(total, which) + read(part, which), which)
            )

        summed = loops.sequence(
            loops.vectorized(neighbours, lambda which: loops.store(total, read(0, which), which)),
            loops.unrolled(splits - 1, add, "part", start=1),
            _finished(product, output, (row, block, column), lambda which: loops.load(total, which), neighbours),
        )
        return loops.sequence(loops.alloc(total), loops.when(number < groups, summed))

    return launch((math.ceil(groups / _THREADS),), _THREADS, work)
