"""Unpool without indices where a max pool of windows that do not overlap made them.

    max_unpool(v, indices of max_pool(x)) -> tap_unpool(v, arg_max_pool(x))
    values of max_pool{with_indices}(x)   -> max_pool(x)                       where nothing reads its indices

An index then lies in the window it comes from, so each element of the output knows the one value it may get: nothing
is searched, scattered or checked at run time, channels may lie in blocks, and taps are half as large as indices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import map_graph, miss, rebuild, record, rewrite
from cnnc.ops.pool import MaxPool
from cnnc.ops.unpool import ArgMaxPool, MaxUnpool, TapUnpool
from cnnc.passes.registry import Pass
from cnnc.target import Target


@dataclass(frozen=True)
class LocalUnpool(Pass):
    """Replace unpooling at indices by unpooling at taps, and leave out indices that nothing reads."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with fewer indices."""
        return _without_unread_indices(rewrite(graph, (unpool_at_taps,)))


def unpool_at_taps(v: Value) -> Value | None:
    """max_unpool(v, indices of max_pool(x)) -> tap_unpool(v, arg_max_pool(x))."""
    match v.node:
        case Node(MaxUnpool() as unpool, (values, Value(Node(MaxPool() as pool, (x,)), 1))):
            if any(pool.pad) or pool.ceil_mode or any(d != 1 for d in pool.dilation) or pool.column_major:
                miss("the windows of the pool hang over, have gaps or count by columns")
                return None
            if x.shape != v.shape:
                miss("the indices count through another shape than the pool's")
                return None
            try:
                taps = call(ArgMaxPool(pool.kernel, pool.stride), x)
                if taps.dtype is not values.dtype:
                    miss("the values have another type than what was pooled")
                    return None
                return call(TapUnpool(pool.kernel, pool.stride, unpool.size), values, taps)
            except ShapeError:
                miss("the windows overlap, or are of integers")
                return None
    return None


def _without_unread_indices(graph: Graph) -> Graph:
    """max_pool{with_indices}(x) -> max_pool(x) where nothing reads the indices."""
    outputs = set(graph.outputs)

    def lean(node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        op = node.op
        if not isinstance(op, MaxPool) or not op.with_indices:
            return rebuild(node, inputs)
        indices = node.values[1]
        if indices in outputs or graph.users[indices]:
            return rebuild(node, inputs)
        pooled = call(replace(op, with_indices=False, column_major=False), *inputs, loc=node.loc)
        record("unread_indices", node.values[0], pooled)
        return (pooled, *rebuild(node, inputs)[1:])

    return map_graph(graph, lean)
