"""Functions: a model's own (`model.functions`), and the bodies ONNX itself gives for composite operators.

Both are run by the importer as calls, in a scope of their own; nothing is copied or renamed.  How far calls would
expand is counted first, on the call graph: 24 functions that call one another twice are 2**24 nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import onnx

from cnnc.errors import LimitError, ModelError
from cnnc.frontends.onnx.naming import listed, shown
from cnnc.options import Limits

FunctionKey: TypeAlias = tuple[str, str, str]
"""Domain, name, overload."""


def plain_domain(domain: str) -> str:
    """Give the domain with `ai.onnx` written as the empty one it is a name for."""
    return "" if domain == "ai.onnx" else domain


def function_key(node: onnx.NodeProto) -> FunctionKey:
    """Give the function that a node would call."""
    return plain_domain(node.domain), node.op_type, node.overload


def function_table(model: onnx.ModelProto) -> dict[FunctionKey, onnx.FunctionProto]:
    """Collect a model's functions; raises `ModelError` for two with one name."""
    table: dict[FunctionKey, onnx.FunctionProto] = {}
    for function in model.functions:
        key = (plain_domain(function.domain), function.name, function.overload)
        if not function.name:
            raise ModelError("a function has no name")
        if key in table:
            raise ModelError(f"function {title(key)} is defined twice")
        table[key] = function
    return table


def title(key: FunctionKey) -> str:
    """Write a function's name for a message: `domain::name:overload`."""
    domain, name, overload = key
    text = f"{domain}::{name}" if domain else name
    return shown(f"{text}:{overload}" if overload else text)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Give the graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Give nodes and, after each, those of its subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


@dataclass(frozen=True)
class _Cost:
    """What one call of a function expands to."""

    nodes: int
    calls: int
    depth: int


def check_expansion(
    nodes: Sequence[onnx.NodeProto], functions: Mapping[FunctionKey, onnx.FunctionProto], limits: Limits
) -> None:
    """Check that the calls end and stay within the limits.

    Raises `ModelError` for recursion (printing it), `LimitError` for too many nodes, calls or levels.
    """
    if not functions:
        return
    costs: dict[FunctionKey, _Cost] = {}
    for key in _callees_first(functions):
        costs[key] = _cost(functions[key].node, functions, costs)
    total = _cost(nodes, functions, costs)
    for got, limit, name in (
        (total.calls, limits.expansions, "expansions"),
        (total.nodes, limits.nodes, "nodes"),
        (total.depth - 1, limits.function_depth, "function_depth"),
    ):
        if got > limit:
            raise LimitError(
                f"calls of local functions expand to {total.nodes} nodes by {total.calls} calls, "
                f"{total.depth - 1} levels deep (limit {name}={limit})"
            )


def _cost(
    nodes: Iterable[onnx.NodeProto],
    functions: Mapping[FunctionKey, onnx.FunctionProto],
    costs: Mapping[FunctionKey, _Cost],
) -> _Cost:
    total_nodes = calls = depth = 0
    for node in all_nodes(nodes):
        total_nodes += 1
        key = function_key(node)
        if key in functions:
            callee = costs[key]
            total_nodes += callee.nodes
            calls += 1 + callee.calls
            depth = max(depth, callee.depth)
    return _Cost(total_nodes, calls, depth + 1)


def _callees_first(functions: Mapping[FunctionKey, onnx.FunctionProto]) -> list[FunctionKey]:
    """Order functions so that each comes after those it calls (iterative: calls may nest deep)."""
    callees = {
        key: list(dict.fromkeys(k for k in map(function_key, all_nodes(function.node)) if k in functions))
        for key, function in functions.items()
    }
    order: list[FunctionKey] = []
    finished: set[FunctionKey] = set()
    for root in functions:
        path: dict[FunctionKey, Iterator[FunctionKey]] = {}
        if root not in finished:
            path[root] = iter(callees[root])
        while path:
            caller = next(reversed(path))
            callee = next((k for k in path[caller] if k not in finished), None)
            if callee is None:
                del path[caller]
                finished.add(caller)
                order.append(caller)
            elif callee in path:
                loop = list(path)[list(path).index(callee) :]
                raise ModelError(f"functions call themselves: {listed(title(k)[1:-1] for k in [*loop, callee])}")
            else:
                path[callee] = iter(callees[callee])
    return order


@lru_cache(maxsize=256)
def _schema(op_type: str, opset: int) -> Any:  # the stubs of onnx lack the function members
    try:
        return onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def standard_body(
    node: onnx.NodeProto, opset: int, types: Sequence[onnx.TypeProto | None]
) -> onnx.FunctionProto | None:
    """Give the definition ONNX has for a composite operator, in simpler ones; None where there is none.

    `types` are the inputs' (some bodies depend on them); None stands for an absent input.
    """
    schema = _schema(node.op_type, opset) if plain_domain(node.domain) == "" else None
    if schema is None:
        return None
    body = b""
    versions = [v for v in schema.function_opset_versions if v <= opset]
    if versions:
        body = schema.get_function_with_opset_version(max(versions))
    elif schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
        encoded = [b"" if t is None else t.SerializeToString() for t in types]
        if versions:
            body = schema.get_context_dependent_function_with_opset_version(
                max(versions), node.SerializeToString(), encoded
            )
    return onnx.FunctionProto.FromString(body) if body else None
