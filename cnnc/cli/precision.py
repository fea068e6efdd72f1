"""What storing weights in 16 bits did to a network: which weights, which not, and the error it makes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import click
import numpy as np

from cnnc.cli.arguments import open_model
from cnnc.cli.inputs import make_input
from cnnc.module import Module
from cnnc.options import format_bytes
from cnnc.passes.weight_report import WeightReport
from cnnc.profiler.accuracy import relative_error
from cnnc.target import Target

INPUTS = 4
"""Random inputs the error is measured on: together some thousand outputs, in the time of as many runs."""

BUDGET = {"f32": 1e-4, "f16": 5e-3, "bf16": 3e-2}
"""Relative L2 error of a whole network that still agrees with float64, by the type its weights are stored in."""


@dataclass(frozen=True)
class MeasuredError:
    """The relative L2 error of each output, over all inputs together; `reason` says why there is none."""

    relative_l2: dict[str, float]
    reason: str = ""


def weights_of(module: Module) -> str:
    """Give the type the weights of a module are stored in."""
    return str(module.meta.get("options", {}).get("weights", "f32"))


def measure_error(narrow: Module, model: str, arguments: dict[str, Any]) -> MeasuredError:
    """Compare a module with the same model compiled with f32 weights, on `INPUTS` random inputs.

    The f32 module's own error, some 1e-6, is far below what is measured.  A CPU that cannot run the code measures
    nothing.
    """
    missing = Target.parse(arguments["target"]).missing_features()
    if missing:
        reason = f"this machine lacks {', '.join(missing)}; run cnnc verify MODEL BINARY on one that has it"
        return MeasuredError({}, reason)
    wide = open_model(model, {**arguments, "weights": "f32", "dump_ir": None}).module
    rng = np.random.default_rng(0)
    feeds = [{port.name: make_input(port, "random", rng) for port in narrow.inputs} for _ in range(INPUTS)]
    pairs = [(narrow.run(feed), wide.run(feed)) for feed in feeds]
    return MeasuredError(
        {
            port.name: relative_error(*(np.stack([pair[which][port.name] for pair in pairs]) for which in (0, 1)))
            for port in narrow.outputs
        }
    )


def describe(stored: WeightReport, error: MeasuredError) -> dict[str, Any]:
    """Give both as JSON: every constant that stays f32 is listed."""
    return {"stored": asdict(stored), "error": {"against": "f32 weights", "inputs": INPUTS, **asdict(error)}}


def print_stored(stored: WeightReport, error: MeasuredError) -> None:
    """Print what is stored how, and the error; what is no weight is summed up."""
    rest = sum(constant.bytes for constant in stored.wide)
    count = f"{len(stored.wide)} other constants" if len(stored.wide) != 1 else "1 other constant"
    click.echo(
        f"weights  {stored.narrow} in {stored.dtype} ({format_bytes(stored.narrow_bytes)}),"
        f" {count} in f32 ({format_bytes(rest)})"
    )
    for sentence in stored.kept:
        click.echo(f"in f32   {sentence}")
    for output, value in error.relative_l2.items():
        click.echo(f"error    {value:.2e} relative L2 of {output}, against f32 weights on {INPUTS} random inputs")
    if error.reason:
        click.echo(f"error    not measured: {error.reason}")
