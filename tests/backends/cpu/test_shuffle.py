"""Channel shuffles in blocks: every lane comes from the right vector, and pad lanes are 0."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cnnc
from cnnc.backends.cpu.shuffle import Shuffle, sources
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.interp import run
from cnnc.ir.layout import Layout
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Concat, Conv, Relu, Reshape, ShuffleChannels, Split, Transpose, constant, graph_input
from cnnc.ops.fused import Fused, Schedule
from cnnc.ops.source import Input
from cnnc.target import Target

V3 = Target.parse("cpu:x86-64-v3")
BLOCKS = Layout("NCHW8c")


def kernel(op: ShuffleChannels, *shapes: tuple[int, ...], layout: Layout | None = BLOCKS) -> Fused:
    inputs = tuple(call(Input(f"x{i}", TensorType(shape, DType.F32, layout))) for i, shape in enumerate(shapes))
    return Fused(Graph("kernel", inputs, (call(op, *inputs),)), "shuffle_channels")


CASES: dict[str, tuple[ShuffleChannels, tuple[tuple[int, ...], ...]]] = {
    "whole blocks": (ShuffleChannels(2, 0, 32), ((1, 16, 9, 8), (1, 16, 9, 8))),
    "channels beside the block": (ShuffleChannels(2, 0, 58), ((2, 29, 5, 7), (2, 29, 5, 7))),
    "the first half": (ShuffleChannels(2, 0, 29), ((1, 29, 10, 10), (1, 29, 10, 10))),
    "the second half": (ShuffleChannels(2, 29, 29), ((1, 29, 10, 10), (1, 29, 10, 10))),
    "four groups of one image": (ShuffleChannels(4, 0, 20), ((3, 20, 3, 3),)),
    "parts of other sizes": (ShuffleChannels(3, 1, 20), ((1, 3, 4, 4), (1, 17, 4, 4), (1, 1, 4, 4))),
    "one pixel": (ShuffleChannels(2, 1, 7), ((2, 8, 1, 1),)),
    "one channel": (ShuffleChannels(1, 0, 1), ((1, 1, 3, 3),)),
    "as it was": (ShuffleChannels(1, 0, 24), ((1, 24, 3, 3),)),
}


@pytest.mark.parametrize("pixels", [1, 7, 64])
@pytest.mark.parametrize("name", CASES)
def test_shuffles_are_right(call_kernel: Any, rng: np.random.Generator, name: str, pixels: int) -> None:
    op, shapes = CASES[name]
    fused = kernel(op, *shapes)
    assert Shuffle().matches(fused, V3)
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    wanted = op.reference(*arrays)
    func = Shuffle().build(fused, Schedule("shuffle", (("pixels", pixels),)), V3)
    packed = BLOCKS.pack(wanted)
    assert np.array_equal(call_kernel(func, [BLOCKS.pack(a) for a in arrays], packed.shape, pieces=2), packed)


def test_an_image_may_be_read_twice(call_kernel: Any, rng: np.random.Generator) -> None:
    x = call(Input("x", TensorType((1, 12, 3, 3), DType.F32, BLOCKS)))
    op = ShuffleChannels(2, 3, 17)
    fused = Fused(Graph("kernel", (x,), (call(op, x, x),)), "shuffle_channels")
    array = rng.standard_normal((1, 12, 3, 3), np.float32)
    (schedule,) = Shuffle().space(fused, V3)
    wanted = BLOCKS.pack(op.reference(array, array))
    assert np.array_equal(call_kernel(Shuffle().build(fused, schedule, V3), [BLOCKS.pack(array)], wanted.shape), wanted)


def test_sources_are_those_of_the_reference() -> None:
    op = ShuffleChannels(3, 2, 6)
    x = np.arange(9.0).reshape(1, 9, 1)
    found = [(0, 4, 5)[part] + channel for part, channel in sources(op, (4, 1, 4))]
    assert found == op.reference(x).reshape(-1).tolist()


def test_what_the_template_refuses() -> None:
    op = ShuffleChannels(2, 0, 8)
    assert not Shuffle().matches(kernel(op, (1, 8, 3, 3), layout=None), V3)
    assert not Shuffle().matches(kernel(op, (1, 8, 3, 3), layout=Layout("NCHW16c")), V3)
    x = call(Input("x", TensorType((1, 8, 3, 3), DType.F32, BLOCKS)))
    for y in (call(Relu(), call(op, x)), call(op, call(Relu(), x))):
        assert not Shuffle().matches(Fused(Graph("kernel", (x,), (y,)), "shuffle_channels"), V3)


def test_units_of_shufflenet_move_vectors_only(rng: np.random.Generator) -> None:
    """Concat, reshape, transpose, reshape and split between two convolutions, of channels that fill no blocks."""

    def conv(x: Value, channels: int) -> Value:
        w = constant(rng.standard_normal((channels, x.type.static_shape[1], 3, 3), np.float32))
        return call(Relu(), call(Conv((1, 1), (1, 1, 1, 1), (1, 1)), x, w))

    x = graph_input("x", (2, 12, 9, 7))
    left, right = conv(x, 22), conv(x, 22)
    for _ in range(2):
        joined = call(Concat(1), left, conv(right, 22))
        dealt = call(Transpose((0, 2, 1, 3, 4)), call(Reshape((2, 2, 22, 9, 7)), joined))
        left, right = call(Split(1, (22, 22)), call(Reshape((2, 44, 9, 7)), dealt)).node.values
    graph = Graph("net", (x,), (conv(left, 8), conv(right, 8)), ("a", "b"))
    module = cnnc.compile(graph, records=False, cache=False)
    assert module.build is not None
    kernels = [n.op for n in module.build.graphs[0].nodes if isinstance(n.op, Fused)]
    moving = [k.schedule.template for k in kernels if k.anchor == "shuffle_channels" and k.schedule is not None]
    assert moving == ["shuffle"] * 4
    array = rng.standard_normal((2, 12, 9, 7), np.float32)
    got = module.run({"x": array})
    for name, wanted in zip(("a", "b"), run(graph, [array.astype(np.float64)], precise=True), strict=True):
        assert np.linalg.norm(got[name] - wanted) <= 1e-5 * np.linalg.norm(wanted)
