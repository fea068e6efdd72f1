"""What earlier compiles found out, such as kernels and schedules, on disk, by the digest of everything they depend on.

One entry is one file, written in a folder for unfinished ones and renamed into its place, so that a reader sees all of
it or none, and any number of writers may race.  An entry carries a digest of itself and the key it was made for; what
does not match, belongs to another user or is no plain file is never served.  Nothing is unpickled.

The folder is `$CNNC_CACHE_DIR/kernels`, or one in the user's cache folder.  A folder that cannot be used costs time,
never a compile: `note` then says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cnnc.ops.fused import Schedule

_MAGIC = b"cnnc cache 2\n"
_DIGEST_BYTES = 32
_KEY = re.compile(r"[0-9a-f]{64}")
_STALE_SECONDS = 3600
_UNFINISHED = "unfinished"

_log = logging.getLogger("cnnc.cache")


@dataclass(frozen=True)
class CacheStatus:
    """Where the cache is, what it holds, and why it is not used (if it is not)."""

    folder: Path | None
    entries: int
    bytes: int
    note: str | None


class DiskCache:
    """Bytes by key, a SHA-256 in hex."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder: Path | None = default_folder() if folder is None else folder
        self._writable = True
        self.note: str | None = None
        self._open()

    def read(self, key: str) -> bytes | None:
        """Give what is stored under a key, or None; a damaged entry counts as absent."""
        path = self._path(key)
        if path is None:
            return None
        try:
            data = _read_own_file(path)
        except OSError:
            return None
        content = _opened(data, key)
        if content is None:
            _log.info("cache entry %s is damaged or from another version; it is made anew", path)
        return content

    def write(self, key: str, content: bytes) -> None:
        """Store bytes under a key; what cannot be written is left out, with a note."""
        path = self._path(key)
        if path is None or not self._writable:
            return
        unfinished = path.parent.parent / _UNFINISHED
        try:
            for folder in (path.parent, unfinished):
                folder.mkdir(mode=0o700, exist_ok=True)
            _publish(path, _sealed(key, content), unfinished)
        except OSError as error:
            self._writable = False
            self._say(f"nothing is cached: {error.strerror} ({path.parent})")

    def status(self) -> CacheStatus:
        """Count the entries."""
        sizes = [path.stat().st_size for path in self._entries()]
        return CacheStatus(self._folder, len(sizes), sum(sizes), self.note)

    def clear(self) -> int:
        """Delete all entries and what dead writers left, and give how many entries there were."""
        entries = list(self._entries())
        for path in (*entries, *self._leftovers(older_than=0)):
            with contextlib.suppress(OSError):
                path.unlink()
        return len(entries)

    def _open(self) -> None:
        """Make the folder, and refuse one that others could have filled."""
        folder = self._folder
        if folder is None:
            return
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            state = folder.stat()
        except OSError as error:
            self._refuse(f"{error.strerror} ({folder})")
            return
        if state.st_uid != os.geteuid():
            self._refuse(f"{folder} belongs to another user")
        elif state.st_mode & 0o022:
            self._refuse(f"{folder} can be written by other users")
        else:
            for path in self._leftovers(older_than=_STALE_SECONDS):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _refuse(self, reason: str) -> None:
        self._folder = None
        self._say(f"nothing is cached: {reason}")

    def _say(self, note: str) -> None:
        self.note = note
        _log.warning("%s", note)

    def _path(self, key: str) -> Path | None:
        if not _KEY.fullmatch(key):
            raise ValueError(f"cache key {key!r} is no SHA-256 in hex")
        return None if self._folder is None else self._folder / key[:2] / key

    def _entries(self) -> Iterator[Path]:
        files = () if self._folder is None else self._folder.glob("??/*")
        return (path for path in files if _KEY.fullmatch(path.name))

    def _leftovers(self, older_than: float) -> Iterator[Path]:
        """Yield the files of writers that did not finish; they are apart, so that no compile looks at all entries."""
        limit = time.time() - older_than
        for path in () if self._folder is None else self._folder.glob(f"{_UNFINISHED}/*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime <= limit:
                    yield path


class ScheduleCache:
    """The schedules that the search over the cost models ended with, by key; on disk, or nowhere."""

    def __init__(self, disk: DiskCache | None) -> None:
        self._disk = disk

    def get(self, key: str) -> Schedule | None:
        """Give the schedule stored under a key, or None."""
        content = self._disk.read(key) if self._disk else None
        return None if content is None else Schedule.parse(content.decode())

    def put(self, key: str, schedule: Schedule) -> None:
        """Store a schedule under a key."""
        if self._disk:
            self._disk.write(key, str(schedule).encode())


def default_folder() -> Path:
    """Give `$CNNC_CACHE_DIR/kernels`, or `kernels` in the user's cache folder."""
    chosen = os.environ.get("CNNC_CACHE_DIR")
    if chosen:
        return Path(chosen) / "kernels"
    import platformdirs

    return Path(platformdirs.user_cache_dir("cnnc", appauthor=False)) / "kernels"


def _sealed(key: str, content: bytes) -> bytes:
    body = key.encode() + content
    return _MAGIC + hashlib.sha256(body).digest() + body


def _opened(data: bytes, key: str) -> bytes | None:
    """Read an entry back; None unless every byte is as it was written, for this key."""
    body = data[len(_MAGIC) + _DIGEST_BYTES :]
    digest = data[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]
    if not data.startswith(_MAGIC) or hashlib.sha256(body).digest() != digest or not body.startswith(key.encode()):
        return None
    return body[len(key) :]


def _read_own_file(path: Path) -> bytes:
    """Read a plain file of this user; OSError for a link, a pipe, or someone else's."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode) or state.st_uid != os.geteuid():
            raise PermissionError(f"{path} is no file of this user")
        return file.read()


def _publish(path: Path, data: bytes, unfinished: Path) -> None:
    """Write a file so that it appears whole or not at all; until then it is in another folder beside that of `path`."""
    descriptor, temporary = tempfile.mkstemp(dir=unfinished)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
