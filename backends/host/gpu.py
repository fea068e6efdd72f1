"""The GPUs of this machine, as CUDA's driver shows them."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from cnnc.target import CUDA_ARCHS, Target, is_portable

_MAJOR, _MINOR = 75, 76
_NO_DEVICE = 100


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and the architecture it is of."""

    name: str
    arch: str

    @property
    def target(self) -> str | None:
        """The target for it: the highest architecture that is not above it; None if all are.

        Of its own generation it runs the machine code, of a lower one the PTX, which its driver compiles.
        """
        fitting = [known for known in CUDA_ARCHS if self._is(known) or _is_below(known, self.arch)]
        return f"cuda:{fitting[-1]}" if fitting else None

    def _is(self, arch: str) -> bool:
        """Whether an architecture is its own, with all that no other has or without."""
        return arch.rstrip("a") == self.arch

    def runs(self, target: Target) -> bool:
        """Whether it runs code for a target: for its own architecture, or a lower one of its generation."""
        same_generation = target.arch[:-1] == self.arch[:-1] and _is_below(target.arch, self.arch)
        return target.is_gpu and (self._is(target.arch) or same_generation)


def _is_below(arch: str, other: str) -> bool:
    """Whether an architecture is lower than another, which can run what is made for it."""
    return is_portable(arch) and int(arch.removeprefix("sm_")) < int(other.removeprefix("sm_"))


@dataclass(frozen=True)
class Driver:
    """CUDA's driver: the version of CUDA it runs, its GPUs in its order, and what is wrong with it (if anything is)."""

    version: str
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


def cuda_driver() -> Driver | None:
    """Ask CUDA's driver what it has; None where there is none."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    try:
        library.cuDriverGetVersion(ctypes.byref(version))
        code = library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count))
    except AttributeError as error:
        return Driver("?", problem=f"libcuda.so.1 is no driver of CUDA: {error}")
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if code not in (0, _NO_DEVICE):
        return Driver(text, problem=f"it cannot be used (CUDA error {code})")
    return Driver(text, tuple(_gpu(library, index) for index in range(count.value)))


def _gpu(library: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    library.cuDeviceGet(ctypes.byref(device), index)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode("utf-8", "replace"), f"sm_{major.value}{minor.value}")
