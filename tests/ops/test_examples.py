"""What must hold for every operator, checked on its examples: adding an operator adds these tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

import cnnc.ops
from cnnc.errors import LimitError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.interp import run
from cnnc.ir.layout import Layout
from cnnc.ir.op import OPERATORS, Example, Op, as_tuple
from cnnc.ir.parse import parse_graph
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType, TensorType
from cnnc.ops.example_graph import TOLERANCE, buildable_examples, draw, graph_of, operator_names, rng_for
from tests.ops.kernels import run_compute

NAMES = operator_names()


def examples(name: str) -> list[Example]:
    return list(OPERATORS[name].examples())


def assert_close(got: np.ndarray, wanted: np.ndarray, tolerance: float, label: str) -> None:
    """Compare with a tolerance for floats; NaN and infinities must be at the same places."""
    assert got.shape == wanted.shape, label
    if wanted.dtype.kind not in "fV":
        np.testing.assert_array_equal(got, wanted, err_msg=label)
        return
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(b)
    scale = max(1.0, float(np.abs(b[finite]).max(initial=0)))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=label)


def title(example: Example) -> str:
    return f"{example.op} of {', '.join(map(str, example.types))}"


def test_every_operator_is_exported() -> None:
    classes = [cls for cls in OPERATORS.values() if cls.__module__.startswith("cnnc.ops.")]
    missing = {cls.__name__ for cls in classes} - set(cnnc.ops.__all__)
    assert not missing


@pytest.mark.parametrize("name", NAMES)
def test_has_examples(name: str) -> None:
    found = examples(name)
    assert len(found) >= 3
    assert all(type(e.op) is OPERATORS[name] for e in found)
    assert (OPERATORS[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", NAMES)
def test_reference_has_the_inferred_types(name: str) -> None:
    for number, example in enumerate(examples(name)):
        types = infer_types(example.op, example.types)
        inputs = draw(example, rng_for(name, number))
        results = as_tuple(example.op.reference(*inputs))
        assert len(results) == len(types) == example.op.outputs, title(example)
        for result, type_ in zip(results, types, strict=True):
            assert result.shape == type_.static_shape, title(example)
            assert result.dtype == type_.dtype.numpy, title(example)
        assert example.op.flops(*example.types) >= 0


@pytest.mark.parametrize("name", NAMES)
def test_reference_leaves_its_inputs_alone(name: str) -> None:
    for number, example in enumerate(examples(name)):
        inputs = draw(example, rng_for(name, number))
        before = [a.copy() for a in inputs]
        for array in inputs:
            array.flags.writeable = False
        example.op.reference(*inputs)
        for array, copy in zip(inputs, before, strict=True):
            np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("name", NAMES)
def test_reference_agrees_with_itself_in_float64(name: str) -> None:
    for number, example in enumerate(examples(name)):
        inputs = draw(example, rng_for(name, number))
        if not any(t.dtype.is_float for t in example.types):
            continue
        wide = [a.astype(np.float64) if t.dtype.is_float else a for a, t in zip(inputs, example.types, strict=True)]
        narrow = as_tuple(example.op.reference(*inputs))
        exact = as_tuple(example.op.reference(*wide))
        tolerance = max(TOLERANCE[t.dtype] for t in example.types if t.dtype.is_float)
        for got, wanted in zip(narrow, exact, strict=True):
            limit = max(tolerance, TOLERANCE.get(DType.of(got), 0))
            assert_close(got, wanted.astype(got.dtype), limit, title(example))


@pytest.mark.parametrize("name", NAMES)
def test_compute_equals_reference(name: str) -> None:
    for number, example in enumerate(examples(name)):
        check_compute(example, rng_for(name, 1000 + number))


def check_compute(example: Example, rng: np.random.Generator) -> None:
    inputs = draw(example, rng)
    wanted = as_tuple(example.op.reference(*inputs))
    got = run_compute(example.op, example.types, inputs)
    for result, reference in zip(got, wanted, strict=True):
        assert result.dtype == reference.dtype, title(example)
        assert_close(result, reference, TOLERANCE.get(DType.of(reference), 0), title(example))


BLOCKED = {3: Layout("NCW4c"), 4: Layout("NCHW4c"), 5: Layout("NCDHW4c")}


@pytest.mark.parametrize("name", NAMES)
def test_layouts_are_computed_or_refused(name: str) -> None:
    """Put the inputs of every example into blocked layouts: what `infer_layout` accepts must be right."""
    tried = 0
    for number, example in enumerate(examples(name)):
        for types in blocked_variants(example.types):
            try:
                infer_types(example.op, types)
            except (ShapeError, UnsupportedError):
                continue
            inputs = draw(example, rng_for(name, 2000 + number))
            # `compute` packs, so an example that draws its own inputs keeps its meaning.
            check_compute(Example(example.op, types, lambda rng, inputs=inputs: inputs), np.random.default_rng(0))
            tried += 1
        if tried >= 4:
            return


def blocked_variants(types: Sequence[TensorType]) -> Iterator[tuple[TensorType, ...]]:
    """Block all inputs that have a rank for it, then the first only."""
    able = [i for i, t in enumerate(types) if t.rank in BLOCKED and t.layout is None]
    for chosen in {tuple(able), tuple(able[:1])} - {()}:
        yield tuple(replace(t, layout=BLOCKED[t.rank]) if i in chosen else t for i, t in enumerate(types))


@pytest.mark.parametrize("name", NAMES)
def test_text_round_trip(name: str) -> None:
    for example in examples(name):
        graph = graph_of([example])
        text = print_graph(graph)
        again = parse_graph(text)
        assert print_graph(again) == text
        assert again.outputs[0].op == example.op


def mutations(types: Sequence[TensorType]) -> Iterator[tuple[TensorType, ...]]:
    """Give inputs that are wrong in one way: their number, a rank, a size, a dtype, a layout."""
    yield ()
    yield tuple(types[:-1])
    yield (*types, types[0])
    for position, type_ in enumerate(types):
        plain = replace(type_, layout=None)
        others = [replace(plain, shape=(*plain.shape, 2)), replace(plain, shape=(3, *plain.shape))]
        if plain.rank:
            others += [replace(plain, shape=plain.shape[1:]), replace(plain, shape=plain.shape[:-1])]
            others += [replace(plain, shape=(*plain.shape[:-1], 0)), replace(plain, shape=(*plain.shape[:-1], 10**6))]
            others += [replace(plain, shape=(2**40, *plain.shape[1:]))]
        others += [replace(plain, dtype=dtype) for dtype in DType]
        others += [replace(plain, layout=layout) for layout in BLOCKED.values() if layout.rank == plain.rank]
        for other in others:
            yield (*types[:position], other, *types[position + 1 :])


def complaint(op: Op, types: tuple[TensorType, ...]) -> str | None:
    """Give the message by which inputs are refused; None where they are taken."""
    try:
        infer_types(op, types)
    except (ShapeError, LimitError, UnsupportedError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_refused_by_a_message(name: str) -> None:
    """Whatever the inputs: types come out, or an error of ours that names the operator; never a traceback."""
    refused = 0
    for example in examples(name):
        for types in mutations(example.types):
            message = complaint(example.op, types)
            if message is not None:
                refused += 1
                assert message.startswith((f"{name}:", "shape [")), f"{title(example)}: {message}"
    assert refused > 0


@pytest.mark.parametrize("name", NAMES)
def test_compiled_model_equals_interpreter(name: str) -> None:
    """All examples of an operator in one model, through passes, templates and driver."""
    chosen = buildable_examples(name)
    graph = graph_of(chosen)
    inputs = [a for number, e in enumerate(chosen) for a in draw(e, rng_for(name, 3000 + number))]
    module = cnnc.compile(graph, target="cpu")
    feeds = dict(zip(graph.input_names, inputs, strict=True))
    results = module.run(feeds)
    for label, wanted in zip(graph.output_names, run(graph, inputs), strict=True):
        assert_close(results[label], wanted, TOLERANCE.get(DType.of(wanted), 0), f"{name} {label}")
