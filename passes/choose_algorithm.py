"""Choose how each convolution is computed, and each fully connected layer.

    conv{algorithm=direct}(x, w) -> conv{algorithm=winograd4}(x, winograd_weight{tile=4}(w))

for the cheapest algorithm of a table (see algorithms.py) whose error stays within the budget, 64 units in the last
place of the work done.  What is not cheaper than the first of the table by its margin gives way to it.  Winograd's
algorithms also differ in what they make of infinities, which turn into NaN wherever a tile holds one, and near the
largest floats: `exact` forbids them, and what splits numbers into parts.

Graphs of one network for several batch sizes share the choice, and so the weights; a layer's seconds count as its share
of a graph's.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeAlias

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Op
from cnnc.ir.rewrite import rewrite
from cnnc.ir.types import DType, TensorType
from cnnc.ops.conv import Conv
from cnnc.ops.dense import Dense
from cnnc.ops.digit_conv import DigitConv, conv_digits, digits_bytes, weight_digits
from cnnc.ops.digit_dense import DigitDense
from cnnc.ops.source import Constant, constant
from cnnc.ops.winograd import WinogradWeight, winograd_tile
from cnnc.ops.winograd_digit_conv import WinogradDigitConv, digit_tile, transformed_digits
from cnnc.passes.algorithms import (
    ALGORITHMS,
    BF16X3_ERROR,
    INT8X3_ERROR,
    MOST_ROUNDING,
    Algorithm,
    gpu_algorithms,
    is_for_digits,
    is_for_tiles,
    rounding,
)
from cnnc.passes.registry import Pass
from cnnc.passes.tile import KernelTemplate
from cnnc.target import Target

Layer: TypeAlias = tuple[Op, Value | Op]
"""A convolution and its weight: layers that share both are computed the same way."""


def _layer(conv: Op, weight: Value, shared: bool) -> Layer:
    """Name a layer; by its weight's numbers where graphs share it."""
    return (conv, weight.op if shared and isinstance(weight.op, Constant) else weight)


def _counts(nodes: Sequence[Node], target: Target, first: Algorithm, stored: DType) -> dict[Node, float]:
    """Say by how much the seconds of each convolution of a graph count, so that every graph counts the same."""
    total = sum(first.seconds(node, target, stored) for node in nodes)
    return dict.fromkeys(nodes, 1 / total if total else 1.0)


@dataclass(frozen=True)
class ChooseAlgorithm(Pass):
    """Choose an algorithm for every convolution and fully connected layer.

    `budget` bounds its error and `exact` forbids Winograd's.  `growth` bounds the bytes that transformed weights add,
    as a share of those of all constants; they go where they save most time for each byte.  `weights` is
    what narrow_weights will store weights in, transformed ones too; where products are in a `dtype`, bf16, those that
    are not rounded to it are not considered.  `templates` are the back end's, which estimate what kernels take on a
    GPU.
    """

    budget: float = 64.0
    exact: bool = False
    growth: float = math.inf
    weights: DType = DType.F32
    dtype: str = "f32"
    templates: tuple[KernelTemplate, ...] = field(default=(), metadata={"option": False})

    def run(self, graph: Graph, target: Target) -> Graph:
        """Set the algorithm of every convolution; one with transformed weights keeps the one they are for.

        For a GPU all stay as they are where tensor cores multiply, in any other type than f32, or weights are narrow.
        """
        return self.run_together((graph,), target)[0]

    def run_together(self, graphs: Sequence[Graph], target: Target) -> tuple[Graph, ...]:
        """Choose once for all graphs."""
        f32 = self.dtype == "f32" and self.weights is DType.F32
        if target.is_gpu and not (f32 and self.templates):
            return tuple(graphs)
        chosen = self._choices(graphs, target)
        digits = self._dense_digits(graphs, target)
        return tuple(self._apply(graph, target, chosen, digits, shared=len(graphs) > 1) for graph in graphs)

    def _apply(
        self, graph: Graph, target: Target, chosen: Mapping[Layer, str], digits: Collection[Op], shared: bool
    ) -> Graph:
        tiles = not self.exact and self.budget >= BF16X3_ERROR

        def choose_algorithm(v: Value) -> Value | None:
            """conv{algorithm=direct} -> conv{algorithm=cheapest within the bounds}, and so with dense."""
            match v.node:
                case Node(Conv() as conv, (x, w, *bias)) if conv.tile is None:
                    best = chosen.get(_layer(conv, w, shared), conv.algorithm)
                    if conv.algorithm == best:
                        return None
                    if best == "int8x3" or digit_tile(best) is not None:
                        return _in_digits(conv, digit_tile(best), x, w, bias)
                    transform = _transform_of(best, conv)
                    weight = w if transform is None else call(transform, w)
                    return call(replace(conv, algorithm=best), x, weight, *bias)
                case Node(Dense(algorithm="direct"), (x, w, *bias)) if w.op in digits:
                    return _dense_in_digits(x, w, bias)
                case Node(Dense(algorithm="direct") as dense) if tiles and is_for_tiles(v.node, target, self.weights):
                    return call(replace(dense, algorithm="bf16x3"), *v.inputs)
            return None

        return rewrite(graph, (choose_algorithm,))

    def _dense_digits(self, graphs: Sequence[Graph], target: Target) -> set[Op]:
        """Give the weights of fully connected layers that are stored in digits: all that read them gain.

        Where growth is bounded, they are those that grow by nothing.
        """
        if self.exact or self.budget < INT8X3_ERROR or self.dtype != "f32" or self.weights is not DType.F32:
            return set()
        nodes = [node for graph in graphs for node in graph.nodes]
        layers = [node for node in nodes if isinstance(node.op, Dense)]
        others = {node.inputs[1].op for node in layers if not is_for_digits(node, target)}
        others |= {
            v.op for node in nodes for i, v in enumerate(node.inputs) if i != 1 or not isinstance(node.op, Dense)
        }
        weights = {node.inputs[1] for node in layers if node.inputs[1].op not in others}
        if math.isfinite(self.growth):
            weights = {w for w in weights if digits_bytes(*w.type.static_shape) <= w.type.nbytes}
        return {w.op for w in weights}

    def _table(self, target: Target) -> tuple[Algorithm, ...]:
        """Give the algorithms that are allowed, with what is known of their speed."""
        table = gpu_algorithms(self.templates) if target.is_gpu else ALGORITHMS
        return tuple(a for a in table if a.exact or not (self.exact or (self.dtype != "f32" and not a.rounds)))

    def _choices(self, graphs: Sequence[Graph], target: Target) -> dict[Layer, str]:
        """Give the algorithm of every layer."""
        table = self._table(target)
        layers: dict[Layer, list[Node]] = {}
        counts: dict[Node, float] = {}
        for graph in graphs:
            nodes = [node for node in graph.nodes if isinstance(node.op, Conv) and node.op.tile is None]
            counts |= _counts(nodes, target, table[0], self.weights) if len(graphs) > 1 else {}
            for node in nodes:
                layers.setdefault(_layer(node.op, node.inputs[1], len(graphs) > 1), []).append(node)
        saved = {
            layer: savings(nodes, target, self.budget, table, counts, self.weights) for layer, nodes in layers.items()
        }
        if math.isinf(self.growth):
            return {layer: max(found, default=(0.0, table[0].name))[1] for layer, found in saved.items()}
        worth = [
            (seconds / max(_added_bytes(algorithm, layer), 1), algorithm, layer)
            for layer, found in saved.items()
            for seconds, algorithm in found
        ]
        room = _room(graphs[0], self.growth)
        chosen: dict[Layer, str] = dict.fromkeys(layers, table[0].name)
        for _, algorithm, layer in sorted(worth, key=lambda item: -item[0]):
            added = _added_bytes(algorithm, layer)
            if chosen[layer] == table[0].name and added <= room:
                chosen[layer] = algorithm
                room -= added
        return chosen


def _in_digits(conv: Conv, tile: int | None, x: Value, w: Value, bias: Sequence[Value]) -> Value:
    """Give a convolution with its weight, a constant, in digits: transformed for a tile, if any."""
    assert isinstance(w.op, Constant), "only known weights have digits"
    weight = w.op.value.array
    op: Op
    if tile is None:
        window = conv.window(w.type)
        op = DigitConv(_pair(window.kernel), _pair(conv.stride), _four(conv.pad), _pair(conv.dilation))
        digits, unit = conv_digits(weight)
    else:
        op = WinogradDigitConv(tile, _pair(w.type.static_shape[2:]), _four(conv.pad))
        digits, unit = transformed_digits(WinogradWeight(tile).reference(weight))
    return call(op, x, constant(digits, label=w.op.label), constant(unit), *bias)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    (vertical, horizontal) = sizes
    return vertical, horizontal


def _four(pad: tuple[int, ...]) -> tuple[int, int, int, int]:
    (top, left, bottom, right) = pad
    return top, left, bottom, right


def _dense_in_digits(x: Value, w: Value, bias: Sequence[Value]) -> Value:
    """Give a fully connected layer with its weight, a constant, in digits."""
    assert isinstance(w.op, Constant), "only known weights have digits"
    digits, unit = weight_digits(w.op.value.array)
    return call(DigitDense(), x, constant(digits, label=w.op.label), constant(unit), *bias)


def _room(graph: Graph, growth: float) -> float:
    """Give the bytes that transformed weights may still add, beside those there are."""
    grown = {
        node.inputs[1]: _bytes_added_to(node.op, node.inputs[1].type)
        for node in graph.nodes
        if isinstance(node.op, Conv) and node.op.tile is not None
    }
    constants = sum(node.types[0].nbytes for node in graph.nodes if isinstance(node.op, Constant))
    constants -= sum(added for weight, added in grown.items() if isinstance(weight.op, Constant))
    return growth * constants - sum(grown.values())


def _bytes_added_to(conv: Conv, transformed: TensorType) -> int:
    kernel = conv.window(transformed).kernel
    return transformed.nbytes - transformed.with_shape((*transformed.shape[:2], *kernel)).nbytes


def _transform_of(algorithm: str, conv: Conv) -> WinogradWeight | None:
    """Give what an algorithm makes of a convolution's weight, if it changes it."""
    tile = winograd_tile(algorithm)
    return None if tile is None else WinogradWeight(tile, (conv.stride[0], conv.stride[1]))


def _added_bytes(algorithm: str, layer: Layer) -> int:
    """Count the bytes that a layer's weight grows by."""
    conv, weight = layer
    assert isinstance(conv, Conv)
    type_ = weight.type if isinstance(weight, Value) else call(weight).type
    tile = digit_tile(algorithm)
    if tile is not None or algorithm == "int8x3":
        outputs, channels, *kernel = type_.static_shape
        if tile is None:
            return digits_bytes(outputs, channels * math.prod(kernel)) - type_.nbytes
        return digits_bytes(*WinogradWeight(tile).infer(type_).static_shape) - type_.nbytes
    transform = _transform_of(algorithm, conv)
    return 0 if transform is None else transform.infer(type_).nbytes - type_.nbytes


def savings(
    nodes: Sequence[Node],
    target: Target,
    budget: float,
    table: tuple[Algorithm, ...] = ALGORITHMS,
    counts: Mapping[Node, float] = MappingProxyType({}),
    stored: DType = DType.F32,
) -> list[tuple[float, str]]:
    """List (seconds saved over the first of a table, name) of what stays within an error budget and saves enough.

    `nodes` are all convolutions of a layer, whose weight is `stored` in a type; `counts` is by how much the seconds of
    each count, once if it is not there.
    """

    def seconds(algorithm: Algorithm) -> float:
        return sum(algorithm.seconds(node, target, stored) * counts.get(node, 1.0) for node in nodes)

    def applies(algorithm: Algorithm) -> bool:
        return algorithm.error <= budget and all(
            algorithm.applies(node, target) and rounding(algorithm.name, node, stored) <= MOST_ROUNDING
            for node in nodes
        )

    first, *others = table
    saved = [(seconds(first) - seconds(a) / a.margin, a.name) for a in others if applies(a)]
    return [(gain, name) for gain, name in saved if gain > 0]


def cheapest(node: Node, target: Target, budget: float, table: tuple[Algorithm, ...] = ALGORITHMS) -> str:
    """Name the cheapest algorithm of a table that applies to a convolution and stays within an error budget.

    The first of the table is what remains when none does, or none is cheaper by the margin.
    """
    return max(savings((node,), target, budget, table), default=(0.0, table[0].name))[1]
