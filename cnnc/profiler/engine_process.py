"""An engine in a process of its own, seen from the process that compares engines.

Only the engine that is asked runs: as soon as it has answered, its process is stopped (SIGSTOP) until it is asked
again, so that threads which spin in wait for work take no time from another engine.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

_SECONDS_TO_END = 10

Failing = Literal["failed", "crashed", "hung", "wrong"]


class EngineFailure(Exception):
    """An engine that failed (raised an error), crashed (its process ended), hung, or gave wrong numbers."""

    def __init__(self, kind: Failing, reason: str, exit_code: int = 70) -> None:
        super().__init__(reason)
        self.kind: Failing = kind
        self.reason = reason
        self.exit_code = exit_code


def engine_worker(cpus: Sequence[int]) -> list[str]:
    """Give the worker for an engine of this machine's CPUs."""
    return ["cnnc.profiler.worker", ",".join(map(str, cpus))]


class EngineProcess:
    """A worker process, which runs a module with arguments, for so many threads; what it prints is kept in `folder`.

    Every answer must come within `timeout` seconds.
    """

    def __init__(self, worker: Sequence[str], threads: int, folder: Path, timeout: float) -> None:
        self._timeout = timeout
        self._log = folder / "stderr.txt"
        self._pending = b""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                # -P: the working folder may hold files named like packages.
                [sys.executable, "-P", "-m", *worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(threads),
                bufsize=0,
                start_new_session=True,
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Let the worker run until it has answered one request; raises `EngineFailure` if it does not, or cannot."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
        except BrokenPipeError:
            raise self._crashed() from None
        answer: dict[str, Any] = json.loads(self._read_line(do))
        self._process.send_signal(signal.SIGSTOP)
        if "error" in answer:
            raise EngineFailure("failed", answer["error"], answer["exit_code"])
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing."""
        # A pid is not given to another process before it is waited for.
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read_line(self, what: str) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        end = time.monotonic() + self._timeout
        while b"\n" not in self._pending:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise EngineFailure("hung", f"no answer to {what!r} within {self._timeout:g} s")
            data = os.read(descriptor, 1 << 16)
            if not data:
                raise self._crashed()
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _crashed(self) -> EngineFailure:
        try:
            code = self._process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return EngineFailure("crashed", "it closed its pipe")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        said = self._log.read_text("utf-8", "replace").strip().splitlines()
        return EngineFailure("crashed", f"{how}; its last words: {said[-1]}" if said else how)


def _environment(threads: int) -> dict[str, str]:
    """Give this process's environment, with the cnnc that runs here and pools of so many threads."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, os.environ.get("PYTHONPATH", "")]
    pools = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    return {**os.environ, **pools, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
