"""The digest at a binary's end: added when all else is written, compared before any of its code runs."""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from pathlib import Path

from cnnc.errors import CheckFailed

# The last 56 bytes of a binary: a mark, the size before it, and the digest of everything before it.
_TRAILER = struct.Struct("<16sQ32s")
_MARK = b"cnnc-sha256-v2\0\0"
# The digest is the SHA-256 of the SHA-256 of each block, so that several threads can share the work.
_BLOCK = 1 << 22
_MOST_THREADS = 8


def seal_binary(path: Path) -> None:
    """Add the digest to a file that is complete but for it."""
    with path.open("r+b") as file:
        length = file.seek(0, os.SEEK_END)
        file.write(_TRAILER.pack(_MARK, length, _digest(file.fileno(), length)))


def check_binary(descriptor: int) -> None:
    """Raise CheckFailed unless the open file is a whole binary of ours, bit for bit as it was written."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise CheckFailed("not a file")
    size = status.st_size
    if size < _TRAILER.size:
        raise CheckFailed(f"not a cnnc binary, or cut: only {size} bytes")
    mark, length, digest = _TRAILER.unpack(os.pread(descriptor, _TRAILER.size, size - _TRAILER.size))
    if mark != _MARK:
        raise CheckFailed("not a cnnc binary, or cut, or stripped: the digest at its end is missing; build it again")
    if length != size - _TRAILER.size or _digest(descriptor, length) != digest:
        raise CheckFailed("the binary was changed after it was built (its digest differs); build it again")


def _digest(descriptor: int, length: int) -> bytes:
    def digest_block(start: int) -> bytes:
        return hashlib.sha256(os.pread(descriptor, min(_BLOCK, length - start), start)).digest()

    starts = range(0, length, _BLOCK)
    threads = min(len(starts), len(os.sched_getaffinity(0)), _MOST_THREADS)
    if threads <= 1:
        return hashlib.sha256(b"".join(map(digest_block, starts))).digest()
    # Its import takes longer than to digest a small binary.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads, "digest") as pool:
        return hashlib.sha256(b"".join(pool.map(digest_block, starts))).digest()
