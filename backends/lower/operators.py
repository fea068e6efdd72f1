"""Operators of cnnc's own in TVM: pure calls that it carries through its passes and replaces last of all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import tvm
from tvm import tirx

_PURE = 1

_registered: set[str] = set()
_registering = threading.Lock()
"""Kernels are compiled by several threads, and TVM takes each name once."""


def register_operator(
    name: str,
    inputs: int,
    lowering: Callable[[Any], Any],
    description: str = "",
    cuda: Callable[[Any], Any] | None = None,
) -> None:
    """Make an operator that works on vectors as on scalars; `lowering` gives the expression a call stands for.

    `cuda` gives another one for CUDA.

    Registering a name again does nothing.
    """
    with _registering:
        if name in _registered:
            return
        tvm.get_global_func("ir.RegisterOp")(name, description)
        tvm.ir.Op.get(name).set_num_inputs(inputs)
        tvm.ir.register_op_attr(name, "TScriptPrinterName", name)
        tvm.ir.register_op_attr(name, "TVectorizable", True)
        tvm.ir.register_op_attr(name, "TCallEffectKind", _PURE)
        tirx.register_intrin_lowering(name, "llvm", f=lowering)
        tirx.register_intrin_lowering(name, "cuda", f=cuda or lowering)
        _registered.add(name)
