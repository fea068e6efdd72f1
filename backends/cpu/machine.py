"""What kernel templates know of a CPU: vector registers, caches, and the rates the cost models count with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["AVX2", "AVX512", "TILE_LINE", "TILE_ROWS", "Machine"]

TILE_ROWS, TILE_LINE = 16, 16
"""Rows of a tile register of AMX, and 32-bit numbers in a row: as many float32, or twice as many bf16."""


@dataclass(frozen=True)
class Machine:
    """One core of a CPU and how many there are; sizes in bytes, rates per clock cycle of one core.

    `lanes` is the number of float32 in a vector register, which is also the channel block of NCHWc layouts.
    """

    lanes: int
    registers: int
    l1: int = 32 << 10
    l2: int = 1 << 20
    l3: int = 16 << 20
    threads: int = 1
    hertz: float = 3e9
    fma_ports: int = 2
    fma_latency: int = 4
    loads: float = 2.0
    """Vector loads (or broadcasts) from L1."""
    l2_bytes: float = 24.0
    """Bytes that flow from L2 into L1 while the core computes."""
    memory_bytes: float = 16.0
    """Bytes that flow from beyond L2, as one core streams."""
    stream_bytes: float = 9.0
    """The same of what is in no cache at all, as weights are at their first use in a run."""
    load_cycles: float = 0.0
    """What a vector load or broadcast adds to the arithmetic it serves: more than nothing where another thread of the
    core takes its share of the load ports."""

    @property
    def broadcasts_from_memory(self) -> bool:
        """Whether a multiply-add takes one float from memory for all lanes, as those of AVX-512 do."""
        return self.lanes >= 16

    @property
    def flops(self) -> float:
        """Peak float32 operations a second of one core (a multiply-add is 2)."""
        return 2.0 * self.lanes * self.fma_ports * self.hertz

    def turns(self, slices: int, alike: int = 1) -> int:
        """Give how many slices a thread does one after the other; or, where neighbours are `alike`, how many kinds."""
        turns = -(-slices // self.threads)
        straddled = turns % alike != 0 and alike % turns != 0
        return -(-turns // alike) + straddled

    def sharing(self, slices: int) -> float:
        """Give by how much longer a kernel takes for being cut into few slices.

        Cores are not equally fast: a lane that is done takes over slices of the others, but the last of each is waited
        for.  A binary for one thread should gain by more.
        """
        lanes = min(self.threads, slices)
        if lanes > 1:
            return 1.0 + LAST_SLICE * lanes / slices
        return 1.0 + MORE_THREADS * -(-slices // MANY_THREADS) * MANY_THREADS / slices

    def fits(self, pixels: int, vectors: int) -> bool:
        """Whether a register tile of `pixels` x `vectors` sums compiles without spills.

        Beside the sums, the smaller side's operands stay in registers while the larger side's pass through one.
        With one vector, LLVM adds each sum to a product in the register of the broadcast input, if that takes a
        register: then every sum needs two.  Where it does not, but three operands or more stay, LLVM moves more of
        them at a time than one.
        """
        if vectors == 1 and not self.broadcasts_from_memory:
            return 2 * pixels <= self.registers
        stay = min(pixels, vectors)
        passing = 3 if self.broadcasts_from_memory and stay > 2 else 1
        return pixels * vectors + stay + passing <= self.registers

    def tile_cycles(self, pixels: int, vectors: int) -> float:
        """Count the cycles a register tile takes for one term of its sums: arithmetic, its latency, or loads.

        A tile that takes all registers is at the mercy of LLVM's allocator, and counts for more.
        """
        arithmetic = pixels * vectors / self.fma_ports
        cycles = max(arithmetic + TERM_CYCLES, self.fma_latency, (pixels + vectors) / self.loads)
        full = pixels * vectors + min(pixels, vectors) + 1 == self.registers
        return cycles * 1.06 if full else cycles

    def loading_instructions(self, pixels: int, vectors: int) -> int:
        """Count the loads of a term that are instructions of their own, not operands of a multiply-add."""
        if self.broadcasts_from_memory and vectors == 1:
            return 1
        return pixels + vectors

    def vector_parts(self, pixels: int, group: int) -> tuple[tuple[int, int], ...]:
        """Split a group of `group` output vectors among tiles of `pixels`: ((vectors, how many tiles), ...)."""
        return _vector_parts(self, pixels, group)

    def group_cycles(self, pixels: int, group: int) -> float:
        """Count the cycles one term takes for all vectors of a group, split as `vector_parts` does."""
        return sum(count * self.tile_cycles(pixels, v) for v, count in self.vector_parts(pixels, group))


LAST_SLICE = 0.25
"""How long the last slice of a lane is waited for, on the average, as a share of it."""

MORE_THREADS, MANY_THREADS = 0.01, 8
"""What it is worth that slices divide evenly among more threads than expected, and how many those may be."""

TERM_CYCLES = 0.3
"""What a term of the sums costs beside its multiply-adds."""


@lru_cache(4096)
def _vector_parts(machine: Machine, pixels: int, group: int) -> tuple[tuple[int, int], ...]:
    """Find the cheapest split; of equals the one with the fewest different tiles, as each is code of its own."""
    fitting = [v for v in range(1, group + 1) if machine.fits(pixels, v)]
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for size in range(1, group + 1):
        options = [(best[size - v][0] + machine.tile_cycles(pixels, v), v) for v in fitting if v <= size]
        options += [(size // v * machine.tile_cycles(pixels, v), v) for v in fitting if size % v == 0]
        cycles, v = min(options, key=lambda o: (round(o[0], 6), size % o[1] != 0, o[1]))
        parts = (v,) * (size // v) if size % v == 0 else (v, *best[size - v][1])
        best.append((cycles, parts))
    return tuple((v, best[group][1].count(v)) for v in sorted(set(best[group][1]), reverse=True))


AVX2 = Machine(lanes=8, registers=16, stream_bytes=5.8)
"""x86-64-v3: 16 registers of 8 floats; rates as measured on AMD's third generation of EPYCs."""

AVX512 = Machine(lanes=16, registers=32, memory_bytes=9.0, load_cycles=0.3)
"""x86-64-v4: 32 registers of 16 floats; rates as measured on Intel's fifth generation of Xeons."""
