"""Engines against each other on one network: one at a time, in interleaved rounds A B C A B C, so that drift meets all.

An engine that fails, crashes, hangs or is wrong says so in its outcome, and the others go on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from cnnc.errors import CnncError
from cnnc.profiler.accuracy import relative_error
from cnnc.profiler.engine_process import EngineFailure, EngineProcess, engine_worker
from cnnc.profiler.engines import Engine, Task
from cnnc.profiler.latency import Latency, quartiles
from cnnc.profiler.machine import choose_cpus

WRONG = 1e-2
"""A relative L2 error above this is a wrong answer, not rounding."""

Status: TypeAlias = Literal["ok", "failed", "crashed", "hung", "wrong"]
Outputs: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    """How long to measure, in seconds: `duration` of each engine, spread over `rounds` turns, after `warmup`.

    An engine that does not answer within `timeout` counts as hung.
    """

    warmup: float = 0.2
    duration: float = 3.0
    rounds: int = 20
    timeout: float = 300.0


@dataclass(frozen=True)
class Startup:
    """What it takes until an engine's first result: seconds, and bytes of its process before and after."""

    import_seconds: float
    load_seconds: float
    first_run_seconds: float
    empty_bytes: int
    """With Python and numpy alone, before the engine is imported."""
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """All of it together."""
        return self.import_seconds + self.load_seconds + self.first_run_seconds


@dataclass(frozen=True)
class Outcome:
    """How an engine did; `rounds` are the seconds of single runs by turn, `outputs` those of its first and last run."""

    engine: str
    version: str = ""
    status: Status = "ok"
    reason: str = ""
    exit_code: int = 0
    startup: Startup | None = None
    rounds: tuple[tuple[float, ...], ...] = ()
    peak_bytes: int = 0
    outputs: tuple[Outputs, ...] = field(default=(), repr=False)
    error: float | None = None
    """The worst relative L2 error of an output; None while it is not judged."""

    @property
    def latency(self) -> Latency | None:
        """Statistics over all its runs; None for an engine whose times mean nothing."""
        return Latency.of(self.rounds) if self.status == "ok" else None

    def judged(self, reference: Outputs) -> Outcome:
        """Compare all outputs with the reference; more than `WRONG` apart makes the outcome wrong."""
        if self.status != "ok":
            return self
        errors = [(_difference(got[name], wanted), name) for got in self.outputs for name, wanted in reference.items()]
        error, name = max(errors)
        if error <= WRONG:
            return replace(self, error=error)
        reason = f"output {name} has a relative error of {error:.1e}"
        return replace(self, error=error, status="wrong", reason=reason, exit_code=1)


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than a peer: the median over the rounds they met in, and the quartiles."""

    median: float
    low: float
    high: float


def ratio(peer: Outcome, ours: Outcome) -> Ratio:
    """Compare two engines round by round, each by the median of its turn: what slows a whole round slows both."""
    turns = zip(peer.rounds, ours.rounds, strict=True)
    low, middle, high = quartiles([statistics.median(theirs) / statistics.median(mine) for theirs, mine in turns])
    return Ratio(middle, low, high)


def compete(
    entries: Sequence[tuple[Engine, Task]],
    plan: Plan,
    folder: Path,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> list[Outcome]:
    """Run the engines on their tasks, which have the same inputs and outputs; `folder` is for temporary files."""
    with ExitStack() as stack:
        contestants = [_Contestant(engine, task, plan, folder / engine.name) for engine, task in entries]
        for done, contestant in enumerate(contestants):
            progress("start", done, len(contestants))
            stack.callback(contestant.close)
            contestant.attempt(contestant.start)
        progress("start", len(contestants), len(contestants))
        for done in range(plan.rounds):
            progress("rounds", done, plan.rounds)
            for contestant in contestants:
                contestant.attempt(contestant.turn)
        progress("rounds", plan.rounds, plan.rounds)
        for contestant in contestants:
            contestant.attempt(contestant.save)
        return [contestant.outcome for contestant in contestants]


class _Contestant:
    """One engine with its process; after a failure it takes part in nothing any more."""

    def __init__(self, engine: Engine, task: Task, plan: Plan, folder: Path) -> None:
        self.outcome = Outcome(engine.name)
        self._engine = engine
        self._task = task
        self._plan = plan
        self._folder = folder
        self._process: EngineProcess | None = None

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step, unless an earlier one failed."""
        if self.outcome.status != "ok":
            return
        try:
            step()
        except EngineFailure as failure:
            self._fail(failure.kind, failure.reason, failure.exit_code)
        except CnncError as error:
            self._fail("failed", str(error), error.exit_code)

    def start(self) -> None:
        """Convert the model if need be, open it in a process of its own, and warm up."""
        task = self._task
        self._folder.mkdir(exist_ok=True)
        convert = self._engine.convert
        model = convert(task.model, task.feeds, self._folder, self._plan.timeout) if convert else task.model
        inputs = {}
        for index, (name, array) in enumerate(task.feeds.items()):
            inputs[name] = str(self._folder / f"input{index}.npy")
            np.save(inputs[name], array, allow_pickle=False)
        worker = engine_worker(choose_cpus(task.threads))
        self._process = EngineProcess(worker, task.threads, self._folder, self._plan.timeout)
        answer = self._process.ask(
            "open",
            package=self._engine.package,
            opener=self._engine.opener,
            model=model,
            threads=task.threads,
            inputs=inputs,
            outputs=task.outputs,
        )
        version = answer.pop("version")
        self.outcome = replace(self.outcome, version=version, startup=Startup(**answer))
        self.save()
        self._process.ask("turn", seconds=self._plan.warmup)

    def turn(self) -> None:
        """Run for one turn of a round."""
        answer = self._ask("turn", seconds=self._plan.duration / self._plan.rounds)
        rounds = (*self.outcome.rounds, tuple(answer["seconds"]))
        self.outcome = replace(self.outcome, rounds=rounds, peak_bytes=answer["peak_bytes"])

    def save(self) -> None:
        """Keep the outputs of a run."""
        names = self._ask("save", folder=str(self._folder))["outputs"]
        outputs = {name: np.load(self._folder / f"{i}.npy", allow_pickle=False) for i, name in enumerate(names)}
        self.outcome = replace(self.outcome, outputs=(*self.outcome.outputs, outputs))

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.close()

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self._process is not None
        return self._process.ask(do, **request)

    def _fail(self, status: Status, reason: str, exit_code: int) -> None:
        self.close()
        self.outcome = Outcome(
            self._engine.name,
            self.outcome.version,
            status,
            " ".join(reason.split()),
            exit_code,
            startup=self.outcome.startup,
            outputs=self.outcome.outputs,
        )


def _difference(got: np.ndarray, wanted: np.ndarray) -> float:
    return relative_error(got, wanted) if got.shape == wanted.shape else float("inf")
