"""What machine code consists of, by NVIDIA's nvdisasm where there is one: on PATH, or in a wheel."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cnnc.backends.cuda.codegen import CudaSource
from cnnc.backends.cuda.nvcc import FLAGS, find_nvcc
from cnnc.target import Target

_FOLDERS = ("cu13/bin", "cuda_nvdisasm/bin")
"""Where the packages nvidia-cuda-nvdisasm put it, below the package `nvidia`."""


def _find() -> str | None:
    spec = importlib.util.find_spec("nvidia")
    roots = (spec.submodule_search_locations or ()) if spec else ()
    paths = [Path(root) / folder / "nvdisasm" for root in roots for folder in _FOLDERS]
    return shutil.which("nvdisasm") or next((str(path) for path in paths if path.is_file()), None)


_NVDISASM = _find()
needs_disassembler = pytest.mark.skipif(_NVDISASM is None, reason="pip install nvidia-cuda-nvdisasm")


def instructions(source: CudaSource, target: Target, folder: Path) -> Callable[[str], int]:
    """Give what counts a kernel's instructions whose name, with its modifiers, begins as a pattern says."""
    assert _NVDISASM is not None
    (folder / "code.cu").write_text(source.text)
    flags = [flag for flag in FLAGS if flag != "-fatbin"]
    compiler = [find_nvcc(), "-cubin", *flags, f"-arch={target.arch}", "-o", folder / "code.cubin", folder / "code.cu"]
    subprocess.run(compiler, capture_output=True, check=True)
    text = subprocess.run([_NVDISASM, "-c", folder / "code.cubin"], capture_output=True, text=True, check=True).stdout
    return lambda pattern: len(re.findall(rf"(?m)^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?{pattern}", text))
