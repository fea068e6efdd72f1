"""Which CPUs threads are held to."""

from __future__ import annotations

import os

import pytest

from cnnc.profiler import machine
from cnnc.profiler.machine import Machine, choose_cpus


def pretend(monkeypatch: pytest.MonkeyPatch, allowed: set[int], cores: dict[int, str]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed)
    monkeypatch.setattr(machine, "_core_of", lambda cpu: cores[cpu])


@pytest.mark.parametrize(
    ("siblings", "wanted"),
    [
        ({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}, [(0,), (0, 1), (0, 1, 4), (0, 1, 4, 5), (0, 1, 4, 5)]),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, [(0,), (0, 2), (0, 2, 1), (0, 2, 1, 3), (0, 2, 1, 3)]),
        ({3: "3", 7: "7"}, [(3,), (3, 7), (3, 7)]),
    ],
)
def test_whole_cores_come_first(
    siblings: dict[int, str], wanted: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, set(siblings), siblings)
    assert [choose_cpus(threads) for threads in range(1, len(wanted) + 1)] == wanted


def test_cpus_of_this_machine_are_allowed_ones() -> None:
    allowed = os.sched_getaffinity(0)
    assert set(choose_cpus(1)) <= allowed
    assert set(choose_cpus(10_000)) == allowed


def test_a_busy_machine_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (3.26, 0.0, 0.0))
    assert "load 3.3" in Machine.here().advice()[0]
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 9.0, 9.0))
    assert Machine.here().advice() == []
