"""From a model to a module: the front end, the passes, the memory plan, the back end, in this order.

The only file that sees every floor of the house.
"""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import cnnc
import cnnc.ops
from cnnc.errors import ModelError, UnsupportedError, UsageError
from cnnc.ir.graph import Graph
from cnnc.ir.rewrite import RewriteLog
from cnnc.ir.text import print_graph
from cnnc.ir.verify import verify
from cnnc.module import Module
from cnnc.options import Limits
from cnnc.target import Target

if TYPE_CHECKING:
    import onnx

    from cnnc.backends.cache import DiskCache
    from cnnc.backends.cpu.build import Build
    from cnnc.backends.host.library import LoadedModel
    from cnnc.frontends.dsl import Network
    from cnnc.passes.plan_memory import MemoryPlan
    from cnnc.passes.tile import KernelTemplate

Source: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | Network | Graph"


@dataclass(frozen=True)
class Options:
    """What a compile may be told, beside the source.

    `shapes` and `batch` fix sizes an ONNX model leaves open; `level` is the optimisation level 0..3; `passes`
    replaces the pipeline of that level; `dump_ir` is a folder for the IR after each pass that changed it;
    `exact` keeps convolutions to the very products of the definition, which forbids Winograd's algorithm; `small`
    gives that algorithm's larger weights no more than a tenth of the model's bytes;
    `records` are the tuned schedules to use: the user's own (True), none (False), or those of a file; shipped ones
    come after them; `cache` off compiles every kernel anew; `name` is what the C functions begin with, by default
    the name of the ONNX file or of the network.
    """

    target: str = "cpu"
    threads: int = 1
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    batch: int | None = None
    level: int = 3
    passes: str | None = None
    exact: bool = False
    small: bool = False
    dump_ir: Path | None = None
    limits: Limits = field(default_factory=Limits)
    records: Path | bool = True
    cache: bool = True
    name: str | None = None

    def effective(self) -> dict[str, Any]:
        """Give the options that decide what the binary does, as they are stored inside it."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {
            "target": self.target,
            "batch": self.batch,
            "level": self.level,
            "passes": self.passes,
            "exact": self.exact,
            "small": self.small,
            "records": self.records is not False,
            "shapes": shapes,
        }


@dataclass
class Report:
    """How a compile went: seconds by phase and by pass, kernels, bytes, and the rules that fired."""

    phases: dict[str, float] = field(default_factory=dict)
    passes: list[tuple[str, float]] = field(default_factory=list)
    rewrites: RewriteLog = field(default_factory=RewriteLog)
    kernels: int = 0
    kernels_compiled: int = 0
    arena_bytes: int = 0
    weight_bytes: int = 0


Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the phase, the steps done and their total."""


@dataclass(frozen=True)
class Lowered:
    """A graph after all passes: every computing node is a kernel with a schedule, every value has its place."""

    graph: Graph
    plan: MemoryPlan
    target: Target


def compile(
    source: Source,
    *,
    target: str = "cpu",
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
    level: int = 3,
    passes: str | None = None,
    exact: bool = False,
    small: bool = False,
    dump_ir: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
    records: str | os.PathLike[str] | bool = True,
    cache: bool = True,
    name: str | None = None,
    report: Report | None = None,
    progress: Progress = lambda phase, done, total: None,
) -> Module:
    """Compile a model into a module that runs in process and can be saved as a binary.

    `source` is a path (`net.onnx`, `file.py:network`, IR text `net.ir`), an `onnx.ModelProto`, a DSL network
    or a `Graph`; the other arguments are those of `Options`.  Raises `CnncError`, whose `exit_code` tells an
    invalid model (3) from an unsupported one (4).
    """
    options = Options(
        target=target,
        threads=threads,
        shapes=shapes or {},
        batch=batch,
        level=level,
        passes=passes,
        exact=exact,
        small=small,
        dump_ir=Path(dump_ir) if dump_ir is not None else None,
        limits=limits or Limits(),
        records=records if isinstance(records, bool) else Path(records),
        cache=cache,
        name=name,
    )
    report = Report() if report is None else report
    with _phase(report, "import", progress):
        graph = load_graph(source, options)
    # Hashing the weights takes as long as a pass, and gives up the interpreter lock meanwhile.
    with ThreadPoolExecutor(1, "digest") as pool:
        digest = pool.submit(_digest, graph)
        with _phase(report, "optimise", progress):
            lowered = lower(graph, options, report)
        with _phase(report, "kernels", progress):
            return _build(lowered, digest.result(), options, report, progress)


def load_graph(source: Source, options: Options | None = None) -> Graph:
    """Turn any source into a verified graph, without optimising it."""
    options = Options() if options is None else options
    graph = verify(_import(source, options), "import")
    return replace(graph, name=options.name) if options.name else graph


def lower(graph: Graph, options: Options, report: Report) -> Lowered:
    """Run the passes: from what the model says to kernels with schedules and addresses."""
    from cnnc.backends.cache import DiskCache, ScheduleCache
    from cnnc.backends.cpu.identity import ScheduleMemory
    from cnnc.backends.records import tuned_records
    from cnnc.passes.pipeline import pipeline, run_pipeline
    from cnnc.passes.plan_memory import plan_memory

    _refuse_open_sizes(graph)
    target = Target.parse(options.target, options.threads)
    disk = DiskCache() if options.cache else None
    memory = ScheduleMemory(ScheduleCache(disk))
    records = tuned_records(options.records, target, disk)
    chosen = pipeline(
        *(options.level, templates_for(target), options.passes, records),
        memory=memory,
        exact=options.exact,
        small=options.small,
    )
    lowered = run_pipeline(graph, target, chosen, dump_dir=options.dump_ir, log=report.rewrites, timings=report.passes)
    for note in records.notes:
        warnings.warn(note, stacklevel=2)
    plan = plan_memory(lowered, target)
    return Lowered(lowered, plan, target)


def templates_for(target: Target) -> Sequence[KernelTemplate]:
    """Give the kernel templates of a target's back end."""
    if target.is_gpu:
        from cnnc.backends.cuda import templates as gpu

        return gpu.TEMPLATES
    from cnnc.backends.cpu import templates as cpu

    return cpu.TEMPLATES


def _build(lowered: Lowered, digest: str, options: Options, report: Report, progress: Progress) -> Module:
    from cnnc.backends.cache import DiskCache

    disk = DiskCache() if options.cache else None
    meta: dict[str, object] = {"cnnc": cnnc.__version__, "options": options.effective(), "model": digest}
    backend = _build_for_gpu if lowered.target.is_gpu else _build_for_cpu
    built, load = backend(lowered, disk, meta, lambda done, total: progress("kernels", done, total))
    report.kernels = built.compiled + built.cached
    report.kernels_compiled = built.compiled
    report.arena_bytes = built.program.arena_bytes
    report.weight_bytes = built.program.weight_bytes
    return Module(load, threads=options.threads, build=built)


Built: TypeAlias = "tuple[Build, Callable[[], LoadedModel]]"


def _build_for_cpu(
    lowered: Lowered, disk: DiskCache | None, meta: dict[str, object], progress: Callable[[int, int], None]
) -> Built:
    from cnnc.backends.cache import KernelCache
    from cnnc.backends.cpu.build import build
    from cnnc.backends.host.jit import JitModel

    places = (lowered.graph, lowered.plan, lowered.target)
    built = build(*places, kernel_cache=KernelCache(disk), meta=meta, progress=progress)
    return built, lambda: JitModel(built.program, built.objects)


def _build_for_gpu(
    lowered: Lowered, disk: DiskCache | None, meta: dict[str, object], progress: Callable[[int, int], None]
) -> Built:
    from cnnc.backends.cuda.build import build
    from cnnc.backends.host.link import load_linked

    places = (lowered.graph, lowered.plan, lowered.target)
    built = build(*places, disk=disk, meta=meta, progress=progress)
    return built, lambda: load_linked(built.program, built.objects)


def _import(source: Source, options: Options) -> Graph:
    if isinstance(source, Graph):
        return source
    if isinstance(source, str | os.PathLike):
        return _import_path(os.fspath(source), options)
    if hasattr(source, "SerializeToString"):
        return _import_onnx(source, options)
    if hasattr(source, "graph"):
        return source.graph()
    raise UsageError(f"a {type(source).__name__} is not a model; give a path, an onnx.ModelProto, a network or a graph")


def _import_path(path: str, options: Options) -> Graph:
    file, _, _ = path.rpartition(":")
    if file.endswith(".py"):
        from cnnc.frontends.dsl import load_network

        net = load_network(path)
        if options.batch is not None:
            net = net.with_batch(options.batch)
        return (net if net.weights else net.init(0)).graph()
    if path.endswith(".py"):
        raise UsageError(f"{path}: name the network too, as in {path}:resnet50")
    if path.endswith(".so"):
        raise UsageError(f"{path} is compiled already; use cnnc.load, or the verbs run, bench and profile")
    if path.endswith(".ir"):
        return _read_ir(Path(path))
    return _import_onnx(path, options)


def _import_onnx(source: Any, options: Options) -> Graph:
    from cnnc.frontends.onnx import import_model

    shapes = {name: tuple(shape) for name, shape in options.shapes.items()}
    graph = import_model(source, shapes=shapes or None, batch=options.batch, limits=options.limits)
    return replace(graph, name=Path(source).stem) if isinstance(source, str) else graph


def _read_ir(path: Path) -> Graph:
    """Read IR text, with the constants it names by digest in the `.npz` beside it."""
    import numpy as np

    from cnnc.ir.parse import parse_graph

    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read as IR text: {error}") from None
    side = path.with_suffix(".npz")
    weights = dict(np.load(side, allow_pickle=False)) if side.exists() else {}
    return parse_graph(text, weights)


def _refuse_open_sizes(graph: Graph) -> None:
    for name, value in zip(graph.input_names, graph.inputs, strict=True):
        if not value.type.is_static:
            raise UnsupportedError(
                f"input {name} : {value.type} has a size known only at run time; fix it with --shape or --batch"
            )


def _digest(graph: Graph) -> str:
    """Identify a model by its graph, weights included."""
    return hashlib.sha256(print_graph(graph).encode()).hexdigest()


@contextmanager
def _phase(report: Report, name: str, progress: Progress) -> Iterator[None]:
    progress(name, 0, 1)
    start = time.perf_counter()
    try:
        yield
    finally:
        report.phases[name] = time.perf_counter() - start
        progress(name, 1, 1)
