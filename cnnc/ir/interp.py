"""The interpreter: runs a graph in numpy, operator by operator, also in float64.

It is the definition every pass and back end is compared with.  Layouts do not change meaning, so it
works on logical arrays throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cnnc.errors import UsageError, VerifyError
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import as_tuple
from cnnc.ir.types import DType, TensorType, format_shape


def evaluate(graph: Graph, feeds: Mapping[str, np.ndarray], *, precise: bool = False) -> dict[str, np.ndarray]:
    """Compute the outputs by name from inputs by name.

    `precise` carries every float tensor in float64, which gives the reference that errors are measured
    against.  Raises `UsageError` for missing, unknown or ill-shaped inputs.
    """
    names = graph.input_names
    unknown = sorted(set(feeds) - set(names))
    missing = sorted(set(names) - set(feeds))
    if unknown or missing:
        raise UsageError(f"graph {graph.name} takes inputs {list(names)}; missing {missing}, unknown {unknown}")
    outputs = run(graph, [feeds[name] for name in names], precise=precise)
    return dict(zip(graph.output_names, outputs, strict=True))


def run(graph: Graph, arrays: Sequence[np.ndarray], *, precise: bool = False) -> tuple[np.ndarray, ...]:
    """Compute the outputs, in order, from the inputs, in order."""
    computed = _compute(graph, arrays, precise, keep=())
    return tuple(computed[v] for v in graph.outputs)


def evaluate_all(graph: Graph, arrays: Sequence[np.ndarray], *, precise: bool = False) -> dict[Value, np.ndarray]:
    """Compute every value of the graph, for comparisons layer by layer (all of them stay in memory)."""
    return _compute(graph, arrays, precise, keep=[v for n in graph.nodes for v in n.values])


def _compute(
    graph: Graph, arrays: Sequence[np.ndarray], precise: bool, keep: Iterable[Value]
) -> dict[Value, np.ndarray]:
    kept = set(keep) | set(graph.outputs)
    values: dict[Value, np.ndarray] = {}
    for value, array in zip(graph.inputs, arrays, strict=True):
        _check_input(graph, value, np.asarray(array))
        values[value] = _cast(np.asarray(array), value.type, precise)
    left = {value: len(users) for value, users in graph.users.items()}
    with np.errstate(all="ignore"):
        for node in graph.nodes:
            if node.op.name != "input":
                _run_node(node, values, precise)
            for value in node.inputs:
                left[value] -= 1
                if left[value] == 0 and value not in kept:
                    values.pop(value, None)
    return values


def _run_node(node: Node, values: dict[Value, np.ndarray], precise: bool) -> None:
    if node.op.name == "parameter":
        label = getattr(node.op, "label", "")
        raise UsageError(f"parameter {label} has no numbers yet; call net.init(seed) or net.load(path) first")
    results = as_tuple(node.op.reference(*(values[v] for v in node.inputs)))
    for value, result in zip(node.values, results, strict=True):
        result = np.asarray(result)
        if value.type.is_static and result.shape != value.type.shape:
            raise VerifyError(
                f"{node.op.name}: reference gives {format_shape(result.shape)}, inference says {value.type}"
            )
        values[value] = _cast(result, value.type, precise)


def _check_input(graph: Graph, value: Value, array: np.ndarray) -> None:
    type_ = value.type
    label = getattr(value.op, "label", "")
    fits = array.ndim == type_.rank and all(
        have <= most and (have == want or not isinstance(want, int))
        for have, want, most in zip(array.shape, type_.shape, type_.static_shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"graph {graph.name}: input {label} is {type_}, the array given is {format_shape(array.shape)}"
        )


def _cast(array: np.ndarray, type_: TensorType, precise: bool) -> np.ndarray:
    """Bring a result to the dtype inference promised (float64 for every float in precise runs)."""
    dtype = DType.F64 if precise and type_.dtype.is_float else type_.dtype
    return array if array.dtype == dtype.numpy else array.astype(dtype.numpy)
