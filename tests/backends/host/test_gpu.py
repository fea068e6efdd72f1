"""What CUDA's driver shows of this machine, with a stand-in for the driver."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cnnc.backends.host.gpu import Gpu

DRIVER = r"""
#include <string.h>
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { return flags == 0 ? INIT : 1; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = index + 5; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, device == 5 ? "First" : "Second", (size_t)size);
  return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? device + 3 : device == 5 ? 9 : 0;
  return 0;
}
"""

SCRIPT = """
import dataclasses, json
from cnnc.backends.host.gpu import cuda_driver
found = cuda_driver()
print(json.dumps(found and dataclasses.asdict(found)))
"""


def seen(folder: Path, source: str | None) -> dict | None:
    """Ask in a process of its own, which loads the driver made of this source."""
    if source is not None:
        (folder / "driver.c").write_text(source)
        command = ["cc", "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1"]
        subprocess.run(command, cwd=folder, check=True)
    environment = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_lists_the_gpus(tmp_path: Path) -> None:
    found = seen(tmp_path, DRIVER.replace("INIT", "0"))
    assert found is not None
    assert (found["version"], found["problem"]) == ("12.4", "")
    assert [Gpu(**gpu) for gpu in found["gpus"]] == [Gpu("First", "sm_89"), Gpu("Second", "sm_90")]


@pytest.mark.parametrize(
    ("arch", "target"),
    [
        ("sm_75", None),
        ("sm_80", "cuda:sm_80"),
        ("sm_87", "cuda:sm_86"),
        ("sm_90", "cuda:sm_90a"),
        ("sm_120", "cuda:sm_90"),
    ],
)
def test_the_target_for_a_gpu(arch: str, target: str | None) -> None:
    assert Gpu("some GPU", arch).target == target


@pytest.mark.parametrize(("code", "problem"), [("100", ""), ("999", "it cannot be used (CUDA error 999)")])
def test_a_driver_without_a_gpu(tmp_path: Path, code: str, problem: str) -> None:
    found = seen(tmp_path, DRIVER.replace("INIT", code))
    assert found == {"version": "12.4", "gpus": [], "problem": problem}


def test_a_library_that_is_no_driver(tmp_path: Path) -> None:
    found = seen(tmp_path, "int something_else;\n")
    assert found is not None
    assert found["problem"].startswith("libcuda.so.1 is no driver of CUDA")
