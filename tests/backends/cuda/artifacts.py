"""Whole artifacts on a machine without a GPU: compiled by `fake_nvcc`, run over `fake_libcuda` in a process apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SCRIPT = """
import sys
import numpy as np
import cnnc

path, feeds, out, runs = sys.argv[1:]
module = cnnc.load(path)
for _ in range(int(runs)):
    results = module.run(dict(np.load(feeds)))
np.savez(out, **results)
"""

_REPORT = re.compile(
    r"fake CUDA: (\d+) launches, (\d+) objects alive, context retained (\d+) times, current (\d+) times\n"
)


@dataclass(frozen=True)
class Report:
    """What the driver counted until the process ended."""

    launches: int
    alive: int
    retained: int
    current: int

    @staticmethod
    def of(text: str) -> Report:
        found = _REPORT.search(text)
        assert found, text
        return Report(*map(int, found.groups()))


@dataclass(frozen=True)
class FakeGpu:
    """The stand-in for libcuda.so.1, in a folder of its own."""

    folder: Path

    @staticmethod
    def build(folder: Path, without: str = "") -> FakeGpu:
        """Compile it, with one of its functions under a name that nobody asks for."""
        source = Path(__file__).parent / "fake_libcuda.c"
        command = ["cc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        command += ["-Wl,-soname,libcuda.so.1", str(source), "-o", str(folder / "libcuda.so.1"), "-ldl"]
        command += [f"-D{without}=hidden"] if without else []
        subprocess.run(command, check=True)
        return FakeGpu(folder)

    def environment(self, options: str = "") -> dict[str, str]:
        """Give the variables of a process that is to see this GPU."""
        return {**os.environ, "LD_LIBRARY_PATH": str(self.folder), "CNNC_FAKE_CUDA": f"report=1,{options}"}

    def start(self, command: Sequence[object], options: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program that sees this GPU."""
        environment = self.environment(options)
        return subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    def run(
        self, library: Path, feeds: Mapping[str, np.ndarray], options: str = "", runs: int = 1
    ) -> tuple[dict[str, np.ndarray], Report]:
        """Load an artifact, run it, and give its outputs and what the driver counted."""
        np.savez(self.folder / "feeds.npz", **feeds)
        files = [library, self.folder / "feeds.npz", self.folder / "results.npz"]
        done = self.start([sys.executable, "-c", _SCRIPT, *files, runs], options)
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(self.folder / "results.npz") as results:
            return dict(results), Report.of(done.stderr)
