"""What narrow weights or products did to a network: which weights are narrow, which not, and the error it makes."""

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

BUDGET = {"f32": 1e-4, "tf32": 5e-3, "f16": 5e-3, "bf16": 3e-2}
"""Relative L2 error of a whole network that still agrees with float64, by its narrowest type."""


@dataclass(frozen=True)
class MeasuredError:
    """The relative L2 error of each output, over all inputs together; `reason` says why there is none."""

    relative_l2: dict[str, float]
    reason: str = ""


def precision_of(module: Module) -> str:
    """Give the narrowest type of a module: that of its products, or of its weights."""
    options = module.meta.get("options", {})
    dtype = str(options.get("dtype", "f32"))
    return str(options.get("weights", "f32")) if dtype == "f32" else dtype


def measure_error(narrow: Module, model: str, arguments: dict[str, Any]) -> MeasuredError:
    """Compare a module with the same model compiled in f32, on `INPUTS` random inputs.

    The f32 module's own error, some 1e-6, is far below what is measured.  A machine that cannot run the code measures
    nothing.
    """
    missing = _missing(Target.parse(arguments["target"]))
    if missing:
        reason = f"this machine lacks {missing}; run cnnc verify MODEL BINARY on one that has it"
        return MeasuredError({}, reason)
    wide = open_model(model, {**arguments, "weights": "f32", "dtype": "f32", "dump_ir": None}).module
    rng = np.random.default_rng(0)
    feeds = [{port.name: make_input(port, "random", rng) for port in narrow.inputs} for _ in range(INPUTS)]
    pairs = [(narrow.run(feed), wide.run(feed)) for feed in feeds]
    return MeasuredError(
        {
            port.name: relative_error(*(np.stack([pair[which][port.name] for pair in pairs]) for which in (0, 1)))
            for port in narrow.outputs
        }
    )


def _missing(target: Target) -> str:
    """Say what this machine lacks to run code for a target; nothing where it runs it."""
    if not target.is_gpu:
        return ", ".join(target.missing_features())
    from cnnc.backends.host.gpu import cuda_driver

    driver = cuda_driver()
    return "" if driver and any(gpu.runs(target) for gpu in driver.gpus) else f"a GPU that runs {target}"


def describe(stored: WeightReport | None, error: MeasuredError) -> dict[str, Any]:
    """Give both as JSON: every constant that stays f32 is listed."""
    measured = {"against": "f32 weights" if stored else "f32", "inputs": INPUTS, **asdict(error)}
    return {**({"stored": asdict(stored)} if stored else {}), "error": measured}


def print_stored(stored: WeightReport) -> None:
    """Print what is stored how; what is no weight is summed up."""
    rest = sum(constant.bytes for constant in stored.wide)
    count = f"{len(stored.wide)} other constants" if len(stored.wide) != 1 else "1 other constant"
    click.echo(
        f"weights  {stored.narrow} in {stored.dtype} ({format_bytes(stored.narrow_bytes)}),"
        f" {count} in f32 ({format_bytes(rest)})"
    )
    for sentence in stored.kept:
        click.echo(f"in f32   {sentence}")


def print_error(error: MeasuredError, against: str) -> None:
    """Print the error, or why there is none."""
    for output, value in error.relative_l2.items():
        click.echo(f"error    {value:.2e} relative L2 of {output}, against {against} on {INPUTS} random inputs")
    if error.reason:
        click.echo(f"error    not measured: {error.reason}")
