"""Runs an operator's `compute` as TVM makes it, without templates or passes: expressions against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tvm
from tvm import te as tvm_te

from cnnc.backends.lower.expr import TVM_DTYPES, Tensor
from cnnc.backends.lower.vocabulary import Vocabulary
from cnnc.ir.build import infer_types
from cnnc.ir.op import Op
from cnnc.ir.types import DType, TensorType


def run_compute(op: Op, types: Sequence[TensorType], arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Compile the expressions and run them once; packs and unpacks blocked tensors, and checks that pad lanes are 0."""
    outputs = infer_types(op, tuple(types))
    computed = [position for position, type_ in enumerate(outputs) if type_.elements]
    results = [np.zeros(t.static_shape, t.dtype.numpy) for t in outputs]
    if not computed:
        return tuple(results)
    inputs = [tvm_te.placeholder(t.physical_shape, TVM_DTYPES[t.dtype], f"x{i}") for i, t in enumerate(types)]
    described = op.compute(Vocabulary(), [Tensor(x) for x in inputs], tuple(types))
    raw = [described[position].raw for position in computed]
    function = tvm_te.create_prim_func([*inputs, *raw]).with_attr("global_symbol", "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), tvm.target.Target({"kind": "llvm", "opt-level": 1}))
    fed = [tvm.runtime.tensor(_packed(a, t)) for a, t in zip(arrays, types, strict=True)]
    # An element that is never written shows.
    made = [outputs[position] for position in computed]
    buffers = [np.full(t.physical_shape, 1 if t.dtype is DType.BOOL else 77, t.dtype.numpy) for t in made]
    tensors = [tvm.runtime.tensor(b) for b in buffers]
    module["kernel"](*fed, *tensors)
    for position, tensor in zip(computed, tensors, strict=True):
        results[position] = _unpacked(tensor.numpy(), outputs[position])
    return tuple(results)


def _packed(array: np.ndarray, type_: TensorType) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(array.shape) if type_.layout is None else type_.layout.pack(array)


def _unpacked(array: np.ndarray, type_: TensorType) -> np.ndarray:
    if type_.layout is None:
        return array
    logical = type_.layout.unpack(array, type_.static_shape)
    np.testing.assert_array_equal(type_.layout.pack(logical), array, err_msg="pad lanes are not 0")
    return logical
