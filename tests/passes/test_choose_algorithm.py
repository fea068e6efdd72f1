"""choose_algorithm: the cheapest within the error budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cnnc.backends.cuda.templates import TEMPLATES
from cnnc.ir.build import call
from cnnc.ir.interp import run
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType
from cnnc.ops import Conv, Dense, DigitDense, MaxPool, Relu, WinogradWeight, constant, graph_input
from cnnc.passes.algorithms import ALGORITHMS, Algorithm, rounding
from cnnc.passes.choose_algorithm import ChooseAlgorithm, cheapest
from cnnc.passes.fold_constants import FoldConstants
from cnnc.passes.pack_weights import PackWeights
from cnnc.passes.pipeline import pipeline
from cnnc.target import Target
from tests.passes.graphs import TARGET, assert_same_numbers, check, conv, graph_of, image, operators, weights

FAST = Algorithm(
    "fast",
    error=11.0,
    applies=lambda node, target: node.inputs[1].shape[2] == 3,
    seconds=lambda node, target, stored: 0.0,
)


def test_golden(rng, golden):
    x = image(1, 3, 6, 6)
    w = weights(rng, 4, 3, 3, 3)
    graph = graph_of(call(Conv((1, 1), (0,) * 4, (1, 1), algorithm="slow"), x, w))
    done = check(ChooseAlgorithm(), graph, rng)
    golden("choose_algorithm", print_graph(graph) + print_graph(done))
    assert operators(done) == ["conv"]


def test_the_budget_decides(rng):
    x = image(1, 3, 6, 6)
    node = conv(x, weights(rng, 4, 3, 3, 3)).node
    table = (*ALGORITHMS, FAST)
    assert cheapest(node, TARGET, 64.0, table) == "fast"
    assert cheapest(node, TARGET, 8.0, table) == "direct"
    assert cheapest(node, TARGET, 0.0, table) == "direct"


def test_where_it_applies_decides(rng):
    node = conv(image(1, 3, 6, 6), weights(rng, 4, 3, 1, 1)).node
    assert cheapest(node, TARGET, 64.0, (*ALGORITHMS, FAST)) == "direct"


def test_winograd_golden(rng, golden):
    y = conv(image(1, 16, 12, 12), weights(rng, 16, 16, 3, 3, label="w"), weights(rng, 16), pad=1)
    graph = graph_of(y)
    done = check(ChooseAlgorithm(), graph, rng)
    folded = FoldConstants().run(done, TARGET)
    golden("choose_algorithm_winograd", print_graph(graph) + print_graph(done) + print_graph(folded))
    assert operators(folded) == ["conv"]


def test_exact_forbids_winograd(rng):
    graph = graph_of(conv(image(1, 16, 12, 12), weights(rng, 16, 16, 3, 3), pad=1))
    assert operators(check(ChooseAlgorithm(exact=True), graph, rng)) == ["conv"]
    for passes in (pipeline(3, exact=True), pipeline(3, passes="choose_algorithm", exact=True)):
        (chosen,) = [p for p in passes if isinstance(p, ChooseAlgorithm)]
        assert str(chosen) == "choose_algorithm{exact=True}"


def test_the_budget_forbids_what_it_cannot_pay(rng):
    node = conv(image(1, 64, 72, 72), weights(rng, 64, 64, 3, 3), pad=1).node
    assert cheapest(node, TARGET, 64.0) == "winograd6"
    assert cheapest(node, TARGET, 40.0) == "winograd4"
    assert cheapest(node, TARGET, 20.0) == "winograd2"
    assert cheapest(node, TARGET, 0.5) == "direct"


@pytest.mark.parametrize(
    ("channels", "size", "algorithm"),
    [(64, 112, "winograd6"), (256, 35, "winograd6"), (64, 56, "winograd4"), (128, 28, "winograd4"),
     (256, 14, "winograd4"), (512, 28, "winograd4"), (64, 7, "winograd4"), (512, 7, "winograd2"),
     (512, 3, "direct"), (512, 1, "direct"), (8, 56, "direct")],
)  # fmt: skip
def test_the_size_decides(channels, size, algorithm):
    w = constant(np.zeros((channels, channels, 3, 3), np.float32))
    assert cheapest(conv(image(1, channels, size, size), w, pad=1).node, TARGET, 64.0) == algorithm


@pytest.mark.parametrize(
    ("channels", "size", "algorithm"),
    [(64, 56, "winograd4"), (128, 28, "winograd4"), (256, 14, "winograd2"), (512, 28, "winograd4"), (512, 7, "direct")],
)
def test_late_layers_read_fewer_weights_where_vectors_are_wide(channels, size, algorithm):
    w = constant(np.zeros((channels, channels, 3, 3), np.float32))
    target = Target.parse("cpu:x86-64-v4")
    assert cheapest(conv(image(1, channels, size, size), w, pad=1).node, target, 64.0) == algorithm


def test_only_what_winograd_takes(rng):
    x, w = image(1, 32, 28, 28), weights(rng, 32, 32, 3, 3)
    infinite = constant(np.full((32, 32, 3, 3), np.inf, np.float32))
    at_run_time = graph_input("w", (32, 32, 3, 3))
    plain = Conv((1, 1), (1, 1, 1, 1), (1, 1))
    refused = [
        conv(x, w, stride=3),
        conv(x, weights(rng, 32, 1, 3, 3), groups=32),
        conv(x, weights(rng, 32, 32, 9, 9)),
        conv(x, weights(rng, 32, 32, 1, 1), stride=2),
        call(replace(plain, dilation=(2, 2)), x, w),
        call(plain, x, at_run_time),
        call(plain, x, infinite),
        conv(image(1, 32, 28), weights(rng, 32, 32, 3)),
    ]
    assert [cheapest(v.node, TARGET, 64.0) for v in refused] == ["direct"] * len(refused)
    assert cheapest(call(plain, x, w).node, TARGET, 64.0) == "winograd4"


def test_growth_goes_where_it_saves_most(rng):
    """Three layers of 144, 144 and 288 KiB; the first has 16 times the pixels of the second."""
    x = image(1, 64, 32, 32)
    y = conv(x, weights(rng, 64, 64, 3, 3), pad=1)
    z = conv(call(MaxPool((4, 4), (4, 4), (0, 0, 0, 0), (1, 1)), y), weights(rng, 64, 64, 3, 3), pad=1)
    graph = graph_of(conv(z, weights(rng, 128, 64, 3, 3), pad=1))
    constants = 9 * 4 * (64 * 64 * 2 + 128 * 64)

    def algorithms(growth):
        done = check(ChooseAlgorithm(growth=growth), graph, rng)
        return [n.op.algorithm for n in done.nodes if isinstance(n.op, Conv)]

    assert algorithms(np.inf) == ["winograd4", "winograd4", "winograd2"]
    assert algorithms(0.0) == ["direct"] * 3
    first = (4 * 64 * 64 * (16 - 9) + 1) / constants
    assert algorithms(first) == ["winograd2", "direct", "direct"]
    for growth in (0.05, 0.1, 0.3, 1.0, 2.0):
        done = ChooseAlgorithm(growth=growth).run(graph, TARGET)
        added = [n.types[0].nbytes - n.inputs[0].type.nbytes for n in done.nodes if n.op.name == "winograd_weight"]
        assert sum(added) <= growth * constants


@pytest.mark.parametrize("order", [1, -1])
def test_layers_that_share_a_weight_are_chosen_for_together(rng, order):
    """As the heads of a detector do, which run on images of very different sizes."""
    w = weights(rng, 64, 64, 3, 3)
    images = [image(1, 64, 64, 64, label="large"), image(1, 64, 1, 1, label="small")][::order]
    graph = graph_of(*(conv(x, w, pad=1) for x in images))
    done = check(ChooseAlgorithm(), graph, rng)
    assert [n.op.algorithm for n in done.nodes if isinstance(n.op, Conv)] == ["winograd6"] * 2


def test_kernels_longer_than_any_matrices(rng):
    for kernel, stride in (((9, 9), 2), ((9, 9), 3), ((10, 10), 2)):
        x = image(1, 16, 40, 40)
        check(ChooseAlgorithm(), graph_of(conv(x, weights(rng, 16, 16, *kernel), stride=stride)), rng)


@pytest.mark.parametrize(
    ("kernel", "stride", "tile", "stored"),
    [
        ((3, 3), 1, 2, "bf16"),
        ((3, 3), 1, 4, "f16"),
        ((5, 5), 1, 2, "f16"),
        ((3, 3), 2, 2, "bf16"),
        ((1, 7), 1, 2, "f16"),
    ],
)
def test_the_error_of_rounded_weights_is_as_estimated(rng, kernel, stride, tile, stored):
    w = rng.standard_normal((24, 32, *kernel)).astype(np.float32)
    x = rng.standard_normal((1, 32, 32, 33)).astype(np.float32)
    dtype = DType(stored)
    op = Conv((stride, stride), (0,) * 4, (1, 1))
    wanted = op.reference(x.astype(np.float64), w.astype(np.float64))
    u = WinogradWeight(tile, (stride, stride)).reference(w).astype(dtype.numpy).astype(np.float64)
    got = replace(op, algorithm=f"winograd{tile}").reference(x.astype(np.float64), u)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    node = conv(image(*x.shape), constant(w), stride=stride).node
    assert rounding(f"winograd{tile}", node, dtype) == pytest.approx(error, rel=0.3)
    plain = op.reference(x, w.astype(dtype.numpy).astype(np.float32))
    assert rounding("direct", node, dtype) == pytest.approx(
        np.linalg.norm(plain - wanted) / np.linalg.norm(wanted), rel=0.1
    )
    assert rounding(f"winograd{tile}", node, DType.F32) == 0


@pytest.mark.parametrize(
    ("stored", "algorithm"), [(DType.F32, "winograd4"), (DType.F16, "winograd4"), (DType.BF16, "winograd2")]
)
def test_the_type_of_stored_weights_decides(rng, stored, algorithm):
    graph = graph_of(conv(image(1, 128, 56, 56), weights(rng, 128, 128, 3, 3), pad=1))
    done = check(ChooseAlgorithm(weights=stored), graph, rng)
    assert done.outputs[0].op.algorithm == algorithm


def test_rounding_forbids_what_it_would_spoil(rng):
    graph = graph_of(conv(image(1, 64, 27, 27), weights(rng, 192, 64, 5, 5), pad=2))
    assert ChooseAlgorithm().run(graph, TARGET).outputs[0].op.algorithm != "direct"
    assert ChooseAlgorithm(weights=DType.BF16).run(graph, TARGET).outputs[0].op.algorithm == "direct"


TILES = Target.parse("cpu:sapphirerapids")


def test_tiles_are_used_where_there_are_some(rng):
    pointwise = conv(image(1, 256, 14, 14), weights(rng, 256, 256, 1, 1)).node
    assert cheapest(pointwise, TILES, 64.0) == "int8x3"
    assert cheapest(pointwise, TILES, 4.0) == "bf16x3"
    assert cheapest(pointwise, TILES, 2.0) == "direct"
    assert cheapest(pointwise, Target.parse("cpu:x86-64-v4"), 64.0) == "direct"


def test_digits_golden(rng, golden):
    y = conv(image(1, 255, 12, 12), weights(rng, 64, 255, 1, 1, label="w"), weights(rng, 64))
    graph = graph_of(call(Relu(), y))
    done = ChooseAlgorithm().run(graph, TILES)
    golden("choose_algorithm_digits", print_graph(graph) + print_graph(done))
    x = rng.standard_normal((1, 255, 12, 12)).astype(np.float32)
    (wanted,), (got,) = run(graph, [x], precise=True), run(done, [x], precise=True)
    assert 0 < np.linalg.norm(got - wanted) <= 2e-7 * np.linalg.norm(wanted)


def test_winograd_in_digits_golden(rng, golden):
    y = conv(image(1, 256, 14, 14), weights(rng, 256, 256, 3, 3, label="w"), weights(rng, 256), pad=1)
    graph = graph_of(call(Relu(), y))
    done = ChooseAlgorithm().run(graph, TILES)
    golden("choose_algorithm_winograd_digits", print_graph(graph) + print_graph(done))
    x = rng.standard_normal((1, 256, 14, 14)).astype(np.float32)
    (wanted,), (got,) = run(graph, [x], precise=True), run(done, [x], precise=True)
    assert 0 < np.linalg.norm(got - wanted) <= 1e-6 * np.linalg.norm(wanted)


def test_what_winograd_in_digits_takes(rng):
    """Of stride 1, of few positions, and never where sums are to be exact or the budget is small."""
    x, w = image(1, 256, 28, 28), weights(rng, 256, 256, 3, 3)
    assert cheapest(conv(x, w, pad=1).node, TILES, 64.0) == "winograd4_int8x3"
    assert cheapest(conv(x, w, pad=1).node, TILES, 24.0) == "winograd2_int8x3"
    assert cheapest(conv(x, w, pad=1).node, TILES, 4.0) == "bf16x3"
    assert cheapest(conv(x, w, pad=1, stride=2).node, TILES, 64.0) == "int8x3"
    assert cheapest(conv(x, weights(rng, 256, 256, 5, 5), pad=2).node, TILES, 64.0) != "winograd4_int8x3"
    assert not cheapest(conv(x, w, pad=1).node, Target.parse("cpu:x86-64-v4"), 64.0).endswith("int8x3")


def test_only_what_has_digits_is_split_into_them(rng):
    """Of several pixels, whole blocks if of several taps, f32 that no type rounds, and known weights of usual size."""
    x, w = image(1, 256, 14, 14), weights(rng, 256, 256, 1, 1)
    assert cheapest(conv(x, w, pad=1).node, TILES, 64.0) == "int8x3"
    assert cheapest(conv(x, weights(rng, 256, 256, 3, 3), stride=2, pad=1).node, TILES, 64.0) == "int8x3"
    assert cheapest(conv(image(1, 1024, 1, 1), weights(rng, 512, 1024, 1, 1)).node, TILES, 64.0) == "direct"
    beside = conv(image(1, 250, 14, 14), weights(rng, 256, 250, 3, 3), stride=2, pad=1)
    assert cheapest(beside.node, TILES, 64.0) == "bf16x3"
    assert cheapest(conv(x, constant(np.full((256, 256, 1, 1), 2.0**41, np.float32))).node, TILES, 64.0) == "bf16x3"
    graph = graph_of(conv(x, w))
    narrow = [ChooseAlgorithm(weights=DType.BF16), ChooseAlgorithm(dtype="bf16"), ChooseAlgorithm(budget=4.0)]
    found = [[node.op.name for node in choose.run(graph, TILES).nodes] for choose in narrow]
    assert not any("digit_conv" in names for names in found)
    assert "digit_conv" in [node.op.name for node in ChooseAlgorithm().run(graph, TILES).nodes]


def layer(x, w):
    return call(Dense(), x, w)


def test_layers_of_many_rows_in_digits_golden(rng, golden):
    x = graph_input("x", (2, 20, 192))
    y = call(Dense(), x, weights(rng, 96, 192, label="w"), weights(rng, 96))
    graph = graph_of(call(Relu(), y))
    done = ChooseAlgorithm().run(graph, TILES)
    golden("choose_algorithm_dense_digits", print_graph(graph) + print_graph(done))
    rows = rng.standard_normal((2, 20, 192)).astype(np.float32)
    (wanted,), (got,) = run(graph, [rows], precise=True), run(done, [rows], precise=True)
    assert 0 < np.linalg.norm(got - wanted) <= 2e-7 * np.linalg.norm(wanted)


def test_which_layers_are_in_digits(rng):
    """Those of many rows and whole lines, f32 that no type rounds, and weights that are known and of usual size."""

    def chosen(rows=64, inputs=192, outputs=384, scale=1.0, **options):
        w = constant(rng.standard_normal((outputs, inputs)).astype(np.float32) * np.float32(scale))
        done = ChooseAlgorithm(**options).run(graph_of(layer(graph_input("x", (rows, inputs)), w)), TILES)
        node = done.outputs[0].node
        return "int8x3" if isinstance(node.op, DigitDense) else node.op.algorithm

    assert chosen() == "int8x3"
    assert chosen(rows=8) == chosen(inputs=200) == chosen(outputs=100) == chosen(exact=True) == "direct"
    assert chosen(scale=2.0**41) == chosen(budget=4.0) == "bf16x3"
    assert chosen(weights=DType.BF16) == chosen(weights=DType.F16) == chosen(dtype="bf16") == "bf16x3"
    assert chosen(scale=np.inf) == "direct"
    computed = graph_of(layer(graph_input("x", (64, 192)), graph_input("w", (384, 192))))
    assert ChooseAlgorithm().run(computed, TILES).outputs[0].op == Dense()


def test_graphs_that_share_a_layer_store_its_weight_once(rng):
    """In digits if all of them gain, else in none."""
    w = weights(rng, 96, 192)

    def names(*batches):
        graphs = [graph_of(layer(graph_input("x", (batch, 192)), w)) for batch in batches]
        return [graph.outputs[0].node.op.name for graph in ChooseAlgorithm().run_together(graphs, TILES)]

    assert names(32, 64) == ["digit_dense", "digit_dense"]
    assert names(1, 64) == ["dense", "dense"]


def test_weights_that_others_read_or_that_would_grow_stay_as_they_are(rng):
    """Others would need them as they are; digits fill up 64 inputs, which counts where growth is bounded."""
    w, narrow = weights(rng, 512, 192), weights(rng, 512, 80)

    def chosen(graph, **options):
        return [node.op.name for node in ChooseAlgorithm(**options).run(graph, TILES).nodes if "dense" in node.op.name]

    shared = graph_of(layer(graph_input("x", (64, 192)), w), call(Relu(), w))
    assert chosen(shared) == ["dense"]
    assert chosen(graph_of(layer(graph_input("x", (64, 192)), w)), growth=0.08) == ["digit_dense"]
    small = graph_of(layer(graph_input("x", (64, 80)), narrow))
    assert chosen(small) == ["digit_dense"]
    assert chosen(small, growth=0.08) == ["dense"]


def test_exact_forbids_tiles(rng):
    graph = graph_of(conv(image(1, 128, 28, 28), weights(rng, 128, 128, 3, 3), stride=2, pad=1))

    def algorithms(**options):
        done = check(ChooseAlgorithm(**options), graph, rng, target=TILES)
        return [node.op.algorithm for node in done.nodes if isinstance(node.op, Conv)]

    assert algorithms(budget=4.0) == ["bf16x3"]
    assert algorithms(exact=True) == ["direct"]
    digits = graph_of(conv(image(1, 256, 14, 14), weights(rng, 256, 256, 1, 1)))
    assert [node.op for node in ChooseAlgorithm(exact=True).run(digits, TILES).nodes][-1].algorithm == "direct"


def test_only_what_tiles_take(rng):
    x, w = image(1, 256, 14, 14), weights(rng, 256, 256, 1, 1)
    refused = [
        conv(x, weights(rng, 256, 128, 1, 1), groups=2),
        conv(image(1, 3, 14, 14), weights(rng, 256, 3, 1, 1)),
        conv(x, graph_input("w", (256, 256, 1, 1))),
        conv(x, constant(np.full((256, 256, 1, 1), np.inf, np.float32))),
        conv(image(1, 256, 14), weights(rng, 256, 256, 1)),
    ]
    assert [cheapest(v.node, TILES, 64.0) for v in refused] == ["direct"] * len(refused)
    assert cheapest(conv(x, w).node, TILES, 4.0) == "bf16x3"


GPU = Target.parse("cuda:sm_80")
ON_GPU = ChooseAlgorithm(templates=TEMPLATES)


def algorithms_on_gpu(graph, target=GPU, **options):
    done = replace(ON_GPU, **options).run(graph, target)
    return [node.op.algorithm for node in done.nodes if isinstance(node.op, Conv)]


def wide(rng, batch=8, channels=64, size=28, outputs=64, kernel=(3, 3), **options):
    return conv(image(batch, channels, size, size), weights(rng, outputs, channels, *kernel), **options)


def test_gpu_golden(rng, golden):
    y = conv(image(4, 32, 28, 28), weights(rng, 34, 32, 3, 3, label="w"), weights(rng, 34), pad=1)
    graph = graph_of(call(Relu(), y))
    done = check(ON_GPU, graph, rng, GPU)
    folded = FoldConstants().run(done, GPU)
    packed = check(PackWeights(), folded, rng, GPU)
    golden("choose_algorithm_gpu", print_graph(graph) + print_graph(done) + print_graph(packed))
    assert operators(packed) == ["conv", "relu"]


def test_gpus_take_winograd_where_it_halves_the_products_and_pays(rng):
    taken = [wide(rng, pad=1), wide(rng, pad=1, outputs=256), wide(rng, pad=2, kernel=(5, 5)), wide(rng, 64, size=56)]
    taken.append(wide(rng, pad=3, stride=2, kernel=(7, 7)))
    refused = [
        wide(rng, pad=1, stride=2),
        wide(rng, pad=4, stride=2, kernel=(9, 9)),
        wide(rng, kernel=(1, 1)),
        wide(rng, channels=8, pad=1),
        wide(rng, pad=1, outputs=8),
        wide(rng, 1, channels=16, size=6, outputs=16, pad=1),
        call(Conv((1, 1), (1, 1, 1, 1), (1, 1)), image(8, 64, 28, 28), graph_input("w", (64, 64, 3, 3))),
    ]
    for y in taken:
        assert algorithms_on_gpu(graph_of(y)) != ["direct"], y
    for y in refused:
        assert algorithms_on_gpu(graph_of(y)) == ["direct"], y


@pytest.mark.parametrize(
    "options",
    [{"exact": True}, {"budget": 8.0}, {"growth": 0.0}, {"dtype": "tf32"}, {"dtype": "f16", "weights": DType.F16},
     {"weights": DType.BF16}, {"templates": ()}],
)  # fmt: skip
def test_what_forbids_winograd_on_gpus(rng, options):
    graph = graph_of(wide(rng, pad=1))
    assert algorithms_on_gpu(graph) == ["winograd4"]
    assert algorithms_on_gpu(graph, budget=20.0) == ["winograd2"]
    assert algorithms_on_gpu(graph, **options) == ["direct"]


def test_graphs_for_several_batches_share_the_choice_on_gpus(rng):
    w = weights(rng, 64, 64, 3, 3)
    graphs = [graph_of(conv(image(batch, 64, 20, 20), w, pad=1)) for batch in (1, 3)]
    chosen = ON_GPU.run_together(graphs, GPU)
    assert len({node.op.algorithm for graph in chosen for node in graph.nodes if isinstance(node.op, Conv)}) == 1
    for graph, done in zip(graphs, chosen, strict=True):
        assert_same_numbers(graph, done, rng)
