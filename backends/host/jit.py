"""Put a compiled model into this process's memory, without a linker and without a file."""

from __future__ import annotations

import ctypes
import itertools
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
            self._engine = llvm.create_lljit_compiler(machine)
            self._tracker = builder.link(self._engine, f"cnnc_{next(_numbers)}")
        except RuntimeError as error:
            raise EnvironmentProblem(f"{program.name}: cannot put the model into memory: {error}") from error
        address = self._tracker[TABLE_SYMBOL]
        super().__init__(ctypes.POINTER(Table).from_address(address).contents)


def _aligned_weights(program: Program) -> npt.NDArray[np.uint8]:
    """Return the weights as one block of bytes."""
    block: npt.NDArray[np.uint8] = aligned_empty((program.weight_bytes,), "u8")
    start = 0
    for piece in program.weights:
        data = np.frombuffer(memoryview(piece).cast("B"), np.uint8)
        block[start : start + data.size] = data
        start += data.size
    return block
