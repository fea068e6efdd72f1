"""Fixtures: a GPU and a compiler for it, where there is neither."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.backends.cuda import fake_nvcc
from tests.backends.cuda.artifacts import FakeGpu


@pytest.fixture(scope="session")
def fake_gpu(tmp_path_factory: pytest.TempPathFactory) -> FakeGpu:
    return FakeGpu.build(tmp_path_factory.mktemp("libcuda"))


@pytest.fixture(scope="module")
def emulating_nvcc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have `nvcc` on PATH make code for the fake GPU."""
    folder = fake_nvcc.install(tmp_path_factory.mktemp("nvcc"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("CNNC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
