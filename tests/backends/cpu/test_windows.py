"""Depthwise convolution and pooling kernels against float64 loops over windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu import depthwise, pool
from cnnc.backends.cpu.machine import AVX2, AVX512, Machine
from cnnc.backends.cpu.window_shape import WindowShape
from cnnc.backends.lower.body import plain_body
from cnnc.ir.layout import Layout

MACHINES = {8: AVX2, 16: AVX512}

SHAPES = {
    "3x3": WindowShape(1, 32, 14, 14, 14, 14, 3, 3, pad=(1, 1)),
    "3x3, stride 2, batch of 2": WindowShape(2, 16, 13, 15, 7, 8, 3, 3, (2, 2), (1, 1)),
    "5x5": WindowShape(1, 16, 9, 9, 9, 9, 5, 5, pad=(2, 2)),
    "5x5, stride 2": WindowShape(1, 48, 12, 11, 6, 6, 5, 5, (2, 2), (2, 2)),
    "7x7": WindowShape(1, 16, 9, 8, 9, 8, 7, 7, pad=(3, 3)),
    "9x9": WindowShape(1, 16, 9, 10, 9, 10, 9, 9, pad=(4, 4)),
    "no padding": WindowShape(1, 16, 10, 30, 8, 28, 3, 3),
    "asymmetric": WindowShape(1, 16, 8, 9, 4, 5, 3, 3, (2, 2), (0, 1)),
    "hanging over": WindowShape(1, 16, 6, 6, 3, 3, 3, 3, (2, 2)),
    "dilated": WindowShape(1, 16, 11, 11, 11, 11, 3, 3, pad=(2, 2), dilation=(2, 2)),
    "stride above kernel": WindowShape(1, 16, 11, 13, 4, 4, 2, 1, (3, 4)),
    "one pixel": WindowShape(1, 16, 1, 1, 1, 1, 3, 3, pad=(1, 1)),
    "channels beside the block": WindowShape(1, 21, 6, 6, 6, 6, 3, 3, pad=(1, 1)),
}


def with_block(name: str, block: int) -> WindowShape:
    return WindowShape(**{**vars(SHAPES[name]), "block": block})


def windows_of(shape: WindowShape, x: np.ndarray, row: int, column: int) -> list[tuple[int, int, np.ndarray]]:
    """List the taps (row, column, x there) of a window that lie inside the input."""
    found = []
    for r in range(shape.kh):
        for s in range(shape.kw):
            h = row * shape.stride[0] - shape.pad[0] + r * shape.dilation[0]
            w = column * shape.stride[1] - shape.pad[1] + s * shape.dilation[1]
            if 0 <= h < shape.h and 0 <= w < shape.w:
                found.append((r, s, x[:, :, h, w]))
    return found


def assert_close(shape: WindowShape, got: np.ndarray, wanted: np.ndarray) -> None:
    blocks = Layout(f"NCHW{shape.block}c")
    logical = blocks.unpack(got, wanted.shape)
    np.testing.assert_allclose(logical, wanted, rtol=1e-5, atol=1e-5)
    assert np.array_equal(blocks.pack(logical), got, equal_nan=True), "pad lanes must be 0"


def check_depthwise(
    call_kernel: Any,
    shape: WindowShape,
    group: int,
    machine: Machine,
    params: depthwise.DepthwiseParams | None = None,
) -> None:
    """Compare a schedule, the cost model's choice by default, with sums in float64."""
    rng = np.random.default_rng(shape.h * 100 + group)
    x = rng.standard_normal((shape.n, shape.c, shape.h, shape.w), np.float32)
    w = rng.standard_normal((shape.c, group, shape.kh, shape.kw), np.float32)
    wanted = np.zeros((shape.n, shape.c, shape.oh, shape.ow))
    groups = np.arange(shape.c) // group * group
    for row in range(shape.oh):
        for column in range(shape.ow):
            for r, s, seen in windows_of(shape, x.astype(np.float64), row, column):
                for j in range(group):
                    wanted[:, :, row, column] += seen[:, groups + j] * w[:, j, r, s]
    if params is None:
        params = min(depthwise.space(shape, group, machine), key=lambda p: depthwise.cost(shape, group, p, machine))
    body = plain_body((shape.input_shape, depthwise.weight_shape(shape, group)), shape.output_shape)
    inputs = [Layout(f"NCHW{shape.block}c").pack(x), Layout(f"OIHW{shape.block}o").pack(w)]
    got = call_kernel(depthwise.build(shape, group, params, body), inputs, shape.output_shape, pieces=3)
    assert_close(shape, got, wanted)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_depthwise(call_kernel: Any, name: str, block: int) -> None:
    check_depthwise(call_kernel, with_block(name, block), 1, MACHINES[block])


GROUPED = ["3x3", "3x3, stride 2, batch of 2", "5x5, stride 2", "9x9", "no padding", "asymmetric", "dilated"]
GROUPED += ["stride above kernel", "one pixel"]


@pytest.mark.parametrize(("group", "block"), [(2, 8), (4, 8), (8, 8), (2, 16), (4, 16), (8, 16), (16, 16)])
@pytest.mark.parametrize("name", GROUPED)
def test_small_groups(call_kernel: Any, name: str, group: int, block: int) -> None:
    check_depthwise(call_kernel, with_block(name, block), group, MACHINES[block])


@pytest.mark.parametrize("group", [2, 4, 8])
def test_groups_that_do_not_fill_a_block(call_kernel: Any, group: int) -> None:
    shape = WindowShape(1, 24, 7, 9, 7, 9, 3, 3, pad=(1, 1), block=16)
    check_depthwise(call_kernel, shape, group, AVX512)


@pytest.mark.parametrize(("group", "block"), [(2, 8), (4, 8), (4, 16), (8, 16)])
def test_every_tile_of_groups(call_kernel: Any, group: int, block: int) -> None:
    shape, machine = with_block("5x5, stride 2", block), MACHINES[block]
    for params in depthwise.space(shape, group, machine):
        check_depthwise(call_kernel, shape, group, machine, params)


REDUCE = {"max": np.max, "min": np.min, "sum": np.sum}


def pooled(shape: WindowShape, kind: pool.PoolKind, x: np.ndarray) -> np.ndarray:
    wanted = np.zeros((shape.n, shape.c, shape.oh, shape.ow))
    for row in range(shape.oh):
        for column in range(shape.ow):
            taps = [seen for _, _, seen in windows_of(shape, x.astype(np.float64), row, column)]
            wanted[:, :, row, column] = REDUCE[kind](np.stack(taps), axis=0)
    return wanted


@pytest.mark.parametrize(("kind", "block"), [("max", 8), ("min", 16), ("sum", 8)])
@pytest.mark.parametrize("name", SHAPES)
def test_pool(call_kernel: Any, name: str, kind: pool.PoolKind, block: int) -> None:
    shape, machine = with_block(name, block), MACHINES[block]
    x = np.random.default_rng(shape.w).standard_normal((shape.n, shape.c, shape.h, shape.w), np.float32)
    params = min(pool.space(shape, machine), key=lambda p: pool.cost(shape, p, machine))
    func = pool.build(shape, kind, params, plain_body((shape.input_shape,), shape.output_shape))
    got = call_kernel(func, [Layout(f"NCHW{block}c").pack(x)], shape.output_shape, pieces=2)
    assert_close(shape, got, pooled(shape, kind, x))


@pytest.mark.parametrize(("kind", "channels", "block"), [("max", 21, 8), ("min", 32, 8), ("sum", 40, 16)])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 2), (4, 8), (1, 29)])
def test_global_pool(call_kernel: Any, kind: pool.PoolKind, size: tuple[int, int], channels: int, block: int) -> None:
    shape = WindowShape(2, channels, *size, 1, 1, *size, block=block)
    x = np.random.default_rng(size[1]).standard_normal((2, channels, *size), np.float32)
    func = pool.build_global(shape, kind, plain_body((shape.input_shape,), shape.output_shape))
    got = call_kernel(func, [Layout(f"NCHW{block}c").pack(x)], shape.output_shape, pieces=2)
    assert_close(shape, got, pooled(shape, kind, x))


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_nan_wins_wherever_it_stands(call_kernel: Any, kind: pool.PoolKind, whole: bool) -> None:
    size = (5, 6)
    oh, ow = (1, 1) if whole else (3, 4)
    kernel = size if whole else (3, 3)
    shape = WindowShape(1, 8, *size, oh, ow, *kernel, block=8)
    x = np.random.default_rng(3).standard_normal((1, 8, *size), np.float32)
    for channel in range(8):
        x[0, channel, channel % 5, channel % 6] = np.nan
    body = plain_body((shape.input_shape,), shape.output_shape)
    params = pool.PoolParams(4, oh)
    func = pool.build_global(shape, kind, body) if whole else pool.build(shape, kind, params, body)
    got = call_kernel(func, [Layout("NCHW8c").pack(x)], shape.output_shape)
    wanted = pooled(shape, kind, x)
    assert np.isnan(wanted).any()
    assert_close(shape, got, wanted)
