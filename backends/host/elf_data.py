"""Writes data as a relocatable ELF object, so that weights of any size are linked without an assembler.

Source: System V ABI, chapters 4 and 5, and its AMD64 supplement.
"""

from __future__ import annotations

import struct
from pathlib import Path

ALIGNMENT = 4096
"""Whole pages: the section is mapped from the file, shared between processes and never copied."""

_FILE_HEADER = struct.Struct("<4s5B7x2HI3QI6H")
_SECTION_HEADER = struct.Struct("<2I4Q2I2Q")
_SYMBOL = struct.Struct("<I2BH2Q")

_PROGBITS, _SYMTAB, _STRTAB = 1, 2, 3
_ALLOC = 2
_GLOBAL_OBJECT = 0x11
_HIDDEN = 2


def write_data_object(path: Path, symbol: str, section: str, data: bytes | memoryview) -> None:
    """Write an object whose read-only `section` holds the data under a hidden global `symbol`."""
    size = memoryview(data).nbytes
    names = f"\0{section}\0.symtab\0.strtab\0.shstrtab\0.note.GNU-stack\0".encode()
    strings = f"\0{symbol}\0".encode()
    symbols = bytes(_SYMBOL.size) + _SYMBOL.pack(1, _GLOBAL_OBJECT, _HIDDEN, 1, 0, size)
    symbols_at = ALIGNMENT + size + -size % 8
    strings_at = symbols_at + len(symbols)
    names_at = strings_at + len(strings)
    headers_at = names_at + len(names) + -(names_at + len(names)) % 8

    def named(name: str) -> int:
        return names.index(f"\0{name}\0".encode()) + 1

    headers = b"".join(
        (
            bytes(_SECTION_HEADER.size),
            _SECTION_HEADER.pack(named(section), _PROGBITS, _ALLOC, 0, ALIGNMENT, size, 0, 0, ALIGNMENT, 0),
            # Its link is the string table (section 3), its info the first symbol that is not local.
            _SECTION_HEADER.pack(named(".symtab"), _SYMTAB, 0, 0, symbols_at, len(symbols), 3, 1, 8, _SYMBOL.size),
            _SECTION_HEADER.pack(named(".strtab"), _STRTAB, 0, 0, strings_at, len(strings), 0, 0, 1, 0),
            _SECTION_HEADER.pack(named(".shstrtab"), _STRTAB, 0, 0, names_at, len(names), 0, 0, 1, 0),
            # Without this section the linker takes it that the stack must be executable.
            _SECTION_HEADER.pack(named(".note.GNU-stack"), _PROGBITS, 0, 0, headers_at, 0, 0, 0, 1, 0),
        )
    )
    with path.open("wb") as file:
        file.write(_file_header(headers_at, len(headers) // _SECTION_HEADER.size))
        file.seek(ALIGNMENT)
        file.write(data)
        file.seek(symbols_at)
        file.write(symbols + strings + names)
        file.seek(headers_at)
        file.write(headers)


def _file_header(headers_at: int, sections: int) -> bytes:
    """Describe a relocatable file (type 1) for x86-64 (machine 62), 64-bit, little-endian."""
    sizes = (_FILE_HEADER.size, 0, 0, _SECTION_HEADER.size, sections, 4)
    return _FILE_HEADER.pack(b"\x7fELF", 2, 1, 1, 0, 0, 1, 62, 1, 0, 0, headers_at, 0, *sizes)
