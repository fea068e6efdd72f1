"""ONNX's Resize (opset 10 and newer) and Upsample."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import floor

import numpy as np

from cnnc.errors import ModelError
from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.op import ForeignNode, onnx
from cnnc.ir.types import Size, upper_bound
from cnnc.ops.axes import normal_axis
from cnnc.ops.dense import MatMul
from cnnc.ops.resize.antialias import antialias_matrix
from cnnc.ops.resize.coordinate import exact, exact_scale
from cnnc.ops.resize.operator import COORDINATE_MODES, MODES, NEAREST_MODES, Resize
from cnnc.ops.source import constant


@onnx("Upsample")
def _upsample(node: ForeignNode, x: Value, scales: Value | None = None) -> Value:
    given = node.attr("scales") if node.opset < 9 else node.const(scales)
    if given is None:
        raise node.invalid("scales are missing")
    return _by_scales(node, x, given)


@onnx("Resize")
def _resize(
    node: ForeignNode,
    x: Value,
    roi: Value | None = None,
    scales: Value | None = None,
    sizes: Value | None = None,
) -> Value:
    if node.opset == 10:
        # Opset 10 has the scales as second input.
        given = node.const(roi)
        if given is None:
            raise node.invalid("scales are missing")
        return _by_scales(node, x, given)
    wanted_scales, wanted_sizes = _given(node, scales), _given(node, sizes)
    if (wanted_scales is None) == (wanted_sizes is None):
        raise node.invalid("needs either scales or sizes, not both")
    axes = _axes(node, x)
    crops = node.attr("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    window = _roi(node, roi, axes, len(x.shape)) if crops else ()
    if wanted_scales is not None:
        by_axis = dict(zip(axes, _checked_scales(node, wanted_scales, len(axes)), strict=True))
        scales_all = tuple(by_axis.get(axis, 1.0) for axis in range(len(x.shape)))
        target = _scaled_sizes(node, x, scales_all, window)
    else:
        target, scales_all = _asked_sizes(node, x, axes, wanted_sizes)
    return _apply(node, x, _operator(node, target, scales_all, window))


def _by_scales(node: ForeignNode, x: Value, given: np.ndarray | Sequence[float]) -> Value:
    """Read the old operators: asymmetric coordinates; nearest rounds down, and up where an axis shrinks."""
    mode = node.attr("mode", "nearest")
    if mode not in ("nearest", "linear"):
        raise node.invalid(f"mode {mode!r} is neither nearest nor linear")
    scales = _checked_scales(node, given, len(x.shape))
    if node.op_type == "Upsample" and min(scales, default=1) < 1:
        raise node.invalid(f"scales {scales} must be at least 1")
    _check_dtype(node, x, mode)
    shrinking = {axis for axis, scale in enumerate(scales) if scale < 1}
    for shrinks in (True, False):
        part = tuple(s if (axis in shrinking) == shrinks else 1.0 for axis, s in enumerate(scales))
        if any(scale != 1 for scale in part):
            rounding = "ceil" if shrinks else "floor"
            sizes = _scaled_sizes(node, x, part, ())
            x = call(Resize(sizes, part, mode, "asymmetric", rounding), x)
    return x


def _given(node: ForeignNode, value: Value | None) -> np.ndarray | None:
    """Give a constant input; absent and empty mean the same."""
    if value is not None and value.shape == (0,):
        return None
    return node.const(value)


def _axes(node: ForeignNode, x: Value) -> tuple[int, ...]:
    rank = len(x.shape)
    given = node.attr("axes")
    if given is None:
        return tuple(range(rank))
    axes = tuple(normal_axis(node.op_type, axis, rank) for axis in given)
    if len(set(axes)) != len(axes):
        raise node.invalid(f"axes {given} name one axis twice")
    return axes


def _checked_scales(node: ForeignNode, given: np.ndarray | Sequence[float], count: int) -> tuple[float, ...]:
    scales = tuple(float(s) for s in np.asarray(given).reshape(-1))
    if len(scales) != count:
        raise node.invalid(f"scales {scales} must have {count} entries")
    if any(not 0 < s < np.inf for s in scales):
        raise node.invalid(f"scales {scales} must be positive")
    return scales


def _roi(node: ForeignNode, roi: Value | None, axes: Sequence[int], rank: int) -> tuple[float, ...]:
    """Give (starts..., ends...) for all axes; those not named are taken whole."""
    given = _given(node, roi)
    if given is None:
        raise node.invalid("tf_crop_and_resize needs the roi input")
    values = [float(v) for v in given.reshape(-1)]
    if len(values) != 2 * len(axes) or not np.isfinite(values).all():
        raise node.invalid(f"roi {values} must be {2 * len(axes)} numbers")
    starts, ends = [0.0] * rank, [1.0] * rank
    for position, axis in enumerate(axes):
        starts[axis], ends[axis] = values[position], values[position + len(axes)]
    return (*starts, *ends)


def _scaled_sizes(node: ForeignNode, x: Value, scales: Sequence[float], roi: Sequence[float]) -> tuple[Size, ...]:
    """Give floor(size * (end - start) * scale) for each axis."""
    rank = len(x.shape)
    sizes: list[Size] = []
    for axis, (size, scale) in enumerate(zip(x.shape, scales, strict=True)):
        part = exact(roi[axis + rank]) - exact(roi[axis]) if roi else Fraction(1)
        if scale == 1 and part == 1:
            sizes.append(size)
        elif not isinstance(size, int):
            raise node.unsupported(f"axis {axis} of size {size}, known only at run time, is resized")
        else:
            sizes.append(max(floor(size * part * exact_scale(scale)), 0))
    return tuple(sizes)


def _asked_sizes(
    node: ForeignNode, x: Value, axes: Sequence[int], given: np.ndarray | None
) -> tuple[tuple[Size, ...], tuple[float, ...]]:
    """Give sizes for all axes, and scales where keeping the aspect ratio makes them another ratio than the sizes."""
    values = [] if given is None else [int(v) for v in given.reshape(-1)]
    if len(values) != len(axes) or min(values, default=1) < 1:
        raise node.invalid(f"sizes {values} must be {len(axes)} positive numbers")
    target = list(x.shape)
    for axis, value in zip(axes, values, strict=True):
        target[axis] = value
    policy = node.attr("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return tuple(target), ()
    if policy not in ("not_larger", "not_smaller"):
        raise node.invalid(f"keep_aspect_ratio_policy {policy!r} is none of stretch, not_larger, not_smaller")
    sizes = [x.shape[axis] for axis in axes]
    ratios = [Fraction(v, s) for v, s in zip(values, sizes, strict=True) if isinstance(s, int) and s > 0]
    if len(ratios) != len(axes):
        raise node.unsupported(f"keep_aspect_ratio_policy {policy} on {x.type}, whose sizes are not fixed")
    ratio = min(ratios) if policy == "not_larger" else max(ratios)
    for axis, size in zip(axes, sizes, strict=True):
        target[axis] = floor(ratio * upper_bound(size) + Fraction(1, 2))
    return tuple(target), tuple(float(ratio) if axis in axes else 1.0 for axis in range(len(x.shape)))


def _operator(node: ForeignNode, sizes: tuple[Size, ...], scales: tuple[float, ...], roi: tuple[float, ...]) -> Resize:
    op = Resize(
        sizes,
        scales,
        node.attr("mode", "nearest"),
        node.attr("coordinate_transformation_mode", "half_pixel"),
        node.attr("nearest_mode", "round_prefer_floor"),
        node.attr("cubic_coeff_a", -0.75),
        bool(node.attr("exclude_outside", 0)),
        node.attr("extrapolation_value", 0.0),
        roi,
    )
    for value, known in (
        (op.mode, MODES),
        (op.coordinate_mode, COORDINATE_MODES),
        (op.nearest_mode, NEAREST_MODES),
    ):
        if value not in known:
            raise node.invalid(f"{value!r} is none of {', '.join(known)}")
    return op


def _check_dtype(node: ForeignNode, x: Value, mode: str) -> None:
    if mode != "nearest" and not x.dtype.is_float:
        raise node.unsupported(f"mode {mode} on integers {x.type}")


def _apply(node: ForeignNode, x: Value, op: Resize) -> Value:
    _check_dtype(node, x, op.mode)
    _refuse_fractional(node, x, op)
    if node.attr("antialias", 0) and op.mode != "nearest":
        return _antialiased(node, x, op)
    return call(op, x)


def _refuse_fractional(node: ForeignNode, x: Value, op: Resize) -> None:
    """Refuse what ONNX's text and its reference answer differently: an output width that is no whole number.

    The text counts pixels (3), the reference evaluator goes on with size * scale (3.5).
    """
    if not op.scales or op.coordinate_mode not in ("align_corners", "tf_crop_and_resize"):
        return
    for axis, (size, wanted) in enumerate(zip(x.shape, op.sizes, strict=True)):
        if isinstance(size, int) and size * exact_scale(op.scales[axis]) != wanted:
            raise node.unsupported(
                f"{op.coordinate_mode} with scale {op.scales[axis]} turns axis {axis} of {size} into no whole number"
                " of pixels, where the ONNX standard contradicts itself; give sizes instead"
            )


def _antialiased(node: ForeignNode, x: Value, op: Resize) -> Value:
    """Multiply the last two axes by matrices of weights."""
    rank = len(x.shape)
    try:
        op.infer(x.type)
    except ModelError as error:
        raise node.invalid(str(error)) from None
    resized = [axis for axis in range(rank) if not op.keeps(axis, x.type)]
    if op.roi or any(axis < rank - 2 for axis in resized):
        raise node.unsupported("antialias with tf_crop_and_resize, or of other axes than the last two")
    for axis in resized:
        matrix = constant(antialias_matrix(op, axis, x.type), x.dtype)
        x = call(MatMul(transpose_b=True), x, matrix) if axis == rank - 1 else call(MatMul(), matrix, x)
    return x
