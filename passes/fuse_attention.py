"""Recognise attention, whatever its heads were cut out of.

    mat_mul(softmax(scale * mat_mul(q, k') + mask), v) -> attention(q, k, v, mask)

The reshapes, transposes, slices and splits between a projection and its heads move no data: where a head is a run of
features of every token, or of every token of an image of its own, the operator reads it where it lies.  Otherwise the
heads are moved into that order: those of one operand for the others' sake.
"""

from __future__ import annotations

from dataclasses import dataclass

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Node, Value
from cnnc.ir.rewrite import miss, rewrite, sole_use
from cnnc.ops.attention import Attention
from cnnc.ops.binary import Add, Div, Mul
from cnnc.ops.dense import MatMul
from cnnc.ops.reshape import Reshape, Transpose
from cnnc.ops.softmax import Softmax
from cnnc.passes.constants import constant_operand, scalar_of
from cnnc.passes.registry import Pass
from cnnc.passes.strided import Strided, strided_views
from cnnc.target import Target


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Put attention in the place of its pieces."""

    def run(self, graph: Graph, target: Target) -> Graph:
        """Give the graph with attention recognised."""
        return rewrite(graph, (attention,))


def attention(v: Value) -> Value | None:
    """mat_mul(softmax(scale * mat_mul(q, k') + mask), v) -> attention(q, k, v, mask)."""
    match v.node:
        case Node(MatMul(False, transposed), (Value(Node(Softmax(axis), (scores,))) as shares, values)):
            rank = scores.type.rank
            if axis % rank != rank - 1 or rank not in (3, 4) or not v.dtype.is_float or not v.type.is_static:
                return None
            if not sole_use(shares) or values.shape[:-2] != scores.shape[:-2] or v.type.elements == 0:
                miss("the shares are read elsewhere, or the values broadcast")
                return None
            dots = _dots(scores)
            if dots is None or 0 in (*dots.queries.shape, *dots.keys.shape):
                return None
            return _attention(dots, _swapped(values) if transposed else values, v)
    return None


# The pieces


@dataclass(frozen=True)
class _Dots:
    """What scores are made of: queries [...,M,D] and keys [...,N,D], their scale, perhaps a mask."""

    queries: Value
    keys: Value
    scale: float
    mask: Value | None


def _dots(scores: Value) -> _Dots | None:
    """Read scores as scale * queries keys' + mask."""
    products, mask = scores, None
    if isinstance(scores.op, Add):
        if not sole_use(scores):
            return None
        products, mask = scores.inputs
        if not isinstance(_unscaled(products)[0].op, MatMul):
            products, mask = mask, products
        if products.type != scores.type:
            return None
    product, scale = _unscaled(products)
    match product.node:
        case Node(MatMul(transpose_a, transpose_b), (a, b)):
            if not sole_use(product) or not a.shape[:-2] == b.shape[:-2] == scores.shape[:-2]:
                return None
            (a, scale_a), (b, scale_b) = _unscaled(a), _unscaled(b)
            queries, keys = _swapped(a) if transpose_a else a, b if transpose_b else _swapped(b)
            return _Dots(queries, keys, scale * scale_a * scale_b, mask)
    return None


def _unscaled(v: Value) -> tuple[Value, float]:
    """Take numbers that multiply or divide a value away from it."""
    scale = 1.0
    while sole_use(v):
        match v.node:
            case Node(Mul()):
                operands = constant_operand(v)
                number = scalar_of(operands[1]) if operands else None
                if operands is None or number is None or operands[0].type != v.type:
                    break
                v, scale = operands[0], scale * number
            case Node(Div(), (x, c)) if scalar_of(c) and x.type == v.type:
                v, scale = x, scale / (scalar_of(c) or 1.0)
            case _:
                break
    return v, scale


def _swapped(v: Value) -> Value:
    """Swap the last two axes."""
    rank = v.type.rank
    return call(Transpose((*range(rank - 2), rank - 1, rank - 2)), v)


# Where heads lie


@dataclass(frozen=True)
class _Heads:
    """A tensor [batch,tokens,features]; head h is its features from `start` + h * `step` on."""

    tensor: Value
    start: int
    step: int


def _attention(dots: _Dots, values: Value, whole: Value) -> Value | None:
    """Make the operator, and move its heads to where the matrix product had them."""
    operands = [dots.queries, dots.keys, values]
    sizes = [_four(x) for x in operands]
    (batch, heads, rows, size), value_size = sizes[0], sizes[2][3]
    views = [list(strided_views(x, shape)) for x, shape in zip(operands, sizes, strict=True)]
    found = [_deepest(view, by_token=True) for view in views]
    by_image = [_deepest(view, by_token=False) for view in views]
    mask = None if dots.mask is None else _four_axes(dots.mask, whole)
    if dots.mask is not None and mask is None:
        miss("the mask does not broadcast to the scores")
        return None
    if found.count(None) > 1 and None not in by_image and (mask is None or mask.shape[:2] == (1, 1)):
        found, batch, heads = by_image, batch * heads, 1
    placed = [part or _moved(x, shape) for part, x, shape in zip(found, operands, sizes, strict=True)]
    (q, k, v), starts, steps = placed, [x.start for x in placed], [x.step for x in placed]
    op = Attention(
        heads, size, value_size, dots.scale, (starts[0], starts[1], starts[2]), (steps[0], steps[1], steps[2])
    )
    y = call(op, q.tensor, k.tensor, v.tensor, *(() if mask is None else (mask,)))
    if heads > 1:
        y = call(Transpose((0, 2, 1, 3)), call(Reshape((batch, rows, heads, value_size)), y))
    return call(Reshape(whole.shape), y) if y.shape != whole.shape else y


def _four(v: Value) -> tuple[int, ...]:
    """Give the sizes [batch,heads,tokens,size]; of three, the first is that of the heads."""
    shape = v.type.static_shape
    return shape if len(shape) == 4 else (1, *shape)


def _four_axes(mask: Value, whole: Value) -> Value | None:
    """Give a mask of the scores with the axes [batch,heads,M,N]; None where it has more than they."""
    rank, shape = mask.type.rank, mask.type.static_shape
    if rank > whole.type.rank:
        return None
    return mask if rank == 4 else call(Reshape((1,) * (4 - rank) + shape), mask)


def _deepest(views: list[Strided], by_token: bool) -> _Heads | None:
    """Give the heads where they lie in the first of the tensors that a value is cut out of, from the last on."""
    return next((heads for view in reversed(views) if (heads := _heads(view, by_token)) is not None), None)


def _heads(view: Strided, by_token: bool) -> _Heads | None:
    """See a view [batch,heads,tokens,size] as heads among the features of each token.

    Otherwise each head of an image is an image of its own, and has the features of its tokens for itself.
    """
    batch, heads, tokens, size = view.shape
    images = batch if by_token else batch * heads
    features, rest = divmod(view.source.type.elements, images * tokens)
    if rest or not view.walks(3, 1) or not view.walks(2, features):
        return None
    image = tokens * features
    if by_token:
        fits, step = view.walks(0, image), view.strides[1] if heads > 1 else size
        last = view.offset + (heads - 1) * step
    else:
        fits, step = view.walks(1, image) and view.walks(0, heads * image), size
        last = view.offset
    if not fits or min(view.offset, last) < 0 or max(view.offset, last) + size > features:
        return None
    shape = (images, tokens, features)
    tensor = view.source if view.source.shape == shape else call(Reshape(shape), view.source)
    return _Heads(tensor, view.offset, step)


def _moved(x: Value, shape: tuple[int, ...]) -> _Heads:
    """Move the heads of a value [batch,heads,tokens,size] next to each other for every token."""
    batch, heads, tokens, size = shape
    four = x if x.shape == shape else call(Reshape(shape), x)
    tensor = call(Reshape((batch, tokens, heads * size)), call(Transpose((0, 2, 1, 3)), four))
    return _Heads(tensor, 0, size)
