"""Check a parsed model before anything is built from it: versions, names, order, schemas, stored tensors.

Nodes that stand before what they read are put in order, with a warning; everything else that is wrong is refused.
"""

from __future__ import annotations

import heapq
import warnings
from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx

from cnnc.errors import CnncError, LimitError, ModelError, UnsupportedError
from cnnc.frontends.onnx.functions import (
    FunctionKey,
    all_nodes,
    check_expansion,
    function_table,
    plain_domain,
    subgraphs,
    title,
)
from cnnc.frontends.onnx.naming import nearest, node_title, shown
from cnnc.frontends.onnx.signature import check_attribute, check_node
from cnnc.frontends.onnx.tensors import check_dims, dtype_name, total_bytes
from cnnc.options import Limits

OLDEST_OPSET = 7
NEWEST_OPSET: int = onnx.defs.onnx_opset_version()
_CYCLE_SHOWN = 8

Names: TypeAlias = ChainMap[str, str]
"""What the names of the graphs around a graph stand for, the innermost first."""


@dataclass(frozen=True)
class Checked:
    """What the check found out about a model."""

    opset: int
    functions: Mapping[FunctionKey, onnx.FunctionProto]


@dataclass(frozen=True)
class _Region:
    """A graph or function body under check: what holds for all nodes in it."""

    opset: int
    functions: Mapping[FunctionKey, onnx.FunctionProto]
    parameters: Collection[str] | None
    limits: Limits


def check_model(model: onnx.ModelProto, limits: Limits) -> Checked:
    """Check a whole model, its functions and subgraphs; unordered nodes are sorted in place.

    Raises `ModelError` (3) for an invalid model, `UnsupportedError` (4) for versions out of range,
    `LimitError` (5); each message is one line and names the node, without the file.
    """
    if model.ir_version < 1:
        raise ModelError("not an ONNX file: no IR version")
    if model.ir_version > onnx.IR_VERSION:
        raise UnsupportedError(f"IR version {model.ir_version}; the installed onnx reads up to {onnx.IR_VERSION}")
    if not model.HasField("graph"):
        raise ModelError("has no graph")
    opset = _opset(model.opset_import, "the model")
    if not opset and any(plain_domain(node.domain) == "" for node in all_nodes(model.graph.node)):
        raise ModelError("the model imports no opset (opset_import is missing)")
    opset = opset or NEWEST_OPSET
    functions = function_table(model)
    check_expansion(model.graph.node, functions, limits)
    total_bytes(_stored_tensors(model), limits)
    for key, function in functions.items():
        try:
            _check_function(function, functions, opset, limits)
        except CnncError as error:
            raise type(error)(f"function {title(key)}: {error}") from None
    region = _Region(opset, functions, None, limits)
    for value in model.graph.input:
        if not value.HasField("type"):
            raise ModelError(f"input {shown(value.name)} has no type")
    _check_graph(model.graph, ChainMap(), region)
    if not model.graph.output:
        raise ModelError("the graph has no outputs")
    return Checked(opset, functions)


def _opset(imports: Iterable[onnx.OperatorSetIdProto], where: str) -> int:
    """Give the version of ONNX's own operators; 0 where they are not imported."""
    versions: dict[str, int] = {}
    for entry in imports:
        domain = plain_domain(entry.domain)
        if versions.setdefault(domain, entry.version) != entry.version:
            raise ModelError(f"{where} imports two versions of domain {shown(domain)}")
    if "" not in versions:
        return 0
    version = versions[""]
    if version < 1:
        raise ModelError(f"{where} imports opset {version}; opsets start at 1")
    if not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise UnsupportedError(
            f"{where} imports opset {version}; {OLDEST_OPSET} to {NEWEST_OPSET} are supported "
            "(onnx.version_converter changes a model's)"
        )
    return version


def _stored_tensors(model: onnx.ModelProto) -> Iterable[onnx.TensorProto]:
    """Give every dense tensor in the model: initializers, and values of Constant nodes and other attributes."""
    yield from model.graph.initializer
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    for body in bodies:
        for node in all_nodes(body):
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
            for graph in subgraphs(node):
                yield from graph.initializer


def _check_function(
    function: onnx.FunctionProto,
    functions: Mapping[FunctionKey, onnx.FunctionProto],
    model_opset: int,
    limits: Limits,
) -> None:
    opset = _opset(function.opset_import, "it") or model_opset
    parameters = [*function.attribute, *(a.name for a in function.attribute_proto)]
    _unique(parameters, "attribute")
    for attribute in function.attribute_proto:
        check_attribute(attribute, None)
    _unique(function.input, "input")
    _unique(function.output, "output")
    region = _Region(opset, functions, frozenset(parameters), limits)
    known = dict.fromkeys(function.input, "an input")
    _check_nodes(function, known, ChainMap(), region)
    _check_outputs(function.output, known, ChainMap())


def _check_graph(graph: onnx.GraphProto, outer: Names, region: _Region) -> None:
    _unique((value.name for value in graph.input), "input")
    _unique((value.name for value in graph.output), "output")
    _unique((tensor.name for tensor in graph.initializer), "initializer")
    for value in (*graph.input, *graph.output, *graph.value_info):
        check_value_info(value, region.limits)
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise UnsupportedError(f"sparse initializer {shown(name)}; store it dense")
    known = dict.fromkeys((value.name for value in graph.input), "an input")
    known |= dict.fromkeys((tensor.name for tensor in graph.initializer), "an initializer")
    for name in known:
        if name in outer:
            raise ModelError(f"{shown(name)} is defined in a subgraph and as {outer[name]} outside of it")
    _check_nodes(graph, known, outer, region)
    _check_outputs([value.name for value in graph.output], known, outer)


def _unique(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name:
            raise ModelError(f"an {what} has no name")
        if name in seen:
            raise ModelError(f"{what} {shown(name)} is defined twice")
        seen.add(name)


def _check_outputs(names: Iterable[str], known: Mapping[str, str], outer: Names) -> None:
    for name in names:
        if name not in known and name not in outer:
            raise ModelError(f"output {shown(name)} is made by no node{nearest(name, [*known, *outer])}")


def check_value_info(value: onnx.ValueInfoProto, limits: Limits) -> None:
    """Check a declared type: an element type that exists, dimensions in range (-1 may mean an open one)."""
    if not value.HasField("type") or not value.type.HasField("tensor_type"):
        return
    tensor_type = value.type.tensor_type
    try:
        dtype_name(tensor_type.elem_type)
        check_dims((0 if dim.dim_value == -1 else dim.dim_value for dim in tensor_type.shape.dim), limits)
    except (ModelError, LimitError) as error:
        raise type(error)(f"{shown(value.name)}: {error}") from None


def _check_nodes(
    body: onnx.GraphProto | onnx.FunctionProto, known: dict[str, str], outer: Names, region: _Region
) -> None:
    """Check the nodes of a graph or function; adds what they define to `known`."""
    makers = _makers(body, known, outer)
    if _in_order(body, makers, known, outer):
        order = list(range(len(body.node)))
    else:
        order = _sorted(body, makers)
        warnings.warn("nodes stand before what they read; they were put in order", stacklevel=2)
        nodes = [onnx.NodeProto.FromString(body.node[i].SerializeToString()) for i in order]
        del body.node[:]
        body.node.extend(nodes)
    known |= dict.fromkeys(makers, "another node's output")
    visible = ChainMap(known, *outer.maps)
    for position, node in zip(order, body.node, strict=True):
        try:
            check_node(node, region.opset, region.functions, region.parameters)
            for graph in subgraphs(node):
                _check_graph(graph, visible, region)
        except CnncError as error:
            raise type(error)(f"{node_title(node.op_type, node.name, position)}: {error}") from None


def _title(body: onnx.GraphProto | onnx.FunctionProto, position: int) -> str:
    node = body.node[position]
    return node_title(node.op_type, node.name, position)


def _makers(body: onnx.GraphProto | onnx.FunctionProto, known: Mapping[str, str], outer: Names) -> dict[str, int]:
    """Give the node that makes each name; raises `ModelError` where two definitions meet."""
    makers: dict[str, int] = {}
    for position, node in enumerate(body.node):
        for name in node.output:
            if not name:
                continue
            if name in makers:
                other = _title(body, makers[name])
                raise ModelError(f"{shown(name)} is made twice: by {other} and by {_title(body, position)}")
            if name in known or name in outer:
                what = known.get(name) or outer.get(name)
                raise ModelError(f"{shown(name)} is {what}, and an output of {_title(body, position)}")
            makers[name] = position
    return makers


def reads(node: onnx.NodeProto) -> set[str]:
    """Give the names a node reads: its inputs, and what its subgraphs take from around them."""
    names = {name for name in node.input if name}
    for graph in subgraphs(node):
        names |= _captured(graph)
    return names


def _captured(graph: onnx.GraphProto) -> set[str]:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    wanted = {value.name for value in graph.output}
    for node in graph.node:
        own.update(node.output)
        wanted |= reads(node)
    return wanted - own


def _in_order(
    body: onnx.GraphProto | onnx.FunctionProto,
    makers: Mapping[str, int],
    known: Mapping[str, str],
    outer: Names,
) -> bool:
    ordered = True
    for position, node in enumerate(body.node):
        for name in sorted(reads(node)):
            maker = makers.get(name)
            if maker is not None:
                ordered = ordered and maker < position
            elif name not in known and name not in outer:
                hint = nearest(name, [*known, *makers, *outer])
                raise ModelError(f"{_title(body, position)} reads {shown(name)}, which nothing defines{hint}")
    return ordered


def _sorted(body: onnx.GraphProto | onnx.FunctionProto, makers: Mapping[str, int]) -> list[int]:
    """Order the nodes so that each comes after what it reads, the file's order kept where possible (Kahn)."""
    waits = [{makers[name] for name in reads(node) if name in makers} for node in body.node]
    readers: list[list[int]] = [[] for _ in waits]
    for position, makers_of in enumerate(waits):
        for maker in makers_of:
            readers[maker].append(position)
    counts = [len(w) for w in waits]
    ready = [position for position, count in enumerate(counts) if not count]
    order: list[int] = []
    while ready:
        position = heapq.heappop(ready)
        order.append(position)
        for reader in readers[position]:
            counts[reader] -= 1
            if not counts[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(waits):
        raise ModelError(f"the graph has a cycle: {_cycle(body, waits, {i for i, c in enumerate(counts) if c})}")
    return order


def _cycle(body: onnx.GraphProto | onnx.FunctionProto, waits: list[set[int]], stuck: set[int]) -> str:
    """Follow the nodes that wait for each other until one comes again."""
    path = [min(stuck)]
    seen = {path[0]: 0}
    while True:
        position = min(waits[path[-1]] & stuck)
        if position in seen:
            break
        seen[position] = len(path)
        path.append(position)
    loop = path[seen[position] :][::-1]
    titles = [_title(body, i) for i in loop[:_CYCLE_SHOWN]]
    if len(loop) > _CYCLE_SHOWN:
        titles.append(f"({len(loop) - _CYCLE_SHOWN} more)")
    return " -> ".join([*titles, titles[0]])
