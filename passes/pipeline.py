"""The table of contents: every pass, and in which order they run at each optimisation level.

0  one kernel for each operator: what to compare with when a fusion or a layout is under suspicion
1  algebra, constants, batch norm, fusion; plain layouts
2  blocked layouts too
3  groups merged that fill no blocks, and the algorithm of every layer chosen as well (the default)

Weights in 16 bits are a choice at every level: they are rounded last, just before fusion.  So is the type products are
computed in, which kernels see to: just after fusion.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnnc.errors import UsageError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.literal import Literal
from cnnc.ir.rewrite import RewriteLog, map_graph, rebuild, recording
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType
from cnnc.ir.verify import verify
from cnnc.ops.source import Constant
from cnnc.options import LEVELS
from cnnc.passes.assign_layouts import AssignLayouts
from cnnc.passes.choose_algorithm import ChooseAlgorithm
from cnnc.passes.cse import Cse
from cnnc.passes.fold_batch_norm import FoldBatchNorm
from cnnc.passes.fold_constants import FoldConstants
from cnnc.passes.fold_pad import FoldPad
from cnnc.passes.fuse import Fuse
from cnnc.passes.fuse_attention import FuseAttention
from cnnc.passes.local_unpool import LocalUnpool
from cnnc.passes.merge_groups import MergeGroups
from cnnc.passes.narrow_activations import NarrowActivations
from cnnc.passes.narrow_weights import NARROW, NarrowWeights
from cnnc.passes.pack_weights import PackWeights
from cnnc.passes.place_concats import PlaceConcats
from cnnc.passes.push_slices import PushSlices
from cnnc.passes.registry import Pass, parse_passes, print_passes
from cnnc.passes.round_products import RoundProducts
from cnnc.passes.simplify import Simplify
from cnnc.passes.subpixel import Subpixel
from cnnc.passes.tile import KernelTemplate, Memory, NoMemory, Records, Tile, no_records
from cnnc.target import Target


def pipeline(
    level: int,
    templates: Sequence[KernelTemplate] = (),
    passes: str | None = None,
    records: Records | None = None,
    *,
    memory: Memory | None = None,
    exact: bool = False,
    small: bool = False,
    weights: DType = DType.F32,
    dtype: str = "f32",
    tensor_cores: bool = False,
) -> tuple[Pass, ...]:
    """Give the passes of an optimisation level, or those that `passes` spells out.

    `templates` are the back end's, `records` what the tile pass knows of them, `memory` what it found; `exact` keeps to
    algorithms that add up the very products of the definition, `small` to weights hardly larger than the model's;
    `weights` is the type weights are stored in, `dtype` that of products (see `Options`), on a GPU's `tensor_cores` or
    on the matrix tiles of a CPU.
    Raises `UsageError` for a level that does not exist, and for narrow `weights` or `dtype` beside a list of passes.
    """
    handed_in: dict[str, Any] = {
        "templates": tuple(templates),
        "records": records or no_records,
        "memory": memory or NoMemory(),
    }
    asked: dict[str, Any] = {"templates": tuple(templates)}
    if passes is not None:
        if weights is not DType.F32:
            wanted = f"narrow_weights{{dtype={weights}}} before fuse"
            raise UsageError(f"weights={weights} does not go with a list of passes; put {wanted} into the list")
        if dtype != "f32":
            wanted = print_passes(_narrowing(dtype, tensor_cores)) + " after fuse"
            raise UsageError(f"dtype={dtype} does not go with a list of passes; put {wanted} into the list")
        given = parse_passes(
            passes, {"tile": handed_in, "fuse": asked, "assign_layouts": asked, "choose_algorithm": asked}
        )
        return tuple(_bounded(p, exact, small) if isinstance(p, ChooseAlgorithm) else p for p in given)
    if level not in LEVELS:
        raise UsageError(f"optimisation level {level} does not exist; use one of {', '.join(map(str, LEVELS))}")
    tile = Tile(**handed_in)
    stored = DType(dtype) if dtype in NARROW else weights
    narrow = () if stored is DType.F32 else (NarrowWeights(stored),)
    if level == 0:
        return (FoldConstants(), *narrow, Fuse(grow=False), *_narrowing(dtype, tensor_cores), tile)
    chosen: list[Pass] = [Simplify(), FoldConstants(), FoldBatchNorm(), FoldPad(), FuseAttention()]
    chosen += [Simplify(), Subpixel(), LocalUnpool(), PushSlices(), FoldConstants(), Cse()]
    if level >= 3:
        # Zeros are products that the definition does not have, and bytes.
        chosen += [] if exact or small else [MergeGroups()]
        chosen += [_bounded(ChooseAlgorithm(weights=stored, dtype=dtype, **asked), exact, small), FoldConstants()]
    if level >= 2:
        chosen += [_layouts(dtype, tensor_cores, asked), PackWeights(), Cse()]
    return (*chosen, *narrow, Fuse(**asked), *_narrowing(dtype, tensor_cores), PlaceConcats(), tile)


def _layouts(dtype: str, tensor_cores: bool, asked: Mapping[str, Any]) -> AssignLayouts:
    """Choose layouts for the products of a type: what tensor cores multiply lies in blocks of 16 bytes."""
    if dtype == "f32" or not tensor_cores:
        return AssignLayouts()
    return AssignLayouts(block=8 if dtype in NARROW else 4, tensor_cores=True, **asked)


def _narrowing(dtype: str, tensor_cores: bool) -> tuple[Pass, ...]:
    """Give the passes that have kernels multiply in a type; weights are narrowed apart."""
    if not tensor_cores:
        return () if dtype == "f32" else (RoundProducts(dtype),)
    if dtype in NARROW:
        return (NarrowActivations(DType(dtype)),)
    return () if dtype == "f32" else (RoundProducts(),)


SMALL_GROWTH = 0.08
"""What transformed weights may add where an artifact is to stay small: with code, it then grows by less than 0.1."""


def _bounded(choose: ChooseAlgorithm, exact: bool, small: bool) -> ChooseAlgorithm:
    """Bound a choice of algorithms further."""
    growth = min(choose.growth, SMALL_GROWTH) if small else choose.growth
    return replace(choose, exact=choose.exact or exact, growth=growth)


def run_pipeline(
    graph: Graph,
    target: Target,
    passes: Sequence[Pass],
    *,
    dump_dir: Path | None = None,
    verify_each: bool = True,
    log: RewriteLog | None = None,
    timings: list[tuple[str, float]] | None = None,
) -> Graph:
    """Run passes in order, the verifier after each.

    `dump_dir` gets `00-import.txt` and, for every pass that changed it, the graph as `03-fuse.txt`; `log` collects
    the rules that fired and the near-misses; `timings` gets (pass, seconds).
    """
    (graph,) = run_together(
        (graph,), target, passes, dump_dirs=(dump_dir,), verify_each=verify_each, log=log, timings=timings
    )
    return graph


def run_together(
    graphs: Sequence[Graph],
    target: Target,
    passes: Sequence[Pass],
    *,
    dump_dirs: Sequence[Path | None],
    verify_each: bool = True,
    log: RewriteLog | None = None,
    timings: list[tuple[str, float]] | None = None,
) -> tuple[Graph, ...]:
    """Run passes on the graphs of one network for several batch sizes, in step, so that they keep one set of weights.

    Otherwise as `run_pipeline`, with a folder to dump to for each graph.
    """
    graphs = share_constants(graphs)
    dumps = [_Dump(folder, graph) for folder, graph in zip(dump_dirs, graphs, strict=True)]
    with recording(RewriteLog() if log is None else log):
        for number, step in enumerate(passes, 1):
            start = time.perf_counter()
            graphs = share_constants(step.run_together(graphs, target))
            for graph in graphs if verify_each else ():
                verify(graph, str(step))
            if timings is not None:
                timings.append((step.name, time.perf_counter() - start))
            for dump, graph in zip(dumps, graphs, strict=True):
                dump.write(number, step.name, graph)
    return graphs


def share_constants(graphs: Sequence[Graph]) -> tuple[Graph, ...]:
    """Give the graphs with equal numbers in memory once, whichever graph they are in; one graph stays as it is."""
    known: dict[Literal, Literal] = {}

    def share(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        if not isinstance(node.op, Constant):
            return rebuild(node, inputs)
        first = known.setdefault(node.op.value, node.op.value)
        return node.values if first is node.op.value else call(replace(node.op, value=first), loc=node.loc).node.values

    return tuple(map_graph(graph, share) for graph in graphs) if len(graphs) > 1 else tuple(graphs)


class _Dump:
    """Writes the graph's text after a pass where it is not what it was before."""

    def __init__(self, folder: Path | None, graph: Graph) -> None:
        self.folder = folder
        self.last = ""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self.write(0, "import", graph)

    def write(self, number: int, name: str, graph: Graph) -> None:
        if self.folder is None:
            return
        text = print_graph(graph)
        if text != self.last:
            (self.folder / f"{number:02}-{name}.txt").write_text(text, "utf-8")
            self.last = text
