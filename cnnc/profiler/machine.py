"""This machine, as a measurement should name it: CPU, system, load, and the CPUs that threads are held to."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cnnc.target import cpu_model_name

_BUSY = 0.5


@dataclass(frozen=True)
class Machine:
    """What figures are worth nothing without; `load` is the system's mean number of running threads in a minute."""

    cpu: str
    cpus: int
    """How many CPUs this process may use."""
    system: str
    python: str
    date: str
    load: float

    @staticmethod
    def here() -> Machine:
        """Describe this machine as it is now."""
        return Machine(
            cpu=cpu_model_name(),
            cpus=len(os.sched_getaffinity(0)),
            system=platform.platform(),
            python=platform.python_version(),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            load=os.getloadavg()[0],
        )

    def advice(self) -> list[str]:
        """Say what stands in the way of trusting figures measured here and now."""
        if self.load > _BUSY:
            return [f"the machine was busy at the start (load {self.load:.1f}): trust ratios more than times"]
        return []


def choose_cpus(threads: int) -> tuple[int, ...]:
    """Choose the CPUs that so many threads are held to: one of each core first, then their siblings.

    They are taken in order from those this process may use; where there are fewer than threads, it gives all.
    """
    allowed = sorted(os.sched_getaffinity(0))
    cores: dict[str, list[int]] = {}
    for cpu in allowed:
        cores.setdefault(_core_of(cpu), []).append(cpu)
    rank = {cpu: siblings.index(cpu) for siblings in cores.values() for cpu in siblings}
    return tuple(sorted(allowed, key=lambda cpu: (rank[cpu], cpu))[:threads])


def _core_of(cpu: int) -> str:
    """Name the core of a CPU by all CPUs on it; itself where the system does not tell."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
