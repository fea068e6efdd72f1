"""The generic template's CUDA source computes every operator's examples, whatever the order of threads."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cuda.codegen import CudaSource, cuda_source
from cnnc.backends.cuda.generic import Generic
from cnnc.ir.op import OPERATORS, Example, as_tuple
from cnnc.ir.types import DType, TensorType
from cnnc.ops import reduce, unary
from cnnc.ops.fused import Fused
from cnnc.target import Target
from tests.backends.cuda.emulator import BACKWARD, FORWARD, SHUFFLED, Emulator, needs_gxx
from tests.backends.fused_networks import (
    Network,
    concatenated,
    constant_output,
    fused_network,
    many_stages,
    mean_of_gelu,
    normalised,
    output_read_by_output,
    output_twice_and_input,
    softmax_then_scale,
    sum_of_all,
    two_outputs,
)
from tests.backends.running import assert_close, fused_op

pytestmark = needs_gxx

TARGET = Target.parse("cuda:sm_80")
TEMPLATE = Generic()
ORDERS = (FORWARD, BACKWARD, SHUFFLED + 1)


def source_of(fused: Fused, symbol: str) -> CudaSource:
    (chosen,) = TEMPLATE.space(fused, TARGET)
    return cuda_source(TEMPLATE.build(fused, chosen, TARGET), symbol, TARGET)


def examples(name: str) -> list[Example]:
    return list(OPERATORS[name].examples())


NAMES = [name for name in sorted(OPERATORS) if examples(name)]
GROUPS = [NAMES[i : i + 16] for i in range(0, len(NAMES), 16)]


in_groups = pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]}-{names[-1]}")

FEW = 8
"""Examples of an operator in the quick run, spread over all it has."""


@in_groups
def test_every_operator(names: Sequence[str], tmp_path: Path) -> None:
    check_examples([(n, i, e) for n in names for i, e in few_of(list(enumerate(examples(n))))], tmp_path)


@in_groups
@pytest.mark.slow
def test_every_example_of_every_operator(names: Sequence[str], tmp_path: Path) -> None:
    check_examples([(n, i, e) for n in names for i, e in enumerate(examples(n))], tmp_path)


def few_of(numbered: list[tuple[int, Example]]) -> list[tuple[int, Example]]:
    return numbered[:: -(-len(numbered) // FEW)]


def check_examples(cases: Sequence[tuple[str, int, Example]], folder: Path) -> None:
    """Compile a group of operators in one go, since most of g++'s time goes into headers."""
    kernels = [fused_op(example.op, example.types) for _, _, example in cases]
    sources = [source_of(fused, f"{c[0]}_{c[1]}") for c, fused in zip(cases, kernels, strict=True)]
    emulator = Emulator(sources, folder)
    for (name, number, example), fused, source in zip(cases, kernels, sources, strict=True):
        arrays = example.inputs(np.random.default_rng(zlib.crc32(f"{name} {number}".encode())))
        wanted = as_tuple(example.op.reference(*arrays))
        check_orders(emulator, source, fused, arrays, wanted)


def check_orders(
    emulator: Emulator,
    source: CudaSource,
    fused: Fused,
    arrays: Sequence[np.ndarray],
    wanted: Sequence[np.ndarray],
    tolerance: float | None = None,
) -> None:
    """Hold the results against the reference, and those of other orders of threads against them, bit for bit."""
    results = emulator.run_fused(source, fused, arrays, FORWARD)
    for result, reference in zip(results, wanted, strict=True):
        assert_close(result, reference, tolerance)
    for order in ORDERS[1:]:
        again = emulator.run_fused(source, fused, arrays, order)
        assert [a.tobytes() for a in again] == [r.tobytes() for r in results], f"{source.symbol} in order {order}"


# Fused kernels: what single operators do not show

FUSED: list[tuple[Network, tuple[TensorType, ...]]] = [
    (softmax_then_scale, (TensorType((3, 10)),)),
    (softmax_then_scale, (TensorType((2, 1000)),)),
    (mean_of_gelu, (TensorType((2, 5, 7, 9)),)),
    (mean_of_gelu, (TensorType((1, 3, 33, 31), DType.F16),)),
    (two_outputs, (TensorType((3, 4, 5)),) * 2),
    (output_twice_and_input, (TensorType((7, 3)),)),
    (output_read_by_output, (TensorType((4, 300)),)),
    (constant_output, (TensorType((2, 3)),)),
    (many_stages, (TensorType((5, 7)),)),
    (concatenated, (TensorType((2, 3, 5)), TensorType((2, 4, 5)))),
    (normalised, (TensorType((2, 3, 20, 20)), TensorType((3,)), TensorType((3,)))),
    (sum_of_all, (TensorType((3, 5, 7, 11)),)),
    (sum_of_all, (TensorType((1, 1)),)),
    (sum_of_all, (TensorType((63,)),)),
    (sum_of_all, (TensorType((257,)),)),
    (sum_of_all, (TensorType((16 * 256 + 3,)),)),
]


def test_fused_kernels(tmp_path: Path) -> None:
    kernels = [fused_network(build, types) for build, types in FUSED]
    sources = [source_of(fused, f"fused{i}_{FUSED[i][0].__name__}") for i, fused in enumerate(kernels)]
    emulator = Emulator(sources, tmp_path)
    rng = np.random.default_rng(5)
    for fused, source in zip(kernels, sources, strict=True):
        arrays = [rng.standard_normal(v.type.static_shape).astype(v.dtype.numpy) for v in fused.body.inputs]
        check_orders(emulator, source, fused, arrays, fused.reference(*arrays))


def test_long_sums_are_shared_by_a_block() -> None:
    source = source_of(fused_network(sum_of_all, (TensorType((5000,)),)), "shared_sum")
    first, second = source.launches
    assert (first.grid, first.block) == ((1, 1, 1), (256, 1, 1))
    assert "__syncthreads" in source.text
    # The sum goes from the first launch to the second through scratch memory.
    assert ("scratch", 0) in first.arguments
    assert ("scratch", 0) in second.arguments
    assert source.scratch_bytes > 0


def test_nan_is_not_lost_in_a_maximum(tmp_path: Path) -> None:
    """CUDA's own max gives the operand that is no NaN."""
    fused = fused_op(reduce.ReduceMax((0,), False), (TensorType((5,)),))
    source = source_of(fused, "maximum")
    arrays = [np.array([1, 2, np.nan, 3, 0], np.float32)]
    (result,) = Emulator([source], tmp_path).run_fused(source, fused, arrays)
    assert np.isnan(result)


def test_a_kernel_that_may_run_in_place_does_not_claim_otherwise() -> None:
    fused = fused_op(unary.Relu(), (TensorType((4, 4)),))
    func = TEMPLATE.build(fused, next(iter(TEMPLATE.space(fused, TARGET))), TARGET)
    assert "__restrict__" not in cuda_source(func, "in_place", TARGET, noalias=False).text
    assert "__restrict__" in cuda_source(func, "apart", TARGET).text


def test_a_kernel_without_elements_launches_nothing() -> None:
    source = source_of(fused_op(unary.Relu(), (TensorType((3, 0)),)), "empty")
    assert (source.launches, source.text) == ((), "")
