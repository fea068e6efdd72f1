"""The generic template computes every operator's examples, and fused chains, as the reference does."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest

from cnnc.backends.cpu.codegen import KernelJob, KernelObject, compile_kernel, compile_kernels, kernel_text
from cnnc.backends.cpu.generic import Generic
from cnnc.backends.cpu.generic_schedule import schedule_generic
from cnnc.backends.lower.kernel import lower_kernel
from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import run as interpret
from cnnc.ir.layout import Layout
from cnnc.ir.op import OPERATORS, Op, as_tuple
from cnnc.ir.types import DType, TensorType
from cnnc.ops import binary, dense, norm, reduce, softmax, unary
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input, constant
from cnnc.target import Target
from tests.backends.fused_networks import (
    Network,
    concatenated,
    constant_output,
    fused_network,
    many_stages,
    mean_of_gelu,
    normalised,
    normalised_silu,
    output_read_by_output,
    output_twice_and_input,
    silu_residual,
    softmax_then_scale,
    two_outputs,
)
from tests.backends.running import assert_close, fused_op, link, run_fused

TARGET = Target.parse("cpu")
TEMPLATE = Generic()
BLOCKED = Layout("NCHW8c")


def with_examples() -> list[str]:
    return [name for name, op in sorted(OPERATORS.items()) if any(True for _ in op.examples())]


def schedule(fused: Fused) -> object:
    (chosen,) = TEMPLATE.space(fused, TARGET)
    return TEMPLATE.build(fused, chosen, TARGET)


@pytest.mark.parametrize("name", with_examples())
def test_every_example_of_every_operator(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    examples = list(OPERATORS[name].examples())
    kernels = [fused_op(example.op, example.types) for example in examples]
    jobs = [KernelJob(schedule(fused), f"kernel{i}") for i, fused in enumerate(kernels)]
    objects = compile_kernels(jobs, TARGET)
    library = link(objects, tmp_path)
    for example, fused, kernel in zip(examples, kernels, objects, strict=True):
        arrays = example.inputs(rng)
        results = run_fused(library, kernel, fused, arrays)
        for result, wanted in zip(results, as_tuple(example.op.reference(*arrays)), strict=True):
            assert_close(result, wanted)


@pytest.mark.parametrize("sum_of", [5, 6, 7, 9])
def test_sums_that_llvm_may_not_vectorise(sum_of: int, tmp_path: Path) -> None:
    """LLVM 22 makes invalid code of the sum of seven for this CPU, at its highest level."""
    target = Target.parse("cpu:x86-64-v2")
    fused = fused_op(dense.MatMul(), (TensorType((1, 1, 7, sum_of)), TensorType((1, 1, sum_of, 1))))
    (chosen,) = TEMPLATE.space(fused, target)
    kernel = compile_kernel(TEMPLATE.build(fused, chosen, target), "kernel", target)
    rng = np.random.default_rng(sum_of)
    arrays = [rng.standard_normal(v.type.static_shape, np.float32) for v in fused.body.inputs]
    (result,) = run_fused(link([kernel], tmp_path), kernel, fused, arrays)
    assert_close(result, arrays[0] @ arrays[1])


CASES: list[tuple[Network, tuple[TensorType, ...]]] = [
    (silu_residual, (TensorType((2, 3, 5, 7)),) * 2),
    (silu_residual, (TensorType((1, 64, 14, 14), layout=BLOCKED),) * 2),
    (silu_residual, (TensorType((2, 13, 5, 4), layout=BLOCKED),) * 2),
    (silu_residual, (TensorType((1, 3, 57, 57)),) * 2),
    (normalised_silu, (TensorType((3, 1000)),)),
    (normalised_silu, (TensorType((2, 21, 16, 16)),)),
    (normalised_silu, (TensorType((2, 21, 9, 7)),)),
    (softmax_then_scale, (TensorType((64, 40)),)),
    (softmax_then_scale, (TensorType((1, 997)),)),
    (mean_of_gelu, (TensorType((2, 24, 8, 8)),)),
    (mean_of_gelu, (TensorType((1, 24, 7, 7)),)),
    (mean_of_gelu, (TensorType((1, 128, 6, 6), layout=BLOCKED),)),
    (mean_of_gelu, (TensorType((1, 12, 6, 6), layout=BLOCKED),)),
    (two_outputs, (TensorType((4, 32, 9)),) * 2),
    (output_twice_and_input, (TensorType((3, 11)),)),
    (output_read_by_output, (TensorType((8, 33)),)),
    (constant_output, (TensorType((8, 33)),)),
    (many_stages, (TensorType((5, 64)),)),
    (concatenated, (TensorType((1, 16, 6, 6), layout=BLOCKED), TensorType((1, 24, 6, 6), layout=BLOCKED))),
    (concatenated, (TensorType((2, 3, 5)), TensorType((2, 4, 5)))),
    (normalised, (TensorType((2, 6, 12, 8)), TensorType((6,)), TensorType((6,)))),
]


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize(("network", "types"), CASES, ids=lambda v: getattr(v, "__name__", None) or str(v[0]))
def test_fused_chains(network: Network, types: tuple[TensorType, ...], lanes: int, tmp_path: Path) -> None:
    fused = fused_network(network, types)
    kernel = compile_kernel(schedule_generic(lower_kernel(fused).prim_func(), lanes), "kernel", TARGET)
    rng = np.random.default_rng(lanes)
    arrays = [rng.uniform(-3, 3, type_.static_shape).astype(np.float32) for type_ in types]
    results = run_fused(link([kernel], tmp_path), kernel, fused, arrays)
    for result, wanted in zip(results, interpret(fused.body, arrays), strict=True):
        assert_close(result, wanted)


def compiled(op: Op, *types: TensorType) -> tuple[KernelObject, str]:
    func = schedule(fused_op(op, types))
    return compile_kernel(func, "kernel", TARGET), kernel_text(func, "kernel", TARGET, "s")


@pytest.mark.parametrize(
    ("op", "type_"),
    [
        (unary.Relu(), TensorType((1, 512, 7, 7))),
        (unary.Silu(), TensorType((1, 64, 56, 56), layout=BLOCKED)),
        (unary.Gelu(), TensorType((1, 67, 56, 56), layout=BLOCKED)),
        (softmax.Softmax(1), TensorType((64, 1000))),
        (norm.RmsNorm(1), TensorType((64, 768))),
    ],
    ids=str,
)
def test_work_is_sliced_and_calls_nothing(op: Op, type_: TensorType) -> None:
    extra = (TensorType((768,)),) if isinstance(op, norm.RmsNorm) else ()
    kernel, assembly = compiled(op, type_, *extra)
    assert kernel.slices >= 7
    assert "\tcall" not in assembly


def test_a_sum_along_memory_uses_vectors() -> None:
    _, assembly = compiled(reduce.ReduceSum((1,), True), TensorType((64, 1024)))
    vector = "ymm" if TARGET.vector_bytes == 32 else ("zmm" if TARGET.vector_bytes == 64 else "xmm")
    assert any("addps" in line and vector in line for line in assembly.splitlines())


def test_independent_outputs_share_the_slices() -> None:
    fused = fused_network(two_outputs, [TensorType((256, 64))] * 2)
    kernel = compile_kernel(schedule(fused), "kernel", TARGET)
    assert kernel.slices >= 8


def test_a_tensor_constant_must_be_an_input() -> None:
    x = call(Input("x", TensorType((4,))))
    y = call(binary.Add(), x, constant(np.arange(4, dtype=np.float32)))
    with pytest.raises(VerifyError, match="holds the constant f32\\[4\\]"):
        lower_kernel(Fused(Graph("kernel", (x,), (y,)), "add"))


def test_it_costs_more_than_it_moves() -> None:
    small, large = (fused_op(unary.Relu(), [TensorType((n,), DType.F32)]) for n in (1 << 10, 1 << 20))
    (chosen,) = TEMPLATE.space(small, TARGET)
    assert 0 < TEMPLATE.cost(small, chosen, TARGET) < TEMPLATE.cost(large, chosen, TARGET)
