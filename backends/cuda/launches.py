"""Launches in TIR, written down rather than scheduled: threads, blocks, and calls of device functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import tirx

from cnnc.backends.cuda.machine import LANES
from cnnc.backends.lower import loops

__all__ = ["address", "barrier", "call", "launch", "position", "reduce_lanes", "within"]

_BLOCKS = ("blockIdx.x", "blockIdx.y", "blockIdx.z")


def launch(grid: Sequence[int], threads: int, body: Callable[..., Any]) -> Any:
    """Run `body(thread, *block)` in every thread of a grid of up to three dimensions."""
    sizes = [("threadIdx.x", threads), *zip(_BLOCKS, grid, strict=False)]
    indices = [tirx.Var(tag.replace(".", "_"), "int32") for tag, _ in sizes]
    statement = body(*indices)
    for index, (tag, size) in zip(indices, sizes, strict=True):
        axis = tirx.IterVar(tvm.ir.Range(0, size), index, tirx.IterVar.ThreadIndex, tag)
        statement = tirx.AttrStmt(axis, "thread_extent", loops.const(size), statement)
    return statement


def address(buffer: Any, *indices: Any) -> Any:
    """Give the address of an element."""
    return tirx.address_of(loops.load(buffer, *indices))


def call(name: str, *arguments: Any) -> Any:
    """Call a device function."""
    return tirx.Evaluate(tirx.call_extern("void", name, *arguments))


def barrier() -> Any:
    """Wait for all threads of the block."""
    return tirx.Evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", "shared"))


def position(extents: Sequence[int], number: Any) -> list[Any]:
    """Give the index along each axis, of a number that counts through all of them; it is below their product."""
    indices: list[Any] = []
    for extent in reversed(extents[1:]):
        indices.insert(0, number % extent)
        number = number // extent
    return [number, *indices] if extents else []


_ALL_LANES = 0xFFFFFFFF


def reduce_lanes(buffer: Any, index: Any, combine: Callable[[Any, Any], Any], lanes: int = LANES) -> Any:
    """Combine a register of `lanes` neighbouring threads, a power of two; all get the same, but for NaN among maxima.

    All threads of the warp must come here.  `combine` is to be commutative.
    """
    steps, distance = [], lanes // 2
    while distance:
        own = loops.load(buffer, index)
        other = tirx.call_extern(
            "float32", "__shfl_xor_sync", tirx.const(_ALL_LANES, "uint32"), own, loops.const(distance)
        )
        steps.append(loops.store(buffer, combine(own, other), index))
        distance //= 2
    return loops.sequence(*steps)


def within(index: Any, least: int, most: int, extent: int) -> list[Any]:
    """Write the conditions for an index that may be from `least` to `most` to be in [0, extent)."""
    return [*([index >= 0] if least < 0 else []), *([index < extent] if most >= extent else [])]
