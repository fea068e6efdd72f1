"""Fully connected layers of many rows: a weight packed for a register tile.

    y[m, o] = sum over i of x[m, i] * weight[o, i]

The weight is OI{block}o: for each block of outputs, its vectors for each input, one input after the other.  A tile
is `rows` numbers of x, each broadcast, times those vectors.  A slice is `blocks` neighbouring blocks of the weight
times a share of the rows; a block stays in a near cache while the rows pass by.  The method is that of Goto and van de
Geijn, "Anatomy of High-Performance Matrix Multiplication", TOMS 2008, without packing x, which is read in the order it
lies in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of, operand_bytes
from cnnc.backends.cpu.gemm import DenseShape
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.register_tile import RegisterTile, register_tile, step_cycles, store_sums
from cnnc.backends.cpu.row_index import at_most, position
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.blocked import packed_block, weight_layout
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = [
    "Columns",
    "PackedDense",
    "PackedParams",
    "build",
    "cost",
    "last_columns",
    "space",
    "weight_shape",
]


@dataclass(frozen=True)
class PackedParams:
    """Register tiles of at most `rows` rows; slices of `blocks` blocks of the weight and `tiles` tiles of rows."""

    rows: int
    blocks: int
    tiles: int


def weight_shape(shape: DenseShape) -> tuple[int, int, int]:
    """Give the physical shape of the weight."""
    width = packed_block(shape.lanes)
    return (-(-shape.outputs // width), shape.inputs, width)


def space(shape: DenseShape, machine: Machine) -> Iterator[PackedParams]:
    """Give the tile sizes worth considering."""
    blocks, _, width = weight_shape(shape)
    fitting = [rows for rows in range(1, machine.registers) if machine.fits(rows, width // shape.lanes)]
    for rows in sorted({even_split(shape.rows, most)[0][0] for most in fitting[-2:]}):
        row_tiles = -(-shape.rows // rows)
        for count in sorted({min(count, blocks) for count in (1, 2, 4, 8)}):
            for tiles in sorted({-(-row_tiles // parts) for parts in (1, 2, 4, 8)}):
                yield PackedParams(rows, count, tiles)


def cost(shape: DenseShape, params: PackedParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    blocks, _, width = weight_shape(shape)
    vectors, row_tiles = width // shape.lanes, -(-shape.rows // params.rows)
    slices = -(-row_tiles // params.tiles) * -(-blocks // params.blocks)
    waves = machine.turns(slices) / slices

    compute = 0.0
    for rows, count in even_split(shape.rows, params.rows):
        step = step_cycles(machine, rows, vectors)
        compute += count * blocks * (step * shape.inputs + 14.0 + 2.0 * rows * vectors) * waves

    block_bytes = shape.weight_bytes * width * shape.inputs
    tile_bytes = 4.0 * params.rows * shape.inputs
    streamed = tile_bytes + (block_bytes if block_bytes + tile_bytes > 0.8 * machine.l1 else 0.0)
    near = row_tiles * blocks * streamed / machine.l2_bytes * waves
    rows_again = blocks if tile_bytes * min(params.tiles, row_tiles) + block_bytes > 0.8 * machine.l2 else 1
    weights_again = -(-row_tiles // params.tiles)
    far_bytes = block_bytes * blocks * weights_again + 4.0 * shape.rows * (shape.inputs * rows_again + shape.outputs)
    far = far_bytes / machine.memory_bytes / machine.threads
    total = max(compute, near, far) + 0.05 * (compute + near + far) + 60.0 * slices / machine.threads
    return total * machine.sharing(slices) / machine.hertz


def build(shape: DenseShape, params: PackedParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from cnnc.backends.lower import loops

    bound = body.bind((*shape.leading, shape.outputs))
    (x, weight), y = bound.operands[:2], bound.output()
    lanes, width = shape.lanes, packed_block(shape.lanes)
    columns = last_columns(shape.outputs, lanes, width // lanes)

    def tile(first_row: Any, block: Any, rows: int, part: Columns) -> Any:
        def at(r: Any, v: Any, lane: Any) -> list[Any]:
            return [*position(shape.leading, first_row + r), block * width + part.offset + v * lanes + lane]

        def finish(total: Any) -> Any:
            return store_sums(
                size,
                part.outputs,
                lambda *place: bound.value(total(*place), at(*place)),
                lambda r, v, lane, value: loops.store(y, value, *at(r, v, lane)),
            )

        size = RegisterTile(rows, part.vectors, lanes, shape.inputs)
        return register_tile(
            size,
            lambda r, k: loops.load(x, *position(shape.leading, first_row + r), k),
            lambda k, v: loops.widened(weight, block, k, part.offset + v * lanes, lanes=lanes),
            finish,
        )

    def row_tile(index: Any, block: Any, part: Columns) -> Any:
        """Write tile number `index` of the rows; the last ones may be a row lower."""
        (rows, full), *lower = even_split(shape.rows, params.rows)
        first = tile(index * rows, block, rows, part)
        if not lower:
            return first
        rest = tile(full * rows + (index - full) * lower[0][0], block, lower[0][0], part)
        return loops.when(index < full, first, rest)

    row_tiles = sum(count for _, count in even_split(shape.rows, params.rows))
    row_slices = -(-row_tiles // params.tiles)
    blocks = weight_shape(shape)[0]

    def one_block(block: Any, first: Any, tiles: Any) -> Any:
        def run(part: Columns) -> Any:
            return loops.loop(tiles, lambda t: row_tile(first + t, block, part), "row_tile")

        inner = run(Columns(0, width // lanes, lanes)) if blocks > bool(columns) else None
        last = loops.sequence(*map(run, columns)) if columns else inner
        return last if inner is None else inner if not columns else loops.when(block < blocks - 1, inner, last)

    def one_slice(index: Any) -> Any:
        first, block = index % row_slices * params.tiles, index // row_slices * params.blocks
        tiles = at_most(params.tiles, row_tiles, first)
        return loops.loop(at_most(params.blocks, blocks, block), lambda b: one_block(block + b, first, tiles), "block")

    return loops.function([*bound.inputs, y], loops.parallel(row_slices * -(-blocks // params.blocks), one_slice))


@dataclass(frozen=True)
class Columns:
    """`vectors` vectors from lane `offset` of a block on, each with `outputs` outputs to store."""

    offset: int
    vectors: int
    outputs: int


def last_columns(outputs: int, lanes: int, vectors: int) -> list[Columns]:
    """Give what is computed of a last block of `vectors` that is not full: whole vectors, and one that is none."""
    full, ragged = divmod(outputs % (vectors * lanes), lanes)
    whole = [Columns(0, full, lanes)] if full else []
    return whole + ([Columns(full * lanes, 1, ragged)] if ragged else [])


@dataclass(frozen=True)
class PackedDense:
    """The template: fully connected layers of several rows whose weight is packed."""

    name: str = "dense_packed"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a `dense` whose weight is in blocks of a vector."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, params) for params in space(_known(kernel, target)[1], machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known(kernel, target)[1], params_of(PackedParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape = _known(kernel, target)
        return build(shape, params_of(PackedParams, schedule), body_of(kernel, anchor))


def _known(kernel: Fused, target: Target) -> tuple[Node, DenseShape]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"dense_packed cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, DenseShape] | None:
    """Give the layer and its sizes, if the kernel is one."""
    anchor = anchor_of(kernel, target, "dense", narrow=(1,))
    if anchor is None or not isinstance(anchor.op, Dense) or anchor.op.algorithm != "direct":
        return None
    x, weight = anchor.inputs[0].type, anchor.inputs[1].type
    if x.layout is not None or weight.layout != weight_layout(2, 1, packed_block(target.vector_lanes)):
        return None
    outputs, inputs = weight.static_shape
    size = operand_bytes(anchor.inputs[1])
    return anchor, DenseShape(x.static_shape[:-1], inputs, outputs, target.vector_lanes, size)
