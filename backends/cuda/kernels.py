"""The kernels of a graph as fat binaries with their launches: from the cache, or compiled, several at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from cnnc.backends.cache import DiskCache
from cnnc.backends.cuda.codegen import KERNEL, CudaSource, Launch, cuda_source
from cnnc.backends.cuda.nvcc import FLAGS, Fatbin, Usage, compile_fatbin, nvcc_version
from cnnc.backends.cuda.templates import template
from cnnc.backends.cuda.tensor_cores import MMA
from cnnc.backends.cuda.tensor_maps import map_from
from cnnc.backends.cuda.wgmma import PREFIX as WGMMA
from cnnc.backends.load_tvm import load_tvm
from cnnc.backends.lower.identity import kernel_key
from cnnc.errors import VerifyError
from cnnc.ops.fused import Fused
from cnnc.passes.plan_memory import is_elementwise
from cnnc.target import Target

_MULTIPLY = re.compile(rf"\b({'|'.join(MMA.values())})\b|\b{WGMMA}")
"""What kernels call that multiply on tensor cores."""

MOST_AT_ONCE = 8
"""Runs of nvcc at one time: each takes some hundred megabytes."""


@dataclass(frozen=True)
class CudaKernel:
    """A compiled kernel; without launches, which kernels that write no element have none of, there is no code."""

    symbol: str
    code: bytes = field(repr=False)
    launches: tuple[Launch, ...]
    scratch_bytes: int
    usage: tuple[Usage, ...]
    tensor_cores: bool = False

    def describe(self) -> list[dict[str, object]]:
        """Tell how each launch is shaped and what it needs, for the binary's meta data."""
        known = {usage.function: usage for usage in self.usage}
        return [
            {
                **asdict(known[launch.function]),
                "shared_bytes": known[launch.function].shared_bytes + launch.shared_bytes,
                "grid": launch.grid,
                "block": launch.block,
                "tensor_cores": self.tensor_cores,
            }
            for launch in self.launches
        ]


@dataclass(frozen=True)
class KernelJob:
    """A kernel to compile: how its source is made, and a digest of all that this depends on but nvcc."""

    key: str
    make: Callable[[], CudaSource]


Progress = Callable[[int, int], None]


def compile_kernels(
    jobs: Mapping[str, KernelJob], target: Target, disk: DiskCache | None, progress: Progress
) -> tuple[dict[str, CudaKernel], int]:
    """Give the kernels by symbol, and how many of them were compiled rather than found.

    Raises `EnvironmentProblem` where there is no nvcc, whether or not everything is in the cache.
    """
    keys = {symbol: _key(job) for symbol, job in jobs.items()}
    found = {symbol: _decode(disk.read(key)) if disk else None for symbol, key in keys.items()}
    done = {symbol: kernel for symbol, kernel in found.items() if kernel is not None}
    missing = [symbol for symbol in jobs if symbol not in done]
    progress(len(done), len(jobs))
    if missing:
        load_tvm()
    with ThreadPoolExecutor(min(MOST_AT_ONCE, len(os.sched_getaffinity(0))), "nvcc") as pool:
        for kernel in pool.map(lambda symbol: compiled(jobs[symbol].make(), target), missing):
            done[kernel.symbol] = kernel
            if disk:
                disk.write(keys[kernel.symbol], _encode(kernel))
            progress(len(done), len(jobs))
    return done, len(missing)


def kernel_job(symbol: str, kernel: Fused, target: Target) -> KernelJob:
    """Make the job of a scheduled kernel."""
    return KernelJob(kernel_key(kernel, target), lambda: kernel_source(symbol, kernel, target))


def kernel_source(symbol: str, kernel: Fused, target: Target) -> CudaSource:
    """Make a kernel's CUDA source; the memory plan may let an elementwise one write over its input."""
    if kernel.schedule is None:
        raise VerifyError(f"kernel {kernel.anchor} has no schedule; the tile pass has not run")
    func = template(kernel.schedule.template).build(kernel, kernel.schedule, target)
    return cuda_source(func, symbol, target, noalias=not is_elementwise(kernel))


def compiled(source: CudaSource, target: Target) -> CudaKernel:
    """Compile a source."""
    fatbin = compile_fatbin(source, target) if source.launches else Fatbin(b"", ())
    # What comes before has functions for tensor cores where a kernel uses any that are written in PTX, such as copies.
    _, _, functions = source.text.partition(KERNEL)
    tensor_cores = _MULTIPLY.search(functions) is not None
    return CudaKernel(source.symbol, fatbin.code, source.launches, source.scratch_bytes, fatbin.usage, tensor_cores)


def _key(job: KernelJob) -> str:
    parts = (job.key, nvcc_version(), *FLAGS)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _encode(kernel: CudaKernel) -> bytes:
    header = {**asdict(kernel), "code": None}
    return json.dumps(header, sort_keys=True).encode() + b"\n" + kernel.code


def _decode(content: bytes | None) -> CudaKernel | None:
    if content is None:
        return None
    head, _, code = content.partition(b"\n")
    header = json.loads(head)
    return CudaKernel(
        header["symbol"],
        code,
        tuple(_launch(launch) for launch in header["launches"]),
        int(header["scratch_bytes"]),
        tuple(Usage(**usage) for usage in header["usage"]),
        bool(header["tensor_cores"]),
    )


def _launch(fields: dict[str, Any]) -> Launch:
    """Read a launch back from JSON, whose lists were tuples."""
    read: dict[str, Any] = {key: _tuples(value) for key, value in fields.items()}
    read["maps"] = tuple((position, map_from(described)) for position, described in fields["maps"])
    return Launch(**read)


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
