"""From a scheduled graph to a program for a GPU: compiles the kernels it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from cnnc.backends.cache import DiskCache
from cnnc.backends.cuda.index_check import check_job
from cnnc.backends.cuda.kernels import CudaKernel, compile_kernels, kernel_job
from cnnc.backends.host.device import DeviceCode, DeviceLaunch
from cnnc.backends.host.program import KernelCall, Slot
from cnnc.backends.lower.build import Build, Scheduled, Slots, check_call, fused_of, kernel_call
from cnnc.backends.lower.identity import kernel_symbol
from cnnc.backends.lower.run_time_indices import check_symbol, run_time_indices
from cnnc.ir.graph import Node
from cnnc.target import is_portable


def build(
    network: Scheduled, disk: DiskCache | None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Build:
    """Compile a network's kernels, of which those on `disk` are taken from there, and put them into a program.

    There are no objects to link: the machine code is in the program's modules.
    """
    target, nodes = network.target, network.kernels
    symbols = {node: kernel_symbol(fused_of(node), target) for node in nodes}
    checks = {node: run_time_indices(node) for node in nodes}
    jobs = {symbol: kernel_job(symbol, fused_of(node), target) for node, symbol in symbols.items()}
    jobs |= {check_symbol(v.type, e): check_job(v.type, e, target) for found in checks.values() for v, e in found}
    kernels, compiled = compile_kernels(jobs, target, disk, progress)
    modules = {symbol: kernel.code for symbol, kernel in kernels.items() if kernel.launches}
    numbers = {symbol: number for number, symbol in enumerate(modules)}

    def calls_of(node: Node, slots: Slots) -> Iterator[KernelCall]:
        for value, extents in checks[node]:
            check = check_call(node, value, extents, slots)
            yield _launched(replace(check, args=(*check.args, Slot("status", 0))), kernels, numbers)
        yield _launched(kernel_call(node, symbols[node], slots), kernels, numbers)

    device = DeviceCode(target.arch, tuple(modules.values()), is_portable(target.arch))
    scratch_bytes = max((kernel.scratch_bytes for kernel in kernels.values()), default=0)
    described = {symbol: kernel.describe() for symbol, kernel in sorted(kernels.items())}
    network = replace(network, meta={**network.meta, "launches": described})
    program = network.program(network.memory(), calls_of, scratch_bytes, device)
    return Build(tuple(network.graphs), program, (), compiled, len(kernels) - compiled)


def _launched(call: KernelCall, kernels: Mapping[str, CudaKernel], modules: Mapping[str, int]) -> KernelCall:
    """Give the call as launches over the buffers it has for arguments."""

    def place(argument: int | tuple[str, int]) -> Slot:
        if not isinstance(argument, tuple):
            return call.args[argument]
        space, offset = argument
        return Slot("map" if space == "map" else "scratch", offset)

    launches = tuple(
        DeviceLaunch(
            modules[call.symbol],
            launch.function,
            tuple(map(place, launch.arguments)),
            *(launch.grid, launch.block, launch.shared_bytes),
            tuple((call.args[position], described) for position, described in launch.maps),
        )
        for launch in kernels[call.symbol].launches
    )
    return replace(call, args=(), launches=launches)
