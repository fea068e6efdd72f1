"""Targets: what a binary is made for: `cpu` (this machine), a named CPU, or a CUDA architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from cnnc.errors import UsageError

_V2 = ("cx16", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_ICELAKE = (*_V4, "avx512ifma", "avx512vbmi", "avx512vbmi2", "avx512vnni", "avx512bitalg", "avx512vpopcntdq", "gfni")
_ZNVER4 = (*_ICELAKE, "avx512bf16")
_SAPPHIRE_RAPIDS = (*_ZNVER4, "avx512fp16", "amx-tile", "amx-bf16", "amx-int8")

CPUS: dict[str, tuple[str, ...]] = {
    "x86-64-v2": _V2,
    "x86-64-v3": _V3,
    "x86-64-v4": _V4,
    "haswell": _V3,
    "skylake": _V3,
    "znver2": _V3,
    "znver3": _V3,
    "skylake-avx512": _V4,
    "cascadelake": (*_V4, "avx512vnni"),
    "icelake-server": _ICELAKE,
    "sapphirerapids": _SAPPHIRE_RAPIDS,
    "znver4": _ZNVER4,
    "znver5": _ZNVER4,
}
"""The CPUs code can be made for, by LLVM name, each with the features its code may use."""

CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a")
"""The CUDA architectures code can be made for, in order.

A GPU also runs machine code for a lower one of the same first digit, and PTX, which its driver compiles, for any lower;
but what is made for `sm_90a`, with what no later one has, runs on 9.0 alone.
"""

_FLAG_OF_FEATURE = {
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "avx512ifma": "avx512ifma",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
}
"""Where the kernel's name in /proc/cpuinfo is not LLVM's."""


@dataclass(frozen=True)
class Caches:
    """Data cache sizes in bytes, of one core (L3: of the whole chip).

    They are what kernels may count on, not this machine's, of which another thread may have a part: so a model is
    compiled the same way everywhere.
    """

    l1: int = 32 << 10
    l2: int = 1 << 20
    l3: int = 16 << 20


@dataclass(frozen=True)
class Target:
    """A kind of machine, the architecture code is made for, and the sizes that cost models read.

    `str` gives what `parse` reads: `cpu:x86-64-v4`, `cuda:sm_90`.  `threads` is only what cost models expect; a binary
    runs with any number.  What is said of vectors, LLVM and caches is of CPUs.
    """

    kind: str
    arch: str
    features: tuple[str, ...]
    caches: Caches = Caches()
    threads: int = 1

    @staticmethod
    def parse(text: str, threads: int = 1) -> Target:
        """Read `cpu`, `cpu:NAME` with a name from `CPUS`, or `cuda:ARCH` with one from `CUDA_ARCHS`.

        `cpu` is the highest x86-64 level of this machine, or `sapphirerapids` where it has AMX, so that a binary made
        here runs on every machine of that level.  Raises `UsageError` for anything else.
        """
        kind, _, arch = text.partition(":")
        if kind == "cuda":
            return _parse_cuda(text, arch, threads)
        if kind != "cpu":
            names = f"NAME one of {', '.join(CPUS)}, ARCH one of {', '.join(CUDA_ARCHS)}"
            raise UsageError(f"target {text!r} is not known; use cpu, cpu:NAME or cuda:ARCH with {names}")
        if arch in ("", "native"):
            arch = native_arch()
        if arch not in CPUS:
            raise UsageError(f"target {text!r}: CPU {arch!r} is not known; use one of {', '.join(CPUS)}")
        return Target(kind, arch, CPUS[arch], threads=threads)

    @property
    def is_gpu(self) -> bool:
        """Whether kernels run on a GPU: layouts stay plain there, and the algorithms of CPUs do not apply."""
        return self.kind == "cuda"

    @property
    def vector_bytes(self) -> int:
        """The width of a vector register in bytes."""
        if "avx512f" in self.features:
            return 64
        return 32 if "avx" in self.features else 16

    @property
    def vector_lanes(self) -> int:
        """How many f32 a vector register holds; the channel block of blocked layouts."""
        return self.vector_bytes // 4

    @property
    def vector_registers(self) -> int:
        """How many vector registers there are."""
        return 32 if "avx512f" in self.features else 16

    @property
    def llvm_cpu(self) -> str:
        """LLVM's name of the processor."""
        return self.arch

    @property
    def llvm_attrs(self) -> tuple[str, ...]:
        """LLVM's feature switches: no halved vectors on AVX-512 CPUs, and of AMD's no SSE4A, which `features` lacks."""
        wide = ("-prefer-256-bit",) if "avx512f" in self.features else ()
        return (*wide, "-sse4a") if self.arch.startswith("znver") else wide

    @property
    def multiplies_tiles(self) -> bool:
        """Whether there are instructions that multiply tiles of bf16 numbers, and of int8 (AMX)."""
        return {"amx-bf16", "amx-int8"} <= set(self.features)

    @property
    def multiplies_in_groups(self) -> bool:
        """Whether groups of four warps multiply matrices in shared memory (`wgmma`)."""
        return self.arch == "sm_90a"

    def with_threads(self, threads: int) -> Target:
        """Give the same target for another thread count."""
        return replace(self, threads=threads)

    def missing_features(self) -> tuple[str, ...]:
        """List what this machine lacks to run code for the target."""
        return tuple(f for f in self.features if _FLAG_OF_FEATURE.get(f, f) not in machine_flags())

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}"


def is_portable(arch: str) -> bool:
    """Whether what is compiled for an architecture runs on all newer ones as PTX: not with the features of `sm_90a`."""
    return arch[-1].isdigit()


def _parse_cuda(text: str, arch: str, threads: int) -> Target:
    if arch not in CUDA_ARCHS:
        which = f"architecture {arch!r} is not known" if arch else "the architecture is missing"
        raise UsageError(f"target {text!r}: {which}; use cuda:ARCH with ARCH one of {', '.join(CUDA_ARCHS)}")
    return Target("cuda", arch, (), threads=threads)


@cache
def machine_flags() -> frozenset[str]:
    """Read this machine's CPU flags (empty where /proc/cpuinfo is not to be had)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


@cache
def cpu_model_name() -> str:
    """Read what this machine's CPU calls itself."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown CPU"
    line = next((line for line in text.splitlines() if line.startswith("model name")), ": unknown CPU")
    return line.partition(":")[2].strip()


@cache
def native_arch() -> str:
    """Give the highest x86-64 level this machine runs, or `sapphirerapids` if it multiplies tiles as those CPUs do."""
    for level in ("sapphirerapids", "x86-64-v4", "x86-64-v3"):
        if all(_FLAG_OF_FEATURE.get(f, f) in machine_flags() for f in CPUS[level]):
            return level
    return "x86-64-v2"
