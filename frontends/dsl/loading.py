"""Running a DSL file that the user names, as in `examples/resnet.py:resnet50`."""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from cnnc.errors import CnncError, ModelError, UsageError
from cnnc.frontends.dsl.network import Definition, Network
from cnnc.ir.types import Size


def load_network(spec: str, *, batch: Size | None = None, **options: Any) -> Network:
    """Run the file of `path.py:name` and give that network; the name may be left out where there is one only.

    `name` is a `@network` function, a `Network`, or a function that returns one; `batch` and `options` go to it.
    A DSL file is Python: it is run with all the rights of the user.  Raises `UsageError` where the file or the
    name is not there, `ModelError` with file and line where the file itself is wrong.
    """
    path, name = _split(spec)
    if batch is not None:
        options["batch"] = batch
    with _folder_importable(path):
        module = _run(path)
        found = _find(path, name, module)
        if isinstance(found, Network):
            return found if batch is None else found.with_batch(batch)
        made = _guarded(path, lambda: found(**options))
    if not isinstance(made, Network):
        raise UsageError(f"{path}: {name} gives {type(made).__name__}, not a network; decorate it with @network(...)")
    return made


def _split(spec: str) -> tuple[Path, str]:
    if spec.endswith(".py"):
        return Path(spec), ""
    path, _, name = spec.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UsageError(f"{spec!r} is no network of a DSL file; write path/to/file.py:name")
    return Path(path), name


class _folder_importable:  # noqa: N801 (a context manager that reads as a verb)
    """Let the file import its neighbours; what is installed goes before them."""

    def __init__(self, path: Path) -> None:
        self.folder = os.path.abspath(path.parent)

    def __enter__(self) -> None:
        sys.path.append(self.folder)

    def __exit__(self, *_: object) -> None:
        sys.path.remove(self.folder)


def _run(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"cnnc_dsl_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: cannot be run as Python")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    sys.modules[module.__name__] = module
    try:
        _guarded(path, lambda: loader.exec_module(module))
    except CnncError:
        del sys.modules[module.__name__]
        raise
    return module


def _guarded(path: Path, run: Any) -> Any:
    """Run the user's code; anything it raises becomes an error with its file and line."""
    try:
        return run()
    except CnncError:
        raise
    except SyntaxError as error:
        raise ModelError(f"{error.filename or path}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        lines = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
        where = f"{lines[-1].filename}:{lines[-1].lineno}" if lines else str(path)
        raise ModelError(f"{where}: {type(error).__name__}: {error}") from error


def _is_users(filename: str) -> bool:
    return os.path.dirname(os.path.abspath(filename)) != os.path.dirname(os.path.abspath(__file__)) and (
        not filename.startswith("<")
    )


def _find(path: Path, name: str, module: ModuleType) -> Any:
    networks = [key for key, value in vars(module).items() if isinstance(value, Definition | Network)]
    if not name:
        if len(networks) != 1:
            raise UsageError(f"{path}: name one of its networks, as in {path}:NAME; it has {_list(networks)}")
        name = networks[0]
    found = getattr(module, name, None)
    if callable(found) or isinstance(found, Network):
        return found
    close = difflib.get_close_matches(name, networks, n=3) or networks
    raise UsageError(f"{path}: has no network {name!r}; it has {_list(close)}")


def _list(names: list[str]) -> str:
    return ", ".join(names) if names else "none (decorate a function with @network(...))"
