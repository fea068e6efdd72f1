"""plan_memory: plans that the independent checker accepts, near the least possible; and what the checker refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cnnc.errors import VerifyError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.layout import Layout
from cnnc.ir.types import Dim, DType
from cnnc.ops import Add, Cast, Concat, Exp, Fused, LayoutTransform, MaxPool, Mul, Relu, Reshape, Split, constant
from cnnc.ops.source import graph_input
from cnnc.passes.check_plan import check_plan
from cnnc.passes.fuse import Fuse
from cnnc.passes.plan_memory import MemoryPlan, elementwise_in_place, live_bytes, plan_memory
from tests.passes.graphs import TARGET, conv, graph_of, image, weights


def kernels(graph: Graph, grow: bool = True) -> Graph:
    return Fuse(grow).run(graph, TARGET)


def planned(graph: Graph, in_place=None) -> MemoryPlan:
    plan = plan_memory(graph, TARGET, in_place)
    check_plan(graph, plan)
    assert plan.size >= live_bytes(graph, in_place)
    return plan


def chain(rng: np.random.Generator, length: int, channels: int = 4) -> Graph:
    y: Value = image(1, channels, 8, 8)
    for _ in range(length):
        y = conv(y, weights(rng, channels, channels, 3, 3), pad=1)
    return kernels(graph_of(y))


def vgg16() -> Graph:
    """Build VGG-16 at full size with weights of zeros, which take no time."""
    y: Value = image(1, 3, 224, 224)
    for channels, layers in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(layers):
            w = constant(np.broadcast_to(np.float32(0), (channels, int(y.shape[1]), 3, 3)))
            y = call(Relu(), conv(y, w, pad=1))
        y = call(MaxPool((2, 2), (2, 2), (0,) * 4, (1, 1)), y)
    return kernels(graph_of(call(Exp(), call(Reshape((1, 25088)), y))))


def test_a_chain_needs_two_buffers(rng):
    plan = planned(chain(rng, 6))
    assert plan.size == 2 * 4 * 8 * 8 * 4


def test_one_kernel_needs_none(rng):
    assert planned(chain(rng, 1)) == MemoryPlan({}, 0)


def test_vgg16_takes_less_than_26_mb():
    assert planned(vgg16()).size < 26_000_000


def test_a_residual_is_kept(rng):
    x = image(1, 4, 8, 8)
    first = conv(x, weights(rng, 4, 4, 1, 1))
    y = conv(conv(first, weights(rng, 4, 4, 3, 3), pad=1), weights(rng, 4, 4, 3, 3), pad=1)
    plan = planned(kernels(graph_of(conv(call(Add(), y, first), weights(rng, 4, 4, 1, 1)))))
    assert plan.size == 3 * 1024


def test_views_lie_where_their_source_does(rng):
    y = conv(image(1, 4, 8, 8), weights(rng, 4, 4, 1, 1))
    graph = kernels(graph_of(call(Exp(), call(Reshape((4, 64)), call(Reshape((64, 4)), y)))))
    plan = planned(graph)
    assert len(plan.offsets) == 3
    assert len(set(plan.offsets.values())) == 1


def test_a_view_keeps_its_source_alive(rng):
    y = conv(image(1, 4, 8, 8), weights(rng, 4, 4, 1, 1))
    view = call(Reshape((1, 4, 64, 1)), y)
    z = conv(conv(y, weights(rng, 4, 4, 1, 1)), weights(rng, 4, 4, 1, 1))
    graph = kernels(graph_of(conv(view, weights(rng, 4, 4, 1, 1)), z))
    planned(graph)


def test_views_of_inputs_and_constants_have_no_place(rng):
    x = image(2, 6)
    y = call(Mul(), call(Reshape((3, 4)), x), call(Reshape((3, 4)), weights(rng, 12)))
    graph = kernels(graph_of(call(Exp(), y), y), grow=False)
    assert planned(graph) == MemoryPlan({}, 0)


def test_elementwise_kernels_write_over_their_input(rng):
    y = conv(image(1, 4, 8, 8), weights(rng, 4, 4, 1, 1))
    for _ in range(3):
        y = call(Exp(), y)
    graph = kernels(graph_of(conv(y, weights(rng, 4, 4, 1, 1))), grow=False)
    assert planned(graph).size == 1024
    assert planned(graph, lambda node: ()).size == 2048


@pytest.mark.parametrize("case", ["alive", "broadcast", "narrower", "moved", "two names"])
def test_where_nothing_may_be_written_over(rng, case):
    w = weights(rng, 4, 4, 1, 1)
    y = conv(image(1, 4, 8, 8), w)
    small = conv(image(1, 4, 1, 1, label="z"), w)
    renamed = call(Reshape((1, 4, 8, 8)), call(Reshape((256,)), y))
    made = {
        "alive": lambda: call(Add(), conv(call(Exp(), y), w), y),
        "broadcast": lambda: conv(call(Add(), small, image(1, 4, 8, 8, label="a")), w),
        "narrower": lambda: call(Cast(DType.F32), call(Cast(DType.F16), y)),
        "moved": lambda: call(Exp(), call(Concat(3), y)),
        "two names": lambda: conv(call(Mul(), y, renamed), w),
    }[case]()
    planned(kernels(graph_of(made), grow=False))


def test_outputs_lie_outside(rng):
    y = conv(image(1, 4, 8, 8), weights(rng, 4, 4, 1, 1))
    z = conv(y, weights(rng, 4, 4, 1, 1))
    graph = kernels(graph_of(y, z))
    assert planned(graph) == MemoryPlan({}, 0)


def test_blocks_and_bounds_count(rng):
    x = call(LayoutTransform(Layout("NCHW8c")), graph_input("x", (Dim.symbol("n", 3), 5, 4, 4)))
    graph = kernels(graph_of(call(LayoutTransform(None), call(MaxPool((3, 3), (1, 1), (1,) * 4, (1, 1)), x))))
    plan = planned(graph)
    assert plan.size == 2 * 3 * 8 * 16 * 4


def test_several_outputs_of_one_kernel(rng):
    parts = call(Split(1, (1, 3, 4)), image(2, 8, 5, 5)).node.values
    y = call(Concat(1), conv(parts[2], weights(rng, 2, 4, 1, 1)), conv(parts[0], weights(rng, 2, 1, 1, 1)), parts[1])
    planned(kernels(graph_of(y)))


def test_empty_values(rng):
    y = call(Exp(), conv(image(0, 4, 8, 8), weights(rng, 4, 4, 1, 1)))
    planned(kernels(graph_of(conv(y, weights(rng, 4, 4, 1, 1))), grow=False))


def test_random_lifetimes_are_packed_well(rng):
    for _ in range(20):
        values: list[Value] = [image(1, 1, 4, 4)]
        for _ in range(25):
            pick = values[int(rng.integers(max(len(values) - 6, 0), len(values)))]
            outputs = int(rng.integers(1, 20))
            values.append(conv(pick, weights(rng, outputs, int(pick.shape[1]), 1, 1)))
        graph = kernels(graph_of(*values[-3:], inputs=(values[0],)))
        assert planned(graph).size <= 1.35 * max(live_bytes(graph), 1)


# The checker


def small(rng: np.random.Generator) -> tuple[Graph, MemoryPlan]:
    x = image(1, 4, 8, 8)
    y = conv(x, weights(rng, 4, 4, 1, 1))
    z = conv(y, weights(rng, 4, 4, 1, 1))
    graph = kernels(graph_of(conv(call(Add(), z, y), weights(rng, 4, 4, 1, 1))), grow=False)
    return graph, plan_memory(graph, TARGET, lambda node: ())


def arena(graph: Graph) -> list[Value]:
    return [n.values[0] for n in graph.nodes if isinstance(n.op, Fused)][:-1]


def test_the_checker_sees_every_pair_that_meets(rng):
    graph, plan = small(rng)
    y, z, total = arena(graph)
    check_plan(graph, plan)
    for a, b, message in (
        (z, y, "overwrites the input"),
        (total, z, None),
        (total, y, None),
    ):
        moved = MemoryPlan({**plan.offsets, a: plan.offsets[b]}, plan.size)
        if message is None:
            check_plan(graph, moved)
        else:
            with pytest.raises(VerifyError, match=message):
                check_plan(graph, moved)


def test_the_checker_sees_what_is_overwritten_before_it_is_read(rng):
    x = image(1, 4, 8, 8)
    y = conv(x, weights(rng, 4, 4, 1, 1))
    z = conv(x, weights(rng, 4, 4, 1, 1))
    graph = kernels(graph_of(call(Concat(1), y, z)), grow=False)
    plan = plan_memory(graph, TARGET)
    first, second = arena(graph)
    with pytest.raises(VerifyError, match="its bytes have been overwritten"):
        check_plan(graph, MemoryPlan({**plan.offsets, second: plan.offsets[first]}, plan.size))
    with pytest.raises(VerifyError, match="its bytes have been overwritten"):
        check_plan(graph, MemoryPlan({first: 0, second: 960}, 4096))


def test_the_checker_sees_shifted_overlaps_in_place(rng):
    y = call(Exp(), conv(image(1, 4, 8, 8), weights(rng, 4, 4, 1, 1)))
    graph = kernels(graph_of(conv(y, weights(rng, 4, 4, 1, 1))), grow=False)
    first, second = arena(graph)
    check_plan(graph, MemoryPlan({first: 64, second: 64}, 2048))
    with pytest.raises(VerifyError, match="overwrites the input"):
        check_plan(graph, MemoryPlan({first: 64, second: 128}, 2048))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan, v: replace(plan, size=plan.size - 64), "lies at"),
        (lambda plan, v: replace(plan, offsets={**plan.offsets, v: 32}), "lies at"),
        (lambda plan, v: replace(plan, offsets={**plan.offsets, v: -64}), "lies at"),
        (lambda plan, v: replace(plan, offsets={k: o for k, o in plan.offsets.items() if k != v}), "has no place"),
    ],
)
def test_the_checker_sees_impossible_places(rng, change, message):
    graph, plan = small(rng)
    with pytest.raises(VerifyError, match=message):
        check_plan(graph, change(plan, arena(graph)[0]))


def test_the_checker_sees_views_that_moved(rng):
    y = conv(image(1, 4, 8, 8), weights(rng, 4, 4, 1, 1))
    graph = kernels(graph_of(conv(call(Reshape((1, 4, 64, 1)), y), weights(rng, 4, 4, 1, 1))))
    plan = plan_memory(graph, TARGET)
    (view,) = (n.values[0] for n in graph.nodes if n.op.name == "reshape")
    with pytest.raises(VerifyError, match="does not lie where"):
        check_plan(graph, MemoryPlan({**plan.offsets, view: plan.offsets[view] + 64}, plan.size + 64))


def test_the_checker_sees_what_is_no_view(rng):
    y = conv(image(1, 16, 8, 8), weights(rng, 16, 16, 1, 1))
    graph = kernels(graph_of(y))
    moved = call(LayoutTransform(Layout("NCHW8c")), graph.outputs[0])
    wrong = Fuse(grow=False).run(graph_of(call(LayoutTransform(None), moved)), TARGET)
    check_plan(wrong, plan_memory(wrong, TARGET))
    with pytest.raises(VerifyError, match="stands outside of a kernel but moves bytes"):
        check_plan(graph_of(moved), MemoryPlan({graph.outputs[0]: 0, moved: 0}, 4096))


def test_the_checker_sees_outputs_nobody_writes(rng):
    x = image(2, 3)
    with pytest.raises(VerifyError, match="output output is not written by a kernel"):
        check_plan(graph_of(x), MemoryPlan({}, 0))


def test_the_checker_sees_outputs_of_one_kernel_overlap(rng):
    parts = call(Split(1, (4, 4)), image(2, 8, 5, 5)).node.values
    graph = kernels(graph_of(call(Concat(1), parts[1], parts[0])), grow=False)
    plan = plan_memory(graph, TARGET)
    with pytest.raises(VerifyError, match="overlap"):
        check_plan(graph, MemoryPlan(dict.fromkeys(plan.offsets, 0), plan.size))


def test_in_place_needs_one_kernel_of_elementwise_operators(rng):
    graph = kernels(graph_of(call(Add(), image(2, 3), image(2, 3, label="y"))))
    (node,) = (n for n in graph.nodes if isinstance(n.op, Fused))
    assert list(elementwise_in_place(node)) == [0, 1]
    assert elementwise_in_place(chain(rng, 1).outputs[0].node) == ()
