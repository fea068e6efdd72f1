"""What importing TVM brings along, and what it does not."""

from __future__ import annotations

import subprocess
import sys


def test_tvm_comes_without_what_kernels_do_not_need_and_gives_it_when_asked() -> None:
    # In a process of its own: in this one TVM may be there already.
    program = """
import sys
from cnnc.backends.load_tvm import load_tvm

tvm = load_tvm()
assert load_tvm() is tvm
print([name for name in ("torch", "tvm.relax.expr", "tvm.s_tir.dlight.gpu", "tvm.topi") if name in sys.modules])
print(tvm.relax.Function.__name__, tvm.s_tir.dlight.gpu.Matmul.__name__, tvm.s_tir.meta_schedule.tune_tir.__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "Function Matmul tune_tir"]
