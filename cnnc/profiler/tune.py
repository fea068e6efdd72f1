"""Search for the fastest schedules of a network's kernels by measuring them, and keep what is found.

Kernels come in the order of their share of the run time.  Of each the candidates are measured beside the default, the
choice of the cost models; the best few once more, in more rounds, so that luck does not decide.  A binary runs with any
number of threads, so what divides among more of them clearly worse than the default is no candidate, however fast it is
on those there are.  Every kernel's record is written as soon as it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from cnnc.backends.lower.build import Build, fused_nodes, fused_of
from cnnc.backends.records import Record, RecordFile, checked_schedule, kernel_text, record_key, store
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node, Value
from cnnc.ir.types import DType
from cnnc.module import KernelTiming
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Constant
from cnnc.passes.narrow_weights import NARROW
from cnnc.passes.views import is_view
from cnnc.profiler.candidates import Priced, first_candidates, neighbours, priced
from cnnc.profiler.kernel_bench import Faults, KernelBench, Setting, Timing
from cnnc.target import Target, cpu_model_name

BATCH = 8
"""Candidates that take turns in one program; the default is one more."""

ROUNDS = 11
FINAL_ROUNDS = 25
FINALISTS = 4
BATCH_SECONDS = 1.5
"""What the rounds of a batch may take; a final may take twice that."""

FAR_BYTES = 4
"""Last caches, whose size virtual machines understate, of traffic after which nothing is left in them."""

CHECK = "check_indices"
"""What the program calls its own kernels, that belong to no node."""

MORE_THREADS = (2, 4, 8)

UNEVEN = 1.15
"""The time of the slowest thread over the mean that any candidate may have with more threads."""

WORTH = 0.985
"""A schedule replaces the default if it takes less than this share of its time: less is noise."""


@dataclass(frozen=True)
class TunableKernel:
    """A kernel with several schedules, and how it stands in its network.

    `seconds` is its part of a run, all its `calls` together, and `share` that part as a fraction.
    """

    kernel: Fused
    layers: tuple[str, ...]
    calls: int
    seconds: float
    share: float
    setting: Setting
    schedules: Sequence[Priced]


@dataclass(frozen=True)
class Outcome:
    """What measuring a kernel gave; `seconds` are for one call, `tried` counts the schedules that were timed."""

    kernel: TunableKernel
    default: Schedule
    default_seconds: float
    best: Schedule
    seconds: float
    tried: int
    complete: bool
    faults: Faults = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The time of the best schedule over the default's."""
        return self.seconds / self.default_seconds


@dataclass(frozen=True)
class Step:
    """How far the search is: candidates done of all, the kernel at work, and its best ratio so far."""

    done: int
    total: int
    kernel: TunableKernel
    ratio: float


def tunable_kernels(build: Build, timings: Sequence[KernelTiming], target: Target) -> list[TunableKernel]:
    """List the distinct kernels of a network that have more than one schedule, those that take longest first.

    The network is compiled for one batch size; `timings` are those of its calls, in order.
    """
    measured = [timing for timing in timings if timing.algorithm != CHECK]
    groups: dict[str, list[tuple[Node, KernelTiming]]] = {}
    (graph,) = build.graphs
    for node, timing in zip(fused_nodes(graph), measured, strict=True):
        groups.setdefault(record_key(fused_of(node), target), []).append((node, timing))
    whole = sum(timing.nanoseconds for timing in timings)
    position = {value: number for number, node in enumerate(graph.nodes) for value in node.values}
    traffic = min(build.program.weight_bytes + build.program.arena_bytes, FAR_BYTES * target.caches.l3)
    found = []
    for group in groups.values():
        node = group[0][0]
        kernel = replace(fused_of(node), schedule=None)
        setting = _setting(node, position, traffic)
        schedules = priced(kernel, target) if _is_timed(kernel, setting) else []
        if len(schedules) > 1:
            taken = sum(timing.nanoseconds for _, timing in group)
            layers = tuple(layer for _, timing in group for layer in timing.layers)
            found.append(TunableKernel(kernel, layers, len(group), taken * 1e-9, taken / whole, setting, schedules))
    return sorted(found, key=lambda kernel: -kernel.seconds)


def without_record(kernels: Sequence[TunableKernel], file: Path, target: Target) -> list[TunableKernel]:
    """Leave out the kernels that have a complete and valid record in a file."""
    records = RecordFile(file)
    return [kernel for kernel in kernels if not _has_record(kernel.kernel, records, target)]


def tune(
    kernels: Sequence[TunableKernel],
    target: Target,
    file: Path,
    *,
    candidates: int,
    version: str,
    deadline: float = float("inf"),
    progress: Callable[[Step], None] = lambda step: None,
) -> Iterator[Outcome]:
    """Measure up to `candidates` schedules of each kernel, store its record in `file`, and yield the outcome.

    Records name the `version` of cnnc.  Ends at the `deadline` (of `time.monotonic`); the last record is then
    incomplete.
    """
    total = sum(min(candidates, len(kernel.schedules)) for kernel in kernels)
    done = 0
    for kernel in kernels:
        search = _Search(kernel, target, candidates, deadline)
        for tried, ratio in search.run():
            progress(Step(done + tried, total, kernel, ratio))
        done += min(candidates, len(kernel.schedules))
        outcome = search.outcome()
        if outcome is None:
            return
        store(file, _record(outcome, target, version))
        yield outcome


def tuned_ratio(outcomes: Sequence[Outcome]) -> float:
    """Give the time of the best schedules over that of the defaults, kernels weighted as in a run."""
    untuned = sum(outcome.kernel.seconds for outcome in outcomes)
    return sum(outcome.kernel.seconds * outcome.ratio for outcome in outcomes) / untuned if untuned > 0 else 1.0


class _Search:
    """The search for the best schedule of one kernel."""

    def __init__(self, kernel: TunableKernel, target: Target, candidates: int, deadline: float) -> None:
        self._kernel = kernel
        self._candidates = min(candidates, len(kernel.schedules))
        self._deadline = deadline
        self._timings: dict[Schedule, Timing] = {}
        self._faults: Faults = {}
        self._seen = {kernel.schedules[0].schedule}
        self._complete = False
        seed = int(np.random.default_rng().integers(2**31))
        self._bench = KernelBench(kernel.kernel, target, kernel.setting, seed)
        compiled, faults = self._bench.compile([kernel.schedules[0].schedule])
        if faults:
            raise VerifyError(f"the default schedule {', '.join(f'{s} {what}' for s, what in faults.items())}")
        self._default = compiled[0]

    def run(self) -> Iterator[tuple[int, float]]:
        """Measure the candidates; yields, after each batch, how many are done and the best ratio so far."""
        yield 1, 1.0
        first = first_candidates(self._kernel.schedules, max(self._candidates * 2 // 3, 2))
        yield from self._measure(first[1:])
        near = neighbours(self._kernel.schedules, self._best(), self._seen, self._candidates - len(self._seen))
        yield from self._measure(near)
        self._complete = not self._is_late()

    def outcome(self) -> Outcome | None:
        """Give what was found; None where time ran out before anything was measured."""
        if len(self._seen) == 1 and not self._complete:
            return None
        ahead = sorted((t for t in self._timings.values() if t.ratio < 1.0), key=lambda t: t.ratio)[:FINALISTS]
        candidates = [self._default, *(t.candidate for t in ahead)]
        final = self._bench.measure(candidates, FINAL_ROUNDS, 2 * BATCH_SECONDS)
        default, *others = final.timings
        best = min(others, key=lambda t: t.ratio, default=default)
        if best.ratio > WORTH:
            best = default
        return Outcome(
            kernel=self._kernel,
            default=default.candidate.schedule,
            default_seconds=default.seconds,
            best=best.candidate.schedule,
            seconds=best.seconds,
            tried=1 + len(self._timings),
            complete=self._complete,
            faults={**self._faults, **final.faults},
        )

    def _measure(self, schedules: Sequence[Schedule]) -> Iterator[tuple[int, float]]:
        """Measure schedules beside the default, a batch at a time, until time runs out."""
        for start in range(0, len(schedules), BATCH):
            if self._is_late():
                return
            batch = schedules[start : start + BATCH]
            compiled, faults = self._bench.compile(batch)
            even = [c for c in compiled if _divides_as_well(c.code.slices, self._default.code.slices)]
            measured = self._bench.measure([self._default, *even], ROUNDS, BATCH_SECONDS)
            self._timings |= {t.candidate.schedule: t for t in measured.timings[1:]}
            self._faults |= faults | measured.faults
            self._seen |= set(batch)
            ratios = [t.ratio for t in self._timings.values()]
            yield len(self._seen), min(ratios, default=1.0)

    def _best(self) -> Schedule:
        ahead = [t for t in self._timings.values() if t.ratio < 1.0]
        return min(ahead, key=lambda t: t.ratio).candidate.schedule if ahead else self._default.schedule

    def _is_late(self) -> bool:
        return time.monotonic() >= self._deadline


def _divides_as_well(slices: int, default: int) -> bool:
    """Whether so many slices keep more threads as busy as the default's, or nearly all of their time."""
    return all(_unevenness(slices, n) <= max(_unevenness(default, n), UNEVEN) for n in MORE_THREADS)


def _unevenness(slices: int, threads: int) -> float:
    return -(-slices // threads) * threads / slices


def _is_timed(kernel: Fused, setting: Setting) -> bool:
    """Whether a kernel can be timed on random numbers: one output, all f32, weights of 16 bits or digits among it.

    Every kernel with a choice is so today.
    """
    types = [value.type for value in (*kernel.body.inputs, *kernel.body.outputs)]
    known = all(t.dtype is DType.F32 or (i in setting.weights and t.dtype in _STORED) for i, t in enumerate(types))
    return len(kernel.body.outputs) == 1 and known and all(t.is_static for t in types)


_STORED = (*NARROW, DType.I8)
"""What weights may be stored in, beside f32."""


def _setting(node: Node, position: Mapping[Value, int], traffic: int) -> Setting:
    weights = tuple(i for i, value in enumerate(node.inputs) if isinstance(_source(value).op, Constant))
    activations = [i for i in range(len(node.inputs)) if i not in weights]
    order = tuple(sorted(activations, key=lambda i: position[_source(node.inputs[i]).values[0]]))
    return Setting(weights, order, traffic)


def _source(value: Value) -> Node:
    """Give the node that wrote what a value, perhaps a view, reads."""
    node = value.node
    while is_view(node):
        node = node.inputs[0].node
    return node


def _has_record(kernel: Fused, records: RecordFile, target: Target) -> bool:
    try:
        record = records[record_key(kernel, target)]
        checked_schedule(record, kernel, target)
    except (KeyError, ValueError):
        return False
    return record.complete


def _record(outcome: Outcome, target: Target, version: str) -> Record:
    kernel = outcome.kernel.kernel
    return Record(
        key=record_key(kernel, target),
        target=str(target),
        features=target.features,
        block=target.vector_lanes,
        threads=target.threads,
        kernel=kernel_text(kernel),
        schedule=str(outcome.best),
        seconds=outcome.seconds,
        default=str(outcome.default),
        default_seconds=outcome.default_seconds,
        tried=outcome.tried,
        complete=outcome.complete,
        date=datetime.now(UTC).date().isoformat(),
        cpu=cpu_model_name(),
        cnnc=version,
    )
