"""Direct convolution kernels against a float64 convolution, over shapes that leave every tile its own way."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import conv_direct
from cnnc.backends.cpu.conv_direct import ConvShape
from cnnc.backends.cpu.machine import AVX2, AVX512, Machine
from cnnc.backends.lower.body import Body, plain_body
from cnnc.errors import VerifyError
from cnnc.ir.layout import Layout

MACHINES = {8: AVX2, 16: AVX512}


def reference(shape: ConvShape, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Convolve in float64, tap by tap."""
    top, left, bottom, right = shape.pad
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    group_in, group_out = shape.ic // shape.groups, shape.oc // shape.groups
    y = np.zeros((shape.n, shape.oc, shape.oh, shape.ow))
    for group in range(shape.groups):
        outputs = slice(group * group_out, (group + 1) * group_out)
        seen = padded[:, group * group_in : (group + 1) * group_in]
        for r in range(shape.kh):
            for s in range(shape.kw):
                rows = slice(r * shape.dilation[0], r * shape.dilation[0] + (shape.oh - 1) * shape.stride[0] + 1)
                columns = slice(s * shape.dilation[1], s * shape.dilation[1] + (shape.ow - 1) * shape.stride[1] + 1)
                tap = seen[:, :, rows, columns][:, :, :: shape.stride[0], :: shape.stride[1]]
                y[:, outputs] += np.einsum("oi,nihw->nohw", w[outputs, :, r, s].astype(np.float64), tap)
    return y + b.reshape(1, -1, 1, 1)


def with_bias_and_residual(shape: ConvShape) -> Body:
    """Make the body max(conv + bias + residual, 0), the bias a plain vector of the true channel count."""
    from tvm import te, tirx

    bias = te.placeholder((shape.oc,), name="bias")
    residual = te.placeholder(shape.output_shape, name="residual")
    zero = tirx.const(0.0, "float32")

    def apply(anchor: Any) -> Any:
        def biased(n: Any, o: Any, h: Any, w: Any, c: Any) -> Any:
            channel = o * shape.block + c
            return tirx.if_then_else(channel < shape.oc, anchor(n, o, h, w, c) + bias(channel), zero)

        total = te.compute(anchor.shape, biased, name="biased")
        return te.compute(anchor.shape, lambda *i: tirx.max(total(*i) + residual(*i), zero), name="relu")

    return plain_body(shape.operand_shapes, shape.output_shape, (bias, residual), apply)


def check(
    call_kernel: Any,
    shape: ConvShape,
    params: conv_direct.DirectParams,
    machine: Machine,
    pieces: int = 1,
    error: float = 2e-6,
) -> None:
    rng = np.random.default_rng(shape.ic * 1000 + shape.h)
    x = rng.standard_normal((shape.n, shape.ic, shape.h, shape.w), np.float32)
    w = rng.standard_normal((shape.oc, shape.ic // shape.groups, shape.kh, shape.kw), np.float32)
    b = rng.standard_normal(shape.oc, np.float32)
    wanted = reference(shape, x, w, b)
    extra = rng.standard_normal(wanted.shape, np.float32)
    wanted = np.maximum(wanted + extra, 0)

    blocks = Layout(f"NCHW{shape.block}c")
    x_packed = x if shape.plain_input else blocks.pack(x)
    inner = "" if shape.plain_input else f"{shape.block}i"
    w_packed = Layout(f"OIHW{inner}{shape.block}o").pack(w)
    func = conv_direct.build(shape, params, machine, with_bias_and_residual(shape))
    got = call_kernel(func, [x_packed, w_packed, b, blocks.pack(extra)], shape.output_shape, pieces)

    logical = blocks.unpack(got, wanted.shape)
    assert np.linalg.norm(logical - wanted) <= error * np.linalg.norm(wanted)
    assert np.array_equal(blocks.pack(logical), got), "pad lanes must be 0"


def best(shape: ConvShape, machine: Machine) -> conv_direct.DirectParams:
    return min(conv_direct.space(shape, machine), key=lambda p: conv_direct.cost(shape, p, machine))


SHAPES = {
    "3x3": ConvShape(1, 32, 14, 14, 32, 3, 3, pad=(1, 1, 1, 1)),
    "batch of 3, odd rows": ConvShape(3, 16, 7, 9, 48, 3, 3, pad=(1, 1, 1, 1)),
    "1x1": ConvShape(2, 48, 7, 7, 64, 1, 1),
    "1x1 over one pixel": ConvShape(1, 32, 1, 1, 32, 1, 1),
    "1x1 strided": ConvShape(1, 32, 15, 15, 32, 1, 1, stride=(2, 2)),
    "1x1 padded": ConvShape(1, 16, 5, 5, 16, 1, 1, pad=(1, 2, 1, 2)),
    "stride above kernel": ConvShape(1, 16, 17, 19, 32, 2, 2, stride=(3, 4)),
    "asymmetric padding": ConvShape(1, 16, 9, 11, 32, 3, 3, stride=(2, 2), pad=(0, 0, 1, 1)),
    "padding above kernel": ConvShape(1, 16, 4, 4, 16, 3, 3, pad=(4, 5, 3, 4)),
    "tiles of nothing but padding": ConvShape(1, 16, 5, 2, 24, 3, 1, pad=(1, 33, 1, 35)),
    "dilated": ConvShape(1, 16, 20, 20, 32, 3, 3, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "dilated beyond the input": ConvShape(1, 16, 9, 9, 16, 3, 3, pad=(12, 12, 12, 12), dilation=(12, 12)),
    "1x7": ConvShape(1, 32, 17, 17, 48, 1, 7, pad=(0, 3, 0, 3)),
    "7x1": ConvShape(1, 32, 17, 17, 48, 7, 1, pad=(3, 0, 3, 0)),
    "kernel as large as the input": ConvShape(1, 16, 6, 6, 32, 6, 6),
    "5x5 on 3x2": ConvShape(1, 16, 3, 2, 16, 5, 5, pad=(2, 2, 2, 2)),
    "groups": ConvShape(1, 64, 8, 8, 96, 3, 3, pad=(1, 1, 1, 1), groups=2),
    "seven blocks": ConvShape(1, 16, 9, 9, 7 * 16, 3, 3, pad=(1, 1, 1, 1)),
    "eleven blocks": ConvShape(1, 16, 5, 7, 11 * 16, 1, 1),
    "channels beside the block": ConvShape(1, 20, 9, 9, 37, 3, 3, pad=(1, 1, 1, 1)),
    "1x1, inputs beside the block": ConvShape(1, 40, 7, 8, 32, 1, 1),
    "1x5, inputs beside the block": ConvShape(1, 27, 9, 11, 16, 1, 5, stride=(1, 2), pad=(0, 2, 0, 2)),
    "dilated, inputs beside the block": ConvShape(1, 21, 9, 10, 24, 3, 3, pad=(2, 2, 2, 2), dilation=(2, 2)),
    "three channels in and out": ConvShape(1, 3, 9, 9, 3, 3, 3, pad=(1, 1, 1, 1)),
    "first layer": ConvShape(1, 3, 31, 33, 24, 7, 7, stride=(2, 2), pad=(3, 3, 3, 3), plain_input=True),
    "first layer, 1 channel": ConvShape(2, 1, 28, 28, 6, 5, 5, pad=(2, 2, 2, 2), plain_input=True),
    "first layer, no padding": ConvShape(1, 3, 25, 25, 32, 3, 3, stride=(2, 2), plain_input=True),
    "first layer, 1x1": ConvShape(1, 3, 6, 7, 16, 1, 1, plain_input=True),
    "1-D": ConvShape(1, 16, 1, 40, 32, 1, 5, pad=(0, 2, 0, 2)),
}


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_the_chosen_schedule_is_right(call_kernel: Any, name: str, block: int) -> None:
    shape = ConvShape(**{**vars(SHAPES[name]), "block": block})
    check(call_kernel, shape, best(shape, MACHINES[block]), MACHINES[block], pieces=3)


@pytest.mark.parametrize("channels", [0, 1, 9])
@pytest.mark.parametrize("inputs", [500, 504])
def test_long_sums_are_as_exact_as_short_ones(call_kernel: Any, inputs: int, channels: int) -> None:
    """Of 4,500 products each, which one after the other are off by 1.2e-6."""
    shape = ConvShape(1, inputs, 5, 6, 16, 3, 3, pad=(1, 1, 1, 1), block=8)
    check(call_kernel, shape, conv_direct.DirectParams(6, 2, 1, 5, channels=channels), AVX2, error=4.5e-7)


@pytest.mark.parametrize("inputs", [2032, 2040])
def test_sums_of_any_length_are_cut(call_kernel: Any, inputs: int) -> None:
    """Where blocks do not divide evenly, and the last has pad lanes."""
    shape = ConvShape(1, inputs - 3, 3, 5, 16, 1, 1, block=8)
    check(call_kernel, shape, conv_direct.DirectParams(5, 2, 1, 3), AVX2, error=4.5e-7)


@pytest.mark.parametrize("name", ["3x3", "1x1", "first layer", "groups", "asymmetric padding"])
def test_every_schedule_is_right(call_kernel: Any, name: str) -> None:
    shape = ConvShape(**{**vars(SHAPES[name]), "block": 8})
    candidates = list(conv_direct.space(shape, AVX2))
    for params in random.Random(name).sample(candidates, min(len(candidates), 8)):
        check(call_kernel, shape, params, AVX2)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_sums_are_right_that_wait_in_the_output_for_further_passes(call_kernel: Any, name: str, block: int) -> None:
    """One block of input channels a pass: with a residual, pad lanes, groups, and tiles of nothing but padding."""
    shape = ConvShape(**{**vars(SHAPES[name]), "block": block})
    params = replace(best(shape, MACHINES[block]), channels=1)
    check(call_kernel, shape, params, MACHINES[block], pieces=2)


def test_passes_are_considered_where_weights_are_too_many_for_l1() -> None:
    few, many = (ConvShape(1, channels, 14, 14, 64, 1, 1) for channels in (32, 1024))
    assert {p.channels for p in conv_direct.space(few, AVX512)} == {0}
    assert {p.channels for p in conv_direct.space(many, AVX512)} > {0}


def test_a_residual_that_is_the_input_is_one_parameter(call_kernel: Any) -> None:
    from tvm import te

    shape = ConvShape(1, 16, 6, 6, 16, 3, 3, pad=(1, 1, 1, 1), block=8)
    x, w = (te.placeholder(s, name=f"p{i}") for i, s in enumerate(shape.operand_shapes))
    anchor = te.placeholder(shape.output_shape, name="anchor")
    body = Body((w, x), (x, w), anchor, te.compute(anchor.shape, lambda *i: anchor(*i) + x(*i)))
    rng = np.random.default_rng(1)
    x_value = rng.standard_normal((1, 16, 6, 6), np.float32)
    w_value = rng.standard_normal((16, 16, 3, 3), np.float32)
    func = conv_direct.build(shape, best(shape, AVX2), AVX2, body)
    blocks = Layout("NCHW8c")
    inputs = [Layout("OIHW8i8o").pack(w_value), blocks.pack(x_value)]
    got = blocks.unpack(call_kernel(func, inputs, shape.output_shape), x_value.shape)
    wanted = reference(shape, x_value, w_value, np.zeros(16, np.float32)) + x_value
    assert np.allclose(got, wanted, rtol=0, atol=1e-4)


def test_an_epilogue_must_keep_the_shape() -> None:
    from tvm import te

    shape = ConvShape(1, 16, 6, 6, 16, 1, 1, block=8)

    def apply(anchor: Any) -> Any:
        return te.compute((4,), lambda i: anchor(0, 0, 0, 0, i))

    body = plain_body(shape.operand_shapes, shape.output_shape, apply=apply)
    with pytest.raises(VerifyError, match=r"the output has shape \(4,\)"):
        conv_direct.build(shape, best(shape, AVX2), AVX2, body)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=["avx2", "avx512"])
@pytest.mark.parametrize("group", range(1, 18))
def test_vector_parts_cover_the_group_with_tiles_that_fit(machine: Machine, group: int) -> None:
    for pixels in range(1, machine.registers - 1):
        if machine.fits(pixels, 1):
            parts = machine.vector_parts(pixels, group)
            assert sum(vectors * count for vectors, count in parts) == group
            assert all(machine.fits(pixels, vectors) for vectors, _ in parts)


def test_more_threads_never_cost_more() -> None:
    shape = ConvShape(1, 64, 56, 56, 64, 3, 3, pad=(1, 1, 1, 1), block=8)
    for params in conv_direct.space(shape, AVX2):
        one = conv_direct.cost(shape, params, AVX2)
        four = conv_direct.cost(shape, params, Machine(lanes=8, registers=16, threads=4))
        assert 0 < four <= one


@pytest.mark.parametrize(("block", "cpu"), [(8, "x86-64-v3"), (16, "x86-64-v4"), (16, "znver4")])
@pytest.mark.parametrize("kernel", [3, 1])
def test_sums_stay_in_registers(block: int, cpu: str, kernel: int) -> None:
    """No vector goes through the stack where the arithmetic is, whether or not this machine could run it."""
    from cnnc.backends.cpu.codegen import kernel_text
    from cnnc.target import Target

    pad = (kernel // 2,) * 4
    shape = ConvShape(1, 64, 28, 28, 128, kernel, kernel, pad=pad, block=block)
    body = plain_body(shape.operand_shapes, shape.output_shape)
    func = conv_direct.build(shape, best(shape, MACHINES[block]), MACHINES[block], body)
    text = kernel_text(func, "kernel", Target.parse(f"cpu:{cpu}"), "s")
    text = re.sub(r"(?m)^\s*\.Ltmp.*\n", "", text)
    hot = [part for part in re.split(r"(?m)^\.LBB\w+:", text) if part.count("vfmadd") >= 12]
    assert hot
    register = "zmm" if block == 16 else "ymm"
    for part in hot:
        through_stack = [line for line in part.splitlines() if "%rsp" in line and register in line]
        assert len(through_stack) <= part.count("vfmadd") // 12, "\n".join(through_stack)


@pytest.mark.parametrize("patch", [14, 16])
def test_sums_of_patches_stay_in_registers(patch: int) -> None:
    """As vision transformers have them: the weights of an unrolled row must not push sums out."""
    from cnnc.backends.cpu.codegen import compile_kernel
    from cnnc.target import Target

    shape = patches(patch)
    body = plain_body(shape.operand_shapes, shape.output_shape)
    func = conv_direct.build(shape, best(shape, MACHINES[16]), MACHINES[16], body)
    assert compile_kernel(func, "kernel", Target.parse("cpu:x86-64-v4")).scratch_bytes == 0


@pytest.mark.parametrize("patch", [4, 14, 16, 32])
def test_patches_are_computed_several_at_a_time(patch: int) -> None:
    assert best(patches(patch), MACHINES[16]).pixels > 1


def patches(patch: int) -> ConvShape:
    size = 14 * patch
    return ConvShape(1, 3, size, size, 192, patch, patch, stride=(patch, patch), block=16, plain_input=True)
