"""Options that several verbs share, and how a model argument becomes a module.

What takes long to import is imported where it is used: a verb may have something to start before that.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cnnc.errors import UsageError
from cnnc.options import DTYPES, LEVELS

if TYPE_CHECKING:
    from cnnc.backends.cpu.compile_process import CompileProcess
    from cnnc.driver import Options, Report
    from cnnc.module import Module

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Opened:
    """A module, how it was compiled (None for a binary), and the seconds until it stood ready."""

    module: Module
    report: Report | None
    seconds: float


class BatchSizes(click.ParamType):  # type: ignore[type-arg]  # click makes it generic from 8.5 on
    """A batch size, or several with commas between."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, ...]:
        """Read `8` as a number, `1,8,32` as a tuple."""
        if isinstance(value, int | tuple):
            return value
        if not re.fullmatch(r"-?\d{1,10}(,-?\d{1,10})*", value, re.ASCII):
            self.fail(f"{value!r} cannot be read; write one batch size or several, as 8 or 1,8,32", param, ctx)
        sizes = tuple(map(int, value.split(",")))
        if min(sizes) < 1 or max(sizes) >= 2**31:
            self.fail(f"{value!r}: a batch size is 1 or more", param, ctx)
        if len(set(sizes)) < len(sizes):
            self.fail(f"{value!r} names a batch size twice", param, ctx)
        return sizes[0] if len(sizes) == 1 else sizes


def compile_options(function: F) -> F:
    """Add the options of a compile; they arrive as keyword arguments that `options_of` turns into `Options`."""
    added = [
        click.option("--records", type=click.Path(path_type=Path), help="Tuned records to use instead of your own."),
        click.option("--no-records", is_flag=True, help="Choose every schedule by the cost models alone."),
    ]
    for decorate in reversed(added):
        function = decorate(function)
    return model_options(function)


def model_options(function: F) -> F:
    """Add the options of a compile but those about tuned records."""
    added = [
        click.option("--target", default="cpu", show_default=True, help="cpu, cpu:x86-64-v3, cuda:sm_90, ..."),
        click.option("--shape", "shapes", multiple=True, metavar="x=1x3x224x224", help="Fix an input's shape."),
        click.option("--batch", type=BatchSizes(), help="Fix the batch size; several make one binary for any of them."),
        click.option(
            *("-O", "level"),
            type=click.Choice([*map(str, LEVELS), "s"]),
            default="3",
            show_default=True,
            help="Optimisation level; s is 3 with a binary hardly larger than the model.",
        ),
        click.option("--passes", help='Run these passes instead, e.g. "fold_batch_norm,cse,fuse".'),
        click.option(
            "--exact",
            is_flag=True,
            help="Add up the very products of each convolution: no Winograd, no f32 in parts or digits.",
        ),
        click.option(
            "--weights",
            type=click.Choice(["f32", "f16", "bf16"]),
            default="f32",
            show_default=True,
            help="Store weights in 16 bits, widened as kernels load them; arithmetic stays f32.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="f32",
            show_default=True,
            help="Multiply in this type on a GPU, adding up in f32; the 16-bit ones are also what is stored.",
        ),
        click.option("--dump-ir", type=click.Path(path_type=Path), help="Folder for the IR after each pass."),
        click.option("--no-cache", is_flag=True, help="Compile every kernel anew."),
    ]
    for decorate in reversed(added):
        function = decorate(function)
    return function


def threads_option(function: F) -> F:
    """Add `--threads`."""
    decorate = click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="Threads.")
    return decorate(function)


def options_of(arguments: dict[str, Any]) -> Options:
    """Turn the keyword arguments of `compile_options` into `Options`."""
    from cnnc.driver import Options

    return Options(
        target=arguments["target"],
        threads=arguments.get("threads", 1),
        shapes=dict(_parse_shape(text) for text in arguments["shapes"]),
        batch=arguments["batch"],
        level=max(LEVELS) if arguments["level"] == "s" else int(arguments["level"]),
        passes=arguments["passes"],
        exact=arguments["exact"],
        small=arguments["level"] == "s",
        weights=arguments["weights"],
        dtype=arguments["dtype"],
        dump_ir=arguments["dump_ir"],
        records=_records_of(arguments),
        cache=not arguments["no_cache"],
    )


def open_model(
    model: str, arguments: dict[str, Any], name: str | None = None, helper: CompileProcess | None = None
) -> Opened:
    """Load a binary, or compile a model (under another name, if one is given) with progress on stderr.

    Of a binary `--batch` chooses a batch size; `helper` compiles kernels.
    """
    from cnnc.cli.progress import Phases
    from cnnc.driver import Report, compile
    from cnnc.module import load

    start = time.perf_counter()
    if model.endswith(".so"):
        module = load(model, threads=arguments.get("threads", 1))
        if arguments["batch"] is not None:
            module = module.with_batch(one_batch(arguments))
        return Opened(module, None, time.perf_counter() - start)
    report = Report()
    options = options_of(arguments)
    with Phases() as phases:
        module = compile(
            model,
            target=options.target,
            threads=options.threads,
            shapes=options.shapes,
            batch=options.batch,
            level=options.level,
            passes=options.passes,
            exact=options.exact,
            small=options.small,
            weights=options.weights,
            dtype=options.dtype,
            dump_ir=options.dump_ir,
            records=options.records,
            cache=options.cache,
            name=name,
            report=report,
            progress=phases,
            helper=helper,
        )
    return Opened(module, report, time.perf_counter() - start)


def one_batch(arguments: dict[str, Any]) -> int:
    """Give the batch size of `--batch`; raises `UsageError` for several."""
    batch = arguments["batch"]
    if not isinstance(batch, int):
        raise UsageError(f"--batch {','.join(map(str, batch))}: name one of the batch sizes")
    return batch


def _records_of(arguments: dict[str, Any]) -> Path | bool:
    chosen: Path | None = arguments.get("records")
    if chosen is not None and arguments.get("no_records"):
        raise UsageError("--records and --no-records exclude each other")
    return not arguments.get("no_records") if chosen is None else chosen


def _parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, sizes = text.rpartition("=")
    try:
        shape = tuple(int(size) for size in sizes.split("x")) if sizes else ()
    except ValueError:
        equals = ""
    if not equals or not name:
        raise UsageError(f"--shape {text!r} cannot be read; write it as x=1x3x224x224")
    return name, shape
