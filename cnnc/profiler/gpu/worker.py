"""The process that runs jobs on a GPU: `python -m cnnc.profiler.gpu.worker FOLDER`.

It answers requests as `cnnc.profiler.worker` does.  After a failure of the GPU nothing more can be done in a process:
`cnnc bench-gpu` then starts another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cnnc.backends.host.library import LoadedVariant, SharedModel
from cnnc.ir.types import DType
from cnnc.ops.example_graph import TOLERANCE, difference
from cnnc.profiler.accuracy import relative_error
from cnnc.profiler.gpu.artifact import DeviceArtifact
from cnnc.profiler.gpu.jobs import Job, load_arrays, repeated
from cnnc.profiler.gpu.torch_peers import find_peers
from cnnc.profiler.gpu.turns import take_turns
from cnnc.profiler.worker import serve


class Session:
    """The jobs of one folder; each call answers a request."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def run(self, job: dict[str, Any], peers: Sequence[str], seconds: float) -> dict[str, Any]:
        """Check and measure a job; a failure of the GPU raises `EnvironmentProblem`."""
        found = Job(**{**job, "batches": tuple(job["batches"])})
        return run_job(self._folder, found, tuple(peers), seconds)


def run_job(folder: Path, job: Job, peers: tuple[str, ...], seconds: float) -> dict[str, Any]:
    """Check an artifact at each of its batch sizes, and measure it where it is a network."""
    model = SharedModel(folder / f"{job.stem}.so")
    inputs = load_arrays(folder, job, "x", [_numpy(port.dtype) for port in model.inputs])
    wanted = load_arrays(folder, job, "y", [_numpy(port.dtype) for port in model.outputs])
    batches = []
    for variant in model.variants:
        given = [repeated(flat, port.shape) for flat, port in zip(inputs, variant.inputs, strict=True)]
        expected = [repeated(flat, port.shape) for flat, port in zip(wanted, variant.outputs, strict=True)]
        batches.append(_run_variant(model, variant, job, given, expected, peers, seconds))
    reasons = [batch["reason"] for batch in batches if batch["reason"]]
    return {"status": "differs" if reasons else "agrees", "reason": "; ".join(reasons), "batches": batches}


def _run_variant(
    model: SharedModel,
    variant: LoadedVariant,
    job: Job,
    given: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    peers: tuple[str, ...],
    seconds: float,
) -> dict[str, Any]:
    """Run one batch size from the host's memory and from the GPU's, which must agree bit for bit."""
    result: dict[str, Any] = {"batch": variant.batch, "engines": {}, "missing": {}}
    with model.create() as context:
        from_host = context.run(given, variant.batch)
    with DeviceArtifact(model, variant, given) as device:
        device.start()
        on_gpu = device.outputs()
        result["error"], result["reason"] = _judge(job, variant, from_host, on_gpu, expected)
        if job.kind == "network" and not result["reason"] and seconds > 0:
            others, result["missing"] = find_peers(peers, job.name, job.dtype, variant.inputs[0].shape)
            timings = take_turns([device, *others], seconds)
            result["engines"] = {name: asdict(timing) for name, timing in timings.items()}
    return result


def _judge(
    job: Job,
    variant: LoadedVariant,
    from_host: Sequence[np.ndarray],
    on_gpu: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
) -> tuple[float, str]:
    """Give the worst error of a run, and what is wrong with it; nothing if it is right."""
    worst, reason = 0.0, ""
    for port, host, there, wanted in zip(variant.outputs, from_host, on_gpu, expected, strict=True):
        if job.kind == "network":
            error, limit = relative_error(there, wanted), job.tolerance
        else:
            error, limit = difference(there, wanted), TOLERANCE.get(DType.of(wanted), 0)
        worst = max(worst, error)
        where = f"batch {variant.batch}, output {port.name}" if variant.batch else f"output {port.name}"
        if not error <= limit:
            reason = reason or f"{where}: error {error:.2e}, at most {limit:.0e} is right"
        elif host.tobytes() != there.tobytes():
            reason = reason or f"{where}: other numbers from the host's memory than from the GPU's"
    return worst, reason


def _numpy(dtype: str) -> np.dtype[Any]:
    return np.dtype(DType(dtype).numpy)


if __name__ == "__main__":
    serve(Session(Path(sys.argv[1])))
