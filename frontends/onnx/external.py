"""Read a model's external data: only regular files below the model's own folder, each byte once.

A location is walked component by component relative to a descriptor of the folder, following no symbolic link, so no
name in a model reaches a file outside, whatever is swapped meanwhile.  Format: the ONNX document ExternalData.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path

from cnnc.errors import EnvironmentProblem, ModelError
from cnnc.frontends.onnx.naming import shown

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MAX_LOCATION = 4096
_CHUNK = 1 << 24


class ExternalFolder:
    """The folder of a model; files in it are opened once and read by position."""

    def __init__(self, path: Path) -> None:
        try:
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentProblem(f"{shown(str(path))} cannot be opened: {error.strerror}") from None
        self._files: dict[str, tuple[int, int]] = {}
        self._verified: set[tuple[str, str]] = set()
        weakref.finalize(self, _close_all, self._folder, self._files)

    def read(self, entries: Mapping[str, str], nbytes: int) -> bytes:
        """Give the `nbytes` bytes that a tensor's `external_data` entries point at.

        Raises `ModelError` (3) for a location that leaves the folder or is no regular file, for a range outside the
        file, and for a checksum (SHA-1 of the whole file, as ONNX has it) that is given and wrong.
        """
        location = entries.get("location")
        if not location:
            raise ModelError("external data without a location")
        offset = _natural(entries, "offset", 0)
        length = _natural(entries, "length", nbytes)
        if length != nbytes:
            raise ModelError(f"external data of {length} bytes, where shape and type take {nbytes}")
        descriptor, size = self._open(location)
        if offset + length > size:
            raise ModelError(
                f"external data {shown(location)} has {size} bytes; bytes {offset} to {offset + length} are asked for"
            )
        if "checksum" in entries:
            self._verify(location, descriptor, size, entries["checksum"])
        return _read_range(descriptor, offset, length, location)

    def _open(self, location: str) -> tuple[int, int]:
        if location in self._files:
            return self._files[location]
        parts = _components(location)
        folder, opened = self._folder, []
        try:
            for part in parts[:-1]:
                folder = os.open(part, _OPEN | os.O_DIRECTORY, dir_fd=folder)
                opened.append(folder)
            # Looked at before it is opened: opening a device can have effects.
            _require_plain(os.stat(parts[-1], dir_fd=folder, follow_symlinks=False), location)
            descriptor = os.open(parts[-1], _OPEN, dir_fd=folder)
        except OSError as error:
            raise ModelError(f"external data {shown(location)} cannot be opened: {error.strerror}") from None
        finally:
            for each in opened:
                os.close(each)
        status = os.fstat(descriptor)
        self._files[location] = (descriptor, status.st_size)
        _require_plain(status, location)
        return self._files[location]

    def _verify(self, location: str, descriptor: int, size: int, checksum: str) -> None:
        wanted = checksum.lower()
        if (location, wanted) in self._verified:
            return
        digest = hashlib.sha1(usedforsecurity=False)
        for offset in range(0, size, _CHUNK):
            digest.update(_read_range(descriptor, offset, min(_CHUNK, size - offset), location))
        if digest.hexdigest() != wanted:
            raise ModelError(
                f"external data {shown(location)} has SHA-1 {digest.hexdigest()}, the model says {shown(checksum)}"
            )
        self._verified.add((location, wanted))


def _close_all(folder: int, files: dict[str, tuple[int, int]]) -> None:
    os.close(folder)
    for descriptor, _ in files.values():
        os.close(descriptor)


def _components(location: str) -> list[str]:
    if len(location) > _MAX_LOCATION or "\0" in location:
        raise ModelError(f"external data location {shown(location)} is no file name")
    if location.startswith("/"):
        raise ModelError(f"external data location {shown(location)} is absolute; only files beside the model are read")
    parts = [part for part in location.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise ModelError(f"external data location {shown(location)} leaves the model's folder")
    return parts


def _natural(entries: Mapping[str, str], key: str, default: int) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if re.fullmatch("[0-9]{1,18}", text) is None:
        raise ModelError(f"external data {key} {shown(text)} is no byte count")
    return int(text)


def _require_plain(status: os.stat_result, location: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "no regular file"
        raise ModelError(f"external data {shown(location)} is {kind}; put the file itself beside the model")
    if status.st_nlink != 1:
        raise ModelError(f"external data {shown(location)} is a hard link to another file; put a copy beside the model")


def _read_range(descriptor: int, offset: int, length: int, location: str) -> bytes:
    chunks: list[bytes] = []
    while length:
        chunk = os.pread(descriptor, min(length, _CHUNK), offset)
        if not chunk:
            raise ModelError(f"external data {shown(location)} became shorter while it was read")
        chunks.append(chunk)
        offset += len(chunk)
        length -= len(chunk)
    return b"".join(chunks)
