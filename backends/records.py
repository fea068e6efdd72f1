"""Tuned records: the schedules that measurement found best, kernel by kernel, and who finds them again.

A file holds one record a line, as JSON.  A line begins with its key, a digest of what the kernel computes, the CPU
code is made for (name, features, block) and the number of threads, so that a file is searched without being parsed.
The user's file comes before those that are shipped beside the templates.  A record is only used if a template that
takes the kernel still has its schedule; `notes` says what was not.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cnnc.backends.cache import DiskCache, ScheduleCache
from cnnc.backends.cpu.templates import TEMPLATES
from cnnc.backends.host.publish import publish
from cnnc.backends.lower.identity import anonymous, kernel_key
from cnnc.errors import EnvironmentProblem
from cnnc.ir.text import print_graph
from cnnc.ops.fused import Fused, Schedule
from cnnc.target import Target

SHIPPED = Path(__file__).resolve().parent / "cpu" / "records"
"""The folder of records that come with the package, one file for each CPU name."""

_START = b'{"key": "'
_KEY_DIGITS = 64
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Record:
    """What tuning found out about one kernel.

    `kernel` is its body as text; `seconds` and `default_seconds` are of the same rounds, for the best schedule and the
    one the cost models choose.  `complete` is False where time ran out before all candidates were measured.
    """

    key: str
    target: str
    features: tuple[str, ...]
    block: int
    threads: int
    kernel: str
    schedule: str
    seconds: float
    default: str
    default_seconds: float
    tried: int
    complete: bool
    date: str
    cpu: str
    cnnc: str

    def line(self) -> bytes:
        """Write the record as a line of a file."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @staticmethod
    def parse(line: bytes) -> Record:
        """Read what `line` wrote; raises ValueError for anything else."""
        found: dict[str, Any] = json.loads(line)
        try:
            record = Record(**{**found, "features": tuple(found["features"])})
            Schedule.parse(record.schedule)
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no record: {error}") from None
        return record


def kernel_text(kernel: Fused) -> str:
    """Write what a kernel computes: its body, without the names and places that a model gives it."""
    return print_graph(anonymous(kernel.body))


def record_key(kernel: Fused, target: Target) -> str:
    """Give the key of a kernel's records, for one CPU name and number of threads."""
    machine = (str(target), ",".join(target.features), str(target.vector_lanes), str(target.threads))
    return hashlib.sha256("\0".join((kernel_text(kernel), *machine)).encode()).hexdigest()


class RecordFile:
    """The records of one file, read when first asked; the last of several with the same key counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.note: str | None = None

    def __getitem__(self, key: str) -> Record:
        """Give the record of a key; KeyError if there is none, ValueError if it cannot be read."""
        return Record.parse(self._lines[key])

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    @property
    def keys(self) -> Sequence[str]:
        """List the keys."""
        return list(self._lines)

    @cached_property
    def _lines(self) -> Mapping[str, bytes]:
        try:
            return _by_key(_read(self.path))
        except FileNotFoundError:
            return {}
        except OSError as error:
            self.note = f"{self.path} cannot be read, its tuned records are not used: {error.strerror or error}"
            return {}


class TunedRecords:
    """Gives the tile pass the schedule of the first file that has a valid record of a kernel.

    `legal` remembers from one compile to the next which schedules were found in a space, since looking takes longer
    than all the rest.
    """

    def __init__(self, files: Sequence[RecordFile], legal: ScheduleCache) -> None:
        self._files = files
        self._legal = legal
        self._ignored: dict[Path, list[str]] = {}

    def __call__(self, kernel: Fused, target: Target) -> Schedule | None:
        """Give the tuned schedule of a kernel, or None."""
        key = record_key(kernel, target)
        for file in self._files:
            if key not in file:
                continue
            try:
                return self._checked(file[key], kernel, target)
            except ValueError as error:
                self._ignored.setdefault(file.path, []).append(str(error))
        return None

    def _checked(self, record: Record, kernel: Fused, target: Target) -> Schedule:
        schedule = Schedule.parse(record.schedule)
        # Under the key itself lies the machine code of this schedule.
        scheduled = kernel_key(replace(kernel, schedule=schedule), target)
        key = hashlib.sha256(f"{scheduled}\0legal".encode()).hexdigest()
        if self._legal.get(key) != schedule:
            checked_schedule(record, kernel, target)
            self._legal.put(key, schedule)
        return schedule

    @property
    def notes(self) -> Sequence[str]:
        """Say, in a line for each file, what could not be used."""
        ignored = [
            f"{path}: {len(reasons)} tuned record(s) ignored ({reasons[0]}); cnnc tune makes them anew"
            for path, reasons in self._ignored.items()
        ]
        return [*(file.note for file in self._files if file.note), *ignored]


def checked_schedule(record: Record, kernel: Fused, target: Target) -> Schedule:
    """Give the schedule of a record; raises ValueError unless a template that takes the kernel has it in its space."""
    schedule = Schedule.parse(record.schedule)
    for template in TEMPLATES:
        if template.name == schedule.template and template.matches(kernel, target):
            if schedule in template.space(kernel, target):
                return schedule
            raise ValueError(f"{template.name} no longer has the schedule {record.schedule}")
    raise ValueError(f"no template for the schedule {record.schedule}")


def user_file() -> Path:
    """Give `$CNNC_RECORDS`, or `records.jsonl` in the user's data folder."""
    chosen = os.environ.get("CNNC_RECORDS")
    if chosen:
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_data_dir("cnnc", appauthor=False)) / "records.jsonl"


def tuned_records(source: Path | bool, target: Target, disk: DiskCache | None = None) -> TunedRecords:
    """Give the records for a target: the user's (True) or those of a file, then the shipped ones; or none (False)."""
    legal = ScheduleCache(disk)
    if source is False:
        return TunedRecords([], legal)
    if source is True:
        source = user_file()
    elif not source.exists():
        raise EnvironmentProblem(f"{source}: there is no such file of tuned records; cnnc tune --records makes one")
    return TunedRecords([RecordFile(source), RecordFile(SHIPPED / f"{target.arch}.jsonl")], legal)


def store(path: Path, record: Record) -> None:
    """Put a record into a file, in place of one with the same key; the file is replaced whole or not at all.

    Several processes may do so at once.  Raises EnvironmentProblem where the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            old = _read(path) if path.exists() else b""
            lines = [line for line in old.splitlines() if not line.startswith(_START + record.key.encode())]
            publish(path, b"".join(line + b"\n" for line in lines) + record.line())
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {path}: {error.strerror or error}") from error


def _by_key(data: bytes) -> dict[str, bytes]:
    start, end = len(_START), len(_START) + _KEY_DIGITS
    lines = (line for line in data.splitlines() if line.startswith(_START) and len(line) > end)
    return {line[start:end].decode("ascii", "replace"): line for line in lines}


def _read(path: Path) -> bytes:
    """Read a plain file of reasonable size."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("it is no plain file")
        if state.st_size > _MOST_BYTES:
            raise OSError(f"it has {state.st_size:,} bytes, more than {_MOST_BYTES:,}")
        return file.read()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from changing records in a folder; the lock ends with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
