"""The kernels of a model for GPUs: how each is launched, what it takes of a multiprocessor, what it can come to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import click

from cnnc.backends.cuda.machine import GPUS, Gpu
from cnnc.backends.host.library import KernelInfo
from cnnc.cli.report import print_table, seconds_text
from cnnc.module import Module
from cnnc.options import format_bytes
from cnnc.target import Target


def describe_kernels(module: Module) -> list[dict[str, Any]]:
    """Give each kernel with its launches, their occupancy, and the roofline's estimate of the whole."""
    gpu, meta = _gpu_of(module), module.meta
    dtype = str(meta["options"].get("dtype", "f32"))
    return [_kernel(kernel, meta["launches"][kernel.symbol], gpu, dtype) for kernel in module.kernels]


def _gpu_of(module: Module) -> Gpu:
    return GPUS[Target.parse(module.target).arch]


def _kernel(kernel: KernelInfo, launches: list[dict[str, Any]], gpu: Gpu, dtype: str) -> dict[str, Any]:
    on_tensor_cores = any(launch["tensor_cores"] for launch in launches)
    seconds, bound = gpu.roofline(kernel.flops, kernel.bytes, dtype if on_tensor_cores else None)
    return {
        "symbol": kernel.symbol,
        "layers": list(kernel.layers),
        "template": kernel.algorithm,
        "schedule": kernel.schedule,
        "flops": kernel.flops,
        "bytes": kernel.bytes,
        "roofline_seconds": seconds,
        "bound_by": bound,
        "launches": [_launch(launch, gpu) for launch in launches],
    }


def _launch(launch: dict[str, Any], gpu: Gpu) -> dict[str, Any]:
    occupancy, limit = gpu.occupancy(math.prod(launch["block"]), launch["registers"], launch["shared_bytes"])
    return {**launch, "occupancy": occupancy, "limited_by": limit}


def print_kernels(module: Module, title: str) -> None:
    """Print a table with a line for each launch; what is of a whole kernel stands in its first."""
    gpu = _gpu_of(module)
    kernels = describe_kernels(module)
    columns = [("#", "right"), ("template", "left"), ("tile", "left"), ("grid", "right"), ("block", "right")]
    columns += [("regs", "right"), ("shared", "right"), ("spills", "right"), ("occupancy", "right"), ("limit", "left")]
    columns += [("flops", "right"), ("bytes", "right"), ("at best", "right"), ("bound by", "left"), ("layers", "left")]
    rows = [row for number, kernel in enumerate(kernels) for row in _rows(number, kernel)]
    print_table(title, columns, rows)
    total = sum(kernel["roofline_seconds"] for kernel in kernels)
    click.echo(f"at best {seconds_text(total)} on {gpu.name}, by its data sheet's arithmetic and memory bandwidth")
    if any(kernel["template"] == "winograd" for kernel in kernels):
        click.echo(
            "flops are those of the definition; by Winograd's algorithm a convolution takes fewer, and less time"
        )


def _rows(number: int, kernel: dict[str, Any]) -> Iterator[list[str]]:
    _, _, tile = kernel["schedule"].partition("(")
    first = [f"{kernel['flops']:,}", format_bytes(kernel["bytes"]), seconds_text(kernel["roofline_seconds"])]
    whole = [*first, kernel["bound_by"], ", ".join(kernel["layers"])]
    launches = kernel["launches"]
    if not launches:
        yield [str(number), kernel["template"], tile.rstrip(")"), *[""] * 7, *whole]
    for position, launch in enumerate(launches):
        yield [
            *([str(number), kernel["template"], tile.rstrip(")")] if position == 0 else [""] * 3),
            _sizes(launch["grid"]),
            _sizes(launch["block"]),
            str(launch["registers"]),
            format_bytes(launch["shared_bytes"]),
            format_bytes(launch["spill_bytes"]),
            f"{launch['occupancy']:.0%}",
            launch["limited_by"],
            *(whole if position == 0 else [""] * 5),
        ]


def _sizes(sizes: list[int]) -> str:
    """Write a grid without the sizes of 1 at its end."""
    shown = list(sizes)
    while len(shown) > 1 and shown[-1] == 1:
        shown.pop()
    return "x".join(map(str, shown))
