"""Kernels that compute one reduction directly, in registers: what they read, and the threads that share the work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cnnc.backends.cuda.machine import GPUS, LATENCY, MULTIPROCESSORS, SECONDS_PER_LAUNCH, sustained_flops
from cnnc.ir.types import TensorType
from cnnc.ops.blocked import channel_layout
from cnnc.ops.fused import Fused
from cnnc.target import Target

VECTOR = 4
"""Neighbours that a thread loads at once: 16 bytes of f32, 8 of the narrow types."""

_RANK = 4
_BUSY_WARPS = 4
"""Warps that keep a multiprocessor's units for arithmetic busy."""


def image_block(type_: TensorType) -> int | None:
    """Give the channels in a block of an image, 1 where it is plain; None for what lies in another way."""
    if type_.rank != _RANK:
        return None
    block = 1 if type_.layout is None else type_.layout.block("C")
    fits = type_.layout == channel_layout(_RANK, block) and (block == 1 or block % VECTOR == 0)
    return block if fits else None


def moved_bytes(kernel: Fused) -> int:
    """Count the bytes that a kernel reads and writes."""
    return sum(value.type.nbytes for value in (*kernel.body.inputs, *kernel.body.outputs))


@dataclass(frozen=True)
class Work:
    """What a launch does: blocks of threads, each thread so many instructions.

    `chain` is how often a thread waits for memory, one load after the other; `registers` are of a thread.
    """

    blocks: int
    threads: int
    instructions: float
    chain: float
    registers: int
    shared_bytes: int = 0


def seconds(work: Work, nbytes: int, target: Target) -> float:
    """Estimate a launch by what takes longest: the memory's bandwidth, its latency, or issuing instructions.

    The multiprocessor with the most blocks decides, which runs them in rounds of as many as it has room for.
    """
    gpu, multiprocessors = GPUS[target.arch], MULTIPROCESSORS[target.arch]
    share, _ = gpu.occupancy(work.threads, work.registers, work.shared_bytes)
    warps = math.ceil(work.threads / 32)
    resident = max(1, round(share * gpu.warps / warps))
    blocks = math.ceil(work.blocks / multiprocessors)
    busy = min(1.0, min(blocks, resident) * warps / _BUSY_WARPS)
    # An addition and a product are one instruction.
    rate = sustained_flops(target.arch) / 2 / multiprocessors * busy
    issue = blocks * warps * 32 * work.instructions / rate
    latency = math.ceil(blocks / resident) * work.chain * LATENCY
    return max(issue, nbytes / gpu.bandwidth, latency) + SECONDS_PER_LAUNCH
