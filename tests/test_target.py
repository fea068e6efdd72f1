"""Targets: what text names one, and what is refused, in which words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import cnnc
from cnnc.errors import UnsupportedError, UsageError
from cnnc.target import CUDA_ARCHS, Target

EXAMPLE = Path(__file__).parents[1] / "examples" / "simple_cnn.py"


@pytest.mark.parametrize("text", ["cpu:x86-64-v3", "cpu:znver4", *(f"cuda:{arch}" for arch in CUDA_ARCHS)])
def test_prints_what_it_reads(text: str) -> None:
    target = Target.parse(text)
    assert str(target) == text
    assert target.is_gpu == text.startswith("cuda")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cuda:sm_999",
            "architecture 'sm_999' is not known; use cuda:ARCH with ARCH one of sm_80, sm_86,",
        ),
        ("cuda:sm_75", "architecture 'sm_75' is not known"),
        ("cuda:90", "architecture '90' is not known"),
        ("cuda:", "the architecture is missing; use cuda:ARCH"),
        ("cuda", "target 'cuda': the architecture is missing"),
        ("gpu:sm_90", "target 'gpu:sm_90' is not known; use cpu, cpu:NAME or cuda:ARCH"),
        ("cpu:sm_90", "CPU 'sm_90' is not known"),
    ],
)
def test_refuses_what_it_does_not_know(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as refused:
        Target.parse(text)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "f16"}, "cuda:sm_90: weights in f16 are for CPUs; leave out --weights"),
    ],
)
def test_what_gpus_lack_is_refused_before_anything_is_compiled(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(message)) as refused:
        cnnc.compile(f"{EXAMPLE}:simple_cnn", target="cuda:sm_90", **options)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("tf32", "are for CUDA targets; leave out --dtype"),
        ("f16", "are for CUDA targets; use --weights f16, which"),
        ("bf16", "are for CUDA targets and CPUs with AMX; use cpu:sapphirerapids, or use --weights bf16, which"),
    ],
)
def test_products_in_narrow_types_are_refused_where_there_are_none(dtype: str, message: str) -> None:
    message = f"cpu:x86-64-v3: products in {dtype} {message}"
    with pytest.raises(UnsupportedError, match=re.escape(message)) as refused:
        cnnc.compile(f"{EXAMPLE}:simple_cnn", target="cpu:x86-64-v3", dtype=dtype)
    assert refused.value.exit_code == 4


def test_other_types_of_products_are_not_known() -> None:
    with pytest.raises(UsageError, match="dtype 'f8' is not known; use f32, tf32, f16, bf16"):
        cnnc.compile(f"{EXAMPLE}:simple_cnn", target="cuda:sm_90", dtype="f8")
