"""nvcc: where it is, and from CUDA source to a fat binary with what ptxas says of it."""

from __future__ import annotations

import importlib.util
import re
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cnnc.backends.cuda.codegen import CudaSource
from cnnc.backends.cuda.machine import GPUS
from cnnc.backends.host.toolchain import run_tool, work_folder
from cnnc.errors import EnvironmentProblem, VerifyError
from cnnc.target import Target, is_portable

CURE = "pip install nvidia-cuda-nvcc nvidia-cuda-cccl, or put the nvcc of NVIDIA's CUDA toolkit on PATH"

FLAGS = ("-fatbin", "-O3", "-std=c++17", "-w", "-Xptxas", "-v")
"""No fast math: divisions, roots and denormals are IEEE's, as on a CPU."""

_WHEEL_FOLDERS = ("cu13/bin", "cuda_nvcc/bin")
"""Where the packages nvidia-cuda-nvcc put it, below the package `nvidia`."""

_FUNCTION = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What ptxas says a function needs: registers of a thread, bytes of its stack, of spills, of shared memory."""

    function: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Fatbin:
    """Machine code of one kernel, with PTX where a newer GPU can run it, and what each of its functions needs."""

    code: bytes
    usage: tuple[Usage, ...]


def find_nvcc() -> str:
    """Give the path of nvcc: on PATH, or in the wheel nvidia-cuda-nvcc; raises `EnvironmentProblem` without one."""
    found = shutil.which("nvcc") or _in_wheel()
    if found is None:
        raise EnvironmentProblem(f"nvcc not found, which compiles kernels for CUDA: {CURE}")
    return found


def nvcc_version() -> str:
    """Give what nvcc says of itself; raises `EnvironmentProblem` without one."""
    return _version(find_nvcc())


@cache
def _version(path: str) -> str:
    return run_tool([path, "--version"], Path("/")).strip()


def _in_wheel() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for folder in _WHEEL_FOLDERS:
            path = Path(root) / folder / "nvcc"
            if path.is_file():
                return str(path)
    return None


def compile_fatbin(source: CudaSource, target: Target) -> Fatbin:
    """Compile a kernel for the target's architecture, to PTX too for GPUs that are newer than any we know.

    Raises `EnvironmentProblem` where nvcc fails or is missing, and `VerifyError` for code no GPU of the target could
    launch.
    """
    with work_folder() as folder:
        (folder / "kernel.cu").write_text(source.text)
        virtual = target.arch.replace("sm_", "compute_")
        codes = f"{target.arch},{virtual}" if is_portable(target.arch) else target.arch
        make = ["-gencode", f"arch={virtual},code=[{codes}]", "-o", "kernel.fatbin", "kernel.cu"]
        said = run_tool([find_nvcc(), *FLAGS, *make], folder, both=True)
        code = (folder / "kernel.fatbin").read_bytes()
    usage = read_usage(said)
    _check(source, usage, target)
    return Fatbin(code, usage)


def read_usage(said: str) -> tuple[Usage, ...]:
    """Read what `ptxas -v` printed, function by function."""
    _, *parts = _FUNCTION.split(said)
    return tuple(_usage(name, text) for name, text in zip(parts[::2], parts[1::2], strict=True))


def _usage(function: str, text: str) -> Usage:
    stack, used, shared = _STACK.search(text), _USED.search(text), _SHARED.search(text)
    if stack is None or used is None:
        raise EnvironmentProblem(f"ptxas does not say what {function} needs; this version of nvcc is not known: {text}")
    spilled = int(stack[2]) + int(stack[3])
    return Usage(function, int(used[1]), int(stack[1]), spilled, int(shared[1]) if shared else 0)


def _check(source: CudaSource, usage: tuple[Usage, ...], target: Target) -> None:
    """Refuse code that lacks a function or whose blocks ask for more shared memory than there is."""
    known = {function.function: function for function in usage}
    for launch in source.launches:
        if launch.function not in known:
            raise VerifyError(f"kernel {source.symbol}: nvcc made no {launch.function}, only {sorted(known)}")
        shared = known[launch.function].shared_bytes + launch.shared_bytes
        if shared > GPUS[target.arch].most_shared_bytes:
            raise VerifyError(f"{launch.function}: {shared} bytes of shared memory are more than {target} has")
