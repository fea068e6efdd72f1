"""The vectorised functions against float64, over all magnitudes, and that they stay in vector registers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu.codegen import KernelJob, compile_kernels, kernel_text
from cnnc.backends.load_tvm import load_tvm
from cnnc.target import Target
from tests.backends.running import aligned, link, poisoned, run

LENGTH = 1 << 18
TARGETS = [Target.parse("cpu:x86-64-v2"), Target.parse("cpu")]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x)))


REFERENCES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "exp": (np.exp, 1.0),
    "expm1": (np.expm1, 2.0),
    "log": (np.log, 2.0),
    "log1p": (np.log1p, 3.0),
    "sigmoid": (_sigmoid, 3.0),
    "tanh": (np.tanh, 3.0),
    "erf": (_erf, 2.0),
}
"""The function in float64, and the largest error in units of the last place."""

_SMALL = (0.0, 1e-45, 3e-39, 2.0**-126, 1e-10, 0.99999994, 1.0, 1.0000001)
_LARGE = (87.33654, 87.33655, 88.72283, 88.72284, 88.73, 103.97, 103.98, 104.0, 128.0, 150.0, 3.4e38, np.inf)
EDGES = np.array([sign * x for x in (*_SMALL, *_LARGE, np.nan) for sign in (1.0, -1.0)], np.float32)


def _sample() -> np.ndarray:
    """Draw from all bit patterns, and densely where the functions bend."""
    rng = np.random.default_rng(7)
    patterns = rng.integers(0, 2**32, LENGTH // 4, dtype=np.uint32).view(np.float32)
    ranges = [(-10, 10), (-110, 110), (-1, 1), (0.9, 1.1), (0, 4)]
    count = (LENGTH - patterns.size - EDGES.size) // len(ranges)
    drawn = [rng.uniform(low, high, count) for low, high in ranges]
    sample = np.concatenate([EDGES, patterns, *(d.astype(np.float32) for d in drawn)])
    return np.concatenate([sample, np.ones(LENGTH - sample.size, np.float32)])


def _function(name: str) -> object:
    """Describe y[i] = f(x[i]), in vectors of eight."""
    load_tvm()
    from tvm import s_tir, te

    from cnnc.backends.lower import vector_math

    vector_math.register()
    x = te.placeholder((LENGTH,), name="x")
    y = te.compute((LENGTH,), lambda i: vector_math.call(name, x(i)), name="y")
    sch = s_tir.Schedule(te.create_prim_func([x, y]))
    outer, lane = sch.split(sch.get_loops(sch.get_sblock("y"))[0], [None, 8])
    sch.parallel(outer)
    sch.vectorize(lane)
    return sch.mod["main"]


def _units(result: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Measure errors in units of the last place of the float32 nearest to the exact value; equal is 0."""
    nearest = exact.astype(np.float32)
    same = (result == nearest) | (np.isnan(result) & np.isnan(nearest))
    spacing = np.spacing(np.abs(np.where(np.isfinite(nearest), nearest, np.float32(1)))).astype(np.float64)
    return np.where(same, 0.0, np.abs(result - exact) / spacing)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_errors_are_as_stated(target: Target, tmp_path: Path) -> None:
    jobs = [KernelJob(_function(name), f"kernel_{name}") for name in REFERENCES]
    kernels = compile_kernels(jobs, target)
    library = link(kernels, tmp_path)
    x = aligned(_sample())
    for (name, (reference, bound)), kernel in zip(REFERENCES.items(), kernels, strict=True):
        y = poisoned(x.shape, x.dtype)
        run(library, kernel, [x, y])
        with np.errstate(all="ignore"):
            exact = reference(x.astype(np.float64))
            errors = _units(y, exact)
        worst = int(np.nanargmax(np.where(np.isnan(errors), np.inf, errors)))
        assert errors[worst] <= bound, f"{name}({x[worst]!r}) = {y[worst]!r}, exactly {exact[worst]!r}"
        signed = np.isfinite(exact) & (np.abs(exact) < 1e-30)
        np.testing.assert_array_equal(np.signbit(y[signed]), np.signbit(exact[signed]), name)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_gelu_is_as_exact_as_its_argument(target: Target, tmp_path: Path) -> None:
    kernels = compile_kernels([KernelJob(_function("gelu"), "kernel_gelu")], target)
    x = aligned(_sample())
    y = poisoned(x.shape, x.dtype)
    run(link(kernels, tmp_path), kernels[0], [x, y])
    finite = np.isfinite(x)
    share = 0.5 * np.vectorize(math.erfc, otypes=[np.float64])(-x[finite].astype(np.float64) * math.sqrt(0.5))
    with np.errstate(all="ignore"):
        errors = np.abs(y[finite] - x[finite] * share) / np.spacing(np.abs(x[finite]))
    assert errors.max() <= 3
    assert (y[finite & (x < -5.43)] == 0).all()
    assert np.isnan(y[np.isnan(x) | (x == -np.inf)]).all()
    assert (y[x == np.inf] == np.inf).all()


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_terms_of_a_softmax(target: Target, tmp_path: Path) -> None:
    load_tvm()
    from cnnc.backends.lower import loops
    from cnnc.backends.lower.vector_math import exp_nonpositive

    x, y = loops.buffer("x", (LENGTH,)), loops.buffer("y", (LENGTH,))

    def vector(index: Any) -> Any:
        return loops.store(y, exp_nonpositive(loops.load(x, index * 8, lanes=8)), index * 8, lanes=8)

    func = loops.function([x, y], loops.parallel(LENGTH // 8, vector))
    kernels = compile_kernels([KernelJob(func, "kernel_exp_nonpositive")], target)
    given = aligned(-np.abs(_sample()))
    got = poisoned(given.shape, given.dtype)
    run(link(kernels, tmp_path), kernels[0], [given, got])
    with np.errstate(all="ignore"):
        exact = np.exp(given.astype(np.float64))
    large = ~(given < -87)
    assert (got[~large] == 0).all()
    assert _units(got[large], exact[large]).max() <= 1.0
    np.testing.assert_array_equal(np.isnan(got), np.isnan(given))


@pytest.mark.parametrize("name", [*REFERENCES, "gelu"])
@pytest.mark.parametrize("arch", ["x86-64-v3", "x86-64-v4"])
def test_no_lane_is_computed_alone(name: str, arch: str) -> None:
    assembly = kernel_text(_function(name), "kernel", Target.parse(f"cpu:{arch}"), "s")
    code = [line.split() for line in assembly.splitlines() if line.startswith("\tv")]
    arithmetic = [line for line in code if line[0].startswith(("vmul", "vadd", "vsub", "vfm", "vfnm", "vdiv"))]
    assert len(arithmetic) > 8
    assert all(line[0].endswith("ps") for line in arithmetic)
    assert "\tcall" not in assembly


def test_the_table_is_complete() -> None:
    load_tvm()
    from cnnc.backends.lower import vector_math

    assert {*REFERENCES, "gelu"} == set(vector_math.FUNCTIONS)
