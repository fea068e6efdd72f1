"""Engines that misbehave in every way the harness must survive; each doubles its input, in a worker process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from cnnc.profiler.engines import Engine, Opened, Task, open_onnxruntime


def fake(name: str) -> Engine:
    """Make an engine whose opener is the function of this file named so."""
    return Engine(name, "json", (), "onnx", f"{__name__}:{name}")


def doubling(task: Task, before: Callable[[int], None], factor: Callable[[int], float] = lambda run: 2.0) -> Opened:
    """Call `before` with the number of each run, then multiply."""
    runs = 0

    def run() -> dict[str, np.ndarray]:
        nonlocal runs
        runs += 1
        before(runs)
        return {name: factor(runs) * task.feeds["x"] for name in task.outputs}

    return Opened(run, lambda got: got)


def right(_: Any, task: Task) -> Opened:
    return doubling(task, lambda run: None)


def waits_2_ms(_: Any, task: Task) -> Opened:
    return doubling(task, lambda run: time.sleep(0.002))


def waits_6_ms(_: Any, task: Task) -> Opened:
    return doubling(task, lambda run: time.sleep(0.006))


def wrong(_: Any, task: Task) -> Opened:
    return doubling(task, lambda run: None, lambda run: 2.1)


def wrong_later(_: Any, task: Task) -> Opened:
    return doubling(task, lambda run: None, lambda run: 2.0 if run < 5 else 2.1)


def rounding(_: Any, task: Task) -> Opened:
    return doubling(task, lambda run: None, lambda run: 2.0 * (1 + 1e-3))


def not_a_number(_: Any, task: Task) -> Opened:
    return doubling(task, lambda run: None, lambda run: float("nan"))


def other_shape(_: Any, task: Task) -> Opened:
    return Opened(lambda: 2 * task.feeds["x"][:1], lambda got: dict.fromkeys(task.outputs, got))


def raises_at_open(_: Any, task: Task) -> Opened:
    raise ValueError("a model of\nunknown make")


def raises_later(_: Any, task: Task) -> Opened:
    def before(run: int) -> None:
        if run == 6:
            raise ValueError("tired")

    return doubling(task, before)


def crashes(_: Any, task: Task) -> Opened:
    def before(run: int) -> None:
        if run == 6:
            print("stack smashed", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)

    return doubling(task, before)


def ends(_: Any, task: Task) -> Opened:
    os._exit(3)


def hangs(_: Any, task: Task) -> Opened:
    return doubling(task, lambda run: time.sleep(1000 if run == 6 else 0))


def talks(_: Any, task: Task) -> Opened:
    """Print where the answers go, from Python and from below it."""

    def before(run: int) -> None:
        print("{}", flush=True)
        os.write(1, b'{"seconds": [0]}\n')

    return doubling(task, before)


def eats_256_mib(_: Any, task: Task) -> Opened:
    def before(run: int) -> None:
        np.ones(256 << 17)

    return doubling(task, before)


def tells(_: Any, task: Task) -> Opened:
    """Give the CPUs a thread of the engine may use, and what pools are told by the environment."""
    seen: list[float] = []
    thread = threading.Thread(target=lambda: seen.extend(sorted(os.sched_getaffinity(0))))
    thread.start()
    thread.join()
    pools = [float(os.environ[f"{library}_NUM_THREADS"]) for library in ("OMP", "MKL", "OPENBLAS")]
    told = {"cpus": np.array(seen), "pools": np.array(pools), "threads": np.array([task.threads])}
    return Opened(lambda: None, lambda _: told)


def distorts(library: Any, task: Task) -> Opened:
    """Run ONNX Runtime, and falsify one element of each output."""
    import onnxruntime

    opened = open_onnxruntime(onnxruntime, task)

    def read(got: Any) -> dict[str, np.ndarray]:
        outputs = opened.read(got)
        for array in outputs.values():
            array.reshape(-1)[0] += 1
        return outputs

    return Opened(opened.run, read)
