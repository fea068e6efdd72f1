"""Imports TVM: quietly, and without what it would drag along."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from typing import Any

# tvm_ffi imports torch wherever it is installed, for tensors that cnnc never hands it.  TVM tries disco, its runtime
# for several machines, before the library of it is loaded; to find that out takes a fifth of a second.
_NEEDLESS = ("torch", "tvm.runtime.disco")
# TVM's own graphs and tuners, most of its Python code: loaded when somebody first reads an attribute of theirs.
_LAZY = ("tvm.relax", "tvm.s_tir.dlight", "tvm.s_tir.meta_schedule")


def load_tvm() -> Any:
    """Import TVM (a third of a second the first time) and return the package.

    What it would import needlessly is hidden for as long as the import takes, unless the user has it loaded already.
    """
    os.environ.setdefault("TVM_LOG_DEBUG", "")
    for name in ("tvm", "te_compiler"):
        logging.getLogger(name).setLevel(logging.ERROR)
    hidden = [name for name in _NEEDLESS if name not in sys.modules] if "tvm_ffi" not in sys.modules else []
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is what says that there is none
    sys.meta_path.insert(0, _LazyFinder)
    try:
        import tvm
        import tvm.s_tir
    finally:
        sys.meta_path.remove(_LazyFinder)
        for name in hidden:
            del sys.modules[name]
    return tvm


class _LazyFinder:
    """Finds the lazy parts of TVM before Python does."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        """Give a lazy part as Python would find it, but for its loader; None for all else."""
        spec = PathFinder.find_spec(name, path) if name in _LAZY else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec
