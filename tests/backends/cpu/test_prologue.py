"""Convolutions that compute their input themselves, against the interpreter, on shapes with every kind of border."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import cnnc
from cnnc.backends.cpu.conv_direct import ConvDirect
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.templates import TEMPLATES, template
from cnnc.backends.cpu.winograd import Winograd
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import run
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Add, BatchNorm, Concat, Conv, Div, Exp, Log, MaxPool, Mul, Relu, Sigmoid, constant, graph_input
from cnnc.ops.blocked import channel_layout, weight_layout
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Input
from cnnc.ops.winograd import WinogradWeight, winograd_layout
from cnnc.target import Target

V3 = Target.parse("cpu:x86-64-v3")
BLOCK = 8

Prologue = Callable[..., Value]


def norm_relu(x: Value, scale: Value, shift: Value) -> Value:
    """Scale, shift and cut: where the input is 0, as padding is, this is not."""
    return call(Relu(), call(Add(), call(Mul(), x, scale), shift))


def swish(x: Value, scale: Value) -> Value:
    """A function, which epilogues compute for several vectors at once."""
    y = call(Mul(), x, scale)
    return call(Mul(), y, call(Sigmoid(), y))


def source(label: str, *shape: int, layout: Layout | None = None) -> Value:
    return call(Input(label, TensorType(shape, DType.F32, layout)))


def kernel(shape: ConvShape, tile: int = 0, prologue: Prologue = norm_relu, scales: tuple[int, ...] = (1, 1)) -> Fused:
    """Make conv(prologue(x, scales...), w, b) + r in blocks; each scale has a number for each channel of 1 or n images.

    With a `tile`, the algorithm is Winograd's.
    """
    image = channel_layout(4, BLOCK)
    x = source("x", shape.n, shape.ic, shape.h, shape.w, layout=image)
    factors = [source(f"k{i}", n, shape.ic, 1, 1, layout=image) for i, n in enumerate(scales)]
    weight = TensorType((shape.oc, shape.ic // shape.groups, shape.kh, shape.kw))
    layout = weight_layout(4, BLOCK, BLOCK)
    if tile:
        weight, layout = WinogradWeight(tile, shape.stride).infer(weight), winograd_layout(BLOCK, BLOCK)
    w = source("w", *weight.static_shape, layout=layout)
    b = source("b", shape.oc)
    op = Conv(shape.stride, shape.pad, shape.dilation, shape.groups, f"winograd{tile}" if tile else "direct")
    r = source("r", shape.n, shape.oc, shape.oh, shape.ow, layout=image)
    y = call(Add(), call(op, prologue(x, *factors), w, b), r)
    return Fused(Graph("kernel", (x, *factors, w, b, r), (y,)), "conv")


def draw(rng: np.random.Generator, fused: Fused) -> list[np.ndarray]:
    return [rng.standard_normal(v.type.static_shape, np.float32) for v in fused.body.inputs]


def check(call_kernel: Any, fused: Fused, schedule: Schedule, arrays: list[np.ndarray], wanted: np.ndarray) -> None:
    """Build, run in pieces, and hold the result against what is wanted, NaN and infinities included."""
    types = [v.type for v in fused.body.inputs]
    packed = [a if t.layout is None else t.layout.pack(a) for a, t in zip(arrays, types, strict=True)]
    result = fused.body.outputs[0].type
    func = template(schedule.template).build(fused, schedule, V3)
    got = call_kernel(func, packed, result.physical_shape, pieces=3)
    assert result.layout is not None
    logical = result.layout.unpack(got, result.static_shape)
    scale = np.abs(wanted[np.isfinite(wanted)]).max(initial=1.0)
    np.testing.assert_allclose(logical, wanted, rtol=1e-5, atol=1e-5 * scale)
    assert np.array_equal(result.layout.pack(logical), got, equal_nan=True), "pad lanes must be 0"


def interpreted(fused: Fused, arrays: list[np.ndarray]) -> np.ndarray:
    return run(fused.body, [a.astype(np.float64) for a in arrays], precise=True)[0]


def cheapest(fused: Fused, name: str) -> Schedule:
    chosen = template(name)
    return min(chosen.space(fused, V3), key=lambda s: chosen.cost(fused, s, V3))


SHAPES = {
    "1x1": ConvShape(1, 32, 6, 10, 64, 1, 1),
    "1x1, batch of 3": ConvShape(3, 24, 5, 7, 40, 1, 1),
    "1x1, seven by seven": ConvShape(1, 16, 7, 7, 72, 1, 1),
    "one pixel": ConvShape(2, 16, 1, 1, 24, 1, 1),
    "3x3 padded": ConvShape(1, 16, 9, 11, 24, 3, 3, pad=(1, 1, 1, 1)),
    "3x3 of one pixel": ConvShape(1, 16, 1, 1, 16, 3, 3, pad=(1, 1, 1, 1)),
    "padding above kernel": ConvShape(1, 8, 4, 4, 16, 3, 3, pad=(4, 5, 3, 4)),
    "asymmetric padding, stride": ConvShape(2, 16, 10, 9, 16, 3, 3, stride=(2, 2), pad=(0, 0, 1, 1)),
    "stride above kernel": ConvShape(1, 16, 11, 13, 16, 2, 2, stride=(3, 4)),
    "1x1 strided": ConvShape(1, 16, 9, 9, 16, 1, 1, stride=(2, 2)),
    "dilated": ConvShape(1, 16, 12, 12, 16, 3, 3, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "groups": ConvShape(2, 32, 6, 6, 48, 3, 3, pad=(1, 1, 1, 1), groups=2),
    "channels beside the block": ConvShape(1, 20, 7, 6, 37, 3, 3, pad=(1, 1, 1, 1)),
    "three channels in and out": ConvShape(1, 3, 8, 8, 3, 1, 1),
    "many output channels": ConvShape(1, 8, 5, 5, 12 * 8, 1, 1),
}
SHAPES = {name: ConvShape(**{**vars(shape), "block": BLOCK}) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_direct_convolutions_compute_their_input(call_kernel: Any, rng: np.random.Generator, name: str) -> None:
    fused = kernel(SHAPES[name])
    arrays = draw(rng, fused)
    check(call_kernel, fused, cheapest(fused, "conv_direct"), arrays, interpreted(fused, arrays))


@pytest.mark.parametrize("name", ["1x1, batch of 3", "3x3 padded", "groups", "asymmetric padding, stride"])
def test_every_schedule_is_right(call_kernel: Any, rng: np.random.Generator, name: str) -> None:
    fused = kernel(SHAPES[name])
    arrays = draw(rng, fused)
    wanted = interpreted(fused, arrays)
    candidates = list(template("conv_direct").space(fused, V3))
    for schedule in random.Random(name).sample(candidates, min(len(candidates), 6)):
        check(call_kernel, fused, schedule, arrays, wanted)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(
    "name", ["3x3 padded", "3x3 of one pixel", "channels beside the block", "padding above kernel"]
)
def test_winograd_convolutions_compute_their_input(
    call_kernel: Any, rng: np.random.Generator, name: str, tile: int
) -> None:
    shape = SHAPES[name]
    fused, direct = kernel(shape, tile), kernel(shape)
    arrays = draw(rng, direct)
    wanted = interpreted(direct, arrays)
    arrays[3] = WinogradWeight(tile).reference(arrays[3])
    check(call_kernel, fused, cheapest(fused, "winograd"), arrays, wanted)


def test_winograd_of_a_batch_with_inner_tiles(call_kernel: Any, rng: np.random.Generator) -> None:
    shape = ConvShape(2, 24, 19, 17, 16, 3, 3, pad=(1, 0, 1, 2), block=BLOCK)
    fused, direct = kernel(shape, 4, scales=(2, 1)), kernel(shape, scales=(2, 1))
    arrays = draw(rng, direct)
    wanted = interpreted(direct, arrays)
    arrays[3] = WinogradWeight(4).reference(arrays[3])
    schedules = list(template("winograd").space(fused, V3))
    for schedule in random.Random(1).sample(schedules, 4):
        check(call_kernel, fused, schedule, arrays, wanted)


def gated(x: Value, gate: Value) -> Value:
    return call(Mul(), x, gate)


@pytest.mark.parametrize(
    ("prologue", "scales"), [(gated, (1,)), (gated, (3,)), (swish, (1,)), (lambda x: call(Relu(), x), ())]
)
def test_other_prologues(
    call_kernel: Any, rng: np.random.Generator, prologue: Prologue, scales: tuple[int, ...]
) -> None:
    """The gate of squeeze-and-excitation is another for each image."""
    for name in ("1x1, batch of 3", "3x3 padded"):
        shape = ConvShape(**{**vars(SHAPES[name]), "n": max(scales, default=1)})
        fused = kernel(shape, prologue=prologue, scales=scales)
        arrays = draw(rng, fused)
        check(call_kernel, fused, cheapest(fused, "conv_direct"), arrays, interpreted(fused, arrays))


def test_pad_lanes_do_not_spoil_the_sums(call_kernel: Any, rng: np.random.Generator) -> None:
    """log(0) and 1 / 0 in the lanes beside the channels would make NaN of 0 * inf."""
    for prologue in (lambda x, k: call(Log(), call(Exp(), x)), lambda x, k: call(Div(), k, call(Exp(), x))):
        fused = kernel(SHAPES["channels beside the block"], prologue=prologue, scales=(1,))
        arrays = draw(rng, fused)
        check(call_kernel, fused, cheapest(fused, "conv_direct"), arrays, interpreted(fused, arrays))
    fused = kernel(SHAPES["channels beside the block"], prologue=lambda x: call(Log(), x), scales=())
    arrays = [np.abs(array) + 0.5 for array in draw(rng, fused)]
    check(call_kernel, fused, cheapest(fused, "conv_direct"), arrays, interpreted(fused, arrays))


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_where_the_interpreter_has_it(
    call_kernel: Any, rng: np.random.Generator, special: float
) -> None:
    fused = kernel(SHAPES["3x3 padded"])
    arrays = draw(rng, fused)
    arrays[0][0, 5, 4, 3] = special
    arrays[1] = np.abs(arrays[1])
    wanted = run(fused.body, arrays)[0]
    assert np.isfinite(wanted).all() == (special == -np.inf)
    check(call_kernel, fused, cheapest(fused, "conv_direct"), arrays, wanted)


def matching(fused: Fused) -> set[str]:
    return {t.name for t in TEMPLATES if t.matches(fused, V3)} - {"generic"}


def test_what_the_templates_refuse() -> None:
    shape = SHAPES["1x1"]
    assert matching(kernel(shape)) == {"conv_direct"}
    assert matching(kernel(SHAPES["3x3 padded"], 4)) == {"winograd"}
    # Neither elementwise, ...
    pool = MaxPool((3, 3), (1, 1), (1,) * 4, (1, 1))
    assert not matching(kernel(shape, prologue=lambda x: call(pool, x), scales=()))
    # ... nor the input alone, ...
    x, w = source("x", 1, 8, 5, 5, layout=channel_layout(4, 8)), source("w", 8, 8, 1, 1, layout=weight_layout(4, 8, 8))
    op = Conv((1, 1), (0,) * 4, (1, 1))
    assert not matching(Fused(Graph("kernel", (x, w), (call(op, x, call(Relu(), w)),)), "conv"))
    # ... nor in blocks; and depthwise kernels take none.
    plain, first = source("x", 1, 3, 5, 5), source("w", 8, 3, 1, 1, layout=weight_layout(4, 1, 8))
    assert not matching(Fused(Graph("kernel", (plain, first), (call(op, call(Relu(), plain), first),)), "conv"))
    d = source("d", 8, 1, 3, 3, layout=weight_layout(4, 1, 8))
    deep = Conv((1, 1), (1,) * 4, (1, 1), groups=8)
    assert not matching(Fused(Graph("kernel", (x, d), (call(deep, call(Relu(), x), d),)), "conv"))


def test_winograd_takes_few_operations_only() -> None:
    """Its tiles overlap, so that most inputs are computed more than once."""

    def twice(x: Value, scale: Value, shift: Value) -> Value:
        return norm_relu(norm_relu(x, scale, shift), shift, scale)

    shape = SHAPES["3x3 padded"]
    assert Winograd().takes_prologue(kernel(shape, 4), V3)
    assert not Winograd().takes_prologue(kernel(shape, 4, twice), V3)


def test_direct_kernels_take_prologues_of_images_that_are_dear_to_pass() -> None:
    shape = ConvShape(1, 64, 32, 32, 16, 1, 1, block=BLOCK)
    just = replace(V3, caches=replace(V3.caches, l2=8 * 4 * 64 * 32 * 32))
    more = replace(V3, caches=replace(V3.caches, l2=just.caches.l2 + 8))
    assert ConvDirect().takes_prologue(kernel(shape), just)
    assert not ConvDirect().takes_prologue(kernel(shape), more)
    for others in ({"kh": 3}, {"kw": 3}, {"stride": (2, 2)}, {"pad": (1, 1, 1, 1)}):
        assert not ConvDirect().takes_prologue(kernel(replace(shape, **others)), just)


def test_a_slice_computes_all_output_channels_where_it_computes_the_input() -> None:
    """Otherwise every part of the channels would compute the whole input again."""
    shape = ConvShape(1, 256, 28, 28, 12 * BLOCK, 1, 1, block=BLOCK)
    schedule = cheapest(kernel(shape), "conv_direct")
    assert schedule["vectors"] * schedule["oc_tiles"] == 12


def test_layers_of_densenet_have_no_kernel_before_the_convolution(rng: np.random.Generator) -> None:
    """Batch norm and ReLU of all that came before, parts of which lie one after the other without a copy."""
    x = graph_input("x", (1, 64, 40, 40))
    y = call(MaxPool((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)), x)
    for _ in range(2):
        channels = y.type.static_shape[1]
        vectors = [constant(rng.uniform(0.5, 2, channels).astype(np.float32)) for _ in range(4)]
        w = constant(rng.standard_normal((32, channels, 1, 1), np.float32))
        z = call(Relu(), call(BatchNorm(1e-5), y, *vectors))
        y = call(Concat(1), y, call(Conv((1, 1), (0,) * 4, (1, 1)), z, w))
    graph = Graph("net", (x,), (call(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), y),), ("y",))
    module = cnnc.compile(graph, target="cpu:x86-64-v3", records=False, cache=False)
    assert module.build is not None
    kernels = [n.op for n in module.build.graphs[0].nodes if isinstance(n.op, Fused)]
    fused = [k for k in kernels if [n.op.name for n in k.body.nodes if n.inputs] == ["mul", "add", "relu", "conv"]]
    assert len(fused) == 2
    assert not any(k.anchor in ("mul", "add", "relu", "concat") for k in kernels)
    array = rng.standard_normal((1, 64, 40, 40), np.float32)
    (wanted,) = run(graph, [array.astype(np.float64)], precise=True)
    got = module.run({"x": array})["y"]
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)
