"""The pinned compilers work together: newer tvm-ffi builds crash in `save_json`, and the LLVMs must agree."""

from __future__ import annotations

import re
import subprocess
import sys


def test_tvm_saves_json() -> None:
    # In a process of its own: what is guarded against is a segmentation fault.
    program = 'import tvm; from tvm import tirx; print(len(tvm.ir.save_json(tirx.const(1, "int32"))))'
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


def test_llvmlite_reads_the_llvm_of_tvm() -> None:
    import llvmlite.binding as llvm
    import tvm

    version = tvm.get_global_func("target.llvm_version_major")()
    assert llvm.llvm_version_info[0] == int(re.findall(r"\d+", str(version))[0])
