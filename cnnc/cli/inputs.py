"""Inputs on the command line: `x=@cat.png`, `x=@x.npy`, `x=1x3x224x224:random`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import numpy as np

from cnnc.errors import UsageError
from cnnc.ir.types import DType, format_shape

if TYPE_CHECKING:
    from cnnc.backends.host.program import Port
    from cnnc.module import Module

F = TypeVar("F", bound=Callable[..., Any])
_GENERATORS = ("random", "zeros", "ones")


def input_options(function: F) -> F:
    """Add `--input`, `--seed`, `--mean` and `--std`."""
    added = [
        click.option("--input", "inputs", multiple=True, metavar="x=@FILE", help="@x.npy, @cat.png, or random."),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of random inputs."),
        click.option("--mean", default="0,0,0", show_default=True, help="Subtracted from a picture's channels (0..1)."),
        click.option("--std", default="1,1,1", show_default=True, help="A picture's channels are divided by it."),
    ]
    for decorate in reversed(added):
        function = decorate(function)
    return function


def read_inputs(ports: Sequence[Port], arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """Read or make every input; those not named on the command line are random."""
    given = dict(_split(text, ports) for text in arguments["inputs"])
    unknown = sorted(set(given) - {port.name for port in ports})
    if unknown:
        names = ", ".join(port.name for port in ports)
        raise UsageError(f"there is no input {unknown[0]!r}; the network takes {names}")
    rng = np.random.default_rng(arguments["seed"])
    return {port.name: _read(port, given.get(port.name, "random"), rng, arguments) for port in ports}


def read_feeds(module: Module, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """Read or make the inputs of a module; a picture is a batch of one, where it runs that batch size."""
    files = [Path(what) for _, at, what in (text.partition("@") for text in arguments["inputs"]) if at]
    pictures = any(file.suffix != ".npy" for file in files)
    return read_inputs((module.with_batch(1) if pictures and 1 in module.batches else module).inputs, arguments)


def _split(text: str, ports: Sequence[Port]) -> tuple[str, str]:
    name, equals, what = text.partition("=")
    if equals:
        return name, what
    if len(ports) == 1:
        return ports[0].name, text
    raise UsageError(f"--input {text!r} names no input; write it as {ports[0].name}={text}")


def _read(port: Port, what: str, rng: np.random.Generator, arguments: dict[str, Any]) -> np.ndarray:
    if what.startswith("@"):
        path = Path(what[1:])
        if not path.is_file():
            raise UsageError(f"input {port.name}: there is no file {path}")
        return _read_npy(port, path) if path.suffix == ".npy" else _read_picture(port, path, arguments)
    shape, colon, generator = what.rpartition(":")
    if colon and shape != "x".join(map(str, port.shape)):
        raise UsageError(f"input {port.name} is {format_shape(port.shape)}, not {shape}")
    if generator not in _GENERATORS:
        raise UsageError(f"input {port.name}: {what!r} is none of @FILE, {', '.join(_GENERATORS)}")
    return make_input(port, generator, rng)


def make_input(port: Port, generator: str, rng: np.random.Generator) -> np.ndarray:
    """Make an input: normal floats, small integers, coin flips; or zeros, or ones."""
    dtype = DType(port.dtype)
    if generator != "random":
        return np.full(port.shape, generator == "ones", dtype.numpy)
    if dtype.is_float:
        return rng.standard_normal(port.shape).astype(dtype.numpy)
    return rng.integers(0, 2, port.shape).astype(dtype.numpy)


def _read_npy(port: Port, path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"input {port.name}: {path} is no .npy file: {error}") from None
    return array


def _read_picture(port: Port, path: Path, arguments: dict[str, Any]) -> np.ndarray:
    """Read a picture as RGB, short side scaled to the input, centre cropped, in 0..1, then mean and std."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if len(port.shape) != 4 or port.shape[0] != 1 or port.shape[1] not in (1, 3) or port.dtype != "f32":
        raise UsageError(f"input {port.name} : {port.dtype}{format_shape(port.shape)} takes no picture; give a .npy")
    channels, height, width = port.shape[1:]
    try:
        picture = Image.open(path).convert("RGB" if channels == 3 else "L")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"input {port.name}: {path} is no picture: {error}") from None
    fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BILINEAR)
    array = np.asarray(fitted, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255
    mean, std = (_per_channel(arguments[name], name, channels) for name in ("mean", "std"))
    return np.ascontiguousarray(((array - mean) / std)[None], np.float32)


def _per_channel(text: str, name: str, channels: int) -> np.ndarray:
    try:
        numbers = [float(item) for item in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 3):
        raise UsageError(f"--{name} {text!r} cannot be read; write one number or three, as 0.485,0.456,0.406")
    return np.array(numbers[:channels], np.float32).reshape(-1, 1, 1)
