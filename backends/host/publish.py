"""Write a file so that its path holds the old content or the whole new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cnnc.errors import EnvironmentProblem

_SUFFIX = ".cnnc-tmp"


@contextlib.contextmanager
def published(path: Path, mode: int = 0o644) -> Iterator[Path]:
    """Give a temporary path on the same disk; when the block ends well it is flushed and takes the place of `path`.

    The folder it is in is the caller's own, for other temporary files, and goes away in any case.
    Raises EnvironmentProblem when the folder or disk does not allow it; the old file is then as it was.
    """
    path = Path(os.path.abspath(path))
    try:
        if path.is_dir():
            raise EnvironmentProblem(f"cannot write {path}: it is a folder; name a file")
        _sweep(path.parent)
        with _locked_folder(path.parent) as folder:
            temporary = folder / "out"
            yield temporary
            _replace(temporary, path, mode)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror or error}") from error


def publish(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `path`, all or nothing."""
    with published(path, mode) as temporary:
        temporary.write_bytes(data)


def flush(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked_folder(parent: Path) -> Iterator[Path]:
    """Make a temporary folder and hold a lock on it, which tells other runs that it is in use.

    The lock ends with the process, however that ends.
    """
    while True:
        folder = Path(tempfile.mkdtemp(suffix=_SUFFIX, prefix=".", dir=parent))
        # Until it is locked, another run may sweep it away; then a new one is made.
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                yield folder
                return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)


def _replace(temporary: Path, path: Path, mode: int) -> None:
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(mode & ~umask)
    flush(temporary)
    os.replace(temporary, path)


def _sweep(parent: Path) -> None:
    """Remove what killed runs left behind: temporary folders that nobody holds a lock on."""
    for folder in parent.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
