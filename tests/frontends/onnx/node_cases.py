"""The node tests that come with onnx, and their models with inputs stored as exporters store them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test.case.node import collect_testcases
from onnx.backend.test.case.test_case import TestCase as NodeTest

from cnnc.frontends.onnx.tensors import NUMPY


@cache
def node_tests() -> tuple[NodeTest, ...]:
    """All node tests of the installed onnx, each once, those with random results left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    found = {case.name: case for case in cases if case.model is not None and not _draws(case.model)}
    return tuple(case for _, case in sorted(found.items()))


def _draws(model: onnx.ModelProto) -> bool:
    random = {"Bernoulli", "RandomNormalLike", "RandomUniformLike", "Multinomial"}
    return any(node.op_type in random for node in model.graph.node)


def as_array(given: object) -> np.ndarray | None:
    """Give a test's input or output as an array; None for sequences and optionals."""
    if isinstance(given, onnx.TensorProto):
        return numpy_helper.to_array(given)
    return np.asarray(given) if isinstance(given, np.ndarray | np.generic) else None


def with_constants(
    model: onnx.ModelProto, inputs: Sequence[np.ndarray | None], chosen: Callable[[int, np.ndarray], bool]
) -> onnx.ModelProto | None:
    """Give the model with the chosen inputs stored as initializers, as exporters do; None where there is none."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    for position, (value, array) in enumerate(zip(list(changed.graph.input), inputs, strict=False)):
        if array is not None and array.dtype in NUMPY.values() and chosen(position, array):
            changed.graph.initializer.append(numpy_helper.from_array(array, value.name))
            changed.graph.input.remove(value)
    return changed if changed.graph.initializer else None
