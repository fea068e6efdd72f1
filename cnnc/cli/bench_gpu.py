"""`cnnc bench-gpu`: everything there is to know on a machine with a GPU, in one command: right numbers, then times."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

import cnnc
from cnnc.backends.host.gpu import Driver, cuda_driver
from cnnc.backends.host.publish import publish
from cnnc.cli.arguments import BatchSizes
from cnnc.cli.bench_gpu_prepare import Preparation, chosen_operators, default_models
from cnnc.cli.progress import Phases
from cnnc.cli.report import SCHEMA, print_table, seconds_text
from cnnc.errors import EnvironmentProblem, UsageError
from cnnc.options import DTYPES
from cnnc.profiler.engine_process import EngineFailure, EngineProcess
from cnnc.profiler.gpu.jobs import Job, Manifest
from cnnc.profiler.gpu.torch_peers import PEERS
from cnnc.target import Target


@click.command("bench-gpu")
@click.argument("models", nargs=-1, metavar="[MODEL...]")
@click.option("--prepare", type=click.Path(path_type=Path), help="Only build, into this folder; needs no GPU.")
@click.option("--from", "source", type=click.Path(path_type=Path), help="Only run what was built into this folder.")
@click.option("--target", help="What to build for.  [default: the first GPU; cuda:sm_90 where there is none]")
@click.option("--batch", type=BatchSizes(), default="1,8,64", show_default=True, help="Batch sizes of each network.")
@click.option("--dtype", default=",".join(DTYPES), show_default=True, help="Types that products are computed in.")
@click.option("--operators", default="all", show_default=True, help="Operators to check: all, none, or A,B.")
@click.option("--peers", default=",".join(PEERS), show_default=True, help="What to measure beside cnnc, or none.")
@click.option("--seconds", type=click.FloatRange(min=0), default=0.5, show_default=True, help="For each engine.")
@click.option("--timeout", type=click.FloatRange(min=0), default=3600.0, show_default=True, help="Seconds to a hang.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-gpu.json"), show_default=True)
def command(
    models: tuple[str, ...],
    prepare: Path | None,
    source: Path | None,
    target: str | None,
    batch: int | tuple[int, ...],
    dtype: str,
    operators: str,
    peers: str,
    seconds: float,
    timeout: float,
    out: Path,
) -> int:
    """Check and measure networks (file.py:network, else the examples) and operators on the first GPU.

    Results are compared with the interpreter's; networks are timed beside PyTorch, where it is installed.  A machine
    without a GPU can --prepare all that a GPU then runs with --from, without a compiler.  Exits with 1 where a number
    is wrong.
    """
    if prepare is not None and source is not None:
        raise UsageError("--prepare builds and --from runs what was built; give one of them")
    driver = cuda_driver()
    names = _chosen("--peers", peers, PEERS)
    if prepare is None:
        _require_gpu(driver)

    def build(folder: Path) -> Manifest:
        made_for = Target.parse(target or _native_target(driver))
        if not made_for.is_gpu:
            raise UsageError(f"--target {made_for} is no GPU; use cuda:ARCH")
        dtypes = _chosen("--dtype", dtype, DTYPES)
        batches = (batch,) if isinstance(batch, int) else batch
        chosen = Preparation(models or default_models(), chosen_operators(operators), dtypes, batches, str(made_for))
        with Phases() as phases:
            return chosen.make(folder, lambda done, total: phases("prepare", done, total))

    if prepare is not None:
        manifest = build(prepare)
        click.echo(f"{len(manifest.jobs)} artifacts for {manifest.target} in {prepare}")
        click.echo(f"on a machine with a GPU: cnnc bench-gpu --from {prepare}")
        return 0
    with tempfile.TemporaryDirectory(prefix="cnnc-bench-gpu-") as temporary:
        folder = source or Path(temporary)
        manifest = Manifest.read(folder) if source else build(folder)
        results = list(_run_all(folder, manifest, names, seconds, timeout))
    return _finish(_report(_require_gpu(driver), manifest, results), out)


def _finish(report: dict[str, Any], out: Path) -> int:
    """Write and print the report; gives the exit code."""
    publish(out, json.dumps(report, indent=1).encode() + b"\n")
    _print(report, out)
    return 1 if report["wrong"] else 0


def _chosen(option: str, text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Read names with commas between, or `none`."""
    names = () if text == "none" else tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(f"{option} {name!r} is not known; use {', '.join(known)}")
    return names


def _require_gpu(driver: Driver | None) -> Driver:
    cure = "cnnc bench-gpu --prepare DIR builds here what a machine with one then runs by --from DIR"
    if driver is None:
        raise EnvironmentProblem(f"there is no CUDA driver on this machine (libcuda.so.1); {cure}")
    if driver.problem or not driver.gpus:
        raise EnvironmentProblem(f"CUDA's driver shows no GPU{': ' * bool(driver.problem)}{driver.problem}; {cure}")
    return driver


def _native_target(driver: Driver | None) -> str:
    native = driver.gpus[0].target if driver is not None and driver.gpus else None
    return native or "cuda:sm_90"


def _run_all(
    folder: Path, manifest: Manifest, peers: Sequence[str], seconds: float, timeout: float
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Run every job; one that fails takes its process with it, and the next gets a new one."""
    pending = list(manifest.jobs)
    with Phases() as phases, tempfile.TemporaryDirectory(prefix="cnnc-gpu-worker-") as log:
        while pending:
            worker = EngineProcess(["cnnc.profiler.gpu.worker", str(folder.resolve())], 1, Path(log), timeout)
            try:
                while pending:
                    phases("run", len(manifest.jobs) - len(pending), len(manifest.jobs))
                    job = pending.pop(0)
                    yield job, worker.ask("run", job=asdict(job), peers=list(peers), seconds=seconds)
            except EngineFailure as failure:
                reason = " ".join(failure.reason.split())
                yield job, {"status": failure.kind, "reason": reason, "batches": []}
            finally:
                worker.close()


def _report(driver: Driver, manifest: Manifest, results: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    gpu = driver.gpus[0]
    wrong = [f"{job.kind} {job.name} {job.dtype}: {r['reason']}" for job, r in results if r["status"] != "agrees"]
    networks = [
        {"network": job.name, "dtype": job.dtype, "status": result["status"], **_with_ratios(batch)}
        for job, result in results
        if job.kind == "network"
        for batch in result["batches"]
    ]
    operators = [
        {"operator": job.name, "status": result["status"], "errors": [b["error"] for b in result["batches"]]}
        for job, result in results
        if job.kind == "operator"
    ]
    return {
        "schema": SCHEMA,
        "report": "bench-gpu",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": gpu.name,
        "arch": gpu.arch,
        "driver": _driver_version(),
        "cuda": driver.version,
        "target": manifest.target,
        "cnnc": cnnc.__version__,
        "built_by": manifest.cnnc,
        "torch": _torch_version(),
        "wrong": wrong,
        "operators": operators,
        "networks": networks,
    }


def _with_ratios(batch: dict[str, Any]) -> dict[str, Any]:
    """Add how many times faster cnnc is than each peer: in the time to an answer, and in answers in a row."""
    engines = batch["engines"]
    ours = engines.get("cnnc")
    ratios = {
        name: {key: timing[key] / ours[key] for key in ("latency", "interval")}
        for name, timing in engines.items()
        if ours and name != "cnnc"
    }
    return {**batch, "times_faster": ratios}


def _driver_version() -> str:
    """Give the first line of what NVIDIA's kernel module says of itself."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def _torch_version() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def _print(report: dict[str, Any], out: Path) -> None:
    names = list(dict.fromkeys(name for row in report["networks"] for name in row["engines"] if name != "cnnc"))
    columns = [("network", "left"), ("dtype", "left"), ("batch", "right"), ("error", "right")]
    columns += [("cnnc", "right"), ("in a row", "right"), *((f"x {name}", "right") for name in names)]
    rows = [_row(row, names) for row in report["networks"]]
    print_table(f"{report['device']}, CUDA {report['cuda']}, {report['date']}", columns, rows)
    right = sum(operator["status"] == "agrees" for operator in report["operators"])
    click.echo(f"{right} of {len(report['operators'])} operators agree with the interpreter")
    missing = {name: why for row in report["networks"] for name, why in row["missing"].items()}
    for name, why in missing.items():
        click.echo(f"missing  {name}: {why}")
    for sentence in report["wrong"]:
        click.echo(f"WRONG    {sentence}")
    click.echo(f"written  {out}")


def _row(row: dict[str, Any], names: Sequence[str]) -> list[str]:
    ours = row["engines"].get("cnnc")
    times = [seconds_text(ours["latency"]), seconds_text(ours["interval"])] if ours else ["", ""]
    ratios = [row["times_faster"].get(name) for name in names]
    ratio_texts = [f"{ratio['latency']:.2f} {ratio['interval']:.2f}" if ratio else "" for ratio in ratios]
    return [row["network"], row["dtype"], str(row["batch"]), f"{row['error']:.1e}", *times, *ratio_texts]
