"""The algorithms of convolutions: when each applies, what it costs, how large its error is.

`seconds` are relative estimates for one layer on one core; `error` is in units of the last place of the work done,
max |y - exact| / (eps * sum |a||b|), as measured on the kernels the algorithm takes.

`bf16x3` splits each f32 into three bf16, which CPUs with AMX multiply so fast that six products take less time than one
in f32.  As no sum of them has an infinity, it is none of the exact ones either; its error is that of f32.  It is
for what has no digits.

`int8x3` takes f32 as fixed-point numbers, one scale for all that an output is the sum of and one for all weights of an
output, in three int8 digits: half the products of tiles, and weights of three bytes.  Its error is relative to the
largest of those numbers, as Winograd's is to those of a tile; where they are of about one size it is as stated.  Fully
connected layers of many rows have it, too, and Winograd's algorithm multiplies such rows at each position in a tile.

On GPUs Winograd's algorithm is for f32 alone, as tensor cores multiply all else.  There a layer takes what the back
end's templates estimate for a kernel of it; and at least half of the products must be saved, so that the gain is the
algorithm's, however well either kernel is written.

Where weights are stored in 16 bits, transformed ones are too, and their rounding error grows on the way back to the
output by the factor

    sqrt(product over both axes of mean over i of sum over a of A_ia^2 |G_a|^2 |B_a|^2 / k)

(of uncorrelated weights and inputs: 1.7 for 3x3 and tiles of 2x2, 5.1 for tiles of 4x4, 21 for tiles of 6x6, 19 for 5x5
and tiles of 4x4).  What would round to more than `MOST_ROUNDING` is not considered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from cnnc.ir.graph import Node, Value
from cnnc.ir.types import DType
from cnnc.ops.conv import Conv
from cnnc.ops.digit_conv import MOST_TERMS
from cnnc.ops.winograd import Transform, is_supported, transforms, winograd_tile
from cnnc.passes.constants import largest_of
from cnnc.passes.kernel_seconds import kernel_seconds
from cnnc.passes.tile import KernelTemplate
from cnnc.target import Target

Applies: TypeAlias = Callable[[Node, Target], bool]
Seconds: TypeAlias = Callable[[Node, Target, DType], float]
"""Of a node, for a target, with weights stored in a type."""


@dataclass(frozen=True)
class Algorithm:
    """One way to compute a convolution: when it applies, what it costs, how large its error is.

    `exact` says that it adds up the very products of the definition, `rounds` that tiles may take what it multiplies
    rounded to bf16.  Its time counts as 1/`margin` of what it is: more where it has drawbacks beside.
    """

    name: str
    error: float
    applies: Applies
    seconds: Seconds
    exact: bool = False
    rounds: bool = False
    margin: float = 1.0

    @property
    def is_winograd(self) -> bool:
        """Whether weights are transformed for it."""
        return winograd_tile(self.name) is not None


FMA_A_SECOND = 5.7e9
"""Vector multiply-adds a second of one core; like the other rates, only their ratios decide."""

BYTES_A_SECOND, WIDE_BYTES_A_SECOND = 2.0e10, 1.2e10
"""What one core reads from memory, where a network's weights are each time they are needed: an EPYC's with AVX2, and a
Xeon's, which stand for vectors of 8 lanes and of 16."""

EXPOSED_MOVES = 0.38
"""The share of reading input and writing output that their arithmetic does not hide."""

EXPOSED = 0.15
"""The share of the shorter of arithmetic and reading that the longer does not hide."""

DATA_FMA, OUTPUT_FMA = 15.0, 8.0
"""What transforming a vector of input, or of sums, costs for each position in the tile, in multiply-adds."""

WINOGRAD_MARGIN = 0.82
"""Of the time of the direct algorithm, Winograd's must take less than this to be worth its error and its weights."""

LARGE_TILES_MARGIN = 0.74
"""The same for tiles of 6x6: of the time of tiles of 4x4 they must take less than 0.9, since their error is thrice."""

GPU_MARGIN = 0.8
"""The same on GPUs, where the templates' own estimates of their kernels are compared."""

FEWEST_SAVED = 2.0
"""On GPUs, by how much products must become fewer, at least."""

LARGEST_GPU_TILE = 4
"""On GPUs a thread transforms a tile in its registers."""


def _blocks(channels: int, target: Target) -> int:
    return -(-channels // target.vector_lanes)


def _reading(size: float, target: Target) -> float:
    """Give the seconds to read some bytes of weights."""
    return size / (WIDE_BYTES_A_SECOND if target.vector_lanes >= 16 else BYTES_A_SECOND)


def _moving(node: Node, target: Target) -> float:
    """Give what reading input and writing output add, where arithmetic is so fast that it counts."""
    moved = node.inputs[0].type.nbytes + node.types[0].nbytes
    return EXPOSED_MOVES * _reading(moved, target) if target.multiplies_tiles else 0.0


def _together(arithmetic: float, reading: float) -> float:
    """Give the seconds of both, done at the same time."""
    return max(arithmetic, reading) + EXPOSED * min(arithmetic, reading)


def _direct_seconds(node: Node, target: Target, stored: DType) -> float:
    """Count the multiply-adds of the definition."""
    flops = node.op.flops(*(v.type for v in node.inputs))
    weights = stored.itemsize * node.inputs[1].type.elements
    arithmetic = flops / (2 * target.vector_lanes * FMA_A_SECOND)
    return _together(arithmetic, _reading(weights, target)) + _moving(node, target)


def _stride(node: Node) -> tuple[int, ...]:
    return node.op.stride if isinstance(node.op, Conv) else ()


def _winograd_seconds(tile: int) -> Seconds:
    """Count the products of each position of each tile, and the transforms."""

    def seconds(node: Node, target: Target, stored: DType) -> float:
        n, oc, height, width = node.types[0].static_shape
        _, ic, *kernel = node.inputs[1].type.static_shape
        vertical, horizontal = transforms(tile, kernel, _stride(node))
        ic_blocks, oc_blocks = _blocks(ic, target), _blocks(oc, target)
        tiles = n * -(-height // vertical.tile) * -(-width // horizontal.tile)
        products = 1.06 * ic_blocks * target.vector_lanes * oc_blocks
        work = vertical.positions * horizontal.positions * (products + DATA_FMA * ic_blocks + OUTPUT_FMA * oc_blocks)
        weights = stored.itemsize * vertical.weights * horizontal.weights * ic * oc
        arithmetic = tiles * work / FMA_A_SECOND
        return _together(arithmetic, _reading(weights, target)) + _moving(node, target)

    return seconds


def _saved_products(node: Node, tile: int) -> float:
    """Say by how much products become fewer."""
    kernel = node.inputs[1].type.static_shape[2:]
    axes = transforms(tile, kernel, _stride(node))
    return math.prod(axis.tile * taps / axis.positions for axis, taps in zip(axes, kernel, strict=True))


def _winograd_applies(tile: int) -> Applies:
    """Say of a float32 image convolution whether it has known, finite weights, matrices and enough channels."""

    def applies(node: Node, target: Target) -> bool:
        op, x, w = node.op, node.inputs[0].type, node.inputs[1]
        if not isinstance(op, Conv) or not w.type.is_static or x.rank != 4 or x.dtype is not DType.F32:
            return False
        if not x.is_static or node.types[0].elements == 0:
            return False
        outputs, channels, *kernel = w.type.static_shape
        if max(kernel) == 1 or any(s != 1 for s in (*op.dilation, op.groups)):
            return False
        if not all(map(is_supported, (tile,) * 2, kernel, op.stride)):
            return False
        return min(outputs, channels) >= FEWEST_CHANNELS and math.isfinite(largest_of(w))

    return applies


FEWEST_CHANNELS = 16
"""With fewer there is little to save, and the first layer of a network reads plain data itself."""


def _bf16x3_applies(node: Node, target: Target) -> bool:
    """Say of a float32 image convolution of one group whether it has known, finite weights and enough channels."""
    op, x, w = node.op, node.inputs[0].type, node.inputs[1]
    if not target.multiplies_tiles or not isinstance(op, Conv) or not x.is_static or x.rank != 4:
        return False
    if op.groups > 1 or x.dtype is not DType.F32 or node.types[0].elements == 0:
        return False
    return w.type.static_shape[1] >= PAIR and math.isfinite(largest_of(w))


PAIR = 32
"""Input channels that are multiplied at a time; direct kernels leave out those that are not there."""


def _bf16x3_seconds(node: Node, target: Target, stored: DType) -> float:
    """Count products of tiles of 16 pixels, 32 input channels and 16 outputs, and splitting and storing numbers."""
    op, w = node.op, node.inputs[1].type
    n, oc, height, width = node.types[0].static_shape
    _, ic, kh, kw = w.static_shape
    assert isinstance(op, Conv)
    reach = op.dilation[1] * (kw - 1) // op.stride[1]
    tiles = n * -(-((height - 1) * (width + reach) + width) // 16)
    pixels = node.inputs[0].type.elements // ic
    seconds = _tile_seconds(tiles, pixels, -(-ic // PAIR), kh * kw, -(-oc // 16), stored)
    return _together(seconds, _reading(stored.itemsize * w.elements, target)) + _moving(node, target)


def _tile_seconds(tiles: int, pixels: int, pairs: int, taps: int, oc_blocks: int, stored: DType) -> float:
    """Give the seconds for products of tiles of outputs, and for splitting the input and the weights they are of."""
    number = {DType.BF16: 3, DType.F16: 5}.get(stored, 6)
    products = pairs * taps * oc_blocks * (TILE_CYCLES * number * tiles + SPLIT_WEIGHTS)
    return (products + SPLIT_CYCLES * pixels * pairs) / CYCLES_A_SECOND


def _int8x3_applies(node: Node, target: Target) -> bool:
    """Say of a float32 image convolution whether it is of enough pixels and channels, with known, moderate weights.

    Channels are whole blocks, which those of 1x1 kernels may be filled up to.
    """
    w = node.inputs[1]
    if not _bf16x3_applies(node, target) or not _has_digits(w, math.prod(w.type.static_shape[1:])):
        return False
    n, _, height, width = node.types[0].static_shape
    if n * height * width < FEWEST_PIXELS:
        return False
    _, channels, *kernel = w.type.static_shape
    return max(kernel) == 1 or channels % 16 == 0


def _has_digits(w: Value, terms: int) -> bool:
    """Whether weights are f32 of usual size, and sums have so few terms that those of their digits stay in int32."""
    return w.type.dtype is DType.F32 and terms <= MOST_TERMS and largest_of(w) < LARGEST_WEIGHT


FEWEST_PIXELS = 4
"""With fewer, as in squeeze-excite, multiply-adds keep up with reading the weights."""

LARGEST_WEIGHT = 2.0**40
"""Larger weights are none to expect; by those, what tiny activations lose would be large."""


def _int8x3_seconds(node: Node, target: Target, stored: DType) -> float:
    """Count products of tiles of 16 pixels, 64 input channels and 16 outputs, and splitting and storing numbers."""
    if stored is not DType.F32:
        return math.inf
    n, oc, height, width = node.types[0].static_shape
    terms = math.prod(node.inputs[1].type.static_shape[1:])
    return _digit_seconds(n * height * width, terms, oc, target) + _moving(node, target)


def _digit_seconds(rows: int, inputs: int, outputs: int, target: Target) -> float:
    """Give the seconds to split rows, to multiply them by digits of weights, which are read, and to scale the sums."""
    blocks, steps = -(-outputs // 16), -(-inputs // 64)
    products = 6 * -(-rows // 16) * steps * blocks * (DIGIT_CYCLES if steps <= NEAR_STEPS else FAR_DIGIT_CYCLES)
    moved = rows * (-(-inputs // 16) * DIGIT_SPLIT_CYCLES + blocks * DIGIT_FINISH_CYCLES)
    return _together((products + moved) / CYCLES_A_SECOND, _reading(3.0 * inputs * outputs, target))


def _digit_winograd_applies(tile: int) -> Applies:
    """Say of a convolution by Winograd's algorithm whether tiles multiply it: of stride 1, with moderate weights.

    Tiles of more positions multiply the error of what digits leave out by too much.
    """
    winograd_applies = _winograd_applies(tile)

    def applies(node: Node, target: Target) -> bool:
        w = node.inputs[1]
        if not winograd_applies(node, target) or not _bf16x3_applies(node, target):
            return False
        if not _has_digits(w, w.type.static_shape[1]) or set(_stride(node)) != {1}:
            return False
        kernel = w.type.static_shape[2:]
        return math.prod(axis.positions for axis in transforms(tile, kernel, (1, 1))) <= MOST_POSITIONS

    return applies


def _digit_winograd_seconds(tile: int) -> Seconds:
    """Count products of tiles of 16 tiles of outputs at each position in them, and transforming and splitting."""

    def seconds(node: Node, target: Target, stored: DType) -> float:
        if stored is not DType.F32:
            return math.inf
        n, oc, height, width = node.types[0].static_shape
        _, ic, *kernel = node.inputs[1].type.static_shape
        vertical, horizontal = transforms(tile, kernel, (1, 1))
        ic_blocks, oc_blocks = -(-ic // 16), -(-oc // 16)
        tiles = n * -(-height // vertical.tile) * -(-width // horizontal.tile)
        products = 6 * -(-tiles // 16) * -(-ic_blocks // 4) * oc_blocks * FAR_DIGIT_CYCLES
        moved = tiles * (ic_blocks * ROW_CYCLES + oc_blocks * DIGIT_OUTPUT_CYCLES)
        positions = vertical.positions * horizontal.positions
        arithmetic = positions * (products + moved) / CYCLES_A_SECOND
        return _together(arithmetic, _reading(3.0 * positions * ic * oc, target)) + _moving(node, target)

    return seconds


MOST_POSITIONS = 36
"""Positions in a tile, as those of 4x4 outputs of a 3x3 kernel."""

FAR_DIGIT_CYCLES, ROW_CYCLES, DIGIT_OUTPUT_CYCLES = 40.0, 28.0, 20.0
"""Cycles for a product of tiles of digits of which L1 keeps neither, to transform and split a vector of input, and to
scale and transform one of sums back."""


def is_for_tiles(node: Node, target: Target, stored: DType) -> bool:
    """Whether a fully connected layer takes less time on tiles: of many rows, whole lines, and known, finite weights.

    The weight is packed in any case, so graphs that share it need not agree.
    """
    if not _fills_tiles(node, target):
        return False
    return _dense_bf16x3_seconds(node, stored) < BF16X3_MARGIN * _dense_seconds(node, target)


def is_for_digits(node: Node, target: Target) -> bool:
    """Whether such a layer takes less time yet in int8 digits, which its weight, f32, is then stored in."""
    if not _fills_tiles(node, target):
        return False
    rows, inputs, outputs = _dense_sizes(node)
    if not _has_digits(node.inputs[1], inputs):
        return False
    others = min(_dense_bf16x3_seconds(node, DType.F32), _dense_seconds(node, target))
    reading = _reading(4.0 * inputs * outputs, target)
    return _digit_seconds(rows, inputs, outputs, target) < INT8X3_MARGIN * _together(others, reading)


def _fills_tiles(node: Node, target: Target) -> bool:
    x, w = node.inputs[0].type, node.inputs[1]
    if not target.multiplies_tiles or not w.type.is_static or x.dtype is not DType.F32 or not x.is_static:
        return False
    rows, inputs, outputs = _dense_sizes(node)
    if rows < FEWEST_ROWS or not inputs or inputs % 16 or outputs % 16:
        return False
    return math.isfinite(largest_of(w))


def _dense_sizes(node: Node) -> tuple[int, int, int]:
    """Give the rows of a fully connected layer, its inputs and its outputs."""
    outputs, inputs = node.inputs[1].type.static_shape
    return math.prod(node.inputs[0].type.static_shape[:-1]), inputs, outputs


def _dense_seconds(node: Node, target: Target) -> float:
    rows, inputs, outputs = _dense_sizes(node)
    return 2.0 * rows * inputs * outputs / (2 * target.vector_lanes * FMA_A_SECOND)


def _dense_bf16x3_seconds(node: Node, stored: DType) -> float:
    rows, inputs, outputs = _dense_sizes(node)
    return _tile_seconds(-(-rows // 16), rows, -(-inputs // PAIR), 1, outputs // 16, stored)


FEWEST_ROWS = 16
"""With fewer, reading the weight takes the time."""

BF16X3_ERROR, BF16X3_MARGIN = 2.2, 0.95

INT8X3_ERROR, INT8X3_MARGIN = 12.0, 0.9
"""In units in the last place of the work; and of the time of others, int8 digits must take less than this to be worth
their error."""

CYCLES_A_SECOND = 3.0e9
"""Cycles of a core in which it gives `FMA_A_SECOND`."""

TILE_CYCLES, SPLIT_CYCLES, SPLIT_WEIGHTS = 23.0, 45.0, 130.0
"""Cycles for a product of tiles, to split 32 numbers into parts and use them for few products, and what splitting a
tile of weights adds."""

DIGIT_CYCLES, DIGIT_SPLIT_CYCLES, DIGIT_FINISH_CYCLES = 21.0, 9.0, 7.0
"""Cycles for a product of tiles of digits, to split a vector of input, and to scale a vector of sums and store it."""

NEAR_STEPS = 12
"""Steps of 64 numbers of a sum by which the weights of 16 outputs stay in L1."""

ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm("direct", error=2.2, applies=lambda node, target: True, seconds=_direct_seconds, exact=True),
    Algorithm(
        "bf16x3",
        error=BF16X3_ERROR,
        applies=_bf16x3_applies,
        seconds=_bf16x3_seconds,
        rounds=True,
        margin=BF16X3_MARGIN,
    ),
    Algorithm("int8x3", error=INT8X3_ERROR, applies=_int8x3_applies, seconds=_int8x3_seconds, margin=INT8X3_MARGIN),
    Algorithm(
        "winograd2", error=12.0, applies=_winograd_applies(2), seconds=_winograd_seconds(2), margin=WINOGRAD_MARGIN
    ),
    Algorithm(
        "winograd4", error=32.0, applies=_winograd_applies(4), seconds=_winograd_seconds(4), margin=WINOGRAD_MARGIN
    ),
    Algorithm(
        "winograd6", error=64.0, applies=_winograd_applies(6), seconds=_winograd_seconds(6), margin=LARGE_TILES_MARGIN
    ),
    Algorithm(
        "winograd2_int8x3",
        error=24.0,
        applies=_digit_winograd_applies(2),
        seconds=_digit_winograd_seconds(2),
        margin=WINOGRAD_MARGIN,
    ),
    Algorithm(
        "winograd4_int8x3",
        error=64.0,
        applies=_digit_winograd_applies(4),
        seconds=_digit_winograd_seconds(4),
        margin=LARGE_TILES_MARGIN,
    ),
)
"""The table: a new algorithm is a line here and a template in the back end."""


def gpu_algorithms(templates: Sequence[KernelTemplate]) -> tuple[Algorithm, ...]:
    """Give the table for a GPU, where a back end's templates know what a kernel takes."""
    return tuple(_on_gpu(algorithm, templates) for algorithm in ALGORITHMS)


def _on_gpu(algorithm: Algorithm, templates: Sequence[KernelTemplate]) -> Algorithm:
    def seconds(node: Node, target: Target, stored: DType) -> float:
        return kernel_seconds(node, algorithm.name, templates, target)

    def applies(node: Node, target: Target) -> bool:
        tile = winograd_tile(algorithm.name)
        if not algorithm.applies(node, target):
            return False
        return tile is None or (tile <= LARGEST_GPU_TILE and _saved_products(node, tile) >= FEWEST_SAVED)

    margin = GPU_MARGIN if algorithm.is_winograd else algorithm.margin
    return replace(algorithm, applies=applies, seconds=seconds, margin=margin)


ROUNDING = {DType.F16: 2.1e-4, DType.BF16: 1.7e-3}
"""The relative error, root mean square, of a number rounded to a type."""

MOST_ROUNDING = 2 * ROUNDING[DType.BF16]
"""Relative error that stored weights may give a layer: twice what rounding them to bf16 and no more does."""


def rounding(algorithm: str, node: Node, stored: DType) -> float:
    """Estimate the relative error that storing a convolution's weight in a type gives it, if its algorithm does."""
    tile = winograd_tile(algorithm)
    if stored not in ROUNDING:
        return 0.0
    if tile is None:
        return ROUNDING[stored]
    kernel = node.inputs[1].type.static_shape[2:]
    axes = zip(transforms(tile, kernel, _stride(node)), kernel, strict=True)
    return ROUNDING[stored] * math.sqrt(math.prod(_amplification(axis, taps) for axis, taps in axes))


def _amplification(axis: Transform, taps: int) -> float:
    """Give by how much the square of a rounding error grows along one axis."""
    output, data, weight = (np.array(m, np.float64) ** 2 for m in (axis.output, axis.data, axis.weight))
    weights = weight[np.minimum(np.arange(axis.positions), axis.weights - 1)].sum(axis=1)
    return float((output @ (data.sum(axis=1) * weights)).mean()) / taps
