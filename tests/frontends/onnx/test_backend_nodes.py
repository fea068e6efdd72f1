"""ONNX's own node tests: every one gives the stated numbers, or is refused as unsupported; none is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase as NodeTest

from cnnc.errors import UnsupportedError
from cnnc.frontends.onnx import import_model
from cnnc.frontends.onnx.tensors import NUMPY
from cnnc.ir.interp import run
from cnnc.ir.types import DType

_CARRIED = {dtype.numpy for dtype in DType}


@cache
def node_tests() -> tuple[NodeTest, ...]:
    """All node tests of the installed onnx, each once, those with random results left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    found = {case.name: case for case in cases if case.model is not None and case.data_sets}
    return tuple(case for name, case in sorted(found.items()) if not _draws(case.model))


def _draws(model: onnx.ModelProto) -> bool:
    random = {"Bernoulli", "RandomNormalLike", "RandomUniformLike", "Multinomial"}
    return any(node.op_type in random for node in model.graph.node)


def as_array(given: object) -> np.ndarray | None:
    """Give a test's input or output as an array; None for sequences and optionals."""
    if isinstance(given, onnx.TensorProto):
        return numpy_helper.to_array(given)
    return given if isinstance(given, np.ndarray | np.generic) else None


def with_constants(model: onnx.ModelProto, inputs: Sequence[np.ndarray | None]) -> onnx.ModelProto | None:
    """Give the model with every integer or boolean input stored as an initializer, as exporters write shapes.

    None where there is none.
    """
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    for value, array in zip(list(changed.graph.input), inputs, strict=False):
        if array is None or array.dtype.kind not in "iub" or array.dtype not in NUMPY.values():
            continue
        changed.graph.initializer.append(numpy_helper.from_array(array, value.name))
        changed.graph.input.remove(value)
    return changed if changed.graph.initializer else None


def outcome(
    model: onnx.ModelProto, arrays: dict[str, np.ndarray | None], wanted: Sequence[np.ndarray | None], case: NodeTest
) -> str:
    """Import and interpret; `passed`, or why it was refused.  Wrong numbers raise `AssertionError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = import_model(model)
        except UnsupportedError as error:
            return f"refused: {error}"
    results = run(graph, [np.asarray(arrays[name]) for name in graph.input_names])
    for result, want in zip(results, wanted, strict=True):
        assert want is not None
        assert result.dtype == want.dtype
        assert result.shape == want.shape
        if want.dtype.kind in "fV":
            loose = want.dtype.itemsize == 2
            rtol, atol = (max(case.rtol, 1e-2), 1e-2) if loose else (case.rtol, max(case.atol, 1e-6))
            np.testing.assert_allclose(result.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(result, want)
    return "passed"


@pytest.mark.parametrize("case", node_tests(), ids=lambda case: case.name)
def test_right_or_refused(case: NodeTest) -> None:
    for given, expected in case.data_sets:
        inputs, wanted = [as_array(i) for i in given], [as_array(o) for o in expected]
        names = [value.name for value in case.model.graph.input]
        arrays = dict(zip(names, inputs, strict=False))
        outcome(case.model, arrays, wanted, case)
        constants = with_constants(case.model, inputs)
        if constants is not None:
            outcome(constants, arrays, wanted, case)
