"""From a scheduled graph to a program for a GPU: compiles kernels, packs weights, fills in the launches."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cnnc.backends.cache import DiskCache
from cnnc.backends.cpu.build import Build, WeightBlock, fused_of, port_of, slots_of
from cnnc.backends.cpu.identity import kernel_symbol
from cnnc.backends.cpu.index_check import check_symbol, run_time_indices
from cnnc.backends.cuda.index_check import check_job
from cnnc.backends.cuda.kernels import CudaKernel, KernelJob, compile_kernels, kernel_job
from cnnc.backends.host.device import DeviceCode, DeviceLaunch
from cnnc.backends.host.program import KernelCall, Program, Slot
from cnnc.ir.graph import Graph, Node
from cnnc.ops.fused import Fused
from cnnc.passes.plan_memory import MemoryPlan
from cnnc.target import Target


def build(
    graph: Graph,
    plan: MemoryPlan,
    target: Target,
    *,
    batch: int,
    disk: DiskCache | None,
    meta: dict[str, object],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Build:
    """Compile a graph whose every computing node is a scheduled `Fused`; kernels on `disk` are taken from there.

    There are no objects to link: the machine code is in the program's modules.
    """
    nodes = [node for node in graph.nodes if isinstance(node.op, Fused)]
    checks = {node: run_time_indices(node) for node in nodes}
    jobs: dict[str, KernelJob] = {}
    for node in nodes:
        symbol = kernel_symbol(fused_of(node), target)
        jobs[symbol] = kernel_job(symbol, fused_of(node), target)
        jobs |= {check_symbol(v.type, e): check_job(v.type, e, target) for v, e in checks[node]}
    kernels, compiled = compile_kernels(jobs, target, disk, progress)
    weights = WeightBlock()
    slots = slots_of(graph, plan, weights)
    calls = _Calls(kernels)
    for node in nodes:
        for value, extents in checks[node]:
            calls.add_check(node, check_symbol(value.type, extents), slots[value], value.type.nbytes)
        calls.add(node, kernel_symbol(fused_of(node), target), [slots[v] for v in (*node.inputs, *node.values)])
    program = Program(
        name=graph.name,
        inputs=tuple(port_of(name, v) for name, v in zip(graph.input_names, graph.inputs, strict=True)),
        outputs=tuple(port_of(name, v) for name, v in zip(graph.output_names, graph.outputs, strict=True)),
        calls=tuple(calls.calls),
        arena_bytes=plan.size,
        scratch_bytes=max((kernel.scratch_bytes for kernel in kernels.values()), default=0),
        weights=weights.pieces(),
        meta=json.dumps(meta, sort_keys=True),
        batch=batch,
        device=DeviceCode(target.arch, tuple(calls.modules.values()), tuple(calls.launches)),
    )
    return Build((graph,), program, (), compiled, len(kernels) - compiled)


@dataclass
class _Calls:
    """Collects the calls of a program with their launches, and the modules these are in."""

    kernels: Mapping[str, CudaKernel]
    calls: list[KernelCall] = field(default_factory=list)
    launches: list[DeviceLaunch] = field(default_factory=list)
    modules: dict[str, bytes] = field(default_factory=dict)

    def add(self, node: Node, symbol: str, places: Sequence[Slot]) -> None:
        """Add a kernel over buffers at these places."""
        op = fused_of(node)
        call = KernelCall(
            symbol=symbol,
            args=(),
            layers=tuple(sorted(node.loc)),
            flops=op.flops(*(v.type for v in node.inputs)),
            bytes=sum(v.type.nbytes for v in (*node.inputs, *node.values)),
            algorithm=op.schedule.template if op.schedule else "",
            schedule=str(op.schedule),
        )
        self._launch(call, places)

    def add_check(self, node: Node, symbol: str, indices: Slot, nbytes: int) -> None:
        """Add the check of a kernel's indices."""
        layers = tuple(sorted(node.loc))
        call = KernelCall(symbol, (), 1, layers, 0, nbytes, "check_indices", "check_indices()")
        self._launch(call, [indices, Slot("status", 0)])

    def _launch(self, call: KernelCall, places: Sequence[Slot]) -> None:
        kernel = self.kernels[call.symbol]
        self.calls.append(call)
        if not kernel.launches:
            return
        self.modules.setdefault(kernel.symbol, kernel.code)
        module = list(self.modules).index(kernel.symbol)
        for launch in kernel.launches:
            args = tuple(Slot("scratch", a[1]) if isinstance(a, tuple) else places[a] for a in launch.arguments)
            made = (launch.function, args, launch.grid, launch.block, launch.shared_bytes)
            self.launches.append(DeviceLaunch(len(self.calls) - 1, module, *made))
