"""Operands of a product of matrices on their way into shared memory, where a ring of stages holds their chunks.

A chunk is 16 bytes.  `depth` chunks of all rows are a stage; while one is multiplied, those after it are on their way
(`cp.async`).  Where a chunk has its place in a stage is for the instructions to say that read it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from cnnc.backends.cuda import tensor_cores
from cnnc.backends.cuda.launches import address, barrier, call
from cnnc.backends.lower import loops

__all__ = ["HALF_ROWS", "Operand", "Order", "Ring", "StagedTile", "Store", "Sums", "staged"]

Chunk = Callable[[Any, Any], tuple[Any, Any]]
"""The address of a chunk in memory, and whether it is there, by its row in the tile and its number in depth.

Where chunks are copied in pieces, those are counted instead.
"""

Store = Callable[[Any, Any, Any], Any]
"""Stores neighbouring sums: (row in the tile, column in the tile, function of 0, 1, ... that gives them)."""

HALF_ROWS = 8
"""Of the matrices that tensor cores load: also the 16-bit numbers in a chunk."""


class Order(Enum):
    """What neighbouring threads copy: what is neighbours in memory, as they should.

    ROWS: chunks of neighbouring rows.  DEPTH: neighbouring chunks of a row, in matrices of long rows.  ACROSS: a chunk
    is no part of a row, but a number each of neighbouring rows, as in a matrix that is transposed.  Only numbers of
    16 bits are transposed on their way to tensor cores; `chunk` then gets the chunk of rows, and the place in depth.
    """

    ROWS = "rows"
    DEPTH = "depth"
    ACROSS = "across"


@dataclass(frozen=True)
class Operand:
    """An operand of a product: where its chunks are, and how they lie in memory.

    So many `numbers` are a chunk, which is copied in so many `pieces`: one where lines begin at multiples of 16 bytes.
    """

    chunk: Chunk
    order: Order = Order.ROWS
    numbers: int = HALF_ROWS
    pieces: int = 1


@dataclass(frozen=True)
class Sums:
    """The product of a tile: statements that compute, and then store the sums of a thread."""

    compute: Any
    finish: Callable[[Store], Any]


class StagedTile(Protocol):
    """What a ring is to know of a tile."""

    @property
    def threads(self) -> int:
        """The threads of a block."""

    @property
    def depth(self) -> int:
        """Chunks of depth in a stage."""

    @property
    def stages(self) -> int:
        """Stages of the ring."""


@dataclass(frozen=True)
class Ring(ABC):
    """An operand's part of shared memory, a ring of stages, each of `lines` lines of `line` chunks side by side."""

    operand: Operand
    rows: int
    start: int
    tile: StagedTile

    @property
    def across(self) -> bool:
        """Whether chunks are of neighbouring rows, at one place in depth."""
        return self.operand.order is Order.ACROSS

    @property
    def line(self) -> int:
        """The chunks of a line: of one place in depth."""
        return self.rows // self.operand.numbers if self.across else self.rows

    @property
    def lines(self) -> int:
        """The lines of a stage."""
        return self.tile.depth * self.operand.numbers if self.across else self.tile.depth

    @property
    @abstractmethod
    def chunks(self) -> int:
        """All of it, counted in chunks."""

    @abstractmethod
    def place(self, stage: Any, line: Any, position: Any) -> Any:
        """Give the place of a chunk, counted in chunks."""

    def fetch(self, memory: Any, thread: Any, step: Any, stage: Any) -> Any:
        """Start to copy the chunks of a step into a stage."""
        pieces = self.operand.pieces
        copies = self.lines * self.line * pieces

        def one(turn: Any) -> Any:
            number = turn * self.tile.threads + thread
            chunk, piece = number // pieces, number % pieces
            line, position = chunk // self.line, chunk % self.line
            if self.operand.order is Order.DEPTH:
                line, position = chunk % self.lines, chunk // self.lines
            row, depth = position, step * self.lines + line
            # A line's pieces lie side by side in memory, and are counted through all of its chunks.
            row, depth = (row * pieces + piece, depth) if self.across else (row, depth * pieces + piece)
            source, valid = self.operand.chunk(row, depth)
            place = address(memory, self.place(stage, line, position))
            if pieces == 1:
                copy = call(tensor_cores.COPY, place, source, valid)
            else:
                copy = call(tensor_cores.copy_piece(pieces), place, piece, source, valid)
            return copy if copies % self.tile.threads == 0 else loops.when(number < copies, copy)

        return loops.unrolled(-(-copies // self.tile.threads), one, "turn")


def staged(
    rings: Sequence[Ring], memory: Any, thread: Any, steps: tuple[Any, Any], multiply: Callable[[Any], Any]
) -> Any:
    """Go through the steps [first, last), which may be none: `multiply` a stage while later ones are on their way."""
    (first, last), stages = steps, rings[0].tile.stages

    def fetch(step: Any, stage: Any) -> Any:
        copies = loops.sequence(*(ring.fetch(memory, thread, step, stage) for ring in rings))
        return loops.sequence(loops.when(step < last, copies), call(tensor_cores.COMMIT))

    def turn(step: Any) -> Any:
        ahead = step + (stages - 1)
        return loops.sequence(
            call(tensor_cores.wait(stages - 2)),
            barrier(),
            fetch(first + ahead, ahead % stages),
            multiply(step % stages),
        )

    return loops.sequence(
        loops.unrolled(stages - 1, lambda stage: fetch(first + stage, stage), "stage"),
        loops.loop(last - first, turn, "step"),
    )
