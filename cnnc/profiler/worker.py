"""The process an engine runs in: `python -m cnnc.profiler.worker CPU,CPU`.

It reads requests from stdin and answers on stdout, each one line of JSON; the other end is `engine_process.py`.
Whatever the engine itself prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from cnnc.profiler.engines import Opened

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests for one engine."""
    # Threads made from here on, those of numpy and of the engine, may use these CPUs only.
    os.sched_setaffinity(0, [int(cpu) for cpu in sys.argv[1].split(",")])
    serve(Session())


def serve(session: object) -> None:
    """Answer each request by the session's method of its name, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # A worker that hangs, or is stopped, would outlive a parent that is killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(session, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "exit_code": getattr(error, "exit_code", 70)}
        print(json.dumps(answer), file=answers, flush=True)


class Session:
    """One network in one engine; each method answers a request."""

    def __init__(self) -> None:
        self._opened: Opened | None = None

    def open(
        self, package: str, opener: str, model: str, threads: int, inputs: dict[str, str], outputs: list[str]
    ) -> dict[str, Any]:
        """Import the engine, load the model and run it once, each timed in seconds; `inputs` are `.npy` files."""
        import numpy as np

        from cnnc.profiler.engines import Task

        feeds = {name: _aligned(np.load(path, allow_pickle=False)) for name, path in inputs.items()}
        module, _, function = opener.partition(":")
        make = getattr(import_module(module), function)
        empty = peak_memory()
        library, importing = _timed(lambda: import_module(package))
        self._opened, loading = _timed(lambda: make(library, Task(model, threads, feeds, tuple(outputs))))
        _, running = _timed(self._run)
        return {
            "version": str(getattr(library, "__version__", "")),
            "import_seconds": importing,
            "load_seconds": loading,
            "first_run_seconds": running,
            "empty_bytes": empty,
            "peak_bytes": peak_memory(),
        }

    def turn(self, seconds: float) -> dict[str, Any]:
        """Run for so long, after one run that is not counted: caches and threads come back from another engine."""
        from cnnc.profiler.latency import run_for

        self._run()
        return {"seconds": run_for(self._run, seconds), "peak_bytes": peak_memory()}

    def save(self, folder: str) -> dict[str, Any]:
        """Write the outputs of one more run to `0.npy`, `1.npy`, ... and name them in this order."""
        import numpy as np

        assert self._opened is not None
        outputs = self._opened.read(self._run())
        for index, array in enumerate(outputs.values()):
            np.save(Path(folder) / f"{index}.npy", array, allow_pickle=False)
        return {"outputs": list(outputs)}

    def _run(self) -> Any:
        assert self._opened is not None
        return self._opened.run()


def peak_memory() -> int:
    """Give the most bytes this process has had in memory.

    Not `ru_maxrss`, which begins with the peak of the process that started this one.
    """
    text = Path("/proc/self/status").read_text()
    line = next(line for line in text.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def _aligned(array: np.ndarray) -> np.ndarray:
    """Copy to an address that no engine needs to copy from again: a multiple of 64."""
    import numpy as np

    raw = np.empty(array.nbytes + 64, np.uint8)
    copy: np.ndarray = np.ndarray(array.shape, array.dtype, raw, -raw.ctypes.data % 64)
    copy[...] = array
    return copy


if __name__ == "__main__":
    main()
