"""From a scheduled graph to a program: compiles the kernels it needs, packs weights, fills in the calls."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from cnnc.backends.cache import KernelCache
from cnnc.backends.cpu.codegen import KernelJob, KernelObject, compile_kernels
from cnnc.backends.cpu.identity import kernel_key, kernel_symbol
from cnnc.backends.cpu.index_check import check_symbol, index_check, run_time_indices
from cnnc.backends.cpu.templates import template
from cnnc.backends.host.program import ALIGNMENT, KernelCall, Port, Program, Slot, Variant
from cnnc.backends.load_tvm import load_tvm
from cnnc.errors import VerifyError
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.types import TensorType
from cnnc.ops.fused import Fused
from cnnc.ops.source import Constant
from cnnc.passes.plan_memory import MemoryPlan, is_elementwise
from cnnc.passes.views import is_joint, is_view
from cnnc.target import Target

SOURCES = ("input", "constant")

Indices: TypeAlias = Sequence[tuple[Value, tuple[int, ...]]]
"""Values that hold indices, each with the extents of the axes they point into."""


@dataclass(frozen=True)
class Build:
    """A program with the graphs it came from, one for each batch size, and the machine code of its kernels.

    `compiled` and `cached` count where the kernels came from.
    """

    graphs: tuple[Graph, ...]
    program: Program
    objects: tuple[bytes, ...]
    compiled: int
    cached: int


def build(
    graphs: Sequence[Graph],
    plans: Sequence[MemoryPlan],
    target: Target,
    *,
    batches: Sequence[int],
    kernel_cache: KernelCache,
    meta: dict[str, object],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Build:
    """Compile the graphs of a network, one for each batch size, whose every computing node is a scheduled `Fused`.

    Equal kernels (same body, types and schedule) are compiled once; kernels in the cache not at all.  Equal weights
    are there once, and the arena is the largest that a graph needs.
    """
    calls = [node for graph in graphs for node in fused_nodes(graph)]
    symbols = {node: kernel_symbol(fused_of(node), target) for node in calls}
    kernels, compiled = _kernel_objects({symbols[n]: fused_of(n) for n in calls}, target, kernel_cache, progress)
    weights = WeightBlock()
    checks = {node: run_time_indices(node) for node in calls}
    guards = {check_symbol(v.type, e): index_check(v.type, e) for found in checks.values() for v, e in found}
    code = {node: kernels[symbols[node]] for node in calls}
    first, *others = (
        _variant(batch, graph, slots_of(graph, plan, weights), checks, code)
        for batch, graph, plan in zip(batches, graphs, plans, strict=True)
    )
    program = Program(
        name=graphs[0].name,
        inputs=first.inputs,
        outputs=first.outputs,
        calls=first.calls,
        arena_bytes=max(plan.size for plan in plans),
        scratch_bytes=max((k.scratch_bytes for k in kernels.values()), default=0),
        weights=weights.pieces(),
        cpu=target.llvm_cpu,
        features=target.features,
        meta=json.dumps(meta, sort_keys=True),
        batch=first.batch,
        others=tuple(others),
    )
    objects = tuple(kernel.code for _, kernel in sorted({**kernels, **guards}.items()))
    return Build(tuple(graphs), program, objects, compiled, len(kernels) - compiled)


def _variant(
    batch: int,
    graph: Graph,
    slots: dict[Value, Slot],
    checks: Mapping[Node, Indices],
    code: Mapping[Node, KernelObject],
) -> Variant:
    """Fill in the ports and calls for one batch size."""
    return Variant(
        batch=batch,
        inputs=tuple(port_of(name, v) for name, v in zip(graph.input_names, graph.inputs, strict=True)),
        outputs=tuple(port_of(name, v) for name, v in zip(graph.output_names, graph.outputs, strict=True)),
        calls=tuple(
            call
            for node in fused_nodes(graph)
            for call in (*_check_calls(node, checks[node], slots), _kernel_call(node, code[node], slots))
        ),
    )


def fused_of(node: Node) -> Fused:
    """Give the kernel of a node."""
    if not isinstance(node.op, Fused):
        raise VerifyError(f"{node.op.name} is left outside of a kernel (at {', '.join(sorted(node.loc))})")
    return node.op


def _kernel_objects(
    kernels: dict[str, Fused], target: Target, store: KernelCache, progress: Callable[[int, int], None]
) -> tuple[dict[str, KernelObject], int]:
    """Give the machine code by symbol, from the cache or freshly compiled, and how many were compiled."""
    keys = {symbol: kernel_key(kernel, target) for symbol, kernel in kernels.items()}
    found = {symbol: store.get(key) for symbol, key in keys.items()}
    objects = {symbol: kernel for symbol, kernel in found.items() if kernel is not None}
    missing = [symbol for symbol in kernels if symbol not in objects]
    progress(len(objects), len(kernels))
    if missing:
        load_tvm()
    jobs = [_job(symbol, kernels[symbol], target) for symbol in missing]
    for symbol, kernel in zip(missing, compile_kernels(jobs, target), strict=True):
        objects[symbol] = kernel
        store.put(keys[symbol], kernel)
    progress(len(kernels), len(kernels))
    return objects, len(missing)


def _job(symbol: str, kernel: Fused, target: Target) -> KernelJob:
    """Make a kernel's TIR; the memory plan may let an elementwise one write over its input."""
    if kernel.schedule is None:
        raise VerifyError(f"kernel {kernel.anchor} has no schedule; the tile pass has not run")
    func = template(kernel.schedule.template).build(kernel, kernel.schedule, target)
    return KernelJob(func, symbol, noalias=not is_elementwise(kernel))


class WeightBlock:
    """The constants of a program in one block of memory, equal ones once, each aligned for vector loads."""

    def __init__(self) -> None:
        self._offsets: dict[Constant, int] = {}
        self._size = 0

    def place(self, constant: Constant) -> int:
        """Give the offset of a constant in bytes."""
        key = replace(constant, label="")
        if key not in self._offsets:
            self._offsets[key] = self._size
            self._size += -(-constant_type(constant).nbytes // ALIGNMENT) * ALIGNMENT
        return self._offsets[key]

    def pieces(self) -> tuple[memoryview, ...]:
        """Give the block in pieces, every constant packed in its layout."""
        # Packing is copying in numpy, which gives up the interpreter lock.
        with ThreadPoolExecutor(os.cpu_count(), "pack") as pool:
            return tuple(piece for pieces in pool.map(_packed, self._offsets) for piece in pieces)


def _packed(constant: Constant) -> tuple[memoryview, ...]:
    """Give a constant as it lies in memory, filled up to the alignment."""
    array = constant.value.array
    packed = array if constant.layout is None else constant.layout.pack(array)
    data = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    return data.data, memoryview(bytes(-data.size % ALIGNMENT))


def constant_type(constant: Constant) -> TensorType:
    """Give the type of a constant, layout included."""
    return constant.infer().with_layout(constant.layout)


def slots_of(graph: Graph, plan: MemoryPlan, weights: WeightBlock) -> dict[Value, Slot]:
    """Say where every value outside kernels lives."""
    slots: dict[Value, Slot] = {}
    for position, value in enumerate(graph.inputs):
        slots[value] = Slot("input", position)
    for position, value in enumerate(graph.outputs):
        if not isinstance(value.op, Fused) or value in slots:
            raise VerifyError(f"output {graph.output_names[position]} is not written by a kernel of its own")
        slots[value] = Slot("output", position)
    for node in graph.nodes:
        if isinstance(node.op, Constant):
            slots[node.values[0]] = Slot("weights", weights.place(node.op))
        elif is_view(node):
            slots[node.values[0]] = slots[node.inputs[0]]
        elif isinstance(node.op, Fused) or is_joint(node):
            for value in node.values:
                if value not in slots:
                    slots[value] = Slot("arena", plan.offsets[value])
        elif node.op.name not in SOURCES:
            raise VerifyError(f"{node.op.name} is left outside of a kernel (at {', '.join(sorted(node.loc))})")
    return slots


def _check_calls(node: Node, indices: Indices, slots: dict[Value, Slot]) -> list[KernelCall]:
    """Call the checks of a kernel's indices."""
    return [
        KernelCall(
            symbol=check_symbol(value.type, extents),
            args=(slots[value],),
            layers=tuple(sorted(node.loc)),
            bytes=value.type.nbytes,
            algorithm="check_indices",
            schedule="check_indices()",
        )
        for value, extents in indices
    ]


def _kernel_call(node: Node, kernel: KernelObject, slots: dict[Value, Slot]) -> KernelCall:
    op = fused_of(node)
    args = [slots[v] for v in (*node.inputs, *node.values)]
    if kernel.scratch_bytes:
        args.append(Slot("scratch", 0))
    moved = sum(v.type.nbytes for v in (*node.inputs, *node.values))
    return KernelCall(
        symbol=kernel.symbol,
        args=tuple(args),
        slices=kernel.slices,
        layers=tuple(sorted(node.loc)),
        flops=op.flops(*(v.type for v in node.inputs)),
        bytes=moved,
        algorithm=op.schedule.template if op.schedule else "",
        schedule=str(op.schedule),
    )


def port_of(name: str, value: Value) -> Port:
    """Describe an input or output of the graph."""
    return Port(name, str(value.dtype), value.type.static_shape)


def fused_nodes(graph: Graph) -> Sequence[Node]:
    """List the kernels of a graph in the order they run."""
    return [node for node in graph.nodes if isinstance(node.op, Fused)]
