"""Writes data into ELF files: as an object of its own, or into a binary after it was linked.

Weights are nearly all of a binary's bytes.  Linked the usual way they would be written twice and read once; so the
linker sees a section of a few bytes, in a segment of its own, that is then stretched over data at the file's end.
Source: System V ABI, chapters 4 and 5, and its AMD64 supplement.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeAlias

from cnnc.errors import EnvironmentProblem

Pieces: TypeAlias = Sequence[bytes | memoryview]
"""Data in pieces that follow each other without a gap."""

ALIGNMENT = 4096
"""Whole pages: the section is mapped from the file, shared between processes and never copied."""

HUGE_PAGE = 2 << 20
HUGE_DATA = 64 << 20
"""Data of so many bytes starts a huge page, in the file as in memory: what the file costs is below a thirtieth."""

_FILE_HEADER = struct.Struct("<4s5B7x2HI3QI6H")
_SEGMENT_HEADER = struct.Struct("<2I6Q")
_SECTION_HEADER = struct.Struct("<2I4Q2I2Q")
_SYMBOL = struct.Struct("<I2BH2Q")

_LOAD = 1
_PROGBITS, _SYMTAB, _STRTAB = 1, 2, 3
_ALLOC = 2
_GLOBAL_OBJECT = 0x11
_HIDDEN = 2


def byte_count(pieces: Iterable[bytes | memoryview]) -> int:
    """Give the bytes of all pieces together."""
    return sum(memoryview(piece).nbytes for piece in pieces)


def write_data_object(path: Path, symbol: str, section: str, pieces: Pieces) -> None:
    """Write an object whose read-only `section` holds the data under a hidden global `symbol`."""
    size = byte_count(pieces)
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
        file.writelines(pieces)
        file.seek(symbols_at)
        file.write(symbols + strings + names)
        file.seek(headers_at)
        file.write(headers)


def _file_header(headers_at: int, sections: int) -> bytes:
    """Describe a relocatable file (type 1) for x86-64 (machine 62), 64-bit, little-endian."""
    sizes = (_FILE_HEADER.size, 0, 0, _SECTION_HEADER.size, sections, 4)
    return _FILE_HEADER.pack(b"\x7fELF", 2, 1, 1, 0, 0, 1, 62, 1, 0, 0, headers_at, 0, *sizes)


def stretch_section(path: Path, section: str, pieces: Pieces) -> None:
    """Put data at the end of a linked file and let a section, which fills a segment of its own, hold just that.

    Large data can be mapped in huge pages, if the system keeps it so.  Raises EnvironmentProblem if the linker gave the
    section no segment of its own.
    """
    with path.open("r+b", buffering=0) as file:
        tables = _Tables.read(file)
        header_at, address = tables.find_section(file, section)
        segment_at, alignment = tables.find_segment(file, section, address)
        start = file.seek(0, os.SEEK_END)
        size = byte_count(pieces)
        if size >= HUGE_DATA and address % HUGE_PAGE == 0:
            alignment = HUGE_PAGE
        start += -start % max(alignment, ALIGNMENT)
        file.seek(start)
        _write_all(file.fileno(), pieces)
        _replace(file, _SECTION_HEADER, header_at, {4: start, 5: size})
        _replace(file, _SEGMENT_HEADER, segment_at, {2: start, 5: size, 6: size, 7: alignment})


_MOST_PIECES = 512
"""Pieces in a call: many at a time, so that the system can keep what is small in huge pages, too."""


def _write_all(descriptor: int, pieces: Pieces) -> None:
    views = [memoryview(piece).cast("B") for piece in pieces if memoryview(piece).nbytes]
    first = 0
    while first < len(views):
        written = os.writev(descriptor, views[first : first + _MOST_PIECES])
        while first < len(views) and written >= views[first].nbytes:
            written -= views[first].nbytes
            first += 1
        if written:
            views[first] = views[first][written:]


@dataclass(frozen=True)
class _Tables:
    """Where a file's segment and section headers lie, and which section holds the names of all."""

    segments: range
    sections: range
    names: int

    @classmethod
    def read(cls, file: IO[bytes]) -> _Tables:
        header = _read(file, _FILE_HEADER, 0)
        segments_at, sections_at = header[10], header[11]
        segment_size, segment_count, section_size, section_count, names = header[14:]
        return cls(
            range(segments_at, segments_at + segment_size * segment_count, segment_size),
            range(sections_at, sections_at + section_size * section_count, section_size),
            names,
        )

    def find_section(self, file: IO[bytes], name: str) -> tuple[int, int]:
        """Give where the header of a section is and the address of the section."""
        _, _, _, _, names_at, names_size, *_ = _read(file, _SECTION_HEADER, self.sections[self.names])
        file.seek(names_at)
        names = file.read(names_size)
        for at in self.sections:
            header = _read(file, _SECTION_HEADER, at)
            if names[header[0] :].startswith(name.encode() + b"\0"):
                return at, header[3]
        raise EnvironmentProblem(f"the linker dropped the section {name}")

    def find_segment(self, file: IO[bytes], section: str, address: int) -> tuple[int, int]:
        """Give where the header of the segment is that starts, and ends, with a section, and its alignment."""
        headers = {at: _read(file, _SEGMENT_HEADER, at) for at in self.segments}
        loads = {at: header for at, header in headers.items() if header[0] == _LOAD}
        last = max(loads, key=lambda at: loads[at][3])
        if loads[last][3] != address:
            raise EnvironmentProblem(f"the linker did not give {section} a segment of its own; link with GNU ld")
        return last, loads[last][7]


def _read(file: IO[bytes], record: struct.Struct, at: int) -> tuple[int, ...]:
    file.seek(at)
    return record.unpack(file.read(record.size))


def _replace(file: IO[bytes], record: struct.Struct, at: int, changes: dict[int, int]) -> None:
    fields = list(_read(file, record, at))
    for index, value in changes.items():
        fields[index] = value
    file.seek(at)
    file.write(record.pack(*fields))
