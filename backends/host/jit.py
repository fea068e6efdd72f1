"""Put a compiled model into this process's memory, without a linker and without a file."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Sequence

import llvmlite.binding as llvm
import numpy as np
import numpy.typing as npt

from cnnc.backends.host.driver import TRIPLE, emit_driver
from cnnc.backends.host.library import LoadedModel, Table, aligned_empty
from cnnc.backends.host.program import TABLE_SYMBOL, Program
from cnnc.backends.host.toolchain import runtime_objects
from cnnc.errors import EnvironmentProblem

_numbers = itertools.count()


class JitModel(LoadedModel):
    """A program put into this process's memory: no linker, no file.

    Raises EnvironmentProblem when the process may not make memory executable or there is no C compiler for the runtime.
    """

    def __init__(self, program: Program, objects: Sequence[bytes]) -> None:
        _check_memory(program)
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        builder = llvm.JITLibraryBuilder()
        for data in [emit_driver(program), *runtime_objects(), *objects]:
            builder.add_object_img(data)
        # The weights stay alive, and at their address, as long as this object.
        self._weights = _aligned_weights(program)
        builder.import_symbol("cnnc_rt_weights", self._weights.ctypes.data)
        builder.add_current_process()
        builder.export_symbol(TABLE_SYMBOL)
        try:
            machine = llvm.Target.from_triple(TRIPLE).create_target_machine(reloc="pic", codemodel="small", jit=True)
            # JITLink puts an object's code and constants side by side.  The other linker maps each where there is room;
            # where that is more than 2 GiB away, code of the small model cannot reach it, and LLVM ends the process.
            self._engine = llvm.create_lljit_compiler(machine, use_jit_link=True)
            self._tracker = builder.link(self._engine, f"cnnc_{next(_numbers)}")
        except RuntimeError as error:
            raise EnvironmentProblem(f"{program.name}: cannot put the model into memory: {error}") from error
        address = self._tracker[TABLE_SYMBOL]
        super().__init__(ctypes.POINTER(Table).from_address(address).contents)


def _check_memory(program: Program) -> None:
    """Raise `EnvironmentProblem` if written memory may not be made executable, upon which JITLink ends the process."""
    mprotect = ctypes.CDLL(None, use_errno=True).mprotect
    mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 0xC3
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        refused = mprotect(address, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC)
    if refused:
        reason = os.strerror(ctypes.get_errno())
        raise EnvironmentProblem(
            f"{program.name}: cannot put the model into memory: this process may not make memory executable "
            f"({reason}); save it as a .so, and load that"
        )


def _aligned_weights(program: Program) -> npt.NDArray[np.uint8]:
    """Return the weights as one block of bytes."""
    block: npt.NDArray[np.uint8] = aligned_empty((program.weight_bytes,), "u8")
    start = 0
    for piece in program.weights:
        data = np.frombuffer(memoryview(piece).cast("B"), np.uint8)
        block[start : start + data.size] = data
        start += data.size
    return block
