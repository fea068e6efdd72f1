"""Einstein summation as transposes, sums and matrix products."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.op import ForeignNode, onnx
from cnnc.ops.blocked import fixed
from cnnc.ops.dense import MatMul
from cnnc.ops.reduce import ReduceSum
from cnnc.ops.reshape import Transpose, reshape

_TERM = re.compile(r"[A-Za-z]*(\.\.\.)?[A-Za-z]*")


@dataclass(frozen=True)
class _Labelled:
    """A value whose axes have names: letters, and digits for those an ellipsis stands for."""

    value: Value
    labels: str

    def size(self, label: str) -> int:
        """Give the size of an axis, 1 where there is none of this name."""
        if label not in self.labels:
            return 1
        return fixed("einsum", [self.value.shape[self.labels.index(label)]])[0]

    def summed(self, keep: str) -> _Labelled:
        """Sum over the axes that are not in `keep`."""
        gone = tuple(i for i, label in enumerate(self.labels) if label not in keep)
        if not gone:
            return self
        return _Labelled(call(ReduceSum(gone, keepdims=False), self.value), _only(self.labels, keep))

    def ordered(self, labels: str) -> _Labelled:
        """Permute the axes into this order."""
        if labels == self.labels:
            return self
        return _Labelled(call(Transpose(tuple(self.labels.index(label) for label in labels)), self.value), labels)


def _only(labels: str, chosen: str) -> str:
    return "".join(label for label in labels if label in chosen)


def _product(a: _Labelled, b: _Labelled, keep: str) -> _Labelled:
    """Multiply, and sum over the axes that are not in `keep`: one batched matrix product."""
    a, b = a.summed(keep + b.labels), b.summed(keep + a.labels)
    both = _only(a.labels, b.labels)
    batch, inner = _only(both, keep), "".join(label for label in both if label not in keep)
    rows, columns = ("".join(label for label in labels if label not in both) for labels in (a.labels, b.labels))
    sizes = {label: max(a.size(label), b.size(label)) for label in a.labels + b.labels}

    def count(labels: str) -> int:
        return math.prod(sizes[label] for label in labels)

    left = reshape(a.ordered(batch + rows + inner).value, (count(batch), count(rows), count(inner)))
    right = reshape(b.ordered(batch + inner + columns).value, (count(batch), count(inner), count(columns)))
    labels = batch + rows + columns
    return _Labelled(reshape(call(MatMul(), left, right), [sizes[label] for label in labels]), labels)


@onnx("Einsum")
def _einsum(node: ForeignNode, *inputs: Value) -> Value:
    """Multiply the inputs pairwise from the left."""
    equation = str(node.attr("equation", "")).replace(" ", "")
    terms, output = _parse(node, equation, inputs)
    operands = [_squeezed(value, term, _sizes(node, terms, inputs)) for value, term in zip(inputs, terms, strict=True)]

    def keep(position: int) -> str:
        return output + "".join(operand.labels for operand in operands[position + 1 :])

    numbered = list(enumerate(operands))
    _, result = reduce(lambda a, b: (b[0], _product(a[1], b[1], keep(b[0]))), numbered)
    return result.summed(output).ordered(output).value


def _parse(node: ForeignNode, equation: str, inputs: Sequence[Value]) -> tuple[list[str], str]:
    """Give the labels of each input and of the output, ellipses spelled out in digits."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(inputs) or not all(_TERM.fullmatch(term) for term in (*terms, right)):
        raise node.invalid(f"equation {equation!r} cannot be read for {len(inputs)} inputs")
    ranks = [v.type.rank - len(t.replace("...", "")) for v, t in zip(inputs, terms, strict=True)]
    if any(rank < 0 or (rank > 0 and "..." not in term) for rank, term in zip(ranks, terms, strict=True)):
        raise node.invalid(f"equation {equation!r} does not fit inputs ({', '.join(str(v.type) for v in inputs)})")
    digits = "".join(str(i) for i in range(max(ranks)))
    spelled = [t.replace("...", digits[len(digits) - rank :]) for t, rank in zip(terms, ranks, strict=True)]
    if not arrow:
        counts = Counter(label for term in terms for label in term if label != ".")
        right = "..." + "".join(sorted(label for label, count in counts.items() if count == 1))
    output = right.replace("...", digits)
    if any(label not in "".join(spelled) for label in output) or len(set(output)) != len(output):
        raise node.invalid(f"equation {equation!r} has an output that does not follow from its inputs")
    if any(len(set(term)) != len(term) for term in spelled):
        raise node.unsupported(f"equation {equation!r} takes a diagonal")
    return spelled, output


def _sizes(node: ForeignNode, terms: Sequence[str], inputs: Sequence[Value]) -> dict[str, int]:
    """Give the size of each label; one of 1 stretches."""
    sizes: dict[str, int] = {}
    for term, value in zip(terms, inputs, strict=True):
        for label, size in zip(term, fixed("einsum", value.shape), strict=True):
            if size != sizes.setdefault(label, size) and 1 not in (size, sizes[label]):
                raise node.invalid(f"axis {label!r} has the sizes {sizes[label]} and {size}")
            sizes[label] = size if sizes[label] == 1 else sizes[label]
    return sizes


def _squeezed(value: Value, term: str, sizes: dict[str, int]) -> _Labelled:
    """Leave out axes that stretch: a product broadcasts without them."""
    own = dict(zip(term, fixed("einsum", value.shape), strict=True))
    kept = "".join(label for label in term if own[label] == sizes[label])
    return _Labelled(reshape(value, [own[label] for label in kept]), kept)
