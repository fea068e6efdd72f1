"""Fully connected layers: rows of x against rows of the weight, as dot products along both.

    y[m, o] = sum over i of x[m, i] * weight[o, i]

Both operands are read in the order they lie in memory, so that the weight of a single row of x streams at the
speed of memory and nothing is packed.  A register tile is `rows` of x times `outputs` rows of the weight, each
sum a vector whose lanes are added up at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cnnc.backends.cpu.anchored import anchor_of, body_of, machine_of, operand_bytes
from cnnc.backends.cpu.conv_shape import MOST_PARTS
from cnnc.backends.cpu.machine import Machine
from cnnc.backends.cpu.row_index import position
from cnnc.backends.cpu.segments import even_split
from cnnc.backends.lower.template import params_of, schedule_of
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

if TYPE_CHECKING:
    from cnnc.backends.lower.body import Body

__all__ = ["DenseParams", "DenseShape", "DenseTemplate", "build", "cost", "space"]


@dataclass(frozen=True)
class DenseShape:
    """`rows` of `inputs` features become rows of `outputs` features; `leading` are the axes of y before the last."""

    leading: tuple[int, ...]
    inputs: int
    outputs: int
    lanes: int = 16
    weight_bytes: int = 4
    """What a number of the weight takes in memory."""
    parts: tuple[int, int] = (MOST_PARTS, MOST_PARTS)
    """The bf16 numbers that hold all of a number of x, and of the weight."""

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.leading)


@dataclass(frozen=True)
class DenseParams:
    """Register tiles of `rows` x `outputs` at most; a slice is `tiles` neighbouring tiles of outputs, and all rows."""

    rows: int
    outputs: int
    tiles: int


PAGE = 4096
"""Bytes of a page of memory."""

FARTHEST = 1 << 19
"""Weights of the next tile are asked for if they are no more bytes away than this, else those a page ahead."""


def space(shape: DenseShape, machine: Machine) -> Iterator[DenseParams]:
    """Give the tile sizes worth considering."""
    for rows in range(1, min(shape.rows, 6) + 1):
        for outputs in (1, 2, 3, 4, 5, 6, 8):
            if machine.fits(rows, outputs):
                for tiles in (1, 4, 16):
                    yield DenseParams(rows, outputs, tiles)


def cost(shape: DenseShape, params: DenseParams, machine: Machine) -> float:
    """Estimate the seconds the kernel takes on all threads of the machine."""
    output_tiles = -(-shape.outputs // params.outputs)
    row_tiles = -(-shape.rows // params.rows)
    steps = -(-shape.inputs // shape.lanes)
    tile = steps * machine.tile_cycles(params.rows, params.outputs) + 4.0 * params.rows * params.outputs + 10.0
    slices = -(-output_tiles // params.tiles)
    waves = machine.turns(slices) / slices
    weights = shape.weight_bytes * shape.outputs * shape.inputs
    inputs = 4.0 * params.rows * shape.inputs
    near = output_tiles * row_tiles * (inputs if inputs > machine.l1 / 2 else 0.0) / machine.l2_bytes
    far = weights / machine.memory_bytes / machine.threads
    compute = output_tiles * row_tiles * tile * waves
    total = max(compute, near * waves, far) + HIDDEN * (compute + near * waves + far)
    return total * machine.sharing(slices) / machine.hertz


HIDDEN = 0.05
"""The share of what runs beside the slowest of arithmetic, L2 and memory traffic that still adds to the time."""


def build(shape: DenseShape, params: DenseParams, body: Body) -> Any:
    """Make the kernel: a PrimFunc of the body's inputs and the output; the operands begin with x and weight."""
    from tvm import tirx

    from cnnc.backends.cpu.reduce_lanes import lane_sum
    from cnnc.backends.lower import loops

    bound = body.bind((*shape.leading, shape.outputs))
    (x, weight), y = bound.operands[:2], bound.output()
    lanes, whole = shape.lanes, shape.inputs // shape.lanes

    def tile(first_row: Any, first_output: Any, rows: int, outputs: int) -> Any:
        sums = loops.buffer("sums", (rows, outputs, lanes), scope="local")
        tails = loops.buffer("tails", (rows, outputs), scope="local")

        def each(statement: Any) -> Any:
            return loops.unrolled(rows, lambda r: loops.unrolled(outputs, lambda o: statement(r, o), "o"), "r")

        def product(r: Any, o: Any, at: Any, width: int) -> Any:
            a = loops.load(x, *position(shape.leading, first_row + r), at, lanes=width)
            return a * loops.widened(weight, first_output + o, at, lanes=width)

        def clear(r: Any, o: Any) -> Any:
            zero = tirx.const(0.0, "float32")
            vector = loops.store(sums, tirx.Broadcast(zero, lanes), r, o, 0, lanes=lanes)
            return loops.sequence(vector, loops.store(tails, zero, r, o))

        def add(r: Any, o: Any, step: Any) -> Any:
            total = loops.load(sums, r, o, 0, lanes=lanes) + product(r, o, step * lanes, lanes)
            return loops.store(sums, total, r, o, 0, lanes=lanes)

        def add_tail(r: Any, o: Any, at: Any) -> Any:
            return loops.store(tails, loops.load(tails, r, o) + product(r, o, at, 1), r, o)

        def finish(r: Any, o: Any) -> Any:
            total = lane_sum(loops.load(sums, r, o, 0, lanes=lanes), lanes) + loops.load(tails, r, o)
            at = [*position(shape.leading, first_row + r), first_output + o]
            return loops.store(y, bound.value(total, at), *at)

        def terms(step: Any) -> Any:
            return loops.sequence(ahead(step), each(lambda r, o: add(r, o, step)))

        def ahead(step: Any) -> Any:
            """Ask for weights early: hardware does so up to the end of a page only."""
            near = shape.weight_bytes * outputs * shape.inputs <= FARTHEST
            page = PAGE // shape.weight_bytes
            row, column = (first_output + outputs, step * lanes) if near else (first_output, step * lanes + page)
            return loops.unrolled(outputs, lambda o: loops.prefetch(weight, row + o, column), "o")

        rest = shape.inputs - whole * lanes
        return loops.sequence(
            loops.alloc(sums),
            loops.alloc(tails),
            each(clear),
            loops.loop(whole, terms, "step") if whole else None,
            loops.loop(rest, lambda i: each(lambda r, o: add_tail(r, o, whole * lanes + i)), "rest") if rest else None,
            each(finish),
        )

    def row_tiles(first_output: Any, outputs: int) -> Any:
        statements, start = [], 0
        for rows, count in even_split(shape.rows, params.rows):
            statements.append(_row_loop(loops, tile, start, rows, count, first_output, outputs))
            start += rows * count
        return loops.sequence(*statements)

    output_tiles, rest = divmod(shape.outputs, params.outputs)
    slices = -(-(output_tiles + bool(rest)) // params.tiles)

    def one_slice(index: Any) -> Any:
        def one_tile(number: Any) -> Any:
            output = (index * params.tiles + number) * params.outputs
            full = row_tiles(output, params.outputs) if output_tiles else None
            if not rest and (slices * params.tiles == output_tiles):
                return full
            last = loops.when(output < shape.outputs, row_tiles(output, rest)) if rest else None
            if full is None:
                return last
            return loops.when(output + params.outputs <= shape.outputs, full, last)

        return loops.loop(params.tiles, one_tile, "tile")

    return loops.function([*bound.inputs, y], loops.parallel(slices, one_slice))


def _row_loop(loops: Any, tile: Any, start: int, rows: int, count: int, first_output: Any, outputs: int) -> Any:
    return loops.loop(count, lambda r: tile(start + r * rows, first_output, rows, outputs), "row_tile")


@dataclass(frozen=True)
class DenseTemplate:
    """The template: fully connected layers on plain tensors."""

    name: str = "dense"

    def matches(self, kernel: Fused, target: Target) -> bool:
        """Take a `dense` of plain operands."""
        return _find(kernel, target) is not None

    def space(self, kernel: Fused, target: Target) -> Iterable[Schedule]:
        """Give the tile sizes worth considering."""
        return (schedule_of(self.name, params) for params in space(_known(kernel, target)[1], machine_of(target)))

    def cost(self, kernel: Fused, schedule: Schedule, target: Target) -> float:
        """Estimate the seconds of a run."""
        return cost(_known(kernel, target)[1], params_of(DenseParams, schedule), machine_of(target))

    def build(self, kernel: Fused, schedule: Schedule, target: Target) -> Any:
        """Make the PrimFunc over the kernel's inputs, then its output."""
        anchor, shape = _known(kernel, target)
        return build(shape, params_of(DenseParams, schedule), body_of(kernel, anchor))


def _known(kernel: Fused, target: Target) -> tuple[Node, DenseShape]:
    found = _find(kernel, target)
    if found is None:
        raise VerifyError(f"dense cannot compute kernel {kernel.anchor}")
    return found


@lru_cache(64)
def _find(kernel: Fused, target: Target) -> tuple[Node, DenseShape] | None:
    """Give the layer and its sizes, if the kernel is one."""
    anchor = anchor_of(kernel, target, "dense", narrow=(1,))
    if anchor is None or not isinstance(anchor.op, Dense):
        return None
    if any(value.type.layout is not None for value in anchor.inputs):
        return None
    outputs, inputs = anchor.inputs[1].type.static_shape
    leading = anchor.inputs[0].type.static_shape[:-1]
    return anchor, DenseShape(leading, inputs, outputs, target.vector_lanes, operand_bytes(anchor.inputs[1]))
