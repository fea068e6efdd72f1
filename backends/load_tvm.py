"""Imports TVM: quietly, and without what it would drag along."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any


def load_tvm() -> Any:
    """Import TVM (over a second the first time) and return the package.

    tvm_ffi imports torch wherever it is installed, for tensors that cnnc never hands it; that would cost
    seconds, so torch is hidden for as long as the import takes, unless the user has it loaded already.
    """
    os.environ.setdefault("TVM_LOG_DEBUG", "")
    for name in ("tvm", "te_compiler"):
        logging.getLogger(name).setLevel(logging.ERROR)
    hide = "torch" not in sys.modules and "tvm_ffi" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm
    finally:
        if hide:
            del sys.modules["torch"]
    return tvm
