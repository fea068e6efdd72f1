"""Machine code from one scheduled kernel: s_tir PrimFunc -> LLVM -> ELF object with a plain C function.

The function is

    int32_t symbol(void *buffer0, ..., void *scratch, int32_t last, int32_t lo, int32_t hi)

with the PrimFunc's buffers in their order (64-byte aligned, not aliasing), `scratch` only where
`scratch_bytes > 0`, and the outermost `parallel` loop run over [lo, hi) of its `slices` iterations.  Nothing
of TVM is needed to call it: no runtime, no thread pool, no workspace allocator.  It always returns 0.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cnnc.backends.cpu.elf_symbols import read_symbols
from cnnc.backends.load_tvm import load_tvm
from cnnc.errors import VerifyError

if TYPE_CHECKING:
    from cnnc.backends.cpu.c_abi import Abi

_LIBM = """
acos acosh asin asinh atan atan2 atanh ceil cos cosh erf exp exp10 exp2 expm1 fabs floor fmod hypot ldexp log log10
log1p log2 nearbyint nextafter pow rint round roundeven sin sincos sinh sqrt tan tanh trunc
"""
LIBM = frozenset(name + suffix for name in _LIBM.split() for suffix in ("", "f"))
"""libm functions a kernel may call: those without a vectorised form, and float64 (see lower/vector_math.py)."""

LIBC = frozenset({"memcpy", "memmove", "memset"})
"""libc functions LLVM may make out of loops."""


class CpuTarget(Protocol):
    """What code generation must know of a CPU."""

    @property
    def llvm_cpu(self) -> str:
        """LLVM's name of the processor, for example `znver4` or `x86-64-v3`."""

    @property
    def llvm_attrs(self) -> tuple[str, ...]:
        """LLVM's feature switches, for example `("+avx2", "-avx512f")`."""


@dataclass(frozen=True)
class KernelObject:
    """A compiled kernel.

    `code` is a relocatable ELF object for x86-64 whose one global function is `symbol`; `slices` the extent of its
    [lo, hi) range; `scratch_bytes` what each thread must provide as the last pointer (0: there is no such
    argument).
    """

    symbol: str
    code: bytes = field(repr=False)
    slices: int
    scratch_bytes: int = 0


@dataclass(frozen=True)
class KernelJob:
    """One kernel to compile: a scheduled `tvm.tirx.PrimFunc`, the name its C function gets, may buffers overlap."""

    func: Any
    symbol: str
    noalias: bool = True


def compile_kernel(func: Any, symbol: str, target: CpuTarget, *, noalias: bool = True) -> KernelObject:
    """Compile a scheduled s_tir PrimFunc into an object with one C function.

    `noalias=False` makes code that stays right when an output is computed in place of an input.
    Raises VerifyError if the code would need anything but libc and libm.
    """
    return _compile(KernelJob(func, symbol, noalias), target)


def compile_kernels(jobs: Sequence[KernelJob], target: CpuTarget, threads: int | None = None) -> list[KernelObject]:
    """Compile many kernels, `threads` at a time (all cores by default); results in the order of `jobs`.

    TVM gives the interpreter lock back while a pass or LLVM runs, so threads are enough.
    """
    workers = min(len(jobs), threads or len(os.sched_getaffinity(0)))
    if workers <= 1:
        return [_compile(job, target) for job in jobs]
    load_tvm()
    from cnnc.backends.lower import vector_math

    vector_math.register()
    with ThreadPoolExecutor(workers, thread_name_prefix="codegen") as pool:
        return list(pool.map(lambda job: _compile(job, target), jobs))


def kernel_text(func: Any, symbol: str, target: CpuTarget, form: Literal["tir", "ll", "s"] = "ll") -> str:
    """Return a kernel as text: lowered TIR (`tir`), optimised LLVM IR (`ll`) or assembly (`s`)."""
    if form == "tir":
        mod, _ = _lower(KernelJob(func, symbol), target)
        return str(mod.script())
    module, _ = _to_llvm(KernelJob(func, symbol), target)
    return str(module.inspect_source(form))


def _compile(job: KernelJob, target: CpuTarget) -> KernelObject:
    module, abi = _to_llvm(job, target)
    code = _object_bytes(module)
    _check_symbols(code, job.symbol)
    return KernelObject(job.symbol, code, abi.slices, abi.scratch_bytes)


def _to_llvm(job: KernelJob, target: CpuTarget) -> tuple[Any, Abi]:
    """Lower the job and run LLVM's optimiser over it: TVM's LLVM module, and the ABI."""
    tvm = load_tvm()
    mod, abi = _lower(job, target)
    build = tvm.get_global_func("target.build.llvm")
    try:
        return build(mod, _tvm_target(target)), abi
    except tvm.error.InternalError as error:
        if "LLVM module verification failed" not in str(error):
            raise
    # LLVM 22 breaks some short straight-line sums when it vectorises them ("does not dominate all uses").
    return build(mod, _tvm_target(target, level=1)), abi


def _tvm_target(target: CpuTarget, level: int = 3) -> Any:
    tvm = load_tvm()
    description = {
        "kind": "llvm",
        "mtriple": "x86_64-unknown-linux-gnu",
        "mcpu": target.llvm_cpu,
        "mattr": list(target.llvm_attrs),
        "opt-level": level,
    }
    return tvm.target.Target(description)


def _lower(job: KernelJob, target: CpuTarget) -> tuple[Any, Abi]:
    """Lower a scheduled PrimFunc to flat loops over pointers, with C's calling convention."""
    tvm = load_tvm()
    from tvm import s_tir, tirx

    from cnnc.backends.cpu.c_abi import Abi, c_function
    from cnnc.backends.lower import vector_math
    from cnnc.backends.lower.flatten import flatten_buffers
    from cnnc.backends.lower.loops import WRITTEN_LOOPS
    from cnnc.backends.lower.temporaries import bind_lets

    vector_math.register()
    abi = Abi()

    def to_c_function(mod: Any, _ctx: Any) -> Any:
        functions = {var: c_function(func, job.symbol, job.noalias, abi) for var, func in mod.functions.items()}
        return tvm.IRModule(functions)

    def flat(mod: Any, _ctx: Any) -> Any:
        return flatten_buffers(mod)

    def without_lets(mod: Any, _ctx: Any) -> Any:
        return tvm.IRModule({var: bind_lets(func) for var, func in mod.functions.items()})

    schedule, loops = s_tir.transform, tirx.transform
    written = job.func.attrs.get(WRITTEN_LOOPS) is not None
    steps = [
        schedule.CanonicalizeLoop(),
        schedule.LowerInitBlock(),
        schedule.PlanAndUpdateBufferAllocationLocation(),
        schedule.ConvertBlocksToOpaque(),
        *(() if written else (schedule.CompactBufferAllocation(),)),
        schedule.LowerMatchBuffer(),
        schedule.StmtSimplify(),
        schedule.AnnotateIrregularLoop(),
        schedule.LowerOpaqueBlock(),
        tvm.transform.module_pass(flat, opt_level=0, name="cnnc.FlattenBuffers"),
        loops.BF16ComputeLegalize(),
        loops.NarrowDataType(32),
        schedule.LoopPartition(),
        loops.VectorizeLoop(True),
        loops.StorageRewrite(),
        schedule.HoistIfThenElse(),
        loops.UnrollLoop(),
        schedule.RenormalizeSplitPattern(),
        loops.StmtSimplify(),
        loops.RemoveNoOp(),
        loops.CommonSubexprElim(),
        loops.VerifyMemory(),
        # Legalising bf16 storage refuses buffers among the parameters, so they become pointers before it.
        tvm.transform.module_pass(to_c_function, opt_level=0, name="cnnc.CFunction"),
        loops.BF16StorageLegalize(),
        loops.LowerIntrin(),
        tvm.transform.module_pass(without_lets, opt_level=0, name="cnnc.BindLets"),
    ]
    mod = tvm.IRModule({job.symbol: job.func.with_attr("global_symbol", job.symbol)})
    with tvm.transform.PassContext(opt_level=3, config={"s_tir.LoopPartition": {"partition_const_loop": True}}):
        mod = loops.BindTarget(_tvm_target(target))(mod)
        mod = tvm.transform.Sequential(steps)(mod)
    return mod, abi


def _object_bytes(module: Any) -> bytes:
    """Have LLVM write the module's object file, and return its bytes."""
    with tempfile.TemporaryDirectory(prefix="cnnc-") as folder:
        path = os.path.join(folder, "kernel.o")
        module.write_to_file(path)
        with open(path, "rb") as file:
            return file.read()


def _check_symbols(code: bytes, symbol: str) -> None:
    """Refuse an object that lacks its function or needs more than libc and libm."""
    symbols = read_symbols(code)
    if symbol not in symbols.defined:
        raise VerifyError(f"kernel {symbol}: the object does not define it (it has {sorted(symbols.defined)})")
    missing = symbols.undefined - LIBC - LIBM
    if missing:
        raise VerifyError(f"kernel {symbol}: the object needs {', '.join(sorted(missing))}, which no library has")
