"""Transposed convolution in one, two or three dimensions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cnnc.errors import ShapeError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.op import Example, ForeignNode, Kind, Op, onnx
from cnnc.ir.types import Dim, DType, Size, TensorType
from cnnc.ops.blocked import every, fixed, tensor
from cnnc.ops.broadcast import widen, working_dtype
from cnnc.ops.numeric import cast_to, check_floats, check_vector, narrow
from cnnc.ops.window import Window, spatial_attr, split_padding


@dataclass(frozen=True)
class ConvTranspose(Op):
    """Spread each input element over a window of the output: the gradient of a convolution.

    y[n,o,p] = b[o] + sum over i, q, k with q*stride - pad + k*dilation = p of x[n,i,q] * w[i,o,k]

    Inputs x[N,I,...], w[I,O/groups,...], optionally b[O].  The output has (size-1)*stride + reach - pads + output_pad
    entries along an axis; `pad` (begin..., end...) takes entries away, `output_pad` adds some at the end.  Keras calls
    it Conv2DTranspose, others deconvolution.
    """

    stride: tuple[int, ...]
    pad: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    output_pad: tuple[int, ...] = ()

    kind: ClassVar[Kind] = Kind.REDUCTION

    def window(self, kernel: Sequence[int]) -> Window:
        """Give the windows of the output that input elements spread over."""
        return Window(tuple(kernel), self.stride, self.pad, self.dilation)

    def infer(self, x: TensorType, w: TensorType, b: TensorType | None = None) -> TensorType:
        """Give [N,O,...]; raises `ShapeError` where channels, groups, windows or dtypes do not fit."""
        check_floats(self.name, x=x, weight=w, bias=b)
        if w.rank != x.rank or not w.is_static:
            raise ShapeError(f"{self.name}: weight {w} must be of fixed shape and of the rank of x : {x}")
        self.window(w.static_shape[2:]).check(self.name, x)
        if self.groups < 1 or w.static_shape[0] % self.groups:
            raise ShapeError(f"{self.name}: groups={self.groups} must divide the {w.shape[0]} input channels of {w}")
        if x.shape[1] != w.shape[0]:
            raise ShapeError(f"{self.name}: weight takes {w.shape[0]} channels but x : {x} has {x.shape[1]}")
        channels = w.static_shape[1] * self.groups
        check_vector(self.name, "bias", b, channels, "output channel")
        return x.with_shape((x.shape[0], channels, *self._output(x.shape[2:], w.static_shape[2:])))

    def _output(self, spatial: Sequence[Size], kernel: Sequence[int]) -> tuple[Size, ...]:
        window = self.window(kernel)
        extra = self.output_pad or (0,) * window.rank
        if len(extra) != window.rank or min(extra) < 0:
            raise ShapeError(f"{self.name}: output_pad {extra} needs {window.rank} entries, none below 0")
        result: list[Size] = []
        for axis, size in enumerate(spatial):
            if size == 0:
                raise ShapeError(f"{self.name}: spatial axis {axis} is empty")
            pads = window.begin[axis] + window.end[axis]
            total = (size - 1) * window.stride[axis] + window.reach[axis] + extra[axis] - pads
            if isinstance(total, int) and total < 1:
                raise ShapeError(
                    f"{self.name}: padding {window.begin[axis]}+{window.end[axis]} leaves nothing of"
                    f" spatial axis {axis}, where {size} spreads to {total + pads}"
                )
            result.append(total)
        return tuple(result)

    def reference(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        """Add, tap by tap, the input times the weights to the places it spreads to."""
        window = self.window(w.shape[2:])
        output = fixed(self.name, self._output(x.shape[2:], w.shape[2:]))
        g, batch, spatial = self.groups, x.shape[0], x.shape[2:]
        channels = w.shape[1] * g
        data = widen(x).reshape(batch, g, x.shape[1] // g, math.prod(spatial))
        weights = widen(w).reshape(g, w.shape[0] // g, w.shape[1], math.prod(w.shape[2:]))
        reach = zip(spatial, window.stride, window.reach, window.begin, output, strict=True)
        full = [max((n - 1) * s + r, begin + out) for n, s, r, begin, out in reach]
        total = np.zeros((batch, channels, *full), data.dtype)
        for number, tap in enumerate(window.taps()):
            spread = np.ascontiguousarray(weights[..., number].swapaxes(1, 2)) @ data
            window.tap_view(total, tap, spatial)[...] += spread.reshape(batch, channels, *spatial)
        crop = [slice(begin, begin + n) for begin, n in zip(window.begin, output, strict=True)]
        y = total[(slice(None), slice(None), *crop)]
        if b is not None:
            y = y + widen(b).reshape(-1, *(1,) * window.rank)
        return np.ascontiguousarray(narrow(y, x))

    def compute(self, te: Any, xs: Sequence[Any], types: Sequence[TensorType]) -> Sequence[Any]:
        """Gather: reduce over channels of the group and those taps that reach the output element."""
        x_type, w_type = types[0], types[1]
        out = self.infer(*types)
        window = self.window(w_type.static_shape[2:])
        spatial = fixed(self.name, x_type.shape[2:])
        wide = working_dtype(out.dtype)
        inputs, outputs = w_type.static_shape[0] // self.groups, w_type.static_shape[1]
        ic = te.reduce_axis(inputs, "ic")
        taps = [te.reduce_axis(k, f"k{i}") for i, k in enumerate(window.kernel)]

        def products(n: Any, o: Any, *p: Any) -> Any:
            source, conditions = window.seen_by(te, p, taps, spatial)
            channel = ic if self.groups == 1 else te.floordiv(o, outputs) * inputs + ic
            own = o if self.groups == 1 else te.floormod(o, outputs)
            zero = te.const(0, x_type.dtype)
            value = te.where(every(te, conditions), te.at(xs[0], x_type, n, channel, *source), zero)
            weight = te.at(xs[1], w_type, channel, own, *taps)
            return te.sum(cast_to(te, value, out.dtype, wide) * cast_to(te, weight, out.dtype, wide), [ic, *taps])

        sums = tensor(te, out.with_dtype(wide), products, "conv_transpose")
        if len(xs) == 2 and wide is out.dtype:
            return [sums]

        def finish(n: Any, o: Any, *p: Any) -> Any:
            value = te.at(sums, out.with_dtype(wide), n, o, *p)
            if len(xs) == 3:
                value = value + cast_to(te, te.at(xs[2], types[2], o), out.dtype, wide)
            return cast_to(te, value, wide, out.dtype)

        return [tensor(te, out, finish, "conv_transpose_bias")]

    def flops(self, x: TensorType, w: TensorType, b: TensorType | None = None) -> int:
        """Count two for each multiply-add, one for each bias."""
        bias = self.infer(x, w, b).elements if b is not None else 0
        return 2 * x.elements * math.prod(w.static_shape[1:]) + bias

    @classmethod
    def examples(cls) -> Iterable[Example]:
        """Give strides, cropped and extended outputs, dilation, groups, 1-D and 3-D, empty batches, other dtypes."""
        yield _example((1, 3, 5, 4), (3, 2, 3, 3), (1, 1), (0, 0, 0, 0), bias=True)
        yield _example((2, 4, 4, 5), (4, 3, 2, 2), (2, 2), (0, 0, 0, 0), bias=True)
        yield _example((1, 3, 5, 4), (3, 2, 4, 4), (2, 2), (1, 1, 1, 1))
        yield _example((1, 2, 4, 3), (2, 3, 3, 2), (3, 2), (1, 0, 2, 1), output_pad=(2, 1), bias=True)
        yield _example((2, 4, 3, 4), (4, 3, 3, 3), (2, 1), (2, 1, 0, 3), (2, 2), groups=2, bias=True)
        yield _example((1, 5, 4, 4), (5, 1, 3, 3), (2, 2), (1, 1, 1, 1), groups=5, output_pad=(1, 1))
        yield _example((2, 3, 7), (3, 4, 5), (3,), (2, 1), bias=True)
        yield _example((1, 2, 3, 2, 4), (2, 3, 2, 3, 1), (2, 1, 2), (0, 1, 0, 1, 0, 0), bias=True)
        yield _example((0, 3, 4, 4), (3, 2, 2, 2), (2, 2), (0, 0, 0, 0), bias=True)
        for dtype in (DType.F64, DType.F16):
            yield _example((1, 3, 4, 4), (3, 2, 3, 3), (2, 2), (1, 1, 1, 1), bias=True, dtype=dtype)
        op = cls((2, 2), (0, 0, 0, 0), (1, 1))
        yield Example(op, (TensorType((Dim.symbol("n", 2), 2, 3, 3)), TensorType((2, 3, 2, 2))))


def _example(
    x: tuple[int, ...],
    w: tuple[int, ...],
    stride: tuple[int, ...],
    pad: tuple[int, ...],
    dilation: tuple[int, ...] = (),
    groups: int = 1,
    output_pad: tuple[int, ...] = (),
    bias: bool = False,
    dtype: DType = DType.F32,
) -> Example:
    op = ConvTranspose(stride, pad, dilation or (1,) * len(stride), groups, output_pad or (0,) * len(stride))
    types = (TensorType(x, dtype), TensorType(w, dtype), TensorType((w[1] * groups,), dtype))
    return Example(op, types if bias else types[:2])


@onnx("ConvTranspose")
def _conv_transpose(node: ForeignNode, x: Value, w: Value, b: Value | None = None) -> Value:
    """Read it; `output_shape` and auto_pad fix the size, and the pads follow."""
    if not 3 <= len(x.shape) <= 5:
        raise node.unsupported(f"transposed convolution of {x.type}; one to three spatial axes are compiled")
    if len(w.shape) != len(x.shape) or not w.type.is_static:
        raise node.invalid(f"weight {w.type} must be of fixed shape and of the rank of X : {x.type}")
    kernel = w.type.static_shape[2:]
    declared = tuple(node.attr("kernel_shape", ())) or kernel
    if declared != kernel:
        raise node.invalid(f"kernel_shape {declared} contradicts the weight {w.type}")
    rank = len(kernel)
    op = ConvTranspose(
        spatial_attr(node, "strides", rank, 1),
        spatial_attr(node, "pads", 2 * rank, 0),
        spatial_attr(node, "dilations", rank, 1),
        node.attr("group", 1),
        spatial_attr(node, "output_padding", rank, 0),
    )
    op = _with_output_shape(node, op, x.shape[2:], kernel)
    return call(op, x, w) if b is None else call(op, x, w, b)


def _with_output_shape(
    node: ForeignNode, op: ConvTranspose, spatial: Sequence[Size], kernel: Sequence[int]
) -> ConvTranspose:
    """Replace the pads by those that give the size asked for, if one is."""
    mode = node.attr("auto_pad", "NOTSET") or "NOTSET"
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise node.invalid(f"auto_pad {mode!r} is none of NOTSET, SAME_UPPER, SAME_LOWER, VALID")
    rank = len(kernel)
    none = (0,) * (2 * rank)
    wanted = tuple(node.attr("output_shape", ()))
    if not wanted and mode in ("NOTSET", "VALID"):
        return op if mode == "NOTSET" else ConvTranspose(op.stride, none, op.dilation, op.groups, op.output_pad)
    sizes = [s for s in spatial if isinstance(s, int)]
    if len(sizes) != rank:
        raise node.unsupported(f"an output size for spatial axes {spatial}, known only at run time")
    same = not wanted
    # Some exporters write N and C in front.
    wanted = wanted[-rank:] or tuple(n * s for n, s in zip(sizes, op.stride, strict=True))
    reach = op.window(kernel).reach
    totals, output_pad = [], []
    for axis, size in enumerate(wanted):
        natural = (sizes[axis] - 1) * op.stride[axis] + reach[axis] + op.output_pad[axis]
        missing = size - natural
        if missing >= op.stride[axis] or (same and missing > 0):
            raise node.unsupported(f"spatial axis {axis} of size {size}, where the windows cover {natural} only")
        totals.append(max(-missing, 0))
        output_pad.append(op.output_pad[axis] + max(missing, 0))
    pad = split_padding(totals, more_at_end=mode == "SAME_UPPER")
    return ConvTranspose(op.stride, pad, op.dilation, op.groups, tuple(output_pad))
