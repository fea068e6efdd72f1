"""Models in memory, in processes whose memory is not as usual."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_START = """
import ctypes
import sys
from pathlib import Path

import numpy as np

from cnnc.backends.host.jit import JitModel
from cnnc.backends.host.program import KernelCall, Port, Program, Slot
from cnnc.errors import EnvironmentProblem

libc = ctypes.CDLL(None)
vector = lambda name: (Port(name, "f32", (8,)),)
call = KernelCall("halve", (Slot("input", 0), Slot("output", 0)), 8)
program = Program("half", vector("x"), vector("y"), (call,), 0, 0, b"")
"""

_SCATTER = """
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mmap.restype = ctypes.c_void_p
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PAGE, FAR, HOLES = 4096, 3 << 30, 192

def reserve(size):
    PROT_NONE, PRIVATE_ANONYMOUS_NORESERVE = 0, 0x4022
    return libc.mmap(None, size, PROT_NONE, PRIVATE_ANONYMOUS_NORESERVE, -1, 0)

start = reserve(HOLES * FAR)
end = start + HOLES * FAR
for hole in range(HOLES):
    libc.munmap(start + hole * FAR, (1 + hole % 6) * PAGE)
while not start <= reserve(PAGE) < end:
    pass
"""


def start(script: str, kernels: bytes, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script, in which `program` halves eight numbers and the first argument names its kernels."""
    (folder / "kernels.o").write_bytes(kernels)
    command = [sys.executable, "-c", _START + script, str(folder / "kernels.o")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_pieces_of_a_model_may_lie_far_apart(kernels: bytes, tmp_path: Path) -> None:
    """Free memory is holes of a few pages, 3 GiB apart: farther than an instruction's 32-bit displacement reaches."""
    run = """
model = JitModel(program, [Path(sys.argv[1]).read_bytes()])
x = np.random.default_rng(7).standard_normal(8).astype(np.float32)
with model.create(2) as context:
    (y,) = context.run([x])
np.testing.assert_array_equal(y, x * 0.5)
areas = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
code = [int(area[0].split("-")[0], 16) for area in areas if area[1] == "r-xp"]
print(len({(address - start) // FAR for address in code if start <= address < end}))
"""
    done = start(_SCATTER + run, kernels, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1, "the code was not scattered"


def test_memory_that_may_not_be_executable_is_an_error(kernels: bytes, tmp_path: Path) -> None:
    refuse = """
PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1
if libc.prctl(PR_SET_MDWE, ctypes.c_ulong(PR_MDWE_REFUSE_EXEC_GAIN), 0, 0, 0):
    sys.exit(77)
try:
    JitModel(program, [Path(sys.argv[1]).read_bytes()])
except EnvironmentProblem as problem:
    print(problem)
"""
    done = start(refuse, kernels, tmp_path)
    if done.returncode == 77:
        pytest.skip("Linux 6.3 and later can refuse it")
    assert done.returncode == 0, done.stderr
    assert "half: cannot put the model into memory: this process may not make memory executable" in done.stdout
