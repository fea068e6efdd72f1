"""Engines that fail, crash, hang, lie or talk: each is told of in its own outcome, and the others go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cnnc.profiler.contest import Outcome, Plan, compete, ratio
from cnnc.profiler.engine_process import EngineProcess, engine_worker
from cnnc.profiler.engines import Task
from cnnc.profiler.machine import choose_cpus
from tests.profiler.fake_engines import fake

ROOT = Path(__file__).resolve().parents[2]
QUICK = Plan(warmup=0.0, duration=0.02, rounds=4, timeout=60.0)


@pytest.fixture(autouse=True)
def _workers_find_the_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((2, 5)).astype(np.float32)


def outcomes_of(names: list[str], x: np.ndarray, folder: Path, plan: Plan = QUICK) -> dict[str, Outcome]:
    task = Task("no file", 1, {"x": x}, ("y", "z"))
    found = compete([(fake(name), task) for name in names], plan, folder)
    assert [outcome.engine for outcome in found] == names
    exact = 2 * x.astype(np.float64)
    return {outcome.engine: outcome.judged({"y": exact, "z": exact}) for outcome in found}


def test_every_engine_takes_its_turn_in_every_round(x: np.ndarray, tmp_path: Path) -> None:
    found = outcomes_of(["right", "waits_2_ms"], x, tmp_path)
    for outcome in found.values():
        assert outcome.status == "ok"
        assert outcome.error == 0
        assert len(outcome.rounds) == QUICK.rounds
        assert all(outcome.rounds)
        assert outcome.startup is not None
        assert outcome.startup.seconds > 0
        assert outcome.peak_bytes >= outcome.startup.peak_bytes >= outcome.startup.empty_bytes > 1 << 20
    assert min(min(turn) for turn in found["waits_2_ms"].rounds) >= 0.002


def test_the_ratio_is_theirs_over_ours(x: np.ndarray, tmp_path: Path) -> None:
    found = outcomes_of(["waits_2_ms", "waits_6_ms"], x, tmp_path, Plan(0.0, 0.2, 5, 60.0))
    assert ratio(found["waits_6_ms"], found["waits_2_ms"]).median > 1.5
    assert ratio(found["waits_2_ms"], found["waits_6_ms"]).median < 1 / 1.5


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("wrong", "wrong", "relative error of 5.0e-02"),
        ("wrong_later", "wrong", "relative error of 5.0e-02"),
        ("not_a_number", "wrong", "relative error of inf"),
        ("other_shape", "wrong", "relative error of inf"),
        ("raises_at_open", "failed", "ValueError: a model of unknown make"),
        ("raises_later", "failed", "ValueError: tired"),
        ("crashes", "crashed", "killed by SIGSEGV; its last words: stack smashed"),
        ("ends", "crashed", "ended with status 3"),
    ],
)
def test_a_bad_engine_is_told_of_and_the_others_go_on(
    name: str, status: str, reason: str, x: np.ndarray, tmp_path: Path
) -> None:
    found = outcomes_of([name, "right"], x, tmp_path)
    assert found[name].status == status
    assert reason in found[name].reason
    assert found[name].latency is None
    assert found[name].exit_code == (1 if status == "wrong" else 70)
    assert found["right"].status == "ok"
    assert len(found["right"].rounds) == QUICK.rounds


def test_an_engine_that_hangs_is_ended_when_its_time_is_over(x: np.ndarray, tmp_path: Path) -> None:
    start = time.monotonic()
    found = outcomes_of(["hangs", "right"], x, tmp_path, Plan(0.0, 0.02, 4, timeout=3.0))
    assert time.monotonic() - start < 60
    assert found["hangs"].status == "hung"
    assert "no answer to 'turn' within 3 s" in found["hangs"].reason
    assert found["right"].status == "ok"


def test_rounding_is_an_error_but_not_wrong(x: np.ndarray, tmp_path: Path) -> None:
    outcome = outcomes_of(["rounding"], x, tmp_path)["rounding"]
    assert outcome.status == "ok"
    assert outcome.error == pytest.approx(1e-3, rel=1e-3)


def test_what_an_engine_prints_is_not_taken_for_an_answer(x: np.ndarray, tmp_path: Path) -> None:
    outcome = outcomes_of(["talks"], x, tmp_path)["talks"]
    assert outcome.status == "ok"
    assert min(min(turn) for turn in outcome.rounds) > 0


def test_peak_memory_is_the_engines_alone(x: np.ndarray, tmp_path: Path) -> None:
    ours = np.ones(400 << 17)
    found = outcomes_of(["right", "eats_256_mib"], x, tmp_path)
    assert ours[-1] == 1
    assert found["right"].peak_bytes < 200 << 20
    assert found["eats_256_mib"].peak_bytes - found["right"].peak_bytes > 240 << 20


@pytest.mark.parametrize("threads", [1, 2])
def test_engines_are_held_to_their_cpus_and_threads(threads: int, x: np.ndarray, tmp_path: Path) -> None:
    task = Task("no file", threads, {"x": x}, ("cpus", "pools", "threads"))
    (outcome,) = compete([(fake("tells"), task)], QUICK, tmp_path)
    assert outcome.status == "ok", outcome.reason
    assert sorted(outcome.outputs[0]["cpus"]) == sorted(choose_cpus(threads))
    assert set(outcome.outputs[0]["pools"]) == {threads}
    assert outcome.outputs[0]["threads"] == threads


def test_progress_counts_to_the_end(x: np.ndarray, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    task = Task("no file", 1, {"x": x}, ("y",))
    compete([(fake("right"), task)], QUICK, tmp_path, lambda *step: told.append(step))
    assert told[0] == ("start", 0, 1)
    assert told[-1] == ("rounds", QUICK.rounds, QUICK.rounds)


def test_a_worker_stands_still_between_its_answers(x: np.ndarray, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", x)
    process = EngineProcess(engine_worker(choose_cpus(1)), 1, tmp_path, 60.0)
    try:
        process.ask(
            "open",
            package="json",
            opener=fake("right").opener,
            model="no file",
            threads=1,
            inputs={"x": str(tmp_path / "x.npy")},
            outputs=["y"],
        )
        _wait_for_state(process._process.pid, "T")
        process.ask("turn", seconds=0.0)
        _wait_for_state(process._process.pid, "T")
    finally:
        process.close()
    assert process._process.returncode == -signal.SIGKILL


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from cnnc.profiler.engine_process import EngineProcess;"
        f"p = EngineProcess({engine_worker(choose_cpus(1))}, 1, pathlib.Path({str(tmp_path)!r}), 60.0);"
        "p.ask('save', folder='x')"
    )
    # The request fails, since nothing is open; by then the worker is up, and stopped.
    script = f"try:\n    {code}\nexcept Exception:\n    print(p._process.pid, flush=True)\n    time.sleep(1000)\n"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        _wait_for_state(pid, "T")
    finally:
        parent.kill()
        parent.communicate()
    _wait_for_state(pid, "XZ")


def _wait_for_state(pid: int, wanted: str) -> None:
    """Wait until the kernel says so of a process; one that is gone counts as X (dead)."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            state = "X"
        if state in wanted:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is {state}, not {wanted}")


def test_a_ratio_needs_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="longer"):
        ratio(Outcome("a", rounds=((1.0,),)), Outcome("b", rounds=((1.0,), (1.0,))))
