"""Which indices of a kernel are data, to be checked before it reads with them.

Kernels never read or write outside a tensor, whatever the indices; but an index outside its axis has no right
answer, so the run ends in an error code instead of a number.
"""

from __future__ import annotations

import numpy as np

from cnnc.errors import ModelError, VerifyError
from cnnc.ir.graph import Node, Value
from cnnc.ir.types import TensorType
from cnnc.ops.fused import Fused
from cnnc.ops.source import Constant

OUT_OF_RANGE = 1
"""What a check returns for an index outside; the host makes its error for bad values of it."""


def run_time_indices(node: Node) -> list[tuple[Value, tuple[int, ...]]]:
    """List the inputs of a kernel that are indices, each with the extents its components index into.

    Constant indices are checked here and now; raises `ModelError` for one outside.
    """
    if not isinstance(node.op, Fused):
        return []
    body = node.op.body
    found: dict[tuple[Value, tuple[int, ...]], None] = {}
    for inner in body.nodes:
        for position, extents in inner.op.index_extents(*(v.type for v in inner.inputs)).items():
            value = inner.inputs[position]
            if value in body.inputs:
                value = node.inputs[body.inputs.index(value)]
            elif not isinstance(value.op, Constant):
                raise VerifyError(
                    f"{inner.op.name}: its indices are computed inside the kernel, where none checks them"
                )
            if isinstance(value.op, Constant):
                _check_constant(inner, value.op.value.array, extents)
            elif value.type.elements:
                found[value, extents] = None
    return list(found)


def _check_constant(node: Node, indices: np.ndarray, extents: tuple[int, ...]) -> None:
    columns = indices.reshape(-1, len(extents))
    outside = (columns < -np.array(extents)) | (columns >= np.array(extents))
    if outside.any():
        where = ", ".join(sorted(node.loc)) or "a constant"
        raise ModelError(
            f"{node.op.name}: index {columns[outside][0]} is outside of extents {list(extents)} (at {where})"
        )


def check_symbol(type_: TensorType, extents: tuple[int, ...]) -> str:
    """Name the check of indices of a type into extents."""
    return f"check_indices_{type_.dtype}_{type_.elements}_in_{'x'.join(map(str, extents))}"
