"""Choose layouts for the whole graph: channels in blocks of one vector (NCHW16c), or plain.

    relu(conv(x, w)) -> layout_transform{plain}(relu(conv(layout_transform{NCHW16c}(x), w in OIHW16i16o)))

Every operator that takes blocked tensors (its `infer_layout` says so) has a cost in either layout, and every value a
cost of being changed from its maker's layout to its readers', paid once however many they are.  The cheapest
assignment of the two labels is a minimum cut; NeoCPU (USENIX ATC'19, section 3.3) sets the same problem and solves it
by dynamic programming, approximately where the graph is no chain.  Transforms of constants are done here, so weights
change nothing but their declared layout.  A convolution of few channels, as the first one, reads plain data itself; on
tensor cores where a template of the back end is for that.

Of graphs of one network for several batch sizes the first decides how each weight lies, and the others follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias, runtime_checkable

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.layout import Layout
from cnnc.ir.literal import Literal
from cnnc.ir.op import Kind, Op
from cnnc.ir.rewrite import map_graph, rebuild
from cnnc.ir.types import DType, TensorType
from cnnc.ops.blocked import channel_layout, tile_layout, weight_layout
from cnnc.ops.conv import Conv, fills_tiles
from cnnc.ops.digit_conv import DigitConv, digits_layout
from cnnc.ops.fused import Fused
from cnnc.ops.layout_transform import LayoutTransform
from cnnc.ops.source import Constant
from cnnc.ops.winograd import winograd_layout
from cnnc.ops.winograd_digit_conv import WinogradDigitConv, positions_digits_layout, positions_unit_layout
from cnnc.passes.layout_cut import BLOCKED, PLAIN, Edge, blocked_side
from cnnc.passes.registry import Pass
from cnnc.passes.views import renames_memory
from cnnc.target import Target

Wanted: TypeAlias = dict[Node, tuple[Layout | None, ...]]
"""Nodes that can compute in blocks, with the layouts their inputs then have."""

Decisions: TypeAlias = dict[tuple[Op, Op], tuple[Layout | None, ...]]
"""The layouts of the inputs of each convolution so far, by itself and its weight."""


@runtime_checkable
class ReadsPlain(Protocol):
    """A kernel template for convolutions that read a plain image though their result lies in blocks."""

    def prefers_plain(self, node: Node, block: int, target: Target) -> bool:
        """Whether that is better than to change the image's layout, and then to use tensor cores."""


@dataclass(frozen=True)
class Form:
    """The blocked layout a graph may use: channels in a block, and whether convolutions are for tensor cores.

    `reads_plain` says which of those should read an image as it comes all the same.
    """

    block: int
    tensor_cores: bool = False
    reads_plain: Callable[[Node], bool] = lambda node: False


CONVOLUTIONS = Conv | DigitConv | WinogradDigitConv

RANK = 4
"""The rank of the tensors that are blocked: images."""

OVERHEAD = 2e-6
"""Seconds to start one more kernel."""

BANDWIDTH = 2e10
"""Bytes a second; like the other rates, only their ratios decide."""

FLOPS_PER_LANE = 4e9
"""Floating-point operations a second of one vector lane in a blocked kernel."""

PLAIN_FLOPS = 4e9
"""Floating-point operations a second of a reduction in plain layout."""


@dataclass(frozen=True)
class AssignLayouts(Pass):
    """Assign layouts; `block` is the channel block, by default the lanes of the target's vectors.

    `tensor_cores` is for GPUs whose convolutions read blocks of 16 bytes, and weights that lie as their tiles do.
    `templates` are the back end's, of which those that `ReadsPlain` are asked about images.
    """

    block: int = 0
    tensor_cores: bool = False
    templates: tuple[object, ...] = field(default=(), metadata={"option": False})

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with layouts chosen and transforms put in.

        Graphs with kernels in them stay as they are, and so do those for a GPU without tensor cores: blocks are the
        vectors of a CPU.
        """
        return self.run_together((graph,), target)[0]

    def run_together(self, graphs: Sequence[Graph], target: Target) -> tuple[Graph, ...]:
        """Choose for the first graph; the others follow it in how weights lie."""
        if target.is_gpu != self.tensor_cores:
            return tuple(graphs)
        block, asked = self.block or target.vector_lanes, [t for t in self.templates if isinstance(t, ReadsPlain)]

        def reads_plain(node: Node) -> bool:
            return _comes_plain(node.inputs[0]) and any(t.prefers_plain(node, block, target) for t in asked)

        form = Form(block, self.tensor_cores, reads_plain)
        if form.block == 1 or any(isinstance(node.op, Fused) for graph in graphs for node in graph.nodes):
            return tuple(graphs)
        decided: Decisions | None = {} if len(graphs) > 1 else None
        plain = map(_all_plain, graphs)
        return tuple(_rewrite(graph, _choose(graph, form, decided), form, decided) for graph in plain)


def _all_plain(graph: Graph) -> Graph:
    """Give the graph without layouts, so that the choice does not depend on an earlier one."""

    def strip(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
        if isinstance(node.op, LayoutTransform):
            return inputs
        if isinstance(node.op, Constant) and node.op.layout is not None:
            return call(replace(node.op, layout=None), loc=node.loc).node.values
        return rebuild(node, inputs)

    return map_graph(graph, strip)


# What an operator wants


def wanted_layouts(node: Node, form: Form) -> tuple[Layout | None, ...] | None:
    """Give the layouts of the inputs with which an operator computes in blocks; None where it cannot.

    The graph is plain.  The operator must give blocked f32 images for them.
    """
    if not node.inputs or any(t.rank != RANK or t.dtype is not DType.F32 for t in node.types):
        return None
    layout = channel_layout(RANK, form.block)
    wanted = _conv_layouts(node, form) if isinstance(node.op, CONVOLUTIONS) else _image_layouts(node, layout)
    try:
        inferred = infer_types(node.op, tuple(_adapted(v, w) for v, w in zip(node.inputs, wanted, strict=True)))
    except ShapeError:
        return None
    return wanted if all(t.layout == layout for t in inferred) else None


def _image_layouts(node: Node, layout: Layout | None) -> tuple[Layout | None, ...]:
    """Want every image, and every constant that differs from channel to channel, in blocks."""
    return tuple(layout if _has_channels(v, node) else None for v in node.inputs)


def _has_channels(v: Value, node: Node) -> bool:
    """Whether a value lies beside the output's channels; one channel for all and vectors taken by name do not."""
    if v.dtype is not DType.F32:
        return False
    if isinstance(v.op, Constant) and node.op.kind is Kind.ELEMENTWISE and v.type.rank == RANK - 1:
        return v.shape[0] != 1
    return v.type.rank == RANK and v.shape[1] != 1


def _conv_layouts(node: Node, form: Form, plain: bool = False) -> tuple[Layout | None, ...]:
    """Want OIHW{b}i{b}o weights, or OIHW{b}o where groups fit into blocks or few channels are read plain.

    Transformed weights are wanted as HWOI{b}i{b}o, those for tensor cores as HWIO{b}i, digits as matrix units do.
    """
    w, block = node.inputs[1].type, form.block
    if isinstance(node.op, DigitConv):
        return (channel_layout(RANK, block), digits_layout(block), *(None for _ in node.inputs[2:]))
    if isinstance(node.op, WinogradDigitConv):
        digits = (positions_digits_layout(block), positions_unit_layout(block))
        return (channel_layout(RANK, block), *digits, *(None for _ in node.inputs[3:]))
    plain = plain or (form.tensor_cores and form.reads_plain(node))
    if form.tensor_cores and not plain and isinstance(node.op, Conv) and fills_tiles(node.op, w, block):
        return (channel_layout(w.rank, block), tile_layout(w.rank, block), *(None for _ in node.inputs[2:]))
    if isinstance(node.op, Conv) and node.op.tile is not None:
        return (channel_layout(w.rank, block), winograd_layout(block, block), *(None for _ in node.inputs[2:]))
    channels = w.static_shape[1]
    inside = not _is_dense(node) and channels < block and channels > 0 and block % channels == 0
    reads_plain = plain or (_is_dense(node) and channels < block and not _reads_either(node, form))
    weights = weight_layout(w.rank, 1 if inside or reads_plain else block, block)
    return (None if reads_plain else channel_layout(w.rank, block), weights, *(None for _ in node.inputs[2:]))


def _comes_plain(v: Value) -> bool:
    """Whether a value is the network's, or follows from such, element by element: nothing before it is blocked."""
    pending, seen = [v.node], {v.node}
    while pending:
        node = pending.pop()
        if node.inputs and node.op.kind is not Kind.ELEMENTWISE:
            return False
        before = {value.node for value in node.inputs} - seen
        seen |= before
        pending += before
    return True


def _is_dense(node: Node) -> bool:
    """Whether a convolution has one group, and its weight as it is."""
    return isinstance(node.op, Conv) and node.op.groups == 1 and node.op.tile is None


def _reads_either(node: Node, form: Form) -> bool:
    """Whether a convolution of few channels had better take them as they come.

    Plain ones cost nothing; of blocked ones it computes on pad lanes too, which must be cheaper than a transform.
    """
    if form.tensor_cores or not _is_dense(node) or not 0 < node.inputs[1].type.static_shape[1] < form.block:
        return False
    padding = form.block / node.inputs[1].type.static_shape[1] - 1
    flops = node.op.flops(*(v.type for v in node.inputs))
    return flops * padding / (FLOPS_PER_LANE * form.block) < _transform_cost(node.inputs[0], form)


def _adapted(v: Value, layout: Layout | None) -> TensorType:
    """Give the type a value has once it is in a layout; constants grow leading axes for it."""
    if layout is None:
        return v.type
    return TensorType((1,) * (layout.rank - v.type.rank) + v.shape, v.dtype, layout)


# Costs, in seconds; only their proportions matter


def _node_cost(node: Node, form: Form, blocked: bool) -> float:
    """Estimate a node in one layout: arithmetic for reductions, the bytes moved for the rest.

    Half the bytes for a blocked elementwise operator, which mostly rides in the kernel of the convolution before it.
    """
    moved = sum(v.type.nbytes for v in node.inputs) + sum(t.nbytes for t in node.types)
    if node.op.kind is Kind.ELEMENTWISE:
        return moved / BANDWIDTH / (2 if blocked else 1)
    channels = max((t.static_shape[1] for t in node.types), default=1)
    lanes = form.block if blocked else 1
    waste = -(-channels // lanes) * lanes / max(channels, 1)
    seconds = moved / BANDWIDTH * waste
    if node.op.kind is Kind.REDUCTION:
        flops = node.op.flops(*(v.type for v in node.inputs))
        seconds += flops * waste / (FLOPS_PER_LANE * form.block) if blocked else flops / PLAIN_FLOPS
    return seconds


def _transform_cost(v: Value, form: Form) -> float:
    """Estimate changing a value's layout; nothing where only the name changes."""
    blocked = v.type.with_layout(channel_layout(RANK, form.block))
    if renames_memory(v.type, blocked):
        return 0.0
    return OVERHEAD + (v.type.nbytes + blocked.nbytes) / BANDWIDTH


# The choice


def _choose(graph: Graph, form: Form, decided: Decisions | None = None) -> Wanted:
    """Give the nodes to compute in blocks, each with the layouts of its inputs."""
    wanted = {node: w for node in graph.nodes if (w := wanted_layouts(node, form)) is not None}
    if not any(isinstance(node.op, CONVOLUTIONS) for node in wanted):
        return {}
    return {node: wanted[node] for node in _minimum_cut(graph, wanted, form, decided)}


def _minimum_cut(graph: Graph, wanted: Wanted, form: Form, decided: Decisions | None = None) -> set[Node]:
    """Give the nodes on the blocked side of the cheapest cut that keeps to what is decided."""
    edges = list(_edges(graph, wanted, form))
    gain = {n: _node_cost(n, form, blocked=False) - _node_cost(n, form, blocked=True) for n in wanted}
    return blocked_side(gain, edges, _labels(wanted, decided or {}))


def _edges(graph: Graph, wanted: Wanted, form: Form) -> Iterator[Edge]:
    """List the values whose layout may have to change."""
    outputs = set(graph.outputs)
    for value, users in graph.users.items():
        if isinstance(value.op, Constant) or value.type.rank != RANK or value.dtype is not DType.F32:
            continue
        maker = value.node if value.node in wanted else PLAIN
        strict = (user for user in users if user not in wanted or not _reads_either(user, form))
        readers = dict.fromkeys(_reader(user, value, wanted) for user in strict)
        if value in outputs:
            readers[PLAIN] = None
        if set(readers) - {maker}:
            yield Edge(value, maker, tuple(readers), _transform_cost(value, form))


def _labels(nodes: Iterable[Node], decided: Decisions) -> dict[Node, str]:
    """Label the convolutions that are decided."""
    found = {node: decided.get(layer) for node in nodes if decided and (layer := _layer(node)) is not None}
    return {node: BLOCKED if any(layouts) else PLAIN for node, layouts in found.items() if layouts is not None}


def _reader(user: Node, value: Value, wanted: Wanted) -> Node | str:
    """Give what decides in which layout a node reads a value: its own label, or plain in any case."""
    if user not in wanted:
        return PLAIN
    layouts = [layout for v, layout in zip(user.inputs, wanted[user], strict=True) if v == value]
    return PLAIN if None in layouts else user


# The new graph


def _layer(node: Node) -> tuple[Op, Op] | None:
    """Name a convolution by itself and its constant weight; None for anything else."""
    if not isinstance(node.op, CONVOLUTIONS) or not isinstance(node.inputs[1].op, Constant):
        return None
    return (node.op, node.inputs[1].op)


def _rewrite(graph: Graph, blocked: Wanted, form: Form, decided: Decisions | None) -> Graph:
    """Rebuild the graph, each value changed to another layout at most once; keeps to what is decided and adds to it."""
    changed: dict[tuple[Value, Layout | None], Value] = {}

    def place(node: Node, inputs: tuple[Value, ...]) -> Sequence[Value]:
        layouts = blocked.get(node, (None,) * len(inputs))
        if node in blocked and inputs[0].type.layout is None and _reads_either(node, form):
            layouts = _conv_layouts(node, form, plain=True)
        if decided is not None and (layer := _layer(node)) is not None:
            layouts = decided.setdefault(layer, layouts)
        return rebuild(node, tuple(_in_layout(v, w, changed) for v, w in zip(inputs, layouts, strict=True)))

    placed = map_graph(graph, place)
    outputs = tuple(_in_layout(v, None, changed) for v in placed.outputs)
    return Graph(graph.name, placed.inputs, outputs, graph.output_names)


def _in_layout(v: Value, layout: Layout | None, changed: dict[tuple[Value, Layout | None], Value]) -> Value:
    """Give a value in a layout; a constant is simply declared to be in it."""
    if v.type.layout == layout:
        return v
    if (v, layout) not in changed:
        if isinstance(v.op, Constant):
            array = v.op.value.array
            rank = array.ndim if layout is None else layout.rank
            grown = (
                Literal(array.reshape((1,) * (rank - array.ndim) + array.shape)) if rank > array.ndim else v.op.value
            )
            changed[v, layout] = call(replace(v.op, value=grown, layout=layout), loc=v.node.loc)
        else:
            changed[v, layout] = call(LayoutTransform(layout), v, loc=v.node.loc)
    return changed[v, layout]
