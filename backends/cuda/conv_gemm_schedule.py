"""The loops of `conv_gemm`: operands through shared memory, a tile of sums for each thread in registers."""

from __future__ import annotations

import math
from typing import Any

from tvm import s_tir, te, tirx

from cnnc.backends.cuda.conv_gemm import GemmParams
from cnnc.backends.cuda.flat_epilogue import FlatKernel
from cnnc.backends.lower.kernel import lower_values, placeholder

_STAGES = ("columns", "weights", "products")


def conv_gemm_func(flat: FlatKernel, tile: GemmParams) -> Any:
    """Give the scheduled PrimFunc over the kernel's inputs, then its output."""
    inputs = [placeholder(flat.of.get(v, v).type, f"x{i}") for i, v in enumerate(flat.kernel.body.inputs)]
    of = dict(zip(flat.kernel.body.inputs, inputs, strict=True))
    result = _products(flat, of, tile)
    known = {flat.products: result, **{stand_in: of[value] for value, stand_in in flat.of.items()}}
    output = lower_values([flat.output], known)[flat.output]
    sch = s_tir.Schedule(te.create_prim_func([*inputs, output]))
    _schedule(sch, tile)
    return sch.mod["main"]


def _products(flat: FlatKernel, of: dict[Any, Any], tile: GemmParams) -> Any:
    """Describe the convolution as a product of operands filled up with zeros; the sums of real outputs, with bias."""
    x, w, *bias = (of[value] for value in flat.operands)
    images, channels, height, width = map(int, x.shape)
    rows, _, kh, kw = map(int, w.shape)
    _, _, oh, ow = flat.node.types[0].static_shape
    (sh, sw), (top, left, *_), (dh, dw) = flat.conv.stride, flat.conv.pad, flat.conv.dilation
    taps, pixels, depth = kh * kw, oh * ow, channels * kh * kw
    whole_depth, whole_rows = _whole(depth, tile.depth), _whole(rows, tile.rows)
    zero = tirx.const(0.0, "float32")

    def column(n: Any, k: Any, j: Any) -> Any:
        h = j // ow * sh - top + k % taps // kw * dh
        v = j % ow * sw - left + k % kw * dw
        inside = tirx.all(k < depth, j < pixels, h >= 0, h < height, v >= 0, v < width)
        return tirx.if_then_else(inside, x[n, k // taps, h, v], zero)

    def weight(k: Any, o: Any) -> Any:
        read = w[o, k // taps, k % taps // kw, k % kw]
        return tirx.if_then_else(tirx.all(k < depth, o < rows), read, zero)

    columns = te.compute((images, whole_depth, _whole(pixels, tile.columns)), column, name="columns")
    weights = te.compute((whole_depth, whole_rows), weight, name="weights")
    k = te.reduce_axis((0, whole_depth), "k")
    products = te.compute(
        (images, whole_rows, _whole(pixels, tile.columns)),
        lambda n, o, j: te.sum(weights[k, o] * columns[n, k, j], axis=k),
        name="products",
    )
    if bias:
        return te.compute((images, rows, pixels), lambda n, o, j: products[n, o, j] + bias[0][o], name="result")
    return te.compute((images, rows, pixels), lambda n, o, j: products[n, o, j], name="result")


def _whole(extent: int, tile: int) -> int:
    return math.ceil(extent / tile) * tile


def _schedule(sch: Any, tile: GemmParams) -> None:
    output = sch.get(sch.get_output_blocks("root")[0]).name_hint
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        if sch.get(block).name_hint not in (*_STAGES, output):
            sch.compute_inline(block)
    image, row, pixel = sch.get_loops(sch.get_sblock(output))
    wide, high = tile.threads
    block_y, thread_y, rows = sch.split(row, [None, high, tile.thread_rows])
    block_x, thread_x, columns = sch.split(pixel, [None, wide, tile.thread_columns])
    sch.reorder(image, block_y, block_x, thread_y, thread_x, rows, columns)
    axes = ("blockIdx.z", "blockIdx.y", "blockIdx.x", "threadIdx.y", "threadIdx.x")
    for loop, axis in zip((image, block_y, block_x, thread_y, thread_x), axes, strict=True):
        sch.bind(loop, axis)
    products = sch.get_sblock("products")
    sch.set_scope(products, 0, "local")
    sch.compute_at(products, thread_x)
    *_, rows, columns, depth = sch.get_loops(products)
    step, term = sch.split(depth, [None, tile.depth])
    sch.reorder(step, term, rows, columns)
    for name in ("columns", "weights"):
        _through_shared_memory(sch, name, step, tile)
    sch.decompose_reduction(products, step)


def _through_shared_memory(sch: Any, name: str, step: Any, tile: GemmParams) -> None:
    """Have all threads of a block load an operand's tile, neighbours neighbouring elements."""
    block = sch.get_sblock(name)
    sch.set_scope(block, 0, "shared")
    sch.compute_at(block, step)
    wide, high = tile.threads
    elements = sch.fuse(*sch.get_loops(block)[-2:])
    _, thread_y, thread_x = sch.split(elements, [None, high, wide])
    sch.bind(thread_y, "threadIdx.y")
    sch.bind(thread_x, "threadIdx.x")
