"""Mistakes in a network are errors at the line that made them: what was wanted, what came, where."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cnnc.errors import CnncError, ModelError, ShapeError, UsageError
from cnnc.frontends.dsl import (
    Tensor,
    adaptive_avg_pool,
    avg_pool,
    batch_norm,
    concat,
    conv,
    conv1d,
    conv_transpose,
    correlate,
    crop,
    depth_to_space,
    dropout,
    flatten,
    group_norm,
    layer_norm,
    linear,
    max_pool,
    network,
    pad,
    relu,
    reshape,
    resize,
    sobel,
    softmax,
    split,
    transpose,
    upsample,
)

MISTAKES: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: conv(x, 8, 3, groups=2), r"conv1: conv: wants groups that divide 3 and 8 channels, got 2"),
    (lambda x: conv(x, 8, 9), r"conv1: conv: the window of 9 .* is larger than spatial axis 0 of 8"),
    (lambda x: conv(x, 8, 3, stride=0), r"stride \(0, 0\) has an entry below 1"),
    (lambda x: conv(x, 8, 3, dilation=0), r"dilation"),
    (lambda x: conv(x, 8, 0), r"kernel"),
    (lambda x: conv(x, 0, 3), r"wants channels as an integer of at least 1, got 0"),
    (lambda x: conv(x, "8", 3), r"wants channels as an integer of at least 1, got '8'"),
    (lambda x: conv(x, 8, (3, 3, 3)), r"wants kernel as one integer or 2, got \(3, 3, 3\)"),
    (lambda x: conv(x, 8, 3, stride=1.5), r"wants stride as one integer or 2, got 1.5"),
    (lambda x: conv(x, 8, 3, pad="full"), r"wants pad as numbers, \"same\" or \"valid\", got 'full'"),
    (lambda x: conv(x, 8, 3, pad=(1, 2, 3)), r"wants pad as one integer or 2, got \(1, 2, 3\)"),
    (lambda x: conv(x >> flatten, 8, 3), r"wants x\[N,C,\.\.\.\] with at least one spatial axis, got f32\[1,192\]"),
    (lambda x: conv1d(x, 8, 3), r"wants 1 spatial axes, got f32\[1,3,8,8\]"),
    (lambda x: conv_transpose(x, 8, 3, pad="same"), r"wants pad as numbers, got 'same'"),
    (lambda x: linear(x, 0), r"wants features as an integer of at least 1, got 0"),
    (lambda x: max_pool(x, 9), r"max_pool1: max_pool: the window of 9"),
    (lambda x: max_pool(x, 2, pad=2), r"max_pool1"),
    (lambda x: avg_pool(x, (2, 2, 2)), r"wants kernel as one integer or 2"),
    (lambda x: adaptive_avg_pool(x, 0), r"wants sizes of at least 1, known now"),
    (lambda x: batch_norm(reshape(x, 192) >> transpose(1, 0) >> crop(0, 0, 1) >> flatten(0)), r"wants .* axis|x\[N,C"),
    (lambda x: group_norm(x, 2), r"group_norm1: group_norm"),
    (lambda x: layer_norm(x, 4), r"wants an axis of f32\[1,3,8,8\], got 4"),
    (lambda x: softmax(x, axis=-5), r"wants an axis of f32\[1,3,8,8\], got -5"),
    (lambda x: reshape(x, 5, -1), r"wants a shape of as many elements as f32\[1,3,8,8\], got \[1,5,-1\]"),
    (lambda x: reshape(x, 5, 5), r"reshape1: reshape: x : f32\[1,3,8,8\] has 192 elements"),
    (lambda x: transpose(x, 0, 0, 1, 2), r"transpose"),
    (lambda x: pad(x, (1, 2, 3)), r"wants x\[N,C,\.\.\.\] and 1, 2 or 4 widths"),
    (lambda x: pad(x, -5), r"pad"),
    (lambda x: split(x, 2), r"split: wants a number of parts that divides 3, got 2"),
    (lambda x: split(x, (1, 1)), r"split"),
    (lambda x: concat(x, x >> max_pool(2)), r"concat1: concat: input 1 is f32\[1,3,4,4\]"),
    (lambda x: concat(x, x, axis=7), r"concat: wants an axis of f32\[1,3,8,8\], got 7"),
    (lambda x: x + (x >> max_pool(2)), r"add1: add: .*\[1,3,8,8\].*\[1,3,4,4\]"),
    (lambda x: depth_to_space(x, 2), r"block\^2 = 4 must divide the 3 channels"),
    (lambda x: resize(x, 0), r"wants size as an integer of at least 1, got 0"),
    (lambda x: resize(x, 4, "bilinear"), r"wants mode \"nearest\", \"linear\" or \"cubic\", got 'bilinear'"),
    (lambda x: upsample(x, 2, align_corners=True), r"wants align_corners with"),
    (lambda x: dropout(x, 1.5), r"wants a rate from 0 to 1, got 1.5"),
    (lambda x: sobel(x, axis=2), r"wants one of 2 spatial axes"),
    (lambda x: correlate(x, np.ones(3)), r"wants a kernel with an axis for each spatial one"),
]


@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_in_shapes(mistake: Callable[[Tensor], Any], message: str) -> None:
    @network(x=(3, 8, 8))
    def wrong(x: Tensor) -> Any:
        return mistake(x)

    with pytest.raises(ShapeError, match=message) as caught:
        wrong()
    assert caught.value.exit_code == 3
    line = mistake.__code__.co_firstlineno
    assert re.search(rf"test_mistakes\.py:{line}\b", str(caught.value))


OTHERS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: conv(8), r"conv: missing a required argument: 'kernel'; it is conv\(channels, kernel, \*, stride=1"),
    (lambda x: x >> conv, r"conv: missing a required argument: 'channels'"),
    (lambda x: relu(x, speed=3), r"relu: got an unexpected keyword argument 'speed'"),
    (lambda x: x >> 3, r"x >> 3: on the right stands a layer or a function of one tensor"),
    (lambda x: x >> relu + x, r"a sum is written \(x >> layer\) \+ y"),
    (lambda x: x + relu, r"a sum is written \(x >> layer\) \+ y"),
    (lambda x: relu * 2, r"a layer or a function of one tensor is wanted, not 2"),
    (lambda x: concat(x, relu), r"concat: joins tensors or layers, not both together"),
    (lambda x: not x, r"a tensor has no truth value"),
    (lambda x: conv(8, 3)(3), r"conv: takes a tensor, not 3"),
    (lambda x: flatten(x, 0).channels, r"a tensor f32\[192\] has no channels"),
]


@pytest.mark.parametrize(("mistake", "message"), OTHERS, ids=range(len(OTHERS)))
def test_a_mistake_in_writing(mistake: Callable[[Tensor], Any], message: str) -> None:
    @network(x=(3, 8, 8))
    def wrong(x: Tensor) -> Any:
        return mistake(x)

    with pytest.raises(ModelError, match=message) as caught:
        wrong()
    assert f"test_mistakes.py:{mistake.__code__.co_firstlineno}" in str(caught.value)


def test_a_layer_made_elsewhere_names_both_lines() -> None:
    made = conv(8, 9, name="wide")  # this line

    @network(x=(3, 8, 8))
    def wrong(x: Tensor) -> Tensor:
        return x >> made  # and that line

    first = test_a_layer_made_elsewhere_names_both_lines.__code__.co_firstlineno + 1
    with pytest.raises(ShapeError) as caught:
        wrong()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("wide: conv: the window of 9")
    assert re.search(rf"at .*test_mistakes\.py:{first}, in test_a_layer", lines[1])
    assert any(re.search(rf"from .*test_mistakes\.py:{first + 4}, in wrong", line) for line in lines[2:])


def test_sharing_a_layer_between_sizes_is_refused() -> None:
    shared = linear(4, name="shared")

    @network(x=(3, 8, 8))
    def wrong(x: Tensor) -> Tensor:
        return shared(x) + shared(x >> max_pool(2))

    with pytest.raises(ShapeError, match=r"shared.weight: the layer was applied before, .*\[4,8\]; .*\[4,4\]"):
        wrong()


def test_tensors_of_two_networks_do_not_mix() -> None:
    kept: list[Tensor] = []

    @network(x=(3, 8, 8))
    def first(x: Tensor) -> Tensor:
        kept.append(x)
        return x >> relu

    @network(x=(3, 8, 8))
    def second(x: Tensor) -> Tensor:
        return x + kept[0]

    first()
    with pytest.raises(ModelError, match="add: the tensors belong to different networks"):
        second()


@pytest.mark.parametrize("result", [None, 3, (), [relu], {"a": 1}])
def test_a_network_returns_tensors(result: Any) -> None:
    @network(x=(3, 8, 8))
    def wrong(x: Tensor) -> Any:
        return result

    with pytest.raises(ModelError, match="network wrong: returns tensors, alone, in a tuple or in a dictionary"):
        wrong()


@pytest.mark.parametrize("shape", [224, "big", (3, "x"), (1.5,)])
def test_an_input_has_a_shape(shape: Any) -> None:
    made = network(x=shape)(lambda x: x)
    with pytest.raises(UsageError, match=r"input x: wants its shape without the batch, as in \(3, 224, 224\)"):
        made()


def test_a_network_takes_its_own_options_only() -> None:
    @network(x=(3, 8, 8))
    def net(x: Tensor, classes: int = 3) -> Tensor:
        return x >> flatten >> linear(classes)

    assert net(classes=5).outputs[0].shape == (1, 5)
    with pytest.raises(UsageError, match="network net: takes batch, x, classes, not clases"):
        net(clases=5)


def test_the_inputs_of_a_network_are_its_parameters() -> None:
    with pytest.raises(UsageError, match=r"gives shapes of \['y'\]"):
        network(y=(3,))(lambda x: x)
    with pytest.raises(CnncError):
        network()(lambda x: x)
