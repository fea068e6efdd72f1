"""Random ONNX networks: compiled at every level, by one thread and by three, against ONNX Runtime and float64.

What a seed draws is in random_onnx.py.  A failure is cut down to the smallest network that still fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

import cnnc
from cnnc.backends.cpu import conv_direct
from cnnc.driver import Report, load_graph
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate
from cnnc.module import Module
from cnnc.options import LEVELS
from tests.random_onnx import pruned, random_network

Arrays = Mapping[str, np.ndarray]

EVERYDAY, MANY, LARGEST = 40, 1000, 9

SMALLEST_NORM = 1e-3
"""Outputs whose elements are smaller than this are rounding errors of larger numbers."""

WORST_ONNXRUNTIME = 1e-2
"""Beyond this relative error ONNX Runtime and the interpreter do not compute the same thing."""


def _feeds(model: onnx.ModelProto, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([seed, 1])
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _with_special_values(feeds: Arrays, seed: int) -> dict[str, np.ndarray]:
    """Put a NaN or an infinity, and a negative infinity, into each input."""
    rng = np.random.default_rng([seed, 2])
    special = {}
    for name, array in feeds.items():
        flat = array.copy().reshape(-1)
        at = rng.integers(flat.size, size=2)
        flat[at] = rng.choice([np.nan, np.inf]), -np.inf
        special[name] = flat.reshape(array.shape)
    return special


def _onnxruntime(model: onnx.ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def _error(got: np.ndarray, wanted: np.ndarray) -> float:
    """Give the relative L2 error; infinite for another shape and for NaN or infinities at other places."""
    if got.shape != wanted.shape or not _same_kinds(got, wanted):
        return np.inf
    finite = np.isfinite(wanted)
    difference = np.linalg.norm(got[finite].astype(np.float64) - wanted[finite])
    return float(difference / max(np.linalg.norm(wanted[finite]), SMALLEST_NORM * wanted.size**0.5))


def _same_kinds(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether NaN, +inf and -inf are at the same places."""
    return all(np.array_equal(kind(a), kind(b)) for kind in (np.isnan, np.isposinf, np.isneginf))


def _problems(model: onnx.ModelProto, seed: int, levels: tuple[int, ...]) -> Iterator[str]:
    """List what is wrong."""
    feeds = _feeds(model, seed)
    graph = load_graph(model)
    exact = evaluate(graph, feeds, precise=True)
    theirs = {name: _error(array, exact[name]) for name, array in _onnxruntime(model, feeds).items()}
    yield from (f"{name}: ONNX Runtime is off by {e:.1e}" for name, e in theirs.items() if e > WORST_ONNXRUNTIME)
    for level in levels:
        report = Report()
        module = cnnc.compile(model, level=level, report=report)
        outputs = module.run(feeds)
        for name, array in outputs.items():
            error, allowed = _error(array, exact[name]), max(1e-5, 5 * theirs[name])
            if not error <= allowed:
                yield f"{name} at level {level}: error {error:.1e}, allowed {allowed:.1e}"
        yield from (f"{problem} at level {level}" for problem in _unsteady(module, feeds, outputs))
        if not any(firing.rule == "merge_groups" for firing in report.rewrites.fired):
            yield from (f"{problem} at level {level}" for problem in _misplaced(module, graph, feeds, seed))


def _narrow_problems(model: onnx.ModelProto, seed: int, stored: str, level: int) -> Iterator[str]:
    """List where a network with weights in 16 bits is not what the graph says it was compiled from."""
    feeds = _feeds(model, seed)
    module = cnnc.compile(model, weights=stored, level=level)
    assert module.build is not None
    exact = evaluate(module.build.graphs[0], feeds, precise=True)
    wide = cnnc.compile(model, level=level)
    assert wide.build is not None
    usual = evaluate(wide.build.graphs[0], feeds, precise=True)
    allowed = {name: max(1e-5, 5 * _error(array, usual[name])) for name, array in wide.run(feeds).items()}
    outputs = module.run(feeds)
    yield from (
        f"{name}: error {_error(array, exact[name]):.1e}, allowed {allowed[name]:.1e}"
        for name, array in outputs.items()
        if not _error(array, exact[name]) <= allowed[name]
    )
    yield from _unsteady(module, feeds, outputs)


def _unsteady(module: Module, feeds: Arrays, outputs: Arrays) -> Iterator[str]:
    """Compare bits with those of three threads, and of a run in memory that is full of NaN."""
    module.run({name: np.full_like(array, np.nan) for name, array in feeds.items()})
    for what, again in (("a second run", module.run(feeds)), ("3 threads", module.with_threads(3).run(feeds))):
        yield from (f"{n}: {what} differs" for n, y in outputs.items() if y.tobytes() != again[n].tobytes())


def _misplaced(module: Module, graph: Graph, feeds: Arrays, seed: int) -> Iterator[str]:
    """Compare where NaN and infinities get to; Winograd's sums spread them over their tiles, as do merged groups."""
    if any("winograd" in kernel.algorithm for kernel in module.kernels):
        return
    special = _with_special_values(feeds, seed)
    wanted = evaluate(graph, special)
    yield from (f"{n}: NaN or Inf misplaced" for n, y in module.run(special).items() if not _same_kinds(y, wanted[n]))


def _fails(model: onnx.ModelProto, seed: int, levels: tuple[int, ...]) -> str:
    try:
        return "; ".join(_problems(model, seed, levels))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _shrunk(model: onnx.ModelProto, seed: int, levels: tuple[int, ...]) -> onnx.ModelProto:
    """Cut the network at any value as long as what is left still fails: to outputs first, then from inputs."""
    for cut in (_ending_at, _starting_at):
        progress = True
        while progress:
            smaller = (cut(model, node.output[0]) for node in model.graph.node)
            found = next(
                (m for m in smaller if len(m.graph.node) < len(model.graph.node) and _fails(m, seed, levels)), None
            )
            progress, model = found is not None, found or model
    return model


def _shape_of(model: onnx.ModelProto, name: str) -> list[int]:
    ending = _ending_at(model, name)
    return list(_onnxruntime(ending, _feeds(ending, 0))[name].shape)


def _ending_at(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Make `name` the only output."""
    smaller = onnx.ModelProto.FromString(model.SerializeToString())
    del smaller.graph.output[:]
    smaller.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return pruned(smaller)


def _starting_at(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Make `name` an input instead of computing it."""
    if name in [output.name for output in model.graph.output]:
        return model
    smaller = onnx.ModelProto.FromString(model.SerializeToString())
    kept = [node for node in smaller.graph.node if name not in node.output]
    del smaller.graph.node[:]
    smaller.graph.node.extend(kept)
    smaller.graph.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, _shape_of(model, name)))
    return pruned(smaller)


def _check(seed: int, levels: tuple[int, ...]) -> None:
    model = random_network(seed, LARGEST)
    problems = _fails(model, seed, levels)
    if problems:
        smallest = _shrunk(model, seed, levels)
        text = onnx.printer.to_text(smallest)[:4000]
        pytest.fail(f"seed {seed}: {problems}\nsmallest: {_fails(smallest, seed, levels)}\n{text}")


@pytest.mark.parametrize("seed", range(EVERYDAY))
def test_a_random_network(seed: int) -> None:
    _check(seed, LEVELS)


@pytest.mark.parametrize("seed", range(12))
def test_a_random_network_with_weights_of_16_bits(seed: int) -> None:
    stored, level = ("bf16", "f16")[seed % 2], LEVELS[-1 - seed % 3]
    assert not list(_narrow_problems(random_network(seed, LARGEST), seed, stored, level))


@pytest.mark.slow
@pytest.mark.timeout(36000)
@pytest.mark.parametrize("first", range(EVERYDAY, MANY, 96))
def test_many_random_networks(first: int) -> None:
    for seed in range(first, min(first + 96, MANY)):
        _check(seed, LEVELS)


@pytest.mark.parametrize("seed", range(EVERYDAY, EVERYDAY + 10))
def test_a_random_network_whose_convolutions_take_all_prologues(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_direct, "DEAR_TO_PASS", 0.0)
    _check(seed, (max(LEVELS),))


def test_a_failure_is_cut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong operator in the middle of a network is all that is left of it."""
    monkeypatch.setattr(
        "tests.test_random_networks._fails",
        lambda model, seed, levels: "wrong" if any(n.op_type == "Softmax" for n in model.graph.node) else "",
    )
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 3] y)'
        "{ a = Relu(x) b = Softmax(a) c = Tanh(b) y = Add(c, a) }"
    )
    assert [node.op_type for node in _shrunk(model, 0, (3,)).graph.node] == ["Softmax"]
