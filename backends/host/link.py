"""Link kernels, driver, runtime and weights into a shared library, a program or one relocatable object.

The same inputs and tools give the same bytes: no path, time or random number gets in.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cnnc.backends.host.device_driver import MODULES_SYMBOL, module_pieces
from cnnc.backends.host.driver import emit_driver, exported_symbols
from cnnc.backends.host.elf_data import Pieces, stretch_section, write_data_object
from cnnc.backends.host.library import SharedModel
from cnnc.backends.host.program import ALIGNMENT, MAX_IMAGE, MAX_WEIGHTS, TABLE_SYMBOL, Program
from cnnc.backends.host.publish import flush, published
from cnnc.backends.host.seal import seal_binary
from cnnc.backends.host.toolchain import compiler, run_tool, runtime_objects, tool, work_folder
from cnnc.errors import EnvironmentProblem, VerifyError

_LINK_FLAGS = (
    "-Wl,--build-id=none",
    "-Wl,-z,relro",
    "-Wl,-z,now",
    "-Wl,-z,noexecstack",
    "-Wl,--no-undefined",
    "-Wl,--as-needed",
)
_LIBRARIES = ("-lm", "-lpthread", "-ldl")

# Where a linked file keeps its weights: beyond all else, so that they get a segment of their own.
_WEIGHTS = ".cnnc_weights"
_WEIGHTS_AT = MAX_IMAGE - MAX_WEIGHTS
# What the linker sees in their place.
_PLACEHOLDER = (bytes(ALIGNMENT),)


def build_shared(program: Program, objects: Sequence[bytes], path: str | os.PathLike[str]) -> None:
    """Write a shared library that holds everything: kernels (`objects`), driver, runtime and weights.

    The path holds the old file or the whole new one.  Raises EnvironmentProblem when the tools or the disk fail.
    """
    with published(Path(path), mode=0o755) as out:
        folder = out.parent
        names = _collect(folder, program, objects, _runtime(program), _PLACEHOLDER)
        exports = "".join(f"    {symbol};\n" for symbol in exported_symbols(program))
        (folder / "exports.map").write_text(f"{{\n  global:\n{exports}  local: *;\n}};\n")
        options = ["-shared", "-nostartfiles", "-Wl,--version-script=exports.map"]
        _link(program, folder, out, [*options, *names])
        _finish(program, out)


def load_linked(program: Program, objects: Sequence[bytes]) -> SharedModel:
    """Link a shared library and load it into this process; its file is gone afterwards."""
    with work_folder() as folder:
        build_shared(program, objects, folder / "model.so")
        return SharedModel(folder / "model.so", check=False)


def build_executable(program: Program, objects: Sequence[bytes], path: str | os.PathLike[str]) -> None:
    """Write a command-line program that reads arrays or pictures and prints or writes the outputs."""
    with published(Path(path), mode=0o755) as out:
        folder = out.parent
        names = _collect(folder, program, objects, _runtime(program, with_main=True), _PLACEHOLDER)
        _link(program, folder, out, ["-pie", *names])
        _finish(program, out)


def build_object(program: Program, objects: Sequence[bytes], path: str | os.PathLike[str]) -> None:
    """Write one relocatable object, for linking into a program; only the model's own functions stay visible."""
    with published(Path(path)) as out:
        folder = out.parent
        names = _collect(folder, program, objects, _runtime(program), program.weights)
        run_tool([tool("ld"), "-r", "-o", "all.o", *names], folder)
        # Two models in one program must not fight over the table for generic loaders.
        keep = [symbol for symbol in exported_symbols(program) if symbol != TABLE_SYMBOL]
        (folder / "keep.txt").write_text("".join(f"{symbol}\n" for symbol in keep))
        command = [tool("objcopy"), "--keep-global-symbols=keep.txt", "all.o", str(out)]
        run_tool(command, folder)


def _runtime(program: Program, with_main: bool = False) -> list[bytes]:
    return runtime_objects(with_main, for_device=program.device is not None)


def _collect(
    folder: Path, program: Program, objects: Sequence[bytes], runtime: Sequence[bytes], weights: Pieces
) -> list[str]:
    """Write everything that is to be linked into the folder, under names that depend on the order only."""
    names = []
    try:
        for index, data in enumerate([emit_driver(program), *runtime, *objects]):
            names.append(f"part{index:05}.o")
            (folder / names[-1]).write_bytes(data)
        if program.weight_bytes:
            names.append("weights.o")
            write_data_object(folder / names[-1], "cnnc_rt_weights", _WEIGHTS, weights)
        if program.device is not None and program.device.modules:
            names.append("modules.o")
            write_data_object(folder / names[-1], MODULES_SYMBOL, ".cnnc_modules", module_pieces(program.device))
    except OSError as error:
        raise EnvironmentProblem(f"cannot write to {folder.parent}: {error.strerror}") from error
    return names


def _link(program: Program, folder: Path, out: Path, arguments: Sequence[str]) -> None:
    place = [f"-Wl,--section-start={_WEIGHTS}={_WEIGHTS_AT:#x}"] if program.weight_bytes else []
    command = [*compiler(), *_LINK_FLAGS, *place, "-o", str(out), *arguments, *_LIBRARIES]
    try:
        run_tool(command, folder)
    except EnvironmentProblem as problem:
        # The disk and the tools may fail by themselves; a missing or doubled symbol is our own mistake.
        text = str(problem)
        if "undefined reference" in text or "undefined symbol" in text or "multiple definition" in text:
            raise VerifyError(f"{program.name}: the kernels do not link: {text}") from problem
        raise


def _finish(program: Program, path: Path) -> None:
    """Add what the linker did not see: the weights, and the digest of it all."""
    if program.weight_bytes:
        stretch_section(path, _WEIGHTS, program.weights)
    # The disk has work while the digest is computed; what is flushed here need not be when the file is published.
    with ThreadPoolExecutor(1, "flush") as beside:
        flushed = beside.submit(flush, path)
        seal_binary(path)
        # The system reports a failing disk once.
        flushed.result()
