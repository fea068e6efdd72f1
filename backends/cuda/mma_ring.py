"""Operands of a product of matrices on their way into shared memory, where a ring of stages holds their chunks.

A chunk is 16 bytes.  `depth` chunks of all rows are a stage; while one is multiplied, those after it are on their way
(`cp.async`).  Where a chunk has its place in a stage is for the instructions to say that read it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from cnnc.backends.cuda import tensor_cores
from cnnc.backends.cuda.launches import address, call
from cnnc.backends.lower import loops

__all__ = ["HALF_ROWS", "Operand", "Order", "Ring", "Staged", "Store", "Sums"]

Chunk = Callable[[Any, Any], tuple[Any, Any]]
"""The address of a chunk in memory, and whether it is there, by its row in the tile and its number in depth."""

Store = Callable[[Any, Any, Any], Any]
"""Stores two neighbouring sums: (row in the tile, column in the tile, function of 0 and 1 that gives them)."""

HALF_ROWS = 8
"""Of the matrices that tensor cores load: also the 16-bit numbers in a chunk."""


class Order(Enum):
    """What neighbouring threads copy: what is neighbours in memory, as they should.

    ROWS: chunks of neighbouring rows.  DEPTH: neighbouring chunks of a row, in matrices of long rows.  ACROSS: a chunk
    is no part of a row, but a number each of 8 neighbouring rows, as in a matrix that is transposed.  Only numbers of
    16 bits are transposed on their way to tensor cores; `chunk` then gets the chunk of rows, and the place in depth.
    """

    ROWS = "rows"
    DEPTH = "depth"
    ACROSS = "across"


@dataclass(frozen=True)
class Operand:
    """An operand of a product: where its chunks are, and how they lie in memory."""

    chunk: Chunk
    order: Order = Order.ROWS


@dataclass(frozen=True)
class Sums:
    """The product of a tile: statements that compute, and then store the sums of a thread."""

    compute: Any
    finish: Callable[[Store], Any]


class Staged(Protocol):
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
    tile: Staged

    @property
    def across(self) -> bool:
        """Whether chunks are of neighbouring rows, at one place in depth."""
        return self.operand.order is Order.ACROSS

    @property
    def line(self) -> int:
        """The chunks of a line: of one place in depth."""
        return self.rows // HALF_ROWS if self.across else self.rows

    @property
    def lines(self) -> int:
        """The lines of a stage."""
        return self.tile.depth * HALF_ROWS if self.across else self.tile.depth

    @property
    @abstractmethod
    def chunks(self) -> int:
        """All of it, counted in chunks."""

    @abstractmethod
    def place(self, stage: Any, line: Any, position: Any) -> Any:
        """Give the place of a chunk, counted in chunks."""

    def fetch(self, memory: Any, thread: Any, step: Any, stage: Any) -> Any:
        """Start to copy the chunks of a step into a stage."""
        chunks = self.lines * self.line

        def one(turn: Any) -> Any:
            number = turn * self.tile.threads + thread
            line, position = number // self.line, number % self.line
            if self.operand.order is Order.DEPTH:
                line, position = number % self.lines, number // self.lines
            source, valid = self.operand.chunk(position, step * self.lines + line)
            copy = call(tensor_cores.COPY, address(memory, self.place(stage, line, position)), source, valid)
            return copy if chunks % self.tile.threads == 0 else loops.when(number < chunks, copy)

        return loops.unrolled(-(-chunks // self.tile.threads), one, "turn")
