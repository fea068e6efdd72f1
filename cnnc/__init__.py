"""cnnc: a compiler for convolutional networks.

    m = cnnc.compile("resnet50.onnx", target="cpu", threads=2)
    y = m.run({"x": x})["y"]
    m.save("resnet50.so")
    m = cnnc.load("resnet50.so")

Importing this package is cheap: TVM, LLVM and ONNX are imported when they are first needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnnc.driver import compile, load_graph
    from cnnc.module import Module, load

__version__ = "0.1.0"
__all__ = ["Module", "__version__", "compile", "load", "load_graph"]

_HOMES = {
    "compile": "cnnc.driver",
    "load": "cnnc.module",
    "load_graph": "cnnc.driver",
    "Module": "cnnc.module",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cnnc' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
