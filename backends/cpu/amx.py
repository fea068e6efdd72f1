"""AMX's tile instructions in TIR: eight registers of 16 rows of 64 bytes, and a product that adds to one of them.

    c[p, o] += sum over k of a[p, 2k] * b[k, 2o] + a[p, 2k + 1] * b[k, 2o + 1]     a, b: bf16, c: float32, k < 16

Products are exact; those of even and of odd numbers are added up in float32 each, then both are added to c, and
subnormal numbers count as zero (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and
volume 2, TDPBF16PS).  In memory a tile is 16 lines of the cache, one after the other.  The same of int8 adds four
products at a time to int32, exactly (TDPBSSD).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from cnnc.backends.cpu.machine import TILE_LINE, TILE_ROWS
from cnnc.backends.lower import loops

__all__ = ["configured", "load", "multiply_add", "multiply_add_int8", "store", "zero"]

_REGISTERS = 8


def configured(body: Any) -> Any:
    """Run statements with all tile registers at their full size."""
    config = loops.buffer("tile_config", (TILE_LINE,), "int32", scope="local")
    row_bytes = 4 * TILE_LINE
    # One byte for the palette, 15 reserved, 16 words for the bytes of a row, 16 bytes for the rows of a register.
    words = [1, 0, 0, 0, *[row_bytes << 16 | row_bytes] * (_REGISTERS // 2), 0, 0, 0, 0]
    words += [TILE_ROWS * 0x01010101] * (_REGISTERS // 4) + [0, 0]
    writes = (loops.store(config, loops.const(word), i) for i, word in enumerate(words))
    return loops.sequence(
        loops.alloc(config),
        *writes,
        _instruction("ldtilecfg", tirx.address_of(loops.load(config, 0))),
        body,
        _instruction("tilerelease"),
    )


def zero(register: int) -> Any:
    """Make all numbers of a register zero."""
    return _instruction("tilezero", _number(register))


def load(register: int, buffer: Any, *indices: Any) -> Any:
    """Read a register from a buffer of 32-bit numbers, its rows one after the other."""
    return _instruction("tileloadd64", _number(register), *_rows(buffer, indices))


def store(register: int, buffer: Any, *indices: Any) -> Any:
    """Write a register to a buffer of 32-bit numbers, its rows one after the other."""
    return _instruction("tilestored64", _number(register), *_rows(buffer, indices))


def multiply_add(total: int, a: int, b: int) -> Any:
    """Add the product of two registers of bf16 to one of float32."""
    return _instruction("tdpbf16ps", _number(total), _number(a), _number(b))


def multiply_add_int8(total: int, a: int, b: int) -> Any:
    """Add the product of two registers of int8 to one of int32."""
    return _instruction("tdpbssd", _number(total), _number(a), _number(b))


def _rows(buffer: Any, indices: tuple[Any, ...]) -> tuple[Any, Any]:
    """Give the address of the first row, and the bytes from one row to the next."""
    return tirx.address_of(loops.load(buffer, *indices)), tirx.const(4 * TILE_LINE, "int64")


def _number(register: int) -> Any:
    return tirx.const(register, "int8")


def _instruction(name: str, *operands: Any) -> Any:
    return tirx.Evaluate(tirx.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))
