"""Weights in 16 bits, kernel by kernel: the numbers of the widened weights, read as 16 bits, whatever they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import cnnc
from cnnc.backends.cpu.codegen import kernel_text
from cnnc.backends.cpu.templates import template
from cnnc.driver import Report
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import run
from cnnc.ir.types import DType
from cnnc.module import Module
from cnnc.ops import Add, Conv, ConvTranspose, Dense, MatMul, Mul, Relu, Sigmoid, constant, graph_input
from cnnc.ops.fused import Fused
from cnnc.target import Target
from tests.passes.graphs import conv, graph_of, image, weights

V3 = Target.parse("cpu:x86-64-v3")
V4 = Target.parse("cpu:x86-64-v4")
NARROW = ["f16", "bf16"]


Make = Callable[[np.random.Generator], Value]


def convolved(*shape: int, w: tuple[int, ...], **fields: int) -> Make:
    """Convolve an image of a shape with drawn weights of a shape."""
    return lambda rng: conv(image(*shape), weights(rng, *w), **fields)


def layer(*shape: int, w: tuple[int, int]) -> Make:
    """Multiply rows of a shape by drawn weights of a shape, and add a bias."""
    return lambda rng: call(Dense(), graph_input("x", shape), weights(rng, *w), weights(rng, w[0]))


def product(*shape: int, w: tuple[int, ...], **fields: bool) -> Make:
    """Multiply matrices by drawn ones."""
    return lambda rng: call(MatMul(**fields), graph_input("x", shape), weights(rng, *w))


def one_channel(rng: np.random.Generator) -> Value:
    y = call(Relu(), conv(image(1, 40, 25, 23), weights(rng, 24, 40, 1, 1)))
    return conv(y, weights(rng, 1, 24, 1, 1))


def padded_lanes(rng: np.random.Generator) -> Value:
    return call(Relu(), conv(image(2, 12, 7, 6), weights(rng, 21, 12, 3, 3), weights(rng, 21), pad=1))


def dilated(rng: np.random.Generator) -> Value:
    op = Conv((1, 2), (2, 0, 1, 3), (2, 1))
    return call(op, image(1, 24, 9, 10), weights(rng, 9, 24, 3, 2), weights(rng, 9))


def swish_and_residual(rng: np.random.Generator) -> Value:
    y = conv(image(1, 16, 7, 7), weights(rng, 16, 16, 1, 1))
    return call(Add(), call(Mul(), y, call(Sigmoid(), y)), image(1, 16, 7, 7, label="r"))


def transposed_conv(rng: np.random.Generator) -> Value:
    return call(ConvTranspose((3, 3), (0,) * 4, (1, 1)), image(1, 5, 4, 5), weights(rng, 5, 3, 2, 2))


CASES: dict[str, tuple[str, Make]] = {
    "3x3 and pad lanes": ("conv_direct", padded_lanes),
    "1x1 of one channel": ("conv_direct", one_channel),
    "1x1, long rows": ("conv_direct", convolved(1, 40, 12, 11, w=(24, 40, 1, 1))),
    "stride above the kernel": ("conv_direct", convolved(1, 32, 31, 29, w=(60, 32, 1, 1), stride=3)),
    "dilated, uneven": ("conv_direct", dilated),
    "first layer": ("conv_direct", convolved(1, 3, 20, 22, w=(16, 3, 7, 7), pad=3, stride=2)),
    "groups of blocks": ("conv_direct", convolved(1, 32, 6, 6, w=(48, 16, 3, 3), pad=1, groups=2)),
    "residual": ("conv_direct", swish_and_residual),
    "depthwise": ("depthwise", convolved(1, 20, 39, 37, w=(20, 1, 3, 3), pad=1, stride=2, groups=20)),
    "small groups": ("depthwise", convolved(1, 32, 9, 9, w=(32, 4, 3, 3), pad=1, groups=8)),
    "odd groups": ("generic", convolved(1, 15, 6, 6, w=(10, 3, 3, 3), groups=5)),
    "one row": ("dense", layer(1, 100, w=(37, 100))),
    "three short rows": ("dense", layer(3, 7, w=(5, 7))),
    "one number": ("dense", layer(2, 1, w=(1, 1))),
    "many rows": ("dense_packed", layer(2, 7, 33, w=(41, 33))),
    "constant right": ("mat_mul", product(3, 6, 19, w=(3, 19, 35))),
    "constant left": (
        "mat_mul",
        lambda rng: call(MatMul(), weights(rng, 7, 20), graph_input("x", (2, 20, 9))),
    ),
    "transposed": ("mat_mul", product(2, 9, 37, w=(2, 18, 37), transpose_b=True)),
    "one row of a product": ("generic", product(2, 1, 9, w=(2, 9, 5))),
    "volume": ("generic", convolved(1, 4, 5, 6, 4, w=(5, 4, 3, 2, 3), pad=1)),
    "transposed convolution": ("generic", transposed_conv),
}


def compiled(graph: Graph, stored: str, target: Target = V3) -> tuple[Module, Graph]:
    """Compile with weights stored in a type; gives the module and the graph of kernels it came from."""
    report = Report()
    module = cnnc.compile(graph, target=str(target), weights=stored, records=False, exact=True, report=report)
    assert module.build is not None
    assert report.stored is not None
    assert report.stored.kept == ()
    return module, module.build.graphs[0]


def inputs(graph: Graph, rng: np.random.Generator) -> list[np.ndarray]:
    return [rng.standard_normal(v.type.static_shape).astype(v.dtype.numpy) for v in graph.inputs]


def kernels(graph: Graph) -> list[Fused]:
    return [node.op for node in graph.nodes if isinstance(node.op, Fused)]


def templates(graph: Graph) -> list[str]:
    return [k.schedule.template for k in kernels(graph) if k.schedule is not None]


@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_the_widened_weights(rng, name: str, stored: str):
    wanted, make = CASES[name]
    graph = graph_of(make(rng))
    module, narrow = compiled(graph, stored)
    assert wanted in templates(narrow)
    arrays = inputs(graph, rng)
    got = module(*arrays)
    (exact,) = run(narrow, arrays, precise=True)
    assert np.linalg.norm(got - exact) <= 2e-6 * np.linalg.norm(exact)
    # And they are not those of the weights as they were.
    (unrounded,) = run(graph, arrays, precise=True)
    error = np.linalg.norm(got - unrounded) / np.linalg.norm(unrounded)
    assert 2e-6 < error < {"f16": 1e-3, "bf16": 8e-3}[stored]


@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize("name", ["3x3 and pad lanes", "depthwise", "one row", "many rows", "constant right"])
def test_vectors_of_16_lanes(rng, name: str, stored: str):
    if V4.missing_features():
        pytest.skip("this machine has no AVX-512")
    wanted, make = CASES[name]
    graph = graph_of(make(rng))
    module, narrow = compiled(graph, stored, V4)
    assert wanted in templates(narrow)
    arrays = inputs(graph, rng)
    (exact,) = run(narrow, arrays, precise=True)
    assert np.linalg.norm(module(*arrays) - exact) <= 2e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("stored", NARROW)
def test_winograd_reads_transformed_weights_of_16_bits(rng, stored: str):
    shape = (40, 48, 3, 3)
    graph = graph_of(call(Relu(), conv(image(1, 48, 33, 35), weights(rng, *shape), weights(rng, 40), pad=1)))
    report = Report()
    module = cnnc.compile(graph, target=str(V3), weights=stored, records=False, report=report)
    assert module.build is not None
    narrow = module.build.graphs[0]
    assert "winograd" in templates(narrow)
    arrays = inputs(graph, rng)
    (exact,) = run(narrow, arrays, precise=True)
    assert np.linalg.norm(module(*arrays) - exact) <= 4e-6 * np.linalg.norm(exact)
    assert report.stored is not None
    assert report.stored.narrow == 1
    assert report.stored.narrow_bytes >= 2 * np.prod(shape)


_NUMBERS = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -3e-41, 6e-8, -2e-7, 6.1e-5, 65504.0, -1.0, 3.14159)
SPECIAL = np.array(_NUMBERS, np.float32)
"""Denormal in f32 and bf16, then some denormal in f16."""


def special_layers(rng: np.random.Generator) -> dict[str, Value]:
    """Make layers each of whose outputs is one weight times one input, or that plus zeros."""
    column = SPECIAL.reshape(-1, 1)
    many = np.zeros((SPECIAL.size, 48), np.float32)
    many[:, 17] = SPECIAL
    centre = np.zeros((SPECIAL.size, 1, 3, 3), np.float32)
    centre[:, 0, 1, 1] = SPECIAL
    return {
        "dense": call(Dense(), graph_input("x", (1, 1)), constant(column)),
        "dense of vectors": call(Dense(), graph_input("x", (1, 48)), constant(many)),
        "dense_packed": call(Dense(), graph_input("x", (6, 1)), constant(column)),
        "conv_direct": conv(image(1, 48, 33, 33), constant(many.reshape(*many.shape, 1, 1))),
        "depthwise": conv(image(1, SPECIAL.size, 43, 43), constant(centre), pad=1, groups=SPECIAL.size),
        "mat_mul": call(MatMul(), graph_input("x", (2, 5, 1)), constant(np.stack([column.T] * 2))),
    }


@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize("name", ["dense", "dense of vectors", "dense_packed", "conv_direct", "depthwise", "mat_mul"])
def test_special_weights_widen_right(rng, name: str, stored: str):
    graph = graph_of(special_layers(rng)[name])
    module, narrow = compiled(graph, stored)
    assert name.split()[0] in templates(narrow)
    arrays = [np.ones(v.type.static_shape, np.float32) for v in graph.inputs]
    got = module(*arrays)
    (wanted,) = run(narrow, arrays)
    rounded = SPECIAL.astype(DType(stored).numpy).astype(np.float32)
    assert np.isnan(rounded).sum() == 1
    assert (np.abs(rounded[np.isfinite(rounded)]) < 1e-38).sum() >= 2, "denormals are among the weights"
    np.testing.assert_array_equal(got, wanted)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(np.unique(got[np.isfinite(got)]), np.unique(rounded[finite]))


WIDENS = {"f16": r"vcvtph2ps", "bf16": r"vpmovzxwd|vpunpck[lh]wd|vpslld|vpinsrw"}


@pytest.mark.parametrize("stored", NARROW)
@pytest.mark.parametrize(
    "name", ["3x3 and pad lanes", "first layer", "depthwise", "small groups", "one row", "many rows", "constant right"]
)
def test_code_reads_16_bits(rng, name: str, stored: str):
    module, narrow = compiled(graph_of(CASES[name][1](rng)), stored)
    (fused,) = [k for k in kernels(narrow) if k.schedule and k.schedule.template == CASES[name][0]]
    assert fused.schedule is not None
    code = kernel_text(template(fused.schedule.template).build(fused, fused.schedule, V3), "kernel", V3, "s")
    assert re.search(WIDENS[stored], code)
    assert "call" not in re.findall(r"^\s+(\w+)", code, re.MULTILINE), "no function converts number by number"
    # The binary holds each weight once, in 16 bits, and no kernel has anywhere to put a copy in 32; but a slice of few
    # channels a group has room for the 3x3x4 numbers of its own 8, which it brings into another order.
    assert module.build is not None
    constants = [v for v in fused_inputs(narrow) if v.op.name == "constant"]
    placed = sum(-(-v.type.nbytes // 64) * 64 for v in constants)
    assert module.build.program.weight_bytes == placed
    assert any(v.dtype.itemsize == 2 for v in constants)
    if fused.schedule.template != "mat_mul":
        assert module.build.program.scratch_bytes == (4 * 3 * 3 * 4 * 8 if name == "small groups" else 0)


def fused_inputs(graph: Graph) -> list[Value]:
    return list(dict.fromkeys(v for node in graph.nodes if isinstance(node.op, Fused) for v in node.inputs))


def test_a_template_takes_narrow_weights_but_no_narrow_activations(rng):
    """x in f16 that is widened inside the kernel is the business of the general template."""
    from cnnc.backends.cpu.conv_direct import ConvDirect
    from cnnc.ir.layout import Layout
    from cnnc.ir.types import TensorType
    from cnnc.ops import Cast
    from cnnc.ops.source import Input

    x = call(Input("x", TensorType((1, 8, 4, 4), DType.F16, Layout("NCHW8c"))))
    w = call(Input("w", TensorType((8, 8, 1, 1), DType.F16, Layout("OIHW8i8o"))))
    op = Conv((1, 1), (0,) * 4, (1, 1))
    wide = call(Cast(DType.F32), x)
    kernel = Fused(Graph("kernel", (x, w), (call(op, wide, call(Cast(DType.F32), w)),)), "conv")
    assert not ConvDirect().matches(kernel, V3)
    y = call(Input("x", replace(x.type, dtype=DType.F32)))
    kernel = Fused(Graph("kernel", (y, w), (call(op, y, call(Cast(DType.F32), w)),)), "conv")
    assert ConvDirect().matches(kernel, V3)
    # Nor where something else reads the 16 bits.
    both = Graph("kernel", (y, w), (call(op, y, call(Cast(DType.F32), w)), w))
    assert not ConvDirect().matches(Fused(both, "conv"), V3)


@pytest.mark.parametrize(("cpu", "shape"), [("znver3", (10, 84)), ("znver4", (84, 120)), ("znver5", (10, 84))])
def test_code_for_amd_has_no_sse4a(rng, cpu: str, shape: tuple[int, int]):
    """LLVM moves 16-bit numbers with `insertq` where it may; what a binary checks before it runs knows no SSE4A."""
    target = Target.parse(f"cpu:{cpu}")
    _, narrow = compiled(graph_of(layer(1, shape[1], w=shape)(rng)), "bf16", target)
    (fused,) = kernels(narrow)
    assert fused.schedule is not None
    func = template(fused.schedule.template).build(fused, fused.schedule, target)
    assert not re.search(r"\b(insertq|extrq|movntss)\b", kernel_text(func, "kernel", target, "s"))
