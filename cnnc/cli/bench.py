"""`cnnc bench`: latency, start-up and memory, alone or against other engines in the same run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from cnnc.cli.arguments import compile_options, open_model, options_of
from cnnc.cli.bench_report import describe, print_report, threads_text
from cnnc.cli.inputs import input_options, read_inputs
from cnnc.cli.progress import Phases
from cnnc.cli.report import print_json
from cnnc.driver import load_graph
from cnnc.errors import CnncError, UsageError
from cnnc.ir.interp import evaluate
from cnnc.module import Module
from cnnc.profiler.contest import Outcome, Plan, compete
from cnnc.profiler.engines import CNNC, ENGINES, Engine, Task
from cnnc.profiler.machine import Machine
from cnnc.profiler.standings import Contest


@dataclass(frozen=True)
class Subject:
    """A network to measure, and the files the peers read it from (None where there is none)."""

    model: str
    onnx: str | None
    torch: str | None

    def exact_outputs(self, feeds: Mapping[str, np.ndarray], arguments: dict[str, Any]) -> dict[str, np.ndarray]:
        """Compute the outputs in float64; raises `UsageError` for a binary without its model."""
        options = options_of(arguments)
        model = self.model
        if model.endswith(".so"):
            if self.onnx is None:
                raise UsageError(f"{model} holds no graph to run in float64; give --onnx FILE, or --error cnnc")
            # What the ONNX file leaves open is what the binary was compiled for.
            shapes = {name: array.shape for name, array in feeds.items()}
            model, options = self.onnx, replace(options, shapes=shapes, batch=None)
        return evaluate(load_graph(model, options), feeds, precise=True)

    def file_for(self, engine: Engine) -> str:
        """Give the file an engine reads; raises `UsageError` where there is none."""
        found = self.onnx if engine.reads == "onnx" else self.torch
        if found is None:
            what = "an ONNX file" if engine.reads == "onnx" else "a net.pt2 or file.py:function"
            raise UsageError(f"{engine.name} cannot read {self.model}; give {what} of it with --{engine.reads}")
        return found


@click.command("bench")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@input_options
@click.option("--against", metavar="A,B", help=f"Other engines, in the same run: {','.join(ENGINES)}.")
@click.option("--onnx", "onnx_files", multiple=True, metavar="FILE", help="What peers read, once for each MODEL.")
@click.option("--torch", "torch_files", multiple=True, metavar="FILE", help="net.pt2 or file.py:function, as --onnx.")
@click.option("--threads", default="1", show_default=True, metavar="1,2", help="Thread counts to measure.")
@click.option("--warmup-ms", type=click.IntRange(min=0), default=200, show_default=True)
@click.option(
    "--duration", type=click.FloatRange(min=0), default=3.0, show_default=True, help="Seconds for each engine."
)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Turns of each engine.")
@click.option("--timeout", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds to a hang.")
@click.option(
    "--error",
    type=click.Choice(["float64", "cnnc"]),
    help="What errors are measured against: cnnc's interpreter in float64 (the rule with --against), or cnnc.",
)
@compile_options
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    models: tuple[str, ...],
    against: str | None,
    onnx_files: tuple[str, ...],
    torch_files: tuple[str, ...],
    threads: str,
    warmup_ms: int,
    duration: float,
    rounds: int,
    timeout: float,
    error: str | None,
    as_json: bool,
    **arguments: Any,
) -> int:
    """Measure each MODEL (net.so, net.onnx, file.py:network), alone or against other engines.

    Every engine runs in a process of its own, held to as many CPUs as threads, and only while it is its turn.  --batch
    chooses a batch size, of a binary one of its own, else the first is measured.
    """
    subjects = _subjects(models, onnx_files, torch_files)
    engines = _engines(against, subjects)
    counts = _parse_threads(threads)
    plan = Plan(warmup_ms / 1000, duration, rounds, timeout)
    bench = _Bench(engines, plan, error or ("float64" if engines else None), arguments)
    machine = Machine.here()
    contests: list[Contest] = []
    for subject in subjects:
        measured = 0
        try:
            for contest in bench.measure(subject, counts):
                contests.append(contest)
                measured += 1
        except CnncError as failure:
            if len(subjects) == 1:
                raise
            contests += [_not_measured(subject, count, failure) for count in counts[measured:]]
    if as_json:
        print_json("bench", describe(contests, machine, plan, bench.reference))
    else:
        print_report(contests, machine, bench.reference)
    return next((contest.ours.exit_code for contest in contests if contest.ours.exit_code), 0)


@dataclass(frozen=True)
class _Bench:
    """What is the same for all networks: the peers, how long to measure, what errors are measured against."""

    engines: Sequence[Engine]
    plan: Plan
    reference: str | None
    arguments: dict[str, Any]

    def measure(self, subject: Subject, counts: Sequence[int]) -> Iterator[Contest]:
        """Measure a network with each number of threads, compiled for it unless it is a binary."""
        wanted: Mapping[str, np.ndarray] | None = None
        with tempfile.TemporaryDirectory(prefix="cnnc-bench-") as folder:
            for threads in counts:
                arguments = {**self.arguments, "threads": threads}
                module = open_model(subject.model, arguments).module
                if len(module.batches) > 1:
                    module = module.with_batch(module.batches[0])
                    arguments["batch"] = module.batches[0]
                feeds = read_inputs(module.inputs, arguments)
                if self.reference == "float64" and wanted is None:
                    wanted = subject.exact_outputs(feeds, arguments)
                outcomes = self._compete(subject, module, feeds, threads, Path(folder))
                if self.reference == "cnnc" and outcomes[0].outputs:
                    wanted = outcomes[0].outputs[0]
                if wanted is not None:
                    outcomes = [outcome.judged(wanted) for outcome in outcomes]
                target = module.meta["options"]["target"]
                yield Contest(subject.model, target, threads, outcomes[0], tuple(outcomes[1:]))

    def _compete(
        self, subject: Subject, module: Module, feeds: Mapping[str, np.ndarray], threads: int, folder: Path
    ) -> list[Outcome]:
        binary = subject.model
        if not binary.endswith(".so"):
            binary = str(folder / "net.so")
            module.save(binary, emit=("so",))
        files = [binary, *(subject.file_for(engine) for engine in self.engines)]
        outputs = tuple(port.name for port in module.outputs)
        entries = [
            (engine, Task(file, threads, feeds, outputs))
            for engine, file in zip((CNNC, *self.engines), files, strict=True)
        ]
        label = f"{Path(subject.model).name}, {threads_text(threads)}"
        with Phases() as phases:
            return compete(
                entries, self.plan, folder, lambda phase, done, total: phases(f"{label}: {phase}", done, total)
            )


def _not_measured(subject: Subject, threads: int, failure: CnncError) -> Contest:
    """Record that one of many networks could not be compiled; the others are measured all the same."""
    ours = Outcome(CNNC.name, status="failed", reason=" ".join(str(failure).split()), exit_code=failure.exit_code)
    return Contest(subject.model, "", threads, ours, ())


def _subjects(
    models: Sequence[str], onnx_files: Sequence[str | None], torch_files: Sequence[str | None]
) -> list[Subject]:
    for option, files in (("--onnx", onnx_files), ("--torch", torch_files)):
        if files and len(files) != len(models):
            raise UsageError(f"{option} is given {len(files)} times for {len(models)} models; give it once for each")
    onnx = onnx_files or [model if model.endswith(".onnx") else None for model in models]
    torch = torch_files or [None for _ in models]
    return [Subject(*files) for files in zip(models, onnx, torch, strict=True)]


def _engines(against: str | None, subjects: Sequence[Subject]) -> list[Engine]:
    """Find the peers, and refuse before anything runs what they lack: a package or a file."""
    engines = []
    for name in dict.fromkeys(against.split(",") if against else ()):
        if name not in ENGINES:
            raise UsageError(f"--against {name!r} is not known; use {', '.join(ENGINES)}")
        ENGINES[name].require()
        engines.append(ENGINES[name])
    for subject in subjects:
        for engine in engines:
            subject.file_for(engine)
    return engines


def _parse_threads(text: str) -> list[int]:
    try:
        counts = [int(item) for item in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UsageError(f"--threads {text!r} cannot be read; write counts, as 1,2")
    return counts
