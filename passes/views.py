"""Views and joints: nodes outside of kernels, which only rename memory, and so need none."""

from __future__ import annotations

from cnnc.ir.graph import Node
from cnnc.ir.layout import Layout
from cnnc.ir.types import TensorType


def is_view(node: Node) -> bool:
    """Whether the output has the bytes of the input in the same order.

    A plain reshape always; a layout transform where the axes it moves have one element, as after global pooling.
    """
    if node.op.name == "reshape":
        return node.inputs[0].type.layout is None and node.types[0].layout is None
    return node.op.name == "layout_transform" and renames_memory(node.inputs[0].type, node.types[0])


def is_joint(node: Node) -> bool:
    """Whether the inputs lie one after the other in the output, as `place_concats` found they may."""
    return node.op.name == "concat"


def renames_memory(old: TensorType, new: TensorType) -> bool:
    """Whether a tensor has the same bytes in the same order in both of two layouts."""
    order = _memory_order(old)
    return order is not None and order == _memory_order(new)


def _memory_order(type_: TensorType) -> list[tuple[str, int, int]] | None:
    """List (axis, stride within the axis, extent) from the outermost axis in, those of one element left out.

    Two plain neighbours of one axis, as the outer and inner part of a block, count as one.  None where there are
    pad lanes, which a view cannot make.
    """
    shape = type_.static_shape
    layout = type_.layout
    if layout is None:
        return [(str(axis), 1, size) for axis, size in enumerate(shape) if size != 1]
    if layout.pads(shape):
        return None
    return _merged(layout, type_.physical_shape)


def _merged(layout: Layout, physical: tuple[int, ...]) -> list[tuple[str, int, int]]:
    order: list[tuple[str, int, int]] = []
    for token, size in zip(layout.tokens, physical, strict=True):
        letter = token[-1].upper()
        axis = str(layout.logical_axes.index(letter))
        stride = layout.block(letter) if token.isupper() else 1
        if size == 1:
            continue
        if order and order[-1][0] == axis and order[-1][1] == size * stride:
            order[-1] = (axis, stride, order[-1][2] * size)
        else:
            order.append((axis, stride, size))
    return order
