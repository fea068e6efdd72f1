"""What the host side needs to know of a compiled model: ports, kernel calls, memory, weights."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cnnc.backends.host.device import DeviceCode, DeviceLaunch
from cnnc.errors import LimitError, VerifyError

Space = Literal["input", "output", "weights", "arena", "scratch", "status", "map"]

# dtype name -> (number in the C interface, bytes of one element)
DTYPES: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f64": (2, 8),
    "f16": (3, 2),
    "bf16": (4, 2),
    "i8": (5, 1),
    "u8": (6, 1),
    "i32": (7, 4),
    "i64": (8, 8),
    "bool": (9, 1),
    "i16": (10, 2),
    "u16": (11, 2),
    "u32": (12, 4),
    "u64": (13, 8),
}
ALIGNMENT = 64
BASELINE_CPU = "x86-64"
"""What the host's part of a program runs on."""
ABI = 2
"""The version of the interface between header, binary and loader: `CNNC_RT_ABI` of the runtime."""
TABLE_SYMBOL = "cnnc_model_v1"
"""The one symbol that every binary has, so that a loader need not know its prefix."""
# What the small code model reaches, and how much of it weights may take; the rest is for code and tables.
MAX_IMAGE = 2**31
MAX_WEIGHTS = MAX_IMAGE - 2**27
MAX_SLICES = 2**31 - 1

# What `runtime/cpu.c` can check, under LLVM's names.
_CPU_FEATURES = """
    adx aes amx-bf16 amx-complex amx-fp16 amx-int8 amx-tile avx avx2 avx512bf16 avx512bitalg avx512bw
    avx512cd avx512dq avx512f avx512fp16 avx512ifma avx512vbmi avx512vbmi2 avx512vl avx512vnni
    avx512vp2intersect avx512vpopcntdq avxifma avxneconvert avxvnni avxvnniint16 avxvnniint8 bmi bmi2
    clflushopt clwb clzero cmov cx16 f16c fma fsgsbase fxsr gfni lahf lzcnt mmx movbe movdir64b movdiri
    pclmul popcnt prefetchi prfchw rdrnd rdseed sahf sha sse sse2 sse3 sse4.1 sse4.2 sse4a ssse3 vaes
    vpclmulqdq xsave xsavec xsaveopt
"""
CPU_FEATURES = frozenset(_CPU_FEATURES.split())

_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_.$]*\Z")

# Words that must not become the prefix of `<prefix>_create` and its companions: keywords of C and C++,
# and the libc families whose names end in one of our words (pthread_create, timer_create, ...).
_RESERVED_WORDS = """
    auto break case char const continue default do double else enum extern float for goto if inline int long
    register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
    alignas alignof asm bool catch class concept constexpr decltype delete dynamic_cast explicit export false
    friend mutable namespace new noexcept not nullptr operator or and private protected public requires template
    this throw true try typeid typename using virtual xor main timer thrd mtx cnd tss sem mq aio hcreate svc clnt
    auth xdr svcudp svctcp svcraw svcunix clntudp clnttcp clntraw clntunix authnone authunix authdes xdrmem
    xdrrec xdrstdio timerfd signalfd eventfd epoll inotify shm key argz memfd
"""
_RESERVED = frozenset(_RESERVED_WORDS.split())
_RESERVED_STARTS = ("pthread", "posix_", "authdes", "cnnc", "authunix", "clnt", "svc", "xdr", "_")
_MAX_PREFIX = 60


@dataclass(frozen=True)
class Port:
    """One input or output tensor of a model, dense and row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Slot:
    """Where one pointer argument of a kernel points.

    `offset` is the index for input and output, else bytes from the start of that memory; scratch memory is
    given to each thread apart.
    """

    space: Space
    offset: int


@dataclass(frozen=True)
class KernelCall:
    """One call of `int32_t symbol(void* a0, ..., int32_t last, int32_t lo, int32_t hi)`, cut into independent `slices`.

    A call does the slices [lo, hi); `last` is the one of this kernel that was done last with the same scratch memory.
    `flops` and `bytes` are for the whole call; `layers` are the user's own layer names.  On a GPU the call is its
    `launches`, in order, and `args` are empty.
    """

    symbol: str
    args: tuple[Slot, ...]
    slices: int = 1
    layers: tuple[str, ...] = ()
    flops: int = 0
    bytes: int = 0
    algorithm: str = ""
    schedule: str = ""
    launches: tuple[DeviceLaunch, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A model for one batch size: its ports, and the kernel calls in order."""

    batch: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    calls: tuple[KernelCall, ...]


@dataclass(frozen=True)
class Program:
    """A whole model as the host driver runs it: kernels in order over one arena and one block of weights.

    The weights are pieces of memory that follow each other without a gap; `features` are the CPU features the
    kernels need, of CPU_FEATURES; `meta` is JSON that travels in the binary.  `batch` is 0 where no batch size was
    asked for; `others` is the model for further ones, over the same arena and weights.  With `device` the kernels run
    on a GPU.
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    calls: tuple[KernelCall, ...]
    arena_bytes: int
    scratch_bytes: int
    weights: Sequence[bytes | memoryview]
    cpu: str = BASELINE_CPU
    features: tuple[str, ...] = ()
    meta: str = "{}"
    batch: int = 0
    others: tuple[Variant, ...] = ()
    device: DeviceCode | None = None

    def __post_init__(self) -> None:
        check_program(self)

    @property
    def prefix(self) -> str:
        """The C identifier all public functions of this model begin with."""
        return c_prefix(self.name)

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The model for each batch size, in the order asked for."""
        return (Variant(self.batch, self.inputs, self.outputs, self.calls), *self.others)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the block of weights."""
        return sum(memoryview(piece).nbytes for piece in self.weights)


def c_prefix(name: str) -> str:
    """Return a C identifier made from a model's name: `[A-Za-z0-9_]`, no keyword, no name of libc."""
    prefix = re.sub(r"[^A-Za-z0-9_]+", "_", name, flags=re.ASCII).rstrip("_")
    if len(prefix) > _MAX_PREFIX:
        digest = hashlib.sha256(name.encode("utf-8", "backslashreplace")).hexdigest()[:8]
        prefix = f"{prefix[: _MAX_PREFIX - 9]}_{digest}"
    if not prefix:
        return "model"
    if prefix[0].isdigit() or prefix in _RESERVED or prefix.startswith(_RESERVED_STARTS):
        return f"model_{prefix.lstrip('_')}"
    return prefix


def check_program(program: Program) -> None:
    """Raise VerifyError unless every port, slot and size of the program is possible.

    A wrong program is a bug of the back end that made it, never of the user's model.
    """
    if program.weight_bytes > MAX_WEIGHTS:
        raise LimitError(
            f"{program.name}: {program.weight_bytes:,} bytes of weights; a binary holds at most {MAX_WEIGHTS:,}"
        )
    if program.arena_bytes < 0 or program.scratch_bytes < 0:
        raise VerifyError(f"{program.name}: arena or scratch of a negative size")
    unknown = sorted(set(program.features) - CPU_FEATURES)
    if unknown:
        raise VerifyError(f"{program.name}: the runtime cannot check for the CPU features {unknown}")
    arguments: dict[str, int] = {}
    for variant in program.variants:
        _check_variant(program, variant, arguments)
    batches = [variant.batch for variant in program.variants]
    if len(set(batches)) < len(batches) or min(batches) < (1 if program.others else 0):
        raise VerifyError(f"{program.name}: batch sizes {batches}, wanted are different ones of at least 1")


def _check_variant(program: Program, variant: Variant, arguments: dict[str, int]) -> None:
    """Check the model for one batch size; `arguments` counts those of each symbol."""
    for ports, first in ((variant.inputs, program.inputs), (variant.outputs, program.outputs)):
        if [(port.name, port.dtype) for port in ports] != [(port.name, port.dtype) for port in first]:
            raise VerifyError(f"{program.name}: other ports for batch size {variant.batch} than for {program.batch}")
    for port in (*variant.inputs, *variant.outputs):
        _check_port(program, port)
    for index, call in enumerate(variant.calls):
        where = f"{program.name}: kernel {index} ({call.symbol!r})"
        if not _SYMBOL.match(call.symbol) or call.symbol.startswith("cnnc_rt_"):
            raise VerifyError(f"{where}: not a symbol a kernel may have")
        if not 1 <= call.slices <= MAX_SLICES:
            raise VerifyError(f"{where}: {call.slices} slices, at least 1 is needed")
        if arguments.setdefault(call.symbol, len(call.args)) != len(call.args):
            raise VerifyError(f"{where}: called with {len(call.args)} and {arguments[call.symbol]} arguments")
        if call.flops < 0 or call.bytes < 0:
            raise VerifyError(f"{where}: negative flops or bytes")
        for slot in call.args:
            _check_slot(program, where, slot)
        for launch in call.launches:
            _check_launch(program, where, launch)


def _check_launch(program: Program, where: str, launch: DeviceLaunch) -> None:
    if program.device is None or not 0 <= launch.module < len(program.device.modules):
        raise VerifyError(f"{where}: launch {launch.function!r}: there is no module {launch.module}")
    if min(*launch.grid, *launch.block) < 1 or launch.shared_bytes < 0:
        raise VerifyError(f"{where}: launch {launch.function!r}: {launch.grid} blocks of {launch.block} threads")
    for slot, described in launch.maps:
        _check_slot(program, where, slot)
        if not described.is_possible:
            raise VerifyError(f"{where}: launch {launch.function!r}: no driver makes {described}")
    for slot in launch.args:
        if slot.space != "map":
            _check_slot(program, where, slot)
        elif not 0 <= slot.offset < len(launch.maps):
            raise VerifyError(f"{where}: launch {launch.function!r}: there is no map {slot.offset}")


def _check_port(program: Program, port: Port) -> None:
    if port.dtype not in DTYPES:
        raise VerifyError(f"{program.name}: port {port.name!r} has dtype {port.dtype!r}, known are {list(DTYPES)}")
    if any(extent < 0 for extent in port.shape):
        raise VerifyError(f"{program.name}: port {port.name!r} has shape {port.shape}")


def _check_slot(program: Program, where: str, slot: Slot) -> None:
    sizes: dict[str, int] = {
        "input": len(program.inputs),
        "output": len(program.outputs),
        "weights": program.weight_bytes,
        "arena": program.arena_bytes,
        "scratch": program.scratch_bytes,
        "status": 0 if program.device is None else 1,
    }
    if slot.space not in sizes:
        raise VerifyError(f"{where}: {slot.space!r} is no memory, known are {list(sizes)}")
    size = sizes[slot.space]
    is_index = slot.space in ("input", "output")
    # A buffer of zero bytes may sit at the very end of its memory.
    if not 0 <= slot.offset < size and not (slot.offset == size and not is_index):
        raise VerifyError(f"{where}: {slot.space} {slot.offset} is outside of {size}")
    if not is_index and slot.offset % ALIGNMENT:
        raise VerifyError(f"{where}: {slot.space} offset {slot.offset} is no multiple of {ALIGNMENT}")


def kernel_symbols(calls: Sequence[KernelCall]) -> tuple[str, ...]:
    """Return the distinct kernel symbols in the order of their first call."""
    return tuple(dict.fromkeys(call.symbol for call in calls))
