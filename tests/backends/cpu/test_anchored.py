"""Templates on kernels as the passes make them: what they take, and that what they make is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu.templates import TEMPLATES, template
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops.binary import Add, Mul
from cnnc.ops.conv import Conv
from cnnc.ops.dense import Dense
from cnnc.ops.fused import Fused
from cnnc.ops.pad import Pad
from cnnc.ops.pool import AveragePool, MaxPool
from cnnc.ops.reduce import ReduceMax, ReduceMean
from cnnc.ops.source import Input
from cnnc.ops.unary import Relu, Sigmoid
from cnnc.passes.tile import Tile
from cnnc.target import Target

V3 = Target.parse("cpu:x86-64-v3")
IMAGE, PER_BLOCK = Layout("NCHW8c"), Layout("OIHW8o")
BLOCKED, FROM_PLAIN = Layout("OIHW8i8o"), Layout("OIHW8o")


def kernel(anchor: str, types: list[TensorType], make: Callable[..., Value]) -> Fused:
    inputs = tuple(call(Input(f"x{i}", type_)) for i, type_ in enumerate(types))
    return Fused(Graph("kernel", inputs, (make(*inputs),)), anchor)


def image(*shape: int, layout: Layout | None = IMAGE) -> TensorType:
    return TensorType(shape, DType.F32, layout)


def conv(*stride: int, pad: int = 1, dilation: int = 1, groups: int = 1) -> Conv:
    return Conv(stride or (1, 1), (pad,) * 4, (dilation,) * 2, groups)


def conv_bias_relu(op: Conv) -> Callable[..., Value]:
    return lambda x, w, b: call(Relu(), call(op, x, w, b))


def swish_and_residual(x: Value, w: Value, b: Value, r: Value) -> Value:
    y = call(conv(), x, w, b)
    return call(Add(), call(Mul(), y, call(Sigmoid(), y)), r)


def scaled(x: Value, w: Value, s: Value) -> Value:
    return call(Mul(), call(conv(), x, w), s)


def average(**fields: Any) -> AveragePool:
    return AveragePool((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), **fields)


def vector(size: int) -> TensorType:
    return TensorType((size,))


KERNELS: dict[str, tuple[str, Fused]] = {
    "conv, bias, relu": (
        "conv_direct",
        kernel(
            "conv",
            [image(1, 16, 9, 9), image(24, 16, 3, 3, layout=BLOCKED), vector(24)],
            conv_bias_relu(conv(2, 2)),
        ),
    ),
    "pad lanes": (
        "conv_direct",
        kernel(
            "conv",
            [image(2, 12, 7, 6), image(21, 12, 3, 3, layout=BLOCKED), vector(21), image(2, 21, 7, 6)],
            swish_and_residual,
        ),
    ),
    "1x1 with a residual": (
        "conv_direct",
        kernel(
            "conv",
            [image(1, 16, 14, 14), image(32, 16, 1, 1, layout=BLOCKED), vector(32), image(1, 32, 14, 14)],
            lambda x, w, b, r: call(Relu(), call(Add(), call(conv(pad=0), x, w, b), r)),
        ),
    ),
    "a scale for each channel": (
        "conv_direct",
        kernel("conv", [image(1, 16, 8, 8), image(16, 16, 3, 3, layout=BLOCKED), image(1, 16, 1, 1)], scaled),
    ),
    "a residual padded inside the kernel": (
        "conv_direct",
        kernel(
            "conv",
            [image(1, 16, 8, 8), image(20, 16, 3, 3, layout=BLOCKED), image(1, 20, 4, 5)],
            lambda x, w, r: call(Add(), call(conv(), x, w), call(Pad((0, 0, 2, 1, 0, 0, 2, 2)), r)),
        ),
    ),
    "first layer": (
        "conv_direct",
        kernel(
            "conv",
            [image(1, 3, 20, 22, layout=None), image(16, 3, 3, 3, layout=FROM_PLAIN), vector(16)],
            conv_bias_relu(conv(2, 2)),
        ),
    ),
    "groups": (
        "conv_direct",
        kernel(
            "conv",
            [image(1, 32, 6, 6), image(48, 16, 3, 3, layout=BLOCKED)],
            lambda x, w: call(conv(groups=2), x, w),
        ),
    ),
    "depthwise": (
        "depthwise",
        kernel(
            "conv",
            [image(1, 20, 9, 9), image(20, 1, 3, 3, layout=PER_BLOCK), vector(20)],
            conv_bias_relu(conv(2, 2, groups=20)),
        ),
    ),
    "small groups": (
        "depthwise",
        kernel(
            "conv",
            [image(1, 32, 9, 9), image(32, 4, 3, 3, layout=PER_BLOCK), vector(32)],
            conv_bias_relu(conv(1, 1, groups=8)),
        ),
    ),
    "max pool": (
        "pool",
        kernel(
            "max_pool",
            [image(1, 20, 11, 13)],
            lambda x: call(MaxPool((3, 3), (2, 2), (1, 1, 1, 1), (1, 1), ceil_mode=True), x),
        ),
    ),
    "average pool": (
        "pool",
        kernel("average_pool", [image(1, 20, 11, 13)], lambda x: call(Relu(), call(average(), x))),
    ),
    "average pool that counts padding": (
        "pool",
        kernel(
            "average_pool",
            [image(1, 16, 12, 12)],
            lambda x: call(average(count_include_pad=True, ceil_mode=True), x),
        ),
    ),
    "fully connected": (
        "dense",
        kernel(
            "dense",
            [TensorType((3, 20)), TensorType((11, 20)), vector(11)],
            lambda x, w, b: call(Relu(), call(Dense(), x, w, b)),
        ),
    ),
    "global mean": (
        "pool_global",
        kernel("reduce_mean", [image(2, 20, 7, 7)], lambda x: call(ReduceMean((2, 3)), x)),
    ),
    "global maximum": (
        "pool_global",
        kernel("reduce_max", [image(2, 16, 5, 7)], lambda x: call(ReduceMax((2, 3)), x)),
    ),
}


def scheduled(fused: Fused) -> Fused:
    types = [value.type for value in fused.body.inputs]
    inputs = tuple(call(Input(f"g{i}", type_)) for i, type_ in enumerate(types))
    graph = Graph("graph", inputs, (call(fused, *inputs),))
    tiled = Tile(templates=TEMPLATES).run(graph, V3)
    op = tiled.outputs[0].op
    assert isinstance(op, Fused)
    return op


@pytest.mark.parametrize("name", KERNELS)
def test_the_template_is_chosen_and_right(call_kernel: Any, name: str) -> None:
    wanted_template, fused = KERNELS[name]
    chosen = scheduled(fused)
    assert chosen.schedule is not None
    assert chosen.schedule.template == wanted_template

    rng = np.random.default_rng(len(name))
    types = [value.type for value in fused.body.inputs]
    arrays = [rng.standard_normal(type_.static_shape, np.float32) for type_ in types]
    wide = [array.astype(np.float64) for array in arrays]
    result = fused.body.outputs[0].type
    func = template(wanted_template).build(chosen, chosen.schedule, V3)
    packed = [a if t.layout is None else t.layout.pack(a) for a, t in zip(arrays, types, strict=True)]
    got = call_kernel(func, packed, result.physical_shape, pieces=2)
    logical = got if result.layout is None else result.layout.unpack(got, result.static_shape)
    wanted = reference(fused, wide)
    assert np.linalg.norm(logical - wanted) <= 2e-6 * np.linalg.norm(wanted)
    if result.layout is not None:
        assert np.array_equal(result.layout.pack(logical), got), "pad lanes must be 0"


def reference(fused: Fused, arrays: list[np.ndarray]) -> np.ndarray:
    """Run the body in float64, operator by operator."""
    values: dict[Value, np.ndarray] = dict(zip(fused.body.inputs, arrays, strict=True))
    for node in fused.body.nodes:
        if node.op.name != "input":
            values[node.values[0]] = np.asarray(node.op.reference(*(values[v] for v in node.inputs)))
    return values[fused.body.outputs[0]]


def matching(fused: Fused) -> set[str]:
    return {t.name for t in TEMPLATES if t.matches(fused, V3)} - {"generic"}


def test_what_the_templates_refuse() -> None:
    x, w = image(1, 16, 9, 9), image(16, 16, 3, 3, layout=BLOCKED)
    winograd = replace(conv(), algorithm="winograd")
    assert matching(kernel("conv", [x, w], lambda x, w: call(conv(), x, w))) == {"conv_direct"}
    assert not matching(kernel("conv", [x, w], lambda x, w: call(winograd, x, w)))
    # What follows the anchor has another shape: it would need values that are not in registers.
    assert not matching(kernel("conv", [x, w], lambda x, w: call(ReduceMean((2, 3)), call(conv(), x, w))))
    # The input is computed inside the kernel, and not for a convolution (see test_prologue.py).
    assert not matching(kernel("reduce_mean", [x], lambda x: call(ReduceMean((2, 3)), call(Relu(), x))))
    plain = [image(1, 3, 9, 9, layout=None), image(16, 3, 3, 3, layout=None)]
    assert not matching(kernel("conv", plain, lambda x, w: call(conv(), x, w)))
    assert not matching(kernel("reduce_mean", [x], lambda x: call(ReduceMean((3,)), x)))
    indices = MaxPool((2, 2), (2, 2), (0, 0, 0, 0), (1, 1), with_indices=True)
    assert not matching(kernel("max_pool", [x], lambda x: call(indices, x).node.values[0]))


def test_schedules_name_their_parameters() -> None:
    text = str(scheduled(KERNELS["depthwise"][1]).schedule)
    assert text.startswith("depthwise(pixels=")
    assert "rows=" in text
