"""The package as installed: light to import, one top-level name, promises of the README."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from cnnc.backends.cuda.nvcc import CURE
from cnnc.profiler.engines import ENGINES

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("tvm", "onnx", "llvmlite", "networkx", "torch", "onnxruntime")


def test_import_is_light():
    code = f"import sys, cnnc; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_readme_prints_one_setup_and_one_test_command():
    readme = (ROOT / "README.md").read_text()
    for name in ("setup command", "test command"):
        found = re.findall(rf"<!-- {name} -->\n```sh\n(.+)\n```\n<!-- /{name} -->", readme)
        assert len(found) == 1
        assert ".venv" in found[0]


def test_the_bench_extra_holds_the_engines():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {package for engine in ENGINES.values() for package in engine.needs}
    # PyTorch is installed in other ways on other machines.
    assert {re.split("[<>=]", requirement)[0] for requirement in extras["bench"]} == needed - {"torch"}


def test_the_cuda_extra_holds_what_a_missing_nvcc_is_cured_with():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["cuda"]
    assert {re.split("[<>=]", requirement)[0] for requirement in extras["cuda"]} == set(
        re.findall(r"nvidia-[\w-]+", CURE)
    )


def test_folders_at_the_top_are_parts_of_the_package():
    for name in ("frontends", "passes", "backends"):
        link = ROOT / "cnnc" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


@pytest.mark.slow
def test_wheel_has_one_top_level_name_and_the_runtime(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cnnc"}
    for part in ("frontends/dsl/__init__.py", "passes/pipeline.py", "backends/cpu/build.py"):
        assert f"cnnc/{part}" in names
    assert "cnnc/backends/cpu/records/x86-64-v3.jsonl" in names
    sources = {p.name for p in (ROOT / "backends/host/runtime").iterdir() if p.suffix in (".c", ".h")}
    assert sources <= {Path(name).name for name in names if "host/runtime" in name}
