"""round_products: which operands are rounded to tf32, and that the graph means just that."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import UsageError
from cnnc.ir.build import call
from cnnc.ir.interp import run
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType
from cnnc.ops import Conv, Dense, MatMul, Relu, constant, graph_input
from cnnc.passes.fuse import Fuse
from cnnc.passes.round_products import RoundProducts
from tests.passes.graphs import TARGET, check, conv, graph_of, image, operators, weights

TF32 = RoundProducts()
ROUNDING = 1e-3


def test_golden(rng, golden):
    x = image(1, 4, 6, 6)
    y = call(Relu(), conv(x, weights(rng, 4, 4, 3, 3), weights(rng, 4), pad=1))
    y = conv(y, weights(rng, 4, 1, 3, 3), groups=4)
    y = call(MatMul(transpose_b=True), y, y)
    fused = Fuse().run(graph_of(call(Dense(), y, weights(rng, 5, 4))), TARGET)
    done = check(TF32, fused, rng, tolerance=ROUNDING)
    golden("round_products", print_graph(fused) + print_graph(done))
    product = "round_tf32+round_tf32+"
    assert operators(done) == [f"{product}conv+relu", "conv", f"{product}mat_mul", f"{product}dense"]


def test_numbers_are_those_of_rounded_operands(rng):
    x, w, b = image(1, 3, 4, 4), weights(rng, 5, 3, 1, 1), weights(rng, 5)
    done = TF32.run(Fuse().run(graph_of(conv(x, w, b)), TARGET), TARGET)
    array = rng.standard_normal((1, 3, 4, 4)).astype(np.float32)

    def rounded(a: np.ndarray) -> np.ndarray:
        exponent = np.floor(np.log2(np.abs(a.astype(float)))) - 10
        return np.rint(a / 2**exponent) * 2**exponent

    wanted = np.einsum("oi,ihw->ohw", rounded(w.op.value.array[..., 0, 0]), rounded(array[0]))
    (got,) = run(done, [array], precise=True)
    np.testing.assert_allclose(got[0], wanted + b.op.value.array[:, None, None], rtol=1e-6, atol=1e-7)


def test_other_types_and_what_is_outside_of_kernels_stay(rng):
    x = graph_input("x", (2, 8), DType.F16)
    half = Fuse().run(graph_of(call(Dense(), x, constant(np.ones((3, 8)), DType.F16))), TARGET)
    assert print_graph(check(TF32, half, rng, tolerance=1e-3)) == print_graph(half)
    bare = graph_of(conv(image(1, 3, 4, 4), weights(rng, 5, 3, 1, 1)))
    assert print_graph(check(TF32, bare, rng)) == print_graph(bare)


def test_bf16_is_for_what_tiles_compute(rng, golden):
    x = image(1, 32, 6, 6)
    tiles = Conv((1, 1), (0,) * 4, (1, 1), algorithm="bf16x3")
    y = call(Relu(), call(tiles, call(Relu(), x), weights(rng, 32, 32, 1, 1), weights(rng, 32)))
    y = conv(y, weights(rng, 16, 32, 3, 3))
    fused = Fuse().run(graph_of(call(Dense("bf16x3"), y, weights(rng, 5, 4))), TARGET)
    done = check(RoundProducts("bf16"), fused, rng, tolerance=1e-2)
    golden("round_products_bf16", print_graph(fused) + print_graph(done))
    assert [name.count("round_bf16") for name in operators(done)].count(1) == 2


def test_there_is_no_rounding_to_other_types(rng):
    with pytest.raises(UsageError, match="dtype=f16 is none of tf32, bf16"):
        RoundProducts("f16").run(graph_of(conv(image(1, 3, 4, 4), weights(rng, 5, 3, 1, 1))), TARGET)
