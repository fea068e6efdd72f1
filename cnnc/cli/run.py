"""`cnnc run`: one run of a model or binary on given inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from cnnc.cli.arguments import compile_options, open_model, threads_option
from cnnc.cli.inputs import input_options, read_feeds
from cnnc.cli.report import print_json
from cnnc.errors import UsageError
from cnnc.module import Module
from cnnc.profiler.accuracy import relative_error


@click.command("run")
@click.argument("model")
@input_options
@click.option("--save", "saves", multiple=True, metavar="y=FILE", help="Write an output to a .npy file.")
@click.option("--expect", "expects", multiple=True, metavar="y=@FILE", help="Compare an output; exit 1 if it differs.")
@click.option("--tolerance", type=float, default=1e-4, show_default=True, help="Relative L2 error that still agrees.")
@click.option("--top", type=int, default=5, show_default=True, help="How many of the largest elements to print.")
@threads_option
@compile_options
@click.option("--json", "as_json", is_flag=True, help="Print the outputs as JSON.")
def command(
    model: str,
    saves: tuple[str, ...],
    expects: tuple[str, ...],
    tolerance: float,
    top: int,
    as_json: bool,
    **arguments: Any,
) -> int:
    """Run MODEL (net.so, net.onnx, file.py:network) once and print its outputs."""
    module = open_model(model, arguments).module
    outputs = module.run(read_feeds(module, arguments))
    for text in saves:
        name, path = _named_file(text, module)
        _save(outputs[name], path)
    differences = _compare(outputs, expects, module)
    if as_json:
        described = {name: _describe(array, top) for name, array in outputs.items()}
        print_json("run", {"outputs": described, "differences": differences, "tolerance": tolerance})
    else:
        for name, array in outputs.items():
            _print_output(name, array, top)
        for name, error in differences.items():
            verdict = "agrees" if error <= tolerance else "DIFFERS"
            click.echo(f"{name}: relative L2 error {error:.2e}, {verdict} (tolerance {tolerance:.0e})")
    return int(any(not error <= tolerance for error in differences.values()))


def _named_file(text: str, module: Module) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    names = [port.name for port in module.outputs]
    if not equals and len(names) == 1:
        name, path = names[0], text
    if name not in names or not path:
        raise UsageError(f"{text!r} names no output; write it as {names[0]}=FILE (outputs: {', '.join(names)})")
    return name, Path(path.removeprefix("@"))


def _save(array: np.ndarray, path: Path) -> None:
    import io

    from cnnc.backends.host.publish import publish

    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish(path, buffer.getvalue())


def _compare(outputs: dict[str, np.ndarray], expects: tuple[str, ...], module: Module) -> dict[str, float]:
    differences = {}
    for text in expects:
        name, path = _named_file(text, module)
        try:
            wanted = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"--expect {path} cannot be read: {error}") from None
        if wanted.shape != outputs[name].shape:
            raise UsageError(f"--expect {path} has shape {list(wanted.shape)}, {name} has {list(outputs[name].shape)}")
        differences[name] = relative_error(outputs[name], wanted)
    return differences


def _describe(array: np.ndarray, top: int) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "top": _largest(array, top)}


def _largest(array: np.ndarray, top: int) -> list[tuple[int, float]]:
    flat = array.reshape(-1).astype(np.float64)
    order = np.argsort(-flat, kind="stable")[:top]
    return [(int(i), float(flat[i])) for i in order]


def _print_output(name: str, array: np.ndarray, top: int) -> None:
    click.echo(f"{name}: {array.dtype}{list(array.shape)}")
    for index, value in _largest(array, top):
        click.echo(f"  [{index}] {value:.6g}")
