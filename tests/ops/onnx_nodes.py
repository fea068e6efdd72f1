"""One-node ONNX models: import them, run them here and in ONNX Runtime without its optimisations."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from cnnc.frontends.onnx import import_model
from cnnc.ir.graph import Graph
from cnnc.ir.interp import run


def one_node(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    *,
    opset: int = 20,
    outputs: int = 1,
    constants: Sequence[int] = (),
    **attributes: Any,
) -> onnx.ModelProto:
    """Make a model of one node; inputs that are None are left out, those numbered in `constants` are stored."""
    names = [f"x{i}" if array is not None else "" for i, array in enumerate(inputs)]
    node = helper.make_node(op_type, names, [f"y{i}" for i in range(outputs)], name="the_node", **attributes)
    present = [(i, array) for i, array in enumerate(inputs) if array is not None]
    fed = [_value(f"x{i}", a) for i, a in present if i not in constants]
    stored = [numpy_helper.from_array(a, f"x{i}") for i, a in present if i in constants]
    results = [helper.make_tensor_value_info(f"y{i}", TensorProto.UNDEFINED, None) for i in range(outputs)]
    graph = helper.make_graph([node], "one_node", fed, results, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 19 else 10)
    inferred = onnx.shape_inference.infer_shapes(model)
    fallback = helper.np_dtype_to_tensor_dtype(present[0][1].dtype)
    for result, found in zip(model.graph.output, inferred.graph.output, strict=True):
        # Only the type is needed, shapes are what is tested; a node that makes no sense has none.
        result.type.tensor_type.elem_type = found.type.tensor_type.elem_type or fallback
    return model


def _value(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)


def imported(model: onnx.ModelProto) -> Graph:
    """Import a model with our reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return import_model(model)


def ours(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Import a model and interpret it."""
    graph = imported(model)
    return run(graph, [feeds[name] for name in graph.input_names])


def theirs(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a model in ONNX Runtime, its optimisations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def assert_agrees(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    constants: Sequence[int] = (),
    **rest: Any,
) -> None:
    """Assert that our numbers, shapes and dtypes are ONNX Runtime's."""
    model = one_node(op_type, inputs, constants=constants, **rest)
    feeds = {f"x{i}": a for i, a in enumerate(inputs) if a is not None and i not in constants}
    for mine, other in zip(ours(model, feeds), theirs(model, feeds), strict=True):
        assert mine.shape == other.shape
        assert mine.dtype == other.dtype
        np.testing.assert_allclose(mine, other, rtol=rtol, atol=atol)
