"""Build a `Graph` from an ONNX model: `import_model`.

The model is run node by node in scopes of named values: operators' own readers (`cnnc.ir.op.onnx`) make the nodes,
whatever depends on constants only becomes a constant at once, functions and If branches are run in place.  What
cannot be compiled is collected and reported together.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import onnx
from onnx import AttributeProto

import cnnc.ops  # noqa: F401  (registers the operators' ONNX readers)
from cnnc.errors import CnncError, LimitError, ModelError, UnsupportedError, VerifyError
from cnnc.frontends.onnx.check import Checked, check_model, reads
from cnnc.frontends.onnx.fold import SHAPE_READERS, Folding, check_new_nodes, constant_array, fold_by_reference
from cnnc.frontends.onnx.functions import FunctionKey, function_key, plain_domain, standard_body
from cnnc.frontends.onnx.naming import listed, node_title, shown
from cnnc.frontends.onnx.node import OnnxNode, resolve_attributes, schema_defaults, used_outputs
from cnnc.frontends.onnx.reader import ModelFile, read_model
from cnnc.frontends.onnx.shapes import bind_inputs, check_declared, element_type, type_proto
from cnnc.frontends.onnx.signature import standard_signature
from cnnc.frontends.onnx.tensors import decode_tensor, tensor_title
from cnnc.frontends.onnx.values import check_values
from cnnc.ir.build import located
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import ONNX_READERS, OnnxReader, as_tuple
from cnnc.ops.source import Constant, constant, graph_input
from cnnc.options import Limits, format_bytes


class _Lost(Enum):
    """What stands for the result of a node that cannot be compiled."""

    LOST = "lost"


_LOST = _Lost.LOST
_Known: TypeAlias = Value | _Lost | None
"""What a name stands for: a value, a lost one, or an input that a function call leaves out."""


@dataclass(frozen=True)
class Gap:
    """One node that cannot be compiled."""

    op_type: str
    domain: str
    opset: int
    name: str
    reason: str


class UnsupportedNodes(UnsupportedError):
    """Everything in a model that cannot be compiled; `gaps` has one entry a node."""

    def __init__(self, label: str, gaps: Sequence[Gap]) -> None:
        self.gaps = tuple(gaps)
        groups: dict[tuple[str, str, int, str], list[str]] = {}
        for gap in gaps:
            groups.setdefault((gap.domain, gap.op_type, gap.opset, gap.reason), []).append(gap.name)
        parts = []
        for (domain, op_type, opset, reason), names in groups.items():
            operator = shown(f"{domain}::{op_type}" if domain else op_type)[1:-1]
            version = f"(opset {opset})" if not domain else "(no ONNX operator)"
            parts.append(f"{operator} {version} at {listed(names, most=len(names))}: {reason}")
        count = f"{len(gaps)} nodes" if len(gaps) != 1 else "1 node"
        super().__init__(f"{label}: {count} cannot be compiled: {'; '.join(parts)}")


@dataclass
class _Scope:
    """The values known by name inside one graph, branch or function body."""

    opset: int
    parent: _Scope | None = None
    values: dict[str, _Known] = field(default_factory=dict)
    stored: dict[str, onnx.TensorProto] = field(default_factory=dict)
    """Initializers that nothing has read yet."""
    declared: dict[str, onnx.ValueInfoProto] = field(default_factory=dict)
    attributes: Mapping[str, AttributeProto] | None = None
    """The calling node's attributes, inside a function."""
    prefix: str = ""
    """What the names of nodes in here start with."""
    fixed_name: str = ""
    """The one name all nodes in here go by: they are the parts of one node of the model."""


def import_model(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
    limits: Limits | None = None,
) -> Graph:
    """Read an ONNX model and build its graph, every shape a number.

    `shapes` gives whole input shapes by name, `batch` the leading dimension where the model leaves it open (else it
    is taken as 1, with a warning).  Initializers that are listed among the inputs are constants.

    Raises `ModelError` (3), `UnsupportedNodes` (4) naming every node that cannot be compiled, `LimitError` (5),
    `EnvironmentProblem` (6) and, for shapes that contradict the model, `UsageError` (2); each is one line.
    """
    limits = limits or Limits()
    model = read_model(source, limits)
    try:
        checked = check_model(model.proto, limits)
        return _Importer(model, checked, limits).run(shapes, batch)
    except UnsupportedNodes:
        raise
    except MemoryError:
        raise LimitError(f"{model.label}: out of memory") from None
    except CnncError as error:
        raise type(error)(f"{model.label}: {error}") from error.__cause__


class _Importer:
    """One import: the state that all scopes share."""

    def __init__(self, model: ModelFile, checked: Checked, limits: Limits) -> None:
        self.model = model
        self.functions: Mapping[FunctionKey, onnx.FunctionProto] = checked.functions
        self.opset = checked.opset
        self.limits = limits
        self.folding = Folding(limits)
        self.gaps: list[Gap] = []
        self.seen: set[Node] = set()
        self.names: set[str] = set()
        self.position = 0

    def run(self, shapes: Mapping[str, Sequence[int]] | None, batch: int | None) -> Graph:
        graph = self.model.proto.graph
        scope = self._graph_scope(graph, _Scope(self.opset))
        values = [value for value in graph.input if value.name not in scope.stored]
        types = bind_inputs(values, shapes, batch, self.limits)
        inputs = []
        for value, type_ in zip(values, types, strict=True):
            made = graph_input(value.name, type_.shape, type_.dtype)
            self._check_sizes("input " + shown(value.name), made)
            scope.values[value.name] = made
            inputs.append(made)
        names = [value.name for value in graph.output]
        outputs = self._body(graph.node, names, scope)
        if self.gaps:
            raise UnsupportedNodes(self.model.label, self.gaps)
        known = tuple(value for value in outputs if isinstance(value, Value))
        if len(known) < len(names):
            raise ModelError("an output is left out")
        built = Graph(_identifier(graph.name), tuple(inputs), known, tuple(names))
        _check_peak(built, self.limits)
        return built

    def _check_sizes(self, what: str, value: Value) -> None:
        try:
            check_new_nodes([value], self.seen, self.limits)
        except LimitError as error:
            raise LimitError(f"{what}: {error}") from None

    def _graph_scope(self, graph: onnx.GraphProto, scope: _Scope) -> _Scope:
        scope.stored = {tensor.name: tensor for tensor in graph.initializer}
        scope.declared = {value.name: value for value in (*graph.value_info, *graph.output)}
        return scope

    # Names

    def _lookup(self, name: str, scope: _Scope) -> _Known:
        within: _Scope | None = scope
        while within is not None:
            if name in within.values:
                return within.values[name]
            if name in within.stored:
                value = self._stored_value(within.stored.pop(name))
                within.values[name] = value
                return value
            within = within.parent
        raise ModelError(f"{shown(name)} is read before anything defines it")

    def _stored_value(self, tensor: onnx.TensorProto) -> Value | _Lost:
        try:
            element_type(tensor.data_type)
            array = decode_tensor(tensor, self.limits, self.model.folder)
            value = constant(array, label=tensor.name)
        except UnsupportedError as error:
            self.gaps.append(Gap("Initializer", "", self.opset, tensor.name, str(error)))
            return _LOST
        except CnncError as error:
            raise type(error)(f"{tensor_title(tensor)}: {error}") from None
        self.seen.add(value.node)
        return value

    def _name(self, proto: onnx.NodeProto, scope: _Scope) -> str:
        """Give the node's name in messages and profiles: its own, made unique, or its operator and position."""
        if scope.fixed_name:
            return scope.fixed_name
        position = self.position
        self.position += 1
        name = scope.prefix + (proto.name or f"{proto.op_type}_{position}")
        unique, count = name, 1
        while unique in self.names:
            unique = f"{name}_{count}"
            count += 1
        self.names.add(unique)
        return unique

    # Running

    def _body(self, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], scope: _Scope) -> list[_Known]:
        """Run the nodes that the outputs depend on, and give the outputs."""
        live = {name for name in outputs if name}
        needed: list[tuple[onnx.NodeProto, int]] = []
        for proto in reversed(nodes):
            used = used_outputs(proto.output, live)
            if used:
                needed.append((proto, used))
                live |= reads(proto)
        for proto, used in reversed(needed):
            self._node(proto, used, scope)
        return [self._lookup(name, scope) if name else None for name in outputs]

    def _node(self, proto: onnx.NodeProto, used: int, scope: _Scope) -> None:
        name = self._name(proto, scope)
        gaps = len(self.gaps)
        title = node_title(proto.op_type, name, 0)
        try:
            results = self._results(proto, name, used, scope)
            self._bind(proto, results, used, scope)
        except UnsupportedError as error:
            del self.gaps[gaps:]
            reason = _without_location(str(error), name)
            self.gaps.append(Gap(proto.op_type, plain_domain(proto.domain), scope.opset, name, reason))
            scope.values |= dict.fromkeys((n for n in proto.output if n), _LOST)
        except VerifyError:
            raise
        except CnncError as error:
            if scope.fixed_name:
                raise
            raise type(error)(f"{title}: {_without_location(str(error), name)}") from error.__cause__

    def _bind(self, proto: onnx.NodeProto, results: Sequence[_Known], used: int, scope: _Scope) -> None:
        if len(results) < used:
            raise UnsupportedError(f"its output {len(results)} ({shown(proto.output[len(results)])}) is used")
        for name, value in zip(proto.output, results, strict=False):
            if not name:
                continue
            declared = scope.declared.get(name)
            if isinstance(value, Value) and declared is not None:
                check_declared(declared, value.type)
            scope.values[name] = value

    def _results(self, proto: onnx.NodeProto, name: str, used: int, scope: _Scope) -> Sequence[_Known]:
        found = [self._lookup(n, scope) if n else None for n in proto.input]
        attributes = resolve_attributes(proto, scope.attributes)
        node = OnnxNode(proto, scope.opset, name, used, attributes, self.limits, self.model.folder)
        function = self.functions.get(function_key(proto))
        if function is not None:
            return self._call(node, function, found, scope)
        reader = _reader(node)
        inputs = [value for value in found if not isinstance(value, _Lost)]
        if len(inputs) < len(found):
            if reader is None and standard_body(proto, scope.opset, []) is None:
                raise _no_operator(node)
            return [_LOST] * used
        _check_needed(node, inputs)
        check_values(node, inputs)
        if node.op_type == "If" and node.domain == "":
            return self._branch(node, inputs, scope)
        return self._read(node, reader, inputs, scope)

    def _read(
        self, node: OnnxNode, reader: OnnxReader | None, inputs: list[Value | None], scope: _Scope
    ) -> Sequence[_Known]:
        """Try, in this order: the operator's reader, ONNX's own definition, ONNX's reference on constants."""
        try:
            if reader is None:
                raise _no_operator(node)
            return self._apply(node, reader, inputs)
        except UnsupportedError as refusal:
            decomposed = self._decompose(node, inputs, scope)
            if decomposed is not None:
                return decomposed
            folded = fold_by_reference(node, inputs)
            if folded is not None:
                return folded
            raise refusal from None

    def _apply(self, node: OnnxNode, reader: OnnxReader, inputs: list[Value | None]) -> list[Value]:
        try:
            with located([node.name]):
                made = as_tuple(reader(node, *inputs))
        except (CnncError, MemoryError):
            raise
        except Exception as error:
            raise VerifyError(
                f"{node_title(node.op_type, node.name, 0)}: the reader failed: {type(error).__name__}: {error}"
            ) from error
        unread = node.unread()
        if unread:
            raise UnsupportedError(f"the attribute {listed(unread)} is not supported")
        nodes = check_new_nodes(made, self.seen, self.limits)
        labels = [node.proto.output[i] if i < len(node.proto.output) else "" for i in range(len(made))]
        results = self.folding.fold(made, nodes, labels)
        self.seen.update(value.node for value in results)
        return results

    def _decompose(self, node: OnnxNode, inputs: list[Value | None], scope: _Scope) -> Sequence[_Known] | None:
        """Run the definition ONNX gives for an operator; None where there is none, or it cannot be compiled either."""
        body = standard_body(
            node.resolved_proto(), node.opset, [None if value is None else type_proto(value.type) for value in inputs]
        )
        if body is None:
            return None
        gaps = len(self.gaps)
        results = self._call(node, body, inputs, scope, fixed_name=node.name)
        if len(self.gaps) > gaps:
            del self.gaps[gaps:]
            return None
        return results

    def _call(
        self,
        node: OnnxNode,
        function: onnx.FunctionProto,
        inputs: Sequence[_Known],
        scope: _Scope,
        fixed_name: str = "",
    ) -> list[_Known]:
        opset = next((e.version for e in function.opset_import if not plain_domain(e.domain)), scope.opset)
        defaults = {attribute.name: attribute for attribute in function.attribute_proto}
        attributes = defaults | dict(schema_defaults(node)) | dict(node.attributes)
        inner = _Scope(opset, None, attributes=attributes, prefix=f"{node.name}/", fixed_name=fixed_name)
        inner.values = dict.fromkeys(function.input) | dict(zip(function.input, inputs, strict=False))
        inner.fixed_name = fixed_name or scope.fixed_name
        wanted = [name if made else "" for name, made in zip(function.output, node.proto.output, strict=False)]
        return self._body(function.node, wanted[: node.outputs], inner)

    def _branch(self, node: OnnxNode, inputs: list[Value | None], scope: _Scope) -> Sequence[_Known]:
        condition = None if inputs[0] is None else constant_array(inputs[0])
        if condition is None:
            raise UnsupportedError("its condition is known only at run time")
        if condition.size != 1:
            raise ModelError(f"its condition has {condition.size} elements, not 1")
        graph = node.attributes["then_branch" if condition.reshape(-1)[0] else "else_branch"].g
        inner = _Scope(scope.opset, scope, attributes=scope.attributes, prefix=scope.prefix)
        inner.fixed_name = scope.fixed_name
        return self._body(graph.node, [value.name for value in graph.output], self._graph_scope(graph, inner))


def _reader(node: OnnxNode) -> OnnxReader | None:
    if node.domain == "" and node.op_type in SHAPE_READERS:
        return SHAPE_READERS[node.op_type]
    return ONNX_READERS.get((node.domain, node.op_type))


def _check_needed(node: OnnxNode, inputs: Sequence[Value | None]) -> None:
    """Check that no input an operator must have is one that a function call leaves out."""
    signature = standard_signature(node.op_type, node.opset) if node.domain == "" else None
    needed = () if signature is None else signature.needed
    for position, (value, is_needed) in enumerate(zip(inputs, needed, strict=False)):
        if is_needed and value is None:
            name = shown(node.proto.input[position])
            raise ModelError(f"input {position} ({name}) is left out by the call of the function")


def _no_operator(node: OnnxNode) -> UnsupportedError:
    if node.domain:
        return UnsupportedError("no function of the model and no operator of cnnc has this name")
    if not onnx.defs.has(node.op_type, ""):
        return UnsupportedError("ONNX has no such operator")
    return UnsupportedError("cnnc has no such operator")


def _without_location(message: str, name: str) -> str:
    return " ".join(message.removesuffix(f" (at {name})").split())


def _identifier(name: str) -> str:
    """Make a graph's name an identifier; the model's own is free text."""
    word = re.sub(r"[^A-Za-z0-9_]+", "_", name)[:64].strip("_")
    return f"graph_{word}" if word[:1].isdigit() else word or "graph"


def _check_peak(graph: Graph, limits: Limits) -> None:
    """Check that weights, and the tensors alive at any moment, stay within the memory limit."""
    left = {value: len(users) for value, users in graph.users.items()}
    for value in graph.outputs:
        left[value] += 1
    alive = peak = 0
    for node in graph.nodes:
        alive += sum(type_.nbytes for type_ in node.types)
        peak = max(peak, alive)
        for value in (*node.inputs, *node.values):
            left[value] -= value in node.inputs
            if left[value] == 0 and not isinstance(value.op, Constant):
                alive -= value.type.nbytes
                left[value] = -1
    if peak > limits.memory:
        raise LimitError(
            f"weights and live tensors take {format_bytes(peak)} (limit memory={format_bytes(limits.memory)})"
        )
