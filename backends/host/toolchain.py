"""The C compiler, linker and objcopy of this machine, and the runtime compiled with them (cached by content)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import platformdirs

from cnnc.backends.host.publish import publish
from cnnc.errors import EnvironmentProblem

RUNTIME = Path(__file__).resolve().parent / "runtime"
_SHARED_SOURCES = ("context.c", "cpu.c", "info.c", "pool.c")
LIBRARY_SOURCES = (*_SHARED_SOURCES, "cpu_context.c")
DEVICE_SOURCES = (*_SHARED_SOURCES, "cuda_context.c", "cuda_run.c", "cuda_device.c", "cuda_library.c")
PROGRAM_SOURCES = ("main.c", "npy.c", "picture.c", "png.c", "jpeg.c")
FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off")
_NO_COMPILER = "no C compiler found: install gcc or clang (Debian, Ubuntu: apt install gcc), or set CC to one"
_TOOL_SECONDS = 600


def compiler() -> tuple[str, ...]:
    """Return the command of the C compiler: CC if set, else cc, gcc or clang; EnvironmentProblem if none is there."""
    chosen = os.environ.get("CC", "").strip()
    if chosen:
        command = tuple(shlex.split(chosen))
        if shutil.which(command[0]) is None:
            raise EnvironmentProblem(f"the C compiler named by CC is not there: {command[0]!r}; {_NO_COMPILER}")
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name) is not None:
            return (name,)
    raise EnvironmentProblem(_NO_COMPILER)


def tool(name: str) -> str:
    """Return the name of a binutils program if it is there; EnvironmentProblem if not."""
    if shutil.which(name) is None:
        raise EnvironmentProblem(f"{name} not found: install binutils (Debian, Ubuntu: apt install binutils)")
    return name


def run_tool(command: Sequence[str], folder: Path, both: bool = False) -> str:
    """Run a tool in `folder` and return what it printed, with `both` on stderr too; EnvironmentProblem if it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            timeout=_TOOL_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentProblem(f"{command[0]} could not be run: {error}") from error
    if done.returncode != 0:
        message = done.stderr.decode("utf-8", "replace").strip()
        raise EnvironmentProblem(f"{command[0]} failed with status {done.returncode}: {message[:2000]}")
    return (done.stdout + (done.stderr if both else b"")).decode("utf-8", "replace")


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """Give a fresh temporary folder that is gone afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="cnnc-", ignore_cleanup_errors=True)
    except OSError as error:
        raise EnvironmentProblem(f"no temporary folder: {error}; set TMPDIR to a writable one") from error
    with folder as name:
        yield Path(name)


def cache_folder() -> Path:
    """Return where compiled pieces are kept: CNNC_CACHE_DIR, else the user's cache folder."""
    chosen = os.environ.get("CNNC_CACHE_DIR")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("cnnc"))


def runtime_objects(with_main: bool = False, for_device: bool = False) -> list[bytes]:
    """Return the runtime as relocatable objects, for kernels on the CPU or on a GPU.

    With `main`, picture and array readers for a program are among them.
    """
    library = DEVICE_SOURCES if for_device else LIBRARY_SOURCES
    names = library + PROGRAM_SOURCES if with_main else library
    return [_runtime_object(name) for name in names]


def _runtime_object(name: str) -> bytes:
    command = compiler()
    sources = [RUNTIME / name, *sorted(RUNTIME.glob("*.h"))]
    contents = [source.read_bytes() for source in sources]
    key = hashlib.sha256(repr((name, FLAGS, _version(command), contents)).encode()).hexdigest()
    entry = cache_folder() / "runtime" / f"{key}.o"
    cached = _read_entry(entry)
    if cached is not None:
        return cached
    with work_folder() as folder:
        run_tool([*command, *FLAGS, "-c", str(RUNTIME / name), "-o", "out.o"], folder)
        made = (folder / "out.o").read_bytes()
    # A cache that cannot be written costs a second each time; it is no reason to fail.
    with contextlib.suppress(OSError, EnvironmentProblem):
        entry.parent.mkdir(parents=True, exist_ok=True)
        publish(entry, hashlib.sha256(made).digest() + made, mode=0o600)
    return made


def _read_entry(entry: Path) -> bytes | None:
    """Return a cached object if it is whole and ours."""
    try:
        with entry.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            data = file.read()
    except OSError:
        return None
    return data[32:] if hashlib.sha256(data[32:]).digest() == data[:32] else None


def _version(command: tuple[str, ...]) -> str:
    return _version_of(command, shutil.which(command[0]) or "")


@functools.cache
def _version_of(command: tuple[str, ...], path: str) -> str:
    return path + run_tool([*command, "--version"], Path("/"))
