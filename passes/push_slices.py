"""Compute only what is read: slices move before the matrix products whose results they cut.

    slice(dense(x, w), rows) -> dense(slice(x, rows), w)
    slice(attention(q, k, v), queries) -> attention(slice(q, queries), k, v)

and likewise through layer norms, softmax, and through elementwise operators and moves that lie on the way.  A
transformer that classifies by its first token needs only that one after the last attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.op import Kind
from cnnc.ir.rewrite import rewrite, sole_use
from cnnc.ops.attention import Attention
from cnnc.ops.binary import Add, Div, Mul, Sub
from cnnc.ops.dense import Dense, MatMul
from cnnc.ops.norm import LayerNorm
from cnnc.ops.reshape import Reshape, Transpose
from cnnc.ops.slice import Slice
from cnnc.ops.softmax import Softmax
from cnnc.passes.cse import Cse
from cnnc.passes.registry import Pass
from cnnc.target import Target

FARTHEST = 8
"""Operators looked through for a product to move before: a bound on work."""

MOST_ROUNDS = 100
"""Rounds of rewriting: one for each layer that is read in parts, at most."""


@dataclass(frozen=True)
class PushSlices(Pass):
    """Move slices before the products they cut."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph that computes less; equal slices become one, so that what they cut may be theirs alone."""
        for _ in range(MOST_ROUNDS):
            moved = rewrite(graph, (push_slice,))
            if moved.outputs == graph.outputs:
                break
            graph = Cse().run(moved, target)
        return graph


def push_slice(v: Value) -> Value | None:
    """slice(f(x)) -> f(slice(x)) where that leads to a product that nothing else reads."""
    match v.node:
        case Node(Slice() as cut, (x,)) if x.type.is_static and 0 not in v.shape and _leads_to_work(x, cut, FARTHEST):
            return _pushed(x, cut)
    return None


def _axes(cut: Slice, x: Value) -> set[int]:
    """Give the axes that are not taken whole."""
    spans = zip(cut.starts, cut.sizes, cut.steps, x.shape, strict=True)
    return {axis for axis, (start, size, step, whole) in enumerate(spans) if (start, size, step) != (0, whole, 1)}


def _leads_to_work(x: Value, cut: Slice, farthest: int) -> bool:
    """Whether a slice can move through what makes x, and comes to a product or a norm that way."""
    if not farthest or not sole_use(x) or x.type.layout is not None or not _axes(cut, x):
        return False
    axes, rank = _axes(cut, x), x.type.rank
    match x.node:
        case Node(Dense()):
            return rank - 1 not in axes
        case Node(Attention()):
            return axes == {1}
        case Node(MatMul(), (a, b)):
            return axes == {rank - 2} and a.type.rank == rank and b.type.rank > 1
        case Node(LayerNorm(axis)):
            return max(axes) < axis % rank
        case Node(Softmax(axis)):
            return axis % rank not in axes
    return any(_leads_to_work(source, part, farthest - 1) for source, part in _sources(x, cut))


def _sources(x: Value, cut: Slice) -> list[tuple[Value, Slice]]:
    """Give what an operator in between would read of its inputs; [] where a slice cannot move through it."""
    match x.node:
        case Node(Transpose(perm), (source,)):
            order = [perm.index(axis) for axis in range(len(perm))]
            starts, steps = (tuple(field[axis] for axis in order) for field in (cut.starts, cut.steps))
            return [(source, Slice(starts, tuple(cut.sizes[axis] for axis in order), steps))]
        case Node(Reshape(), (source,)):
            part = _through_reshape(source, x, cut)
            return [] if part is None else [(source, part)]
        case Node(Add() | Sub() | Mul() | Div(), (a, b)):
            return [(source, _broadcast(source, x, cut)) for source in (a, b)]
        case Node(op, (source,)) if op.kind is Kind.ELEMENTWISE and source.shape == x.shape:
            return [(source, cut)]
    return []


def _through_reshape(source: Value, x: Value, cut: Slice) -> Slice | None:
    """Give the slice of a reshape's input, where all axes that are cut stand before those that change."""
    common = 0
    while common < min(source.type.rank, x.type.rank) and source.shape[common] == x.shape[common]:
        common += 1
    if max(_axes(cut, x)) >= common:
        return None
    rest = source.shape[common:]
    return Slice(
        cut.starts[:common] + (0,) * len(rest), cut.sizes[:common] + rest, cut.steps[:common] + (1,) * len(rest)
    )


def _broadcast(source: Value, x: Value, cut: Slice) -> Slice:
    """Give the slice of an operand that broadcasts to x."""
    missing = x.type.rank - source.type.rank
    spans = list(zip(cut.starts, cut.sizes, cut.steps, strict=True))[missing:]
    kept = [(0, 1, 1) if size == 1 else span for size, span in zip(source.shape, spans, strict=True)]
    return Slice(*(tuple(field) for field in zip(*kept, strict=True))) if kept else Slice((), (), ())


def _pushed(x: Value, cut: Slice) -> Value:
    """Give x cut, its operator after the slices of its inputs."""
    match x.node:
        case Node(Softmax() as op, (source,)):
            return call(op, _cut(source, cut))
        case Node(Dense() | LayerNorm() as op, (source, *others)):
            features = source.shape[-1:]
            return call(op, _cut(source, replace(cut, sizes=cut.sizes[:-1] + features)), *others)
        case Node(Attention() as op, (q, k, v, *mask)):
            rows = replace(cut, sizes=cut.sizes[:-1] + q.shape[-1:])
            return call(op, _cut(q, rows), k, v, *(_cut(m, _mask_rows(m, cut)) for m in mask))
        case Node(MatMul(transpose_a) as op, (a, b)):
            return call(op, _cut(a, _matrix_rows(a, cut, transpose_a)), b)
        case Node(Reshape(), (source,)):
            ((_, part),) = _sources(x, cut)
            return call(Reshape(cut.sizes), _cut(source, part))
        case node:
            return call(node.op, *(_cut(source, part) for source, part in _sources(x, cut)))


def _rows(axis: int, shape: Sequence[int], cut: Slice, along: int) -> Slice:
    """Cut one axis of a shape as `cut` cuts its axis `along`."""
    starts = tuple(cut.starts[along] if i == axis else 0 for i in range(len(shape)))
    sizes = tuple(cut.sizes[along] if i == axis else size for i, size in enumerate(shape))
    return Slice(starts, sizes, tuple(cut.steps[along] if i == axis else 1 for i in range(len(shape))))


def _mask_rows(mask: Value, cut: Slice) -> Slice:
    """Cut the queries of a mask, if it has a row for each."""
    shape = mask.type.static_shape
    has_rows = len(shape) > 1 and shape[-2] != 1
    return _rows(len(shape) - 2 if has_rows else -1, shape, cut, 1)


def _matrix_rows(a: Value, cut: Slice, transposed: bool) -> Slice:
    shape = a.type.static_shape
    return _rows(len(shape) - (1 if transposed else 2), shape, cut, len(shape) - 2)


def _cut(v: Value, part: Slice) -> Value:
    """Slice a value, if there is anything to leave out."""
    return call(part, v) if _axes(part, v) else v
