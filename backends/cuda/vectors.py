"""Numbers that lie side by side in memory, read at once into registers or shared memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnc.backends.cuda.machine import CHUNK_BYTES
from cnnc.backends.lower import loops

__all__ = ["copy_vector"]


def copy_vector(target: Any, to: Sequence[Any], source: Any, at: Sequence[Any], lanes: int) -> Any:
    """Copy `lanes` numbers of one type that begin at a multiple of as many, 16 bytes at a time where they are more."""
    (*outer, last), (*front, start) = to, at
    whole = CHUNK_BYTES * 8 // _bits(source)
    # CUDA has no vector of four numbers of 16 bits.
    piece = next(numbers for numbers in (whole, 2, 1) if lanes % numbers == 0)

    def one(p: Any) -> Any:
        def number(lane: Any) -> Any:
            return loops.load(source, *front, start + p * piece + lane)

        return loops.vectorized(piece, lambda lane: loops.store(target, number(lane), *outer, last + p * piece + lane))

    return loops.unrolled(lanes // piece, one, "piece")


def _bits(buffer: Any) -> int:
    from tvm import DataType

    return int(DataType(str(buffer.dtype)).bits)
