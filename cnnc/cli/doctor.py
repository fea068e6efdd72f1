"""`cnnc doctor`: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import click

from cnnc.cli.report import print_json, print_table
from cnnc.errors import EnvironmentProblem
from cnnc.profiler.engines import ENGINES
from cnnc.target import Target, cpu_model_name

_PINNED = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1"}
_NEEDED = ("llvmlite", "onnx", "numpy", "networkx", "protobuf", "safetensors", "pillow")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `cure` is empty where all is well."""

    what: str
    found: str
    cure: str = ""
    fatal: bool = False


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(as_json: bool) -> int:
    """Check the tools and libraries that cnnc needs; exit 6 if one is missing."""
    findings = [*_packages(), *_engines(), _compiler(), _cpu(), _nvcc(), *_gpus(), _cache()]
    broken = any(f.cure and f.fatal for f in findings)
    if as_json:
        print_json("doctor", {"healthy": not broken, "findings": [vars(f) for f in findings]})
    else:
        columns = [("what", "left"), ("found", "left"), ("to mend it", "left")]
        print_table("cnnc doctor", columns, [(f.what, f.found, f.cure) for f in findings])
        click.echo("FAILED" if broken else "PASSED")
    return 6 if broken else 0


def _packages() -> list[Finding]:
    findings = [Finding("python", sys.version.split()[0])]
    for name, wanted in _PINNED.items():
        found = _version(name)
        cure = "" if found == wanted else f"pip install {name}=={wanted}"
        findings.append(Finding(name, found or "missing", cure, fatal=True))
    for name in _NEEDED:
        found = _version(name)
        findings.append(Finding(name, found or "missing", "" if found else f"pip install {name}", fatal=True))
    return findings


def _engines() -> list[Finding]:
    """What `--against` may name, with the versions of what it needs."""
    findings = []
    for engine in ENGINES.values():
        versions = {package: _version(package) for package in engine.needs}
        missing = [package for package, found in versions.items() if not found]
        found = ", ".join(f"{package} {found or 'missing'}" for package, found in versions.items())
        cure = f"pip install {' '.join(missing)}" if missing else ""
        findings.append(Finding(f"--against {engine.name}", found, cure))
    return findings


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _compiler() -> Finding:
    found = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    cure = "" if found else "apt-get install gcc (links the binaries)"
    return Finding("C compiler", found or "missing", cure, fatal=True)


def _cpu() -> Finding:
    target = Target.parse("cpu")
    vectors = f"{target.vector_bytes * 8}-bit vectors"
    return Finding("CPU", f"{cpu_model_name()} ({target}, {vectors})")


def _nvcc() -> Finding:
    """What compiles for `--target cuda:ARCH`; nothing else needs it."""
    from cnnc.backends.cuda.nvcc import CURE, find_nvcc, nvcc_version

    try:
        release = next((line for line in nvcc_version().splitlines() if "release" in line), "of an unknown version")
        return Finding("nvcc", f"{release.rpartition(', ')[2]} ({find_nvcc()})")
    except EnvironmentProblem as problem:
        return Finding("nvcc", "missing" if CURE in str(problem) else str(problem), CURE)


def _gpus() -> list[Finding]:
    """What runs binaries for CUDA; nothing else needs it."""
    from cnnc.backends.host.gpu import cuda_driver

    driver = cuda_driver()
    if driver is None:
        return [Finding("CUDA driver", "missing", "install NVIDIA's driver, to run (not to compile) binaries for CUDA")]
    if driver.problem:
        return [Finding("CUDA driver", driver.problem, "reinstall NVIDIA's driver, and restart")]
    gpus = []
    for i, gpu in enumerate(driver.gpus):
        fit = f"--target {gpu.target}" if gpu.target else f"{gpu.arch}, which no target is for"
        gpus.append(Finding(f"GPU {i}", f"{gpu.name} ({fit})"))
    return [Finding("CUDA driver", f"for CUDA {driver.version}, {len(gpus)} GPUs"), *gpus]


def _cache() -> Finding:
    from cnnc.backends.cache import DiskCache

    return Finding("kernel cache", str(DiskCache().status().folder))
