"""Progress on stderr: a line that lives while a phase runs, nothing at all when stderr is no terminal."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Phases:
    """Shows the phases of a compile; call it as `cnnc.driver.compile` calls its `progress`."""

    def __init__(self) -> None:
        self._bars = _bars()
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Phases:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Show that a phase has `done` of `total` steps behind it."""
        if self._bars is None:
            return
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.update(self._tasks[phase], completed=done, total=total)


class Search:
    """Shows how far a search is, what it is at, and how long it will take yet; it ends after `limit` seconds."""

    def __init__(self, limit: float) -> None:
        self._bars = _bars("{task.fields[left]}")
        self._task: TaskID | None = None
        self._start = time.monotonic()
        self._limit = limit

    def __enter__(self) -> Search:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, text: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps are over, and what is at work."""
        if self._bars is None:
            return
        if self._task is None:
            self._task = self._bars.add_task(text, total=total, left="")
        left = seconds_left(done, total, time.monotonic() - self._start, self._limit)
        self._bars.update(self._task, description=text, completed=done, total=total, left=f"{left:.0f} s left")


def _bars(*ends: str) -> Progress | None:
    """Make the bars, with more columns at their end; None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    # Imported here, as it takes a while, and scripts do without.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    return Progress(*columns, TimeElapsedColumn(), *map(TextColumn, ends), console=Console(stderr=True))


def seconds_left(done: int, total: int, elapsed: float, limit: float) -> float:
    """Estimate the seconds to the end, at the pace so far or at the limit."""
    pace = elapsed / done if done else 0.0
    return max(min(pace * (total - done), limit - elapsed), 0.0)
