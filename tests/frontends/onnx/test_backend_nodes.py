"""ONNX's own node tests: every one gives the stated numbers, or is refused as unsupported; none is wrong."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.backend.test.case.test_case import TestCase as NodeTest

from cnnc.errors import CnncError, UnsupportedError
from cnnc.frontends.onnx import import_model
from cnnc.ir.interp import run
from tests.frontends.onnx.node_cases import as_array, node_tests, with_constants


def outcome(model: onnx.ModelProto, inputs: Sequence[np.ndarray | None], case: NodeTest, wanted: list[Any]) -> str:
    """Import and interpret; gives `passed`, `refused: ...` or `wrong: ...`."""
    names = [value.name for value in case.model.graph.input] if case.model is not None else []
    arrays = dict(zip(names, inputs, strict=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = import_model(model)
            results = run(graph, [np.asarray(arrays[name]) for name in graph.input_names])
            for result, want in zip(results, wanted, strict=True):
                assert_near(result, want, case)
        except UnsupportedError as error:
            return f"refused: {error}"
        except (CnncError, AssertionError) as error:
            return f"wrong: {error}"
    return "passed"


def assert_near(result: np.ndarray, want: np.ndarray, case: NodeTest) -> None:
    """Compare type, shape and numbers, within the test's own tolerance (1e-2 for 16-bit floats)."""
    assert (result.dtype, result.shape) == (want.dtype, want.shape)
    if want.dtype.kind not in "fV":
        np.testing.assert_array_equal(result, want)
        return
    loose = 1e-2 if want.dtype.itemsize == 2 else 0
    rtol, atol = max(case.rtol, loose), max(case.atol, loose, 1e-6)
    np.testing.assert_allclose(result.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol)


@cache
def outcomes(name: str) -> tuple[str, ...]:
    """Give the outcomes of a node test: as it stands, with integer inputs stored, with all but the first stored."""
    (case,) = (case for case in node_tests() if case.name == name)
    assert case.model is not None
    found = []
    for given, expected in case.data_sets or ():
        inputs, wanted = [as_array(i) for i in given], [as_array(o) for o in expected]
        variants = (
            case.model,
            with_constants(case.model, inputs, lambda _, array: array.dtype.kind in "iub"),
            with_constants(case.model, inputs, lambda position, _: position > 0),
        )
        found += [outcome(model, inputs, case, wanted) for model in variants if model is not None]
    return tuple(found)


NAMES = tuple(case.name for case in node_tests())


@pytest.mark.parametrize("name", NAMES)
def test_right_or_refused(name: str) -> None:
    assert [result for result in outcomes(name) if result.startswith("wrong")] == []


def test_most_are_right() -> None:
    """A lost operator must not pass for a refusal: about 70 % of all node tests pass, most of the rest are of types
    or operators that networks of images do not have (strings, 4-bit numbers, sequences, optimisers)."""
    passed = [name for name in NAMES if "passed" in outcomes(name)]
    assert len(passed) / len(NAMES) > 0.69
