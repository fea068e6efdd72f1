"""A stand-in for nvcc: makes, of CUDA source, a library that runs it on the CPU, in the place of a cubin.

Together with `fake_libcuda.c`, which loads such a library as a module, whole artifacts run where there is no GPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HEADERS = Path(__file__).parent / "emulation"
FLAGS = ("-std=c++17", "-O0", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-address")

_FUNCTION = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\([^)]*\) \{')
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\((\d+)\) )?(\w+) (\w+)\[\];")
_IN_DYNAMIC = r"\2 *\3 = reinterpret_cast<\2 *>(cnnc_emulation::dynamic_shared(\1));"


def emulated(texts: Sequence[str]) -> str:
    """Give CUDA sources as one C++ file, one prelude for all, and a door to each function."""
    headers = ["#include <cuda_fp16.h>\n", "#include <cuda_bf16.h>\n"]
    headers += [f'#include "{name}.h"\n' for name in ("tensor_cores", "wgmma", "tma")]
    start = 'extern "C" __global__'
    # Each has what its kernel needs: the longest will do for all.
    prelude = max((text[: text.index(start)] for text in texts if text), key=len, default="")
    functions = [_DYNAMIC.sub(_IN_DYNAMIC, text[text.index(start) :]) for text in texts if text]
    doors = [f"CNNC_EMULATED({name})\n" for text in functions for name in _FUNCTION.findall(text)]
    return "".join(['#include "emulation.h"\n', *headers, prelude, *functions, *doors])


def compile_library(texts: Sequence[str], folder: Path, out: Path, notes: str = "") -> None:
    """Compile CUDA sources into a library."""
    (folder / "emulated.cpp").write_text(emulated(texts) + notes)
    command = ["g++", *FLAGS, "-I", HEADERS, folder / "emulated.cpp", "-o", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]


def contents(wanted: str) -> str:
    """Note what is asked for with `arch=compute_90,code=[sm_90,compute_90]`, for the driver to see."""
    machine = re.search(r"\bsm_(\d+)", wanted)
    assert machine is not None, wanted
    ptx = re.search(r"code=.*compute_(\d+)", wanted)
    numbers = f"cnnc_machine_code = {machine[1]}, cnnc_ptx = {ptx[1] if ptx else 0}"
    return f'extern "C" {{ extern const int cnnc_machine_code, cnnc_ptx; const int {numbers}; }}\n'


def main(arguments: Sequence[str]) -> None:
    """Do what the compiler asks nvcc for."""
    if arguments == ["--version"]:
        print("the emulation of CUDA")
        return
    out, source = arguments[arguments.index("-o") + 1], arguments[-1]
    text = Path(source).read_text()
    compile_library([text], Path.cwd(), Path.cwd() / out, contents(arguments[arguments.index("-gencode") + 1]))
    for name in _FUNCTION.findall(text):
        print(f"ptxas info    : Compiling entry function '{name}' for 'sm_00'", file=sys.stderr)
        print("    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", file=sys.stderr)
        print("ptxas info    : Used 8 registers, used 0 barriers", file=sys.stderr)


def install(folder: Path) -> Path:
    """Write a program `nvcc` that runs this file; gives its folder, to be put on PATH."""
    program = folder / "nvcc"
    program.write_text(
        f"#!{sys.executable}\nimport runpy, sys\n"
        f"runpy.run_path({str(Path(__file__).resolve())!r})['main'](sys.argv[1:])\n"
    )
    program.chmod(0o755)
    return folder
