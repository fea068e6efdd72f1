"""From a scheduled graph to a program for a CPU: compiles the kernels it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

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

Compiler: TypeAlias = "Callable[[Mapping[str, Fused], Target], Iterable[KernelObject]]"
"""Compiles kernels, given by symbol, as far as it can, and gives them as they are done."""


def nowhere(kernels: Mapping[str, Fused], target: Target) -> Iterable[KernelObject]:
    """Compile none."""
    return ()


def build(
    network: Scheduled,
    disk: DiskCache | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    elsewhere: Compiler = nowhere,
) -> Build:
    """Compile a network's kernels and put them into a program.

    Equal kernels (same body, types and schedule) are compiled once; those on `disk` not at all.  What `elsewhere`
    leaves out is compiled here.
    """
    target, nodes = network.target, network.kernels
    symbols = {node: kernel_symbol(fused_of(node), target) for node in nodes}
    wanted = {symbols[node]: fused_of(node) for node in nodes}
    # To pack weights is copying in numpy, which gives up the interpreter lock.
    with ThreadPoolExecutor(1, "weights") as beside:
        memory = beside.submit(network.memory)
        kernels, compiled = _kernel_objects(wanted, target, KernelCache(disk), progress, elsewhere)
    checks = {node: run_time_indices(node) for node in nodes}
    guards = {check_symbol(v.type, e): index_check(v.type, e) for found in checks.values() for v, e in found}

    def calls_of(node: Node, slots: Slots) -> Iterator[KernelCall]:
        for value, extents in checks[node]:
            yield check_call(node, value, extents, slots)
        kernel = kernels[symbols[node]]
        call = kernel_call(node, kernel.symbol, slots)
        scratch = (Slot("scratch", 0),) if kernel.scratch_bytes else ()
        yield replace(call, args=(*call.args, *scratch), slices=kernel.slices)

    scratch_bytes = max((k.scratch_bytes for k in kernels.values()), default=0)
    program = network.program(memory.result(), calls_of, scratch_bytes)
    objects = tuple(kernel.code for _, kernel in sorted({**kernels, **guards}.items()))
    return Build(tuple(network.graphs), program, objects, compiled, len(kernels) - compiled)


def _kernel_objects(
    kernels: dict[str, Fused],
    target: Target,
    store: KernelCache,
    progress: Callable[[int, int], None],
    elsewhere: Compiler,
) -> tuple[dict[str, KernelObject], int]:
    """Give the machine code by symbol, from the cache or freshly compiled, and how many were compiled."""
    keys = {symbol: kernel_key(kernel, target) for symbol, kernel in kernels.items()}
    found = {symbol: store.get(key) for symbol, key in keys.items()}
    objects = {symbol: kernel for symbol, kernel in found.items() if kernel is not None}
    missing = {symbol: kernel for symbol, kernel in kernels.items() if symbol not in objects}
    progress(len(objects), len(kernels))
    for kernel in _compiled(missing, target, elsewhere):
        objects[kernel.symbol] = kernel
        store.put(keys[kernel.symbol], kernel)
        progress(len(objects), len(kernels))
    return objects, len(missing)


def _compiled(kernels: Mapping[str, Fused], target: Target, elsewhere: Compiler) -> Iterator[KernelObject]:
    """Compile kernels elsewhere, and here those that were not."""
    left = dict(kernels)
    for kernel in elsewhere(kernels, target) if kernels else ():
        del left[kernel.symbol]
        yield kernel
    if left:
        load_tvm()
        yield from compile_kernels([kernel_job(symbol, kernel, target) for symbol, kernel in left.items()], target)


def kernel_job(symbol: str, kernel: Fused, target: Target) -> KernelJob:
    """Make a kernel's TIR; the memory plan may let an elementwise one write over its input."""
    if kernel.schedule is None:
        raise VerifyError(f"kernel {kernel.anchor} has no schedule; the tile pass has not run")
    func = template(kernel.schedule.template).build(kernel, kernel.schedule, target)
    return KernelJob(func, symbol, noalias=not is_elementwise(kernel))
