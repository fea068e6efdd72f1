"""The symbols an ELF object defines and needs (System V gABI, chapter 4: 64-bit, little endian)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from cnnc.errors import VerifyError

_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_TABLE = 2
_LOCAL = 0
_SECTION, _FILE = 3, 4


@dataclass(frozen=True)
class Symbols:
    """Names of an object's non-local symbols."""

    defined: frozenset[str]
    undefined: frozenset[str]


def read_symbols(code: bytes) -> Symbols:
    """Read the symbol table of a relocatable object; VerifyError if the bytes are none."""
    if code[:6] != b"\x7fELF\x02\x01":
        raise VerifyError("code generation did not give a 64-bit little-endian ELF object")
    try:
        found = list(_symbols(code))
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise VerifyError(f"code generation gave a damaged ELF object: {error}") from error
    return Symbols(
        frozenset(name for name, defined in found if defined),
        frozenset(name for name, defined in found if not defined),
    )


def _symbols(code: bytes) -> Iterator[tuple[str, bool]]:
    """Yield (name, is it defined) of every non-local symbol."""
    (table_offset,) = struct.unpack_from("<Q", code, 40)
    entry_size, count = struct.unpack_from("<HH", code, 58)
    sections = [_SECTION_HEADER.unpack_from(code, table_offset + i * entry_size) for i in range(count)]
    for section in sections:
        _, kind, _, _, offset, size, link, _, _, _ = section
        if kind != _SYMBOL_TABLE:
            continue
        names = sections[link][4]
        for at in range(offset, offset + size, _SYMBOL.size):
            name, info, _, index, _, _ = _SYMBOL.unpack_from(code, at)
            binding, category = info >> 4, info & 15
            if name and binding != _LOCAL and category not in (_SECTION, _FILE):
                end = code.index(b"\0", names + name)
                yield code[names + name : end].decode(), index != 0
