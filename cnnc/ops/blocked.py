"""Blocked layouts in operators: which ones they take, and tensor expressions by logical index."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from cnnc.errors import ShapeError, UnsupportedError
from cnnc.ir.layout import Layout
from cnnc.ir.types import Size, TensorType

_SPATIAL = {0: "", 1: "W", 2: "HW", 3: "DHW"}


def channel_layout(rank: int, block: int) -> Layout | None:
    """Give the layout of activations whose channels lie in blocks: `NCHW16c` for rank 4; None for block 1."""
    return None if block == 1 else Layout(f"NC{_SPATIAL[rank - 2]}{block}c")


def weight_layout(rank: int, input_block: int, output_block: int) -> Layout:
    """Give the layout of convolution weights for such activations: `OIHW16i16o`; `OIHW16o` for input block 1."""
    inner = f"{input_block}i" if input_block > 1 else ""
    return Layout(f"OI{_SPATIAL[rank - 2]}{inner}{output_block}o")


def tile_layout(rank: int, block: int) -> Layout:
    """Give the layout of convolution weights whose rows of `block` input channels tensor cores load: `HWIO8i`."""
    return Layout(f"{_SPATIAL[rank - 2]}IO{block}i")


def packed_block(lanes: int) -> int:
    """Give how many outputs lie together in the packed weight of a fully connected layer, for vectors of `lanes` f32.

    Four vectors where there are 32 registers: with 6 rows their tile needs the fewest loads; else two.
    """
    return (4 if lanes >= 16 else 2) * lanes


def channel_block(name: str, what: str, type_: TensorType) -> int:
    """Give the channel block of activations, 1 for a plain tensor.

    Raises `ShapeError` for a layout that is neither plain nor N C spatial with channels in blocks.
    """
    if type_.layout is None:
        return 1
    block = type_.layout.block("C") if "C" in type_.layout.axes else 1
    if not 3 <= type_.rank <= 5 or type_.layout != channel_layout(type_.rank, block):
        raise ShapeError(f"{name}: {what} is in layout {type_.layout}; it takes plain tensors and such as NCHW16c")
    return block


def plain_only(name: str, **operands: TensorType | None) -> None:
    """Raise `ShapeError` for an operand that is not plain row-major."""
    for key, type_ in operands.items():
        if type_ is not None and type_.layout is not None:
            raise ShapeError(f"{name}: {key} is in layout {type_.layout}; it must be plain")


def fixed(name: str, sizes: Sequence[Size]) -> tuple[int, ...]:
    """Give sizes that a kernel's arithmetic depends on; raises `UnsupportedError` for one left to run time."""
    for size in sizes:
        if not isinstance(size, int):
            raise UnsupportedError(f"{name}: size {size} is known only at run time; kernels need a fixed one here")
    return tuple(size for size in sizes if isinstance(size, int))


def tensor(te: Any, type_: TensorType, element: Callable[..., Any], name: str, guard: bool = True) -> Any:
    """Describe a tensor of this type by its elements at a *logical* index.

    Pad lanes of a blocked layout become 0.  `guard` False leaves that to `element`, which must then be good
    for the index of a pad lane: reductions, which have to stand outermost.
    """
    layout = type_.layout
    if layout is None:
        return te.compute(type_.static_shape, element, name)
    shape = type_.static_shape
    padded = [i for i, axis in enumerate(layout.logical_axes) if shape[i] % layout.block(axis)]

    def physical(*index: Any) -> Any:
        logical = layout.logical_index(index)
        if not guard or not padded:
            return element(*logical)
        return te.where(
            inside(te, [(logical[i], shape[i]) for i in padded]), element(*logical), te.const(0, type_.dtype)
        )

    return te.compute(type_.physical_shape, physical, name)


def inside(te: Any, pairs: Sequence[tuple[Any, int]]) -> Any:
    """Write the condition that each index is below its size."""
    return every(te, [index < size for index, size in pairs])


def every(te: Any, conditions: Sequence[Any]) -> Any:
    """Write the conjunction of at least one condition."""
    return reduce(te.logical_and, conditions)


def flat_index(index: Sequence[Any], shape: Sequence[int]) -> Any:
    """Write the row-major position of an index."""
    position: Any = 0
    for axis, value in enumerate(index):
        position = position + value * math.prod(shape[axis + 1 :])
    return position
