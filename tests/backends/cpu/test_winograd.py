"""Winograd kernels against a float64 convolution: sizes beside every tile, chunks, slices, and the error they make."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import winograd
from cnnc.backends.cpu.conv_shape import ConvShape
from cnnc.backends.cpu.machine import AVX2, AVX512, Machine
from cnnc.backends.cpu.winograd import Winograd, WinogradParams, WinogradShape
from cnnc.backends.lower.body import Body, plain_body
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate
from cnnc.ir.layout import Layout
from cnnc.ops import Add, Conv, Fused, Input, MaxPool, Relu, Silu, WinogradWeight, constant, graph_input
from cnnc.ops.winograd import is_supported, winograd_layout, winograd_tile
from cnnc.passes.algorithms import ALGORITHMS, Algorithm
from cnnc.target import Target
from tests.backends.cpu.test_conv_direct import reference

MACHINES = {8: AVX2, 16: AVX512}

BUDGET = {2: 8.0, 4: 64.0, 6: 128.0}
"""The largest error allowed, in units of eps * sum |x||w|."""


def conv(
    n: int,
    ic: int,
    h: int,
    w: int,
    oc: int,
    pad: tuple[int, int, int, int] = (1, 1, 1, 1),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    block: int = 8,
) -> ConvShape:
    return ConvShape(n, ic, h, w, oc, *kernel, pad=pad, stride=stride, block=block)


def best(shape: WinogradShape, machine: Machine) -> WinogradParams:
    return min(winograd.space(shape, machine), key=lambda p: winograd.cost(shape, p, machine))


def with_bias_and_residual(shape: WinogradShape) -> Body:
    """Make the body max(conv + bias + residual, 0), the bias a plain vector of the true channel count."""
    from tvm import te, tirx

    output = shape.conv.output_shape
    bias = te.placeholder((shape.conv.oc,), name="bias")
    residual = te.placeholder(output, name="residual")
    zero = tirx.const(0.0, "float32")

    def apply(anchor: Any) -> Any:
        def biased(n: Any, o: Any, h: Any, w: Any, c: Any) -> Any:
            channel = o * shape.conv.block + c
            return tirx.if_then_else(channel < shape.conv.oc, anchor(n, o, h, w, c) + bias(channel), zero)

        total = te.compute(anchor.shape, biased, name="biased")
        return te.compute(anchor.shape, lambda *i: tirx.max(total(*i) + residual(*i), zero), name="relu")

    return plain_body(shape.operand_shapes, output, (bias, residual), apply)


def operands(shape: WinogradShape, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Draw x and w, and give them as the kernel takes them, too."""
    c = shape.conv
    rng = np.random.default_rng(c.ic * 1000 + c.h + seed)
    x = rng.standard_normal((c.n, c.ic, c.h, c.w), np.float32)
    w = rng.standard_normal((c.oc, c.ic, c.kh, c.kw), np.float32)
    u = WinogradWeight(shape.tile, c.stride).reference(w)
    packed = [Layout(f"NCHW{c.block}c").pack(x), winograd_layout(c.block, c.block).pack(u)]
    return x, w, packed


def check(
    call_kernel: Any, shape: WinogradShape, params: WinogradParams, machine: Machine, pieces: int = 1, **how: Any
) -> None:
    c, blocks = shape.conv, Layout(f"NCHW{shape.conv.block}c")
    x, w, packed = operands(shape)
    rng = np.random.default_rng(c.oc)
    b = rng.standard_normal(c.oc, np.float32)
    wanted = reference(c, x, w, b)
    extra = rng.standard_normal(wanted.shape, np.float32)
    func = winograd.build(shape, params, machine, with_bias_and_residual(shape))
    got = call_kernel(func, [*packed, b, blocks.pack(extra)], c.output_shape, pieces, **how)

    logical = blocks.unpack(got, wanted.shape)
    work = reference(c, np.abs(x), np.abs(w), np.abs(b)) + np.abs(extra)
    error = np.abs(logical - np.maximum(wanted + extra, 0)) / (np.finfo(np.float32).eps * work)
    assert error.max() <= BUDGET[shape.tile]
    assert np.array_equal(blocks.pack(logical), got), "pad lanes must be 0"


SHAPES = {
    "whole tiles": conv(1, 16, 8, 16, 24),
    "14x14": conv(1, 32, 14, 14, 48),
    "7x7, batch of 3": conv(3, 16, 7, 7, 32),
    "one pixel": conv(1, 16, 1, 1, 8),
    "one row": conv(2, 8, 1, 13, 8),
    "one column": conv(1, 8, 17, 1, 8),
    "no padding": conv(1, 16, 9, 20, 16, pad=(0, 0, 0, 0)),
    "the kernel's size": conv(2, 8, 3, 3, 16, pad=(0, 0, 0, 0)),
    "padding on one side": conv(1, 16, 10, 11, 16, pad=(0, 2, 1, 0)),
    "padding of 2": conv(1, 8, 5, 6, 8, pad=(2, 2, 2, 2)),
    "padding beyond a tile": conv(1, 8, 2, 3, 8, pad=(5, 6, 7, 4)),
    "channels beside the block": conv(1, 20, 9, 9, 37),
    "three channels in and out": conv(2, 3, 12, 9, 3),
    "eleven blocks": conv(1, 8, 6, 9, 88),
    "stride 2": conv(1, 24, 28, 28, 32, stride=(2, 2)),
    "stride 2, odd, no padding": conv(2, 16, 13, 15, 8, (0, 0, 0, 0), stride=(2, 2)),
    "stride 2 along the rows": conv(1, 16, 9, 14, 16, (1, 0, 0, 1), stride=(1, 2)),
    "5x5": conv(1, 16, 27, 27, 24, (2, 2, 2, 2), (5, 5)),
    "5x5 of stride 2": conv(1, 8, 12, 17, 16, (2, 1, 2, 3), (5, 5), (2, 2)),
    "one row of taps": conv(1, 24, 9, 17, 16, (0, 2, 0, 2), (1, 5)),
    "one column of taps, stride 2": conv(2, 16, 17, 9, 20, (1, 0, 1, 0), (3, 1), (2, 2)),
}
LONG = {
    "1x7": conv(1, 24, 17, 17, 16, (0, 3, 0, 3), (1, 7)),
    "7x1": conv(1, 16, 17, 17, 24, (3, 0, 3, 0), (7, 1)),
    "7x7 of stride 2": conv(1, 16, 20, 21, 8, (3, 3, 3, 3), (7, 7), (2, 2)),
    "4x2": conv(1, 16, 9, 10, 8, (1, 0, 2, 1), (4, 2)),
}
"""What only tiles of 2 are for."""


LARGE = {
    "whole tiles of 6": conv(1, 16, 12, 18, 24),
    "13x20": conv(2, 24, 13, 20, 40),
    "one pixel": SHAPES["one pixel"],
    "one row": SHAPES["one row"],
    "padding on one side": SHAPES["padding on one side"],
    "padding beyond a tile": SHAPES["padding beyond a tile"],
    "channels beside the block": SHAPES["channels beside the block"],
    "one row of taps": conv(1, 24, 9, 19, 16, (0, 1, 0, 1), (1, 3)),
}
"""What tiles of 6 are for."""

IN_TILES = [*((name, tile) for name in SHAPES for tile in (2, 4)), *((name, 6) for name in LARGE)]


@pytest.mark.parametrize(("name", "tile"), IN_TILES)
@pytest.mark.parametrize("block", [8, 16])
def test_the_chosen_schedule_is_right(call_kernel: Any, name: str, block: int, tile: int) -> None:
    shape = WinogradShape(replace((LARGE if tile == 6 else SHAPES)[name], block=block), tile)
    check(call_kernel, shape, best(shape, MACHINES[block]), MACHINES[block], pieces=3)


def test_slices_of_the_same_tiles_transform_them_once(call_kernel: Any) -> None:
    shape = WinogradShape(conv(1, 20, 11, 11, 64), 4)
    check(call_kernel, shape, WinogradParams(shape.tiles, 3, 2, oc_slices=4), AVX2, pieces=3, read_once=True)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("name", LONG)
def test_long_kernels_are_right(call_kernel: Any, name: str, block: int) -> None:
    shape = WinogradShape(replace(LONG[name], block=block), 2)
    check(call_kernel, shape, best(shape, MACHINES[block]), MACHINES[block], pieces=3)


SCHEDULED = ["14x14", "7x7, batch of 3", "padding on one side", "channels beside the block", "stride 2", "5x5"]


@pytest.mark.parametrize(
    ("name", "tile"), [*((name, tile) for name in SCHEDULED for tile in (2, 4)), *((n, 6) for n in SCHEDULED[:4])]
)
def test_every_schedule_is_right(call_kernel: Any, name: str, tile: int) -> None:
    shape = WinogradShape(SHAPES[name], tile)
    candidates = list(winograd.space(shape, AVX2))
    for params in random.Random(name).sample(candidates, min(len(candidates), 6)):
        check(call_kernel, shape, params, AVX2, pieces=2)


@pytest.mark.parametrize("seed", range(12))
def test_any_size_is_right(call_kernel: Any, seed: int) -> None:
    draw = random.Random(seed)
    pad = (draw.randrange(3), draw.randrange(3), draw.randrange(3), draw.randrange(3))
    h = draw.randrange(max(1, 3 - pad[0] - pad[2]), 21)
    w = draw.randrange(max(1, 3 - pad[1] - pad[3]), 21)
    tile = draw.choice((4, 6))
    shape = WinogradShape(conv(draw.randrange(1, 4), draw.randrange(1, 35), h, w, draw.randrange(1, 35), pad), tile)
    params = draw.choice(list(winograd.space(shape, AVX2)))
    check(call_kernel, shape, params, AVX2, pieces=draw.randrange(1, 5))


FILTERS = {
    "3x3": ((3, 3), (1, 1)),
    "3x3 of stride 2": ((3, 3), (2, 2)),
    "5x5": ((5, 5), (1, 1)),
    "1x7": ((1, 7), (1, 1)),
    "7x7": ((7, 7), (1, 1)),
    "5x5 of stride 2": ((5, 5), (2, 2)),
    "7x7 of stride 2": ((7, 7), (2, 2)),
}


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if not a.exact], ids=lambda a: a.name)
@pytest.mark.parametrize("channels", [16, 256])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("name", FILTERS)
def test_the_error_is_as_stated(
    call_kernel: Any, algorithm: Algorithm, channels: int, positive: bool, name: str
) -> None:
    tile = winograd_tile(algorithm.name)
    kernel, stride = FILTERS[name]
    if tile is None or not all(map(is_supported, (tile, tile), kernel, stride)):
        return
    pad = (kernel[0] // 2, kernel[1] // 2) * 2
    shape = WinogradShape(conv(1, channels, 28, 28, 16, pad, kernel, stride), tile)
    x, w, (_, u) = operands(shape, seed=7)
    x = np.maximum(x, 0) if positive else x
    body = plain_body(shape.operand_shapes, shape.conv.output_shape)
    func = winograd.build(shape, best(shape, AVX2), AVX2, body)
    result = call_kernel(func, [Layout("NCHW8c").pack(x), u], shape.conv.output_shape)
    zero = np.zeros(16, np.float32)
    wanted = reference(shape.conv, x, w, zero)
    got = Layout("NCHW8c").unpack(result, wanted.shape)
    work = reference(shape.conv, np.abs(x), np.abs(w), zero)
    error = np.abs(got - wanted) / (np.finfo(np.float32).eps * work)
    assert 0 < error.max() <= algorithm.error


def test_infinities_stay_in_their_tile(call_kernel: Any) -> None:
    shape = WinogradShape(conv(1, 8, 12, 12, 8), 4)
    x, w, (_, u) = operands(shape)
    x[0, 3, 5, 5] = np.inf
    body = plain_body(shape.operand_shapes, shape.conv.output_shape)
    func = winograd.build(shape, best(shape, AVX2), AVX2, body)
    got = call_kernel(func, [Layout("NCHW8c").pack(x), u], shape.conv.output_shape)[0, 0]
    wanted = reference(shape.conv, x, w, np.zeros(8))[0]
    assert not np.isfinite(got[~np.isfinite(wanted).all(axis=0)]).any()
    assert np.isfinite(got[8:]).all()
    assert np.isfinite(got[:, 8:]).all()


@pytest.mark.parametrize("machine", MACHINES.values(), ids=["avx2", "avx512"])
@pytest.mark.parametrize(("channels", "size"), [(64, 56), (128, 28), (256, 14), (512, 14), (512, 7)])
def test_slices_for_eight_threads(machine: Machine, channels: int, size: int) -> None:
    shape = WinogradShape(conv(1, channels, size, size, channels, block=machine.lanes), 4)
    params = best(shape, replace(machine, threads=8))
    assert -(-shape.tiles // params.tiles) * params.oc_slices >= 7


@pytest.mark.parametrize("tile", [4, 6])
@pytest.mark.parametrize(("block", "cpu"), [(8, "x86-64-v3"), (16, "x86-64-v4")])
def test_sums_stay_in_registers(block: int, cpu: str, tile: int) -> None:
    """No vector goes through the stack where the products are, whether or not this machine could run it."""
    from cnnc.backends.cpu.codegen import kernel_text

    shape = WinogradShape(conv(1, 64, 28, 28, 128, block=block), tile)
    body = plain_body(shape.operand_shapes, shape.conv.output_shape)
    func = winograd.build(shape, best(shape, MACHINES[block]), MACHINES[block], body)
    text = kernel_text(func, "kernel", Target.parse(f"cpu:{cpu}"), "s")
    text = re.sub(r"(?m)^\s*\.Ltmp.*\n", "", text)
    hot = [part for part in re.split(r"(?m)^\.LBB\w+:", text) if part.count("prefetch") and part.count("vfmadd") > 12]
    assert hot
    register = "zmm" if block == 16 else "ymm"
    for part in hot:
        through_stack = [line for line in part.splitlines() if "%rsp" in line and register in line]
        assert len(through_stack) <= part.count("vfmadd") // 12, "\n".join(through_stack)


def kernel(op: Conv, channels: int = 16, layout: str = "HWOI8i8o") -> Fused:
    """Make a kernel of one convolution with weights that fit its algorithm."""
    spatial = constant(np.zeros((channels, channels, 3, 3), np.float32)).type
    type_ = spatial if op.tile is None else WinogradWeight(op.tile).infer(spatial)
    x = call(Input("x", graph_input("x", (1, channels, 9, 9)).type.with_layout(Layout("NCHW8c"))))
    w = call(Input("w", type_.with_layout(Layout(layout))))
    return Fused(Graph("conv", (x, w), (call(op, x, w),)), "conv")


def test_what_it_takes() -> None:
    template, target = Winograd(), Target.parse("cpu:x86-64-v3")
    op = Conv((1, 1), (1, 1, 1, 1), (1, 1), algorithm="winograd4")
    taken = kernel(op)
    assert template.matches(taken, target)
    schedules = list(template.space(taken, target))
    assert all(template.cost(taken, schedule, target) > 0 for schedule in schedules)
    assert not template.matches(taken, Target.parse("cpu:x86-64-v4")), "its vectors are of 16"
    assert not template.matches(kernel(replace(op, algorithm="direct"), layout="OIHW8i8o"), target)


def network(rng: np.random.Generator) -> Graph:
    """Make a residual block, a branch of other channels and a pool: what follows convolutions in networks."""

    def layer(x: Any, channels: int, pad: tuple[int, int, int, int]) -> Any:
        ic = x.shape[1]
        w = rng.standard_normal((channels, ic, 3, 3)).astype(np.float32) / np.float32(3 * ic**0.5)
        bias = rng.standard_normal(channels).astype(np.float32)
        return call(Conv((1, 1), pad, (1, 1)), x, constant(w), constant(bias))

    x = graph_input("x", (2, 24, 41, 38))
    y = call(Relu(), layer(x, 40, (1, 1, 1, 1)))
    y = call(Relu(), call(Add(), layer(y, 40, (1, 1, 1, 1)), y))
    y = call(MaxPool((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)), y)
    z = call(Silu(), layer(y, 52, (0, 2, 1, 0)))
    return Graph("net", (x,), (z,), ("z",))


@pytest.mark.parametrize("exact", [False, True])
def test_networks_equal_the_interpreter(rng: np.random.Generator, exact: bool) -> None:
    import cnnc

    graph = network(rng)
    x = rng.standard_normal((2, 24, 41, 38)).astype(np.float32)
    wanted = evaluate(graph, {"x": x}, precise=True)["z"]
    module = cnnc.compile(graph, target="cpu:x86-64-v3", exact=exact, cache=False)
    got = module.run({"x": x})["z"]
    assert np.linalg.norm(got - wanted) <= 2e-6 * np.linalg.norm(wanted)
    convolutions = [k.algorithm for k in module.kernels if k.flops > 1e6]
    assert convolutions == ["conv_direct" if exact else "winograd"] * 3
