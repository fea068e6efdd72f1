"""Imports TVM: quietly, and without what it would drag along."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

# tvm_ffi imports torch wherever it is installed, for tensors that cnnc never hands it.  TVM tries disco, its runtime
# for several machines, before the library of it is loaded; to find that out takes a fifth of a second.
_NEEDLESS = ("torch", "tvm.runtime.disco")


def load_tvm() -> Any:
    """Import TVM (half a second the first time) and return the package.

    What it would import needlessly is hidden for as long as the import takes, unless the user has it loaded already.
    """
    os.environ.setdefault("TVM_LOG_DEBUG", "")
    for name in ("tvm", "te_compiler"):
        logging.getLogger(name).setLevel(logging.ERROR)
    hidden = [name for name in _NEEDLESS if name not in sys.modules] if "tvm_ffi" not in sys.modules else []
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is what says that there is none
    try:
        import tvm
    finally:
        for name in hidden:
            del sys.modules[name]
    return tvm
