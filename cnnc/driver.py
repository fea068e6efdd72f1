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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import cnnc
import cnnc.ops
from cnnc.errors import ModelError, UnsupportedError, UsageError
from cnnc.ir.graph import Graph
from cnnc.ir.rewrite import RewriteLog
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType
from cnnc.ir.verify import verify
from cnnc.module import Module
from cnnc.options import DTYPES, Limits
from cnnc.target import Target

if TYPE_CHECKING:
    import onnx

    from cnnc.backends.cache import DiskCache
    from cnnc.backends.cpu.compile_process import CompileProcess
    from cnnc.backends.host.library import LoadedModel
    from cnnc.backends.lower.build import Build, Scheduled
    from cnnc.frontends.dsl import Network
    from cnnc.passes.plan_memory import MemoryPlan
    from cnnc.passes.tile import KernelTemplate
    from cnnc.passes.weight_report import WeightReport

Source: TypeAlias = "str | os.PathLike[str] | onnx.ModelProto | Network | Graph"


@dataclass(frozen=True)
class Options:
    """What a compile may be told, beside the source.

    `shapes` and `batch` fix sizes a model leaves open; several batch sizes make one binary for all of them, which has
    the weights once; `level` is the optimisation level 0..3; `passes`
    replaces the pipeline of that level; `dump_ir` is a folder for the IR after each pass that changed it;
    `exact` keeps convolutions to the very products of the definition: no Winograd, no f32 in bf16 parts; `small`
    gives Winograd's larger weights no more than a tenth of the model's bytes; `weights` is the type that weights
    of convolutions and fully connected layers are stored in, f32, f16 or bf16, arithmetic being f32 in any case;
    `dtype` is the type that convolutions and products of matrices multiply in, f32, tf32, f16 or bf16, adding up in
    f32 in any case: on GPUs, with the 16-bit ones all weights, and all values between kernels, are stored in them; on
    CPUs with AMX, bf16 is for weights and what is multiplied on its tiles;
    `records` are the tuned schedules to use: the user's own (True), none (False), or those of a file; shipped ones
    come after them; `cache` off compiles every kernel anew; `name` is what the C functions begin with, by default
    the name of the ONNX file or of the network.
    """

    target: str = "cpu"
    threads: int = 1
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    batch: int | Sequence[int] | None = None
    level: int = 3
    passes: str | None = None
    exact: bool = False
    small: bool = False
    weights: str = "f32"
    dtype: str = "f32"
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
            "batch": self.batch if isinstance(self.batch, int | None) else list(self.batch),
            "level": self.level,
            "passes": self.passes,
            "exact": self.exact,
            "small": self.small,
            "weights": self.weights,
            "dtype": self.dtype,
            "records": self.records is not False,
            "shapes": shapes,
        }

    @property
    def batches(self) -> tuple[int | None, ...]:
        """The batch sizes, None for what the model says; raises `UsageError` for a list that makes no sense."""
        if isinstance(self.batch, int | None):
            return (self.batch,)
        wrong = [size for size in self.batch if not isinstance(size, int) or isinstance(size, bool) or size < 1]
        if wrong or not self.batch:
            raise UsageError(f"batch={self.batch!r}: batch sizes are whole numbers of at least 1, as (1, 8, 32)")
        twice = [size for size in dict.fromkeys(self.batch) if list(self.batch).count(size) > 1]
        if twice:
            raise UsageError(f"batch={self.batch!r}: {twice[0]} is there twice; name every batch size once")
        return tuple(self.batch)


@dataclass
class Report:
    """How a compile went: seconds by phase and by pass, batch sizes, kernels, bytes, and the rules that fired.

    `batches` is empty where none was asked for.
    """

    phases: dict[str, float] = field(default_factory=dict)
    passes: list[tuple[str, float]] = field(default_factory=list)
    rewrites: RewriteLog = field(default_factory=RewriteLog)
    batches: tuple[int, ...] = ()
    kernels: int = 0
    kernels_compiled: int = 0
    arena_bytes: int = 0
    weight_bytes: int = 0
    stored: WeightReport | None = None
    """What became of the weights, if they were to be stored in 16 bits."""


Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with the phase, the steps done and their total."""


@dataclass(frozen=True)
class Lowered:
    """Graphs after all passes, one for each batch size.

    Every computing node is a kernel with a schedule, every value has its place.
    """

    graphs: tuple[Graph, ...]
    plans: tuple[MemoryPlan, ...]
    target: Target


def compile(
    source: Source,
    *,
    target: str = "cpu",
    threads: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | Sequence[int] | None = None,
    level: int = 3,
    passes: str | None = None,
    exact: bool = False,
    small: bool = False,
    weights: str = "f32",
    dtype: str = "f32",
    dump_ir: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
    records: str | os.PathLike[str] | bool = True,
    cache: bool = True,
    name: str | None = None,
    report: Report | None = None,
    progress: Progress = lambda phase, done, total: None,
    helper: CompileProcess | None = None,
) -> Module:
    """Compile a model into a module that runs in process and can be saved as a binary.

    `source` is a path (`net.onnx`, `file.py:network`, IR text `net.ir`), an `onnx.ModelProto`, a DSL network
    or a `Graph`; the other arguments are those of `Options`, and `helper` is a process that compiles kernels.
    With `batch=(1, 8)` the module runs either, as its inputs say.  Raises `CnncError`, whose `exit_code` tells an
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
        weights=weights,
        dtype=dtype,
        dump_ir=Path(dump_ir) if dump_ir is not None else None,
        limits=limits or Limits(),
        records=records if isinstance(records, bool) else Path(records),
        cache=cache,
        name=name,
    )
    report = Report() if report is None else report
    with _phase(report, "import", progress):
        graphs = load_graphs(source, options)
    report.batches = tuple(size for size in options.batches if size is not None)
    # Hashing the weights takes as long as a pass, and gives up the interpreter lock meanwhile.
    with ThreadPoolExecutor(1, "digest") as pool:
        digest = pool.submit(_digest, graphs)
        with _phase(report, "optimise", progress):
            lowered = lower(graphs, options, report)
        with _phase(report, "kernels", progress):
            return _build(lowered, digest.result(), options, report, progress, helper)


def load_graph(source: Source, options: Options | None = None) -> Graph:
    """Turn any source into a verified graph, without optimising it; raises `UsageError` for several batch sizes."""
    options = Options() if options is None else options
    if len(options.batches) > 1:
        raise UsageError(f"a graph is for one batch size, not {len(options.batches)}; name one")
    return load_graphs(source, options)[0]


def load_graphs(source: Source, options: Options) -> tuple[Graph, ...]:
    """Turn any source into verified graphs, one for each batch size asked for."""
    from cnnc.passes.pipeline import share_constants

    make = _importer(source, options)
    graphs: tuple[Graph, ...] = ()
    for batch in options.batches:
        # One by one, so that no more than two sets of weights are ever in memory.
        graphs = share_constants((*graphs, verify(make(batch), "import")))
    shapes: dict[tuple[Any, ...], int | None] = {}
    for batch, graph in zip(options.batches, graphs, strict=True):
        same = shapes.setdefault(tuple(v.type for v in graph.inputs), batch)
        if same != batch:
            raise UsageError(f"batch sizes {same} and {batch} make no difference: every input's shape is fixed")
    return tuple(replace(graph, name=options.name) if options.name else graph for graph in graphs)


def lower(graphs: Sequence[Graph], options: Options, report: Report) -> Lowered:
    """Run the passes: from what the model says to kernels with schedules and addresses."""
    from cnnc.backends.cache import DiskCache, ScheduleCache
    from cnnc.backends.lower.identity import ScheduleMemory
    from cnnc.backends.records import tuned_records
    from cnnc.passes.narrow_weights import NARROW
    from cnnc.passes.pipeline import pipeline, run_together
    from cnnc.passes.plan_memory import plan_memory
    from cnnc.passes.weight_report import describe_weights, weight_type

    for graph in graphs:
        _refuse_open_sizes(graph)
    target = Target.parse(options.target, options.threads)
    if target.is_gpu:
        _refuse_what_gpus_lack(options, target)
    check_dtype(options.dtype, target)
    weights = weight_type(options.weights, target)
    disk = DiskCache() if options.cache else None
    memory = ScheduleMemory(ScheduleCache(disk))
    records = tuned_records(options.records, target, disk)
    chosen = pipeline(
        *(options.level, templates_for(target), options.passes, records),
        memory=memory,
        exact=options.exact,
        small=options.small,
        weights=weights,
        dtype=options.dtype,
        tensor_cores=target.is_gpu,
    )
    lowered = run_together(
        *(graphs, target, chosen), dump_dirs=_dump_folders(options), log=report.rewrites, timings=report.passes
    )
    for note in records.notes:
        warnings.warn(note, stacklevel=2)
    stored = DType(options.dtype) if options.dtype in NARROW else weights
    if stored is not DType.F32:
        report.stored = describe_weights(lowered, stored, report.rewrites.missed)
    return Lowered(lowered, tuple(plan_memory(graph, target) for graph in lowered), target)


def _refuse_what_gpus_lack(options: Options, target: Target) -> None:
    if options.weights != "f32":
        raise UnsupportedError(f"{target}: weights in {options.weights} are for CPUs; leave out --weights")


def check_dtype(dtype: str, target: Target) -> None:
    """Raise `UsageError` for a type of products that does not exist, `UnsupportedError` where a target lacks it."""
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; use {', '.join(DTYPES)}")
    if dtype == "f32" or target.is_gpu or (dtype == "bf16" and target.multiplies_tiles):
        return
    narrow = f"use --weights {dtype}, which stores weights in 16 bits"
    cure = {"tf32": "leave out --dtype", "bf16": f"use cpu:sapphirerapids, or {narrow}"}.get(dtype, narrow)
    where = "CUDA targets and CPUs with AMX" if dtype == "bf16" else "CUDA targets"
    raise UnsupportedError(f"{target}: products in {dtype} are for {where}; {cure}")


def _dump_folders(options: Options) -> list[Path | None]:
    """Give each batch size a folder of its own where there are several."""
    folder, batches = options.dump_ir, options.batches
    if folder is None or len(batches) == 1:
        return [folder for _ in batches]
    return [folder / f"batch{batch}" for batch in batches]


def templates_for(target: Target) -> Sequence[KernelTemplate]:
    """Give the kernel templates of a target's back end."""
    if target.is_gpu:
        from cnnc.backends.cuda import templates as gpu

        return gpu.TEMPLATES
    from cnnc.backends.cpu import templates as cpu

    return cpu.TEMPLATES


def _build(
    lowered: Lowered,
    digest: str,
    options: Options,
    report: Report,
    progress: Progress,
    helper: CompileProcess | None,
) -> Module:
    from cnnc.backends.cache import DiskCache
    from cnnc.backends.lower.build import Scheduled

    disk = DiskCache() if options.cache else None
    meta: dict[str, object] = {"cnnc": cnnc.__version__, "options": options.effective(), "model": digest}
    batches = [batch or 0 for batch in options.batches]
    network = Scheduled(lowered.graphs, lowered.plans, batches, lowered.target, meta)
    steps = partial(progress, "kernels")
    if lowered.target.is_gpu:
        built, load = _build_for_gpu(network, disk, steps)
    else:
        built, load = _build_for_cpu(network, disk, steps, helper)
    report.kernels = built.compiled + built.cached
    report.kernels_compiled = built.compiled
    report.arena_bytes = built.program.arena_bytes
    report.weight_bytes = built.program.weight_bytes
    return Module(load, threads=options.threads, build=built)


Built: TypeAlias = "tuple[Build, Callable[[], LoadedModel]]"


def _build_for_cpu(
    network: Scheduled, disk: DiskCache | None, progress: Callable[[int, int], None], helper: CompileProcess | None
) -> Built:
    from cnnc.backends.cpu.build import build, nowhere
    from cnnc.backends.host.jit import JitModel

    built = build(network, disk, progress, helper.compile if helper else nowhere)
    return built, lambda: JitModel(built.program, built.objects)


def _build_for_gpu(network: Scheduled, disk: DiskCache | None, progress: Callable[[int, int], None]) -> Built:
    from cnnc.backends.cuda.build import build
    from cnnc.backends.host.link import load_linked

    built = build(network, disk, progress)
    return built, lambda: load_linked(built.program, built.objects)


def _importer(source: Source, options: Options) -> Callable[[int | None], Graph]:
    """Give what makes the graph of a source for a batch size."""
    if isinstance(source, Graph):
        return lambda batch: _with_batch(source, batch)
    if isinstance(source, str | os.PathLike):
        return _path_importer(os.fspath(source), options)
    if hasattr(source, "SerializeToString"):
        return lambda batch: _import_onnx(source, options, batch)
    if hasattr(source, "graph"):
        return lambda batch: _network_graph(source, batch)
    raise UsageError(f"a {type(source).__name__} is not a model; give a path, an onnx.ModelProto, a network or a graph")


def _path_importer(path: str, options: Options) -> Callable[[int | None], Graph]:
    file, _, _ = path.rpartition(":")
    if file.endswith(".py"):
        from cnnc.frontends.dsl import load_network

        net = load_network(path)
        drawn = net if net.weights else net.init(0)
        return lambda batch: _network_graph(drawn, batch)
    if path.endswith(".py"):
        raise UsageError(f"{path}: name the network too, as in {path}:resnet50")
    if path.endswith(".so"):
        raise UsageError(f"{path} is compiled already; use cnnc.load, or the verbs run, bench and profile")
    if path.endswith(".ir"):
        graph = _read_ir(Path(path))
        return lambda batch: _with_batch(graph, batch)
    return lambda batch: _import_onnx(path, options, batch)


def _network_graph(net: Network, batch: int | None) -> Graph:
    return (net if batch is None else net.with_batch(batch)).graph()


def _with_batch(graph: Graph, batch: int | None) -> Graph:
    """Give a graph, whose shapes are fixed; raises `UsageError` if they are for another batch size."""
    for name, value in zip(graph.input_names, graph.inputs, strict=True):
        leading = value.type.shape[0] if value.type.shape else None
        if batch is not None and isinstance(leading, int) and leading != batch:
            raise UsageError(f"input {name!r} has the fixed leading dimension {leading}, not batch {batch}")
    return graph


def _import_onnx(source: Any, options: Options, batch: int | None) -> Graph:
    from cnnc.frontends.onnx import import_model

    shapes = {name: tuple(shape) for name, shape in options.shapes.items()}
    graph = import_model(source, shapes=shapes or None, batch=batch, limits=options.limits)
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


def _digest(graphs: Sequence[Graph]) -> str:
    """Identify a model by its graphs, weights included."""
    return hashlib.sha256("".join(map(print_graph, graphs)).encode()).hexdigest()


@contextmanager
def _phase(report: Report, name: str, progress: Progress) -> Iterator[None]:
    progress(name, 0, 1)
    start = time.perf_counter()
    try:
        yield
    finally:
        report.phases[name] = time.perf_counter() - start
        progress(name, 1, 1)
