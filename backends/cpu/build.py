"""From a scheduled graph to a program for a CPU: compiles the kernels it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from cnnc.backends.cache import DiskCache
from cnnc.backends.cpu.codegen import KernelJob, KernelObject, compile_kernels
from cnnc.backends.cpu.index_check import index_check
from cnnc.backends.cpu.kernel_cache import KernelCache
from cnnc.backends.cpu.templates import template
from cnnc.backends.host.program import KernelCall, Slot
from cnnc.backends.load_tvm import load_tvm
from cnnc.backends.lower.build import Build, Scheduled, Slots, check_call, fused_of, kernel_call
from cnnc.backends.lower.identity import kernel_key, kernel_symbol
from cnnc.backends.lower.run_time_indices import check_symbol, run_time_indices
from cnnc.errors import VerifyError
from cnnc.ir.graph import Node
from cnnc.ops.fused import Fused
from cnnc.passes.plan_memory import is_elementwise
from cnnc.target import Target


def build(
    network: Scheduled, disk: DiskCache | None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Build:
    """Compile a network's kernels and put them into a program.

    Equal kernels (same body, types and schedule) are compiled once; those on `disk` not at all.
    """
    target, nodes = network.target, network.kernels
    symbols = {node: kernel_symbol(fused_of(node), target) for node in nodes}
    kernels, compiled = _kernel_objects({symbols[n]: fused_of(n) for n in nodes}, target, KernelCache(disk), progress)
    checks = {node: run_time_indices(node) for node in nodes}
    guards = {check_symbol(v.type, e): index_check(v.type, e) for found in checks.values() for v, e in found}

    def calls_of(node: Node, slots: Slots) -> Iterator[KernelCall]:
        for value, extents in checks[node]:
            yield check_call(node, value, extents, slots)
        kernel = kernels[symbols[node]]
        call = kernel_call(node, kernel.symbol, slots)
        scratch = (Slot("scratch", 0),) if kernel.scratch_bytes else ()
        yield replace(call, args=(*call.args, *scratch), slices=kernel.slices)

    program = network.program(calls_of, max((k.scratch_bytes for k in kernels.values()), default=0))
    objects = tuple(kernel.code for _, kernel in sorted({**kernels, **guards}.items()))
    return Build(tuple(network.graphs), program, objects, compiled, len(kernels) - compiled)


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
