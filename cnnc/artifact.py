"""What a compiled network leaves on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnc.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from cnnc.backends.lower.build import Build

KINDS = ("so", "header", "exe", "obj", "ir")
"""What `--emit` may ask for."""


def check_output(path: Path, emit: Sequence[str], batches: int = 1) -> None:
    """Refuse, before any work is done, an output that cannot be written; raises `EnvironmentProblem` or `UsageError`.

    A missing folder is made.  `batches` is for how many batch sizes the output is.
    """
    unknown = [kind for kind in emit if kind not in KINDS]
    if unknown:
        raise UsageError(f"--emit {unknown[0]} is not known; use some of {', '.join(KINDS)}")
    if "ir" in emit and batches > 1:
        raise UsageError("--emit ir writes the kernels for one batch size; name one with --batch")
    if path.is_dir():
        raise EnvironmentProblem(f"{path} is a folder; name the file to write, as in {path / 'net.so'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".{path.name}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentProblem(f"{path.parent} cannot be written to: {error.strerror}") from None


def write(build: Build, path: Path, emit: Sequence[str]) -> list[Path]:
    """Write the kinds asked for beside each other, `path` with its suffix for each; gives the files written."""
    from cnnc.backends.host.header import emit_header
    from cnnc.backends.host.link import build_executable, build_object, build_shared
    from cnnc.backends.host.publish import publish

    check_output(path, emit, len(build.graphs))
    written = []
    for kind in KINDS:
        if kind not in emit:
            continue
        file = output_path(path, kind, alone=len(emit) == 1)
        if kind == "so":
            build_shared(build.program, build.objects, file)
        elif kind == "header":
            publish(file, emit_header(build.program).encode())
        elif kind == "exe":
            build_executable(build.program, build.objects, file)
        elif kind == "obj":
            build_object(build.program, build.objects, file)
        elif kind == "ir":
            _write_ir(build, file)
        written.append(file)
    return written


def output_path(path: Path, kind: str, *, alone: bool) -> Path:
    """Say where a kind goes: the path itself if it is the only one and has a suffix or needs none."""
    suffix = {"so": ".so", "header": ".h", "exe": "", "obj": ".o", "ir": ".ir"}[kind]
    if alone and (kind == "exe" or path.suffix):
        return path
    return path.with_suffix(suffix)


def _write_ir(build: Build, path: Path) -> None:
    """Write the graph of kernels as text, its large constants in a `.npz` beside it."""
    import io

    import numpy as np

    from cnnc.backends.host.publish import publish
    from cnnc.ir.text import print_graph, weights_of

    (graph,) = build.graphs
    arrays: dict[str, Any] = {k: array.reshape(-1).view(np.uint8) for k, array in weights_of(graph).items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    publish(path.with_suffix(".npz"), buffer.getvalue())
    publish(path, print_graph(graph).encode())
