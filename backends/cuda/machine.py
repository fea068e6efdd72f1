"""What is known of GPUs: for cost models, and for saying what a kernel can come to at best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cnnc.target import CUDA_ARCHS

LANES = 32
"""The threads of a warp."""

CHUNK_BYTES = 16
"""What a thread reads or copies at once, at most."""

_REGISTERS = 1 << 16
"""Of a multiprocessor, and of a block at most."""

_REGISTER_UNIT = 256
"""Registers are given to a warp in such portions ..."""

QUARTERS = 4
"""... by one of so many parts of the multiprocessor, each with cores and warps of its own."""

CYCLES_A_SECOND = 1.4e9
"""Of a multiprocessor at work."""

_SHARED_UNIT = 128
_SHARED_RESERVED = 1 << 10
"""Bytes of shared memory: given to blocks in such portions, after what the system takes in each."""


_L2_BANDWIDTH = 4.5e10
"""Bytes a second that a multiprocessor gets from the L2 cache: 32 a cycle."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of an architecture, and the limits of its multiprocessors.

    `flops` is f32 operations a second on ordinary cores, `tensor_flops` those on tensor cores by the type of the
    factors, adding up in f32, all without sparsity; `bandwidth` is bytes of memory a second, `l2_bytes` are those of
    the L2 cache.  From the CUDA programming guide's table of compute capabilities and NVIDIA's data sheets.
    """

    name: str
    multiprocessors: int
    warps: int
    blocks: int
    shared_bytes: int
    flops: float
    tensor_flops: Mapping[str, float]
    bandwidth: float
    l2_bytes: int

    @property
    def l2_bandwidth(self) -> float:
        """Bytes a second that the L2 cache gives all multiprocessors."""
        return self.multiprocessors * _L2_BANDWIDTH

    @property
    def most_shared_bytes(self) -> int:
        """Shared memory that a block may have."""
        return self.shared_bytes - _SHARED_RESERVED

    def roofline(self, flops: int, nbytes: int, dtype: str | None) -> tuple[float, str]:
        """Give the least seconds for operations and bytes of memory, and whether `arithmetic` or `memory` takes them.

        `dtype` is that of tensor cores, None where they are not used.  Williams et al., "Roofline", CACM 2009.
        """
        arithmetic = flops / (self.flops if dtype is None else self.tensor_flops[dtype])
        memory = nbytes / self.bandwidth
        return max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory"

    def occupancy(self, threads: int, registers: int, shared_bytes: int) -> tuple[float, str]:
        """Give the share of a multiprocessor's warps that blocks of such threads can keep there, and what limits it.

        `registers` are of a thread, `shared_bytes` of a block, static and dynamic.  As NVIDIA's occupancy calculator
        has it.
        """
        warps = _ceil(threads, LANES)
        of_a_warp = _ceil(max(registers, 1) * LANES, _REGISTER_UNIT) * _REGISTER_UNIT
        fitting = _REGISTERS // QUARTERS // of_a_warp * QUARTERS
        shared = _ceil(shared_bytes + _SHARED_RESERVED, _SHARED_UNIT) * _SHARED_UNIT
        limits = {
            "warps": self.warps // warps,
            "blocks": self.blocks,
            "registers": fitting // warps,
            "shared memory": self.shared_bytes // shared,
        }
        limit = min(limits, key=lambda name: limits[name])
        return limits[limit] * warps / self.warps, limit

    def resident(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Give how many such blocks a multiprocessor runs at once; 1 for those too large for any."""
        share, _ = self.occupancy(threads, registers, shared_bytes)
        return max(1, round(share * self.warps / _ceil(threads, LANES)))


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)


def _tensor_flops(tf32: float, narrow: float) -> Mapping[str, float]:
    return {"tf32": tf32, "f16": narrow, "bf16": narrow}


_H100 = Gpu("H100", 132, 64, 32, 228 << 10, 66.9e12, _tensor_flops(495e12, 989e12), 3.35e12, 50 << 20)

GPUS = {
    "sm_80": Gpu("A100", 108, 64, 32, 164 << 10, 19.5e12, _tensor_flops(156e12, 312e12), 2.04e12, 40 << 20),
    "sm_86": Gpu("RTX 3090 Ti", 84, 48, 16, 100 << 10, 40e12, _tensor_flops(40e12, 80e12), 1.01e12, 6 << 20),
    "sm_89": Gpu("RTX 4090", 128, 48, 24, 100 << 10, 82.6e12, _tensor_flops(83e12, 165e12), 1.01e12, 72 << 20),
    "sm_90": _H100,
    "sm_90a": _H100,
}
"""The GPU that stands for each architecture."""

MULTIPROCESSORS = {arch: GPUS[arch].multiprocessors for arch in CUDA_ARCHS}
"""Whether there are blocks enough decides between tiles."""

SECONDS_PER_LAUNCH = 2e-6
"""What a launch takes beside its work."""

NOT_HIDDEN = 0.05
"""The share of each bound of a kernel that goes on top of the highest: they do not overlap altogether."""


def sustained_flops(arch: str) -> float:
    """Give the f32 operations a second that kernels come to on ordinary cores when all multiprocessors have blocks."""
    return GPUS[arch].flops / 2


COPY = 25
"""Instructions to put a number of an operand into shared memory: its index, its conditions, its address."""

LATENCY = 5e-7
"""Seconds from a load that misses the caches to its use."""
