"""Resizing: numbers against ONNX Runtime, the ONNX reference and PyTorch, and everything it refuses."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from cnnc.errors import CnncError, LimitError, ModelError, ShapeError, UnsupportedError
from cnnc.ir.build import infer_types
from cnnc.ir.types import Dim, DType, TensorType
from cnnc.ops.resize import Resize
from cnnc.ops.resize.coordinate import exact_scale
from cnnc.ops.resize.operator import COORDINATE_MODES, NEAREST_MODES
from tests.ops.onnx_nodes import assert_agrees, imported, one_node, ours

torch = pytest.importorskip("torch")

EMPTY = np.zeros(0, np.float32)


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 2, 7, 9)).astype(np.float32)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


SIZES = [(4, 3), (5, 14), (14, 18), (7, 20), (13, 1)]
ORDINARY = [m for m in COORDINATE_MODES if m not in ("tf_crop_and_resize", "tf_half_pixel_for_nn")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", ORDINARY)
def test_sizes_as_onnxruntime(coordinates: str, mode: str, size: tuple[int, int]) -> None:
    sizes = np.array([1, 2, *size])
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
    assert_agrees("Resize", [picture(), None, None, sizes], constants=[3], opset=19, **attributes)


@pytest.mark.parametrize("scales", [(0.6, 0.7), (2, 3), (0.7312, 1.2342), (1.5, 1 / 3)])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("coordinates", [m for m in ORDINARY if m != "align_corners"])
def test_scales_as_onnxruntime(coordinates: str, mode: str, scales: tuple[float, float]) -> None:
    attributes = {"mode": mode, "coordinate_transformation_mode": coordinates}
    assert_agrees("Resize", [picture(), None, floats(1, 1, *scales)], constants=[2], opset=19, **attributes)


@pytest.mark.parametrize("nearest", NEAREST_MODES)
@pytest.mark.parametrize("coordinates", ["asymmetric", "align_corners", "tf_half_pixel_for_nn"])
def test_nearest_modes_as_onnxruntime(coordinates: str, nearest: str) -> None:
    attributes = {"mode": "nearest", "coordinate_transformation_mode": coordinates, "nearest_mode": nearest}
    for size in SIZES[:4]:
        assert_agrees(
            "Resize", [picture(), EMPTY, EMPTY, np.array([1, 2, *size])], constants=[1, 2, 3], opset=11, **attributes
        )


@pytest.mark.parametrize("nearest", NEAREST_MODES)
@pytest.mark.parametrize("size", [(1, 20), (4, 3), (5, 14), (14, 18)])
def test_halves_are_exact(nearest: str, size: tuple[int, int]) -> None:
    """ONNX Runtime's float32 coordinates miss some ties (7 pixels to 1: 2.9999998); the reference has float64."""
    attributes: dict[str, Any] = {"mode": "nearest", "nearest_mode": nearest}
    model = one_node("Resize", [picture(), None, None, np.array([1, 2, *size])], constants=[3], opset=19, **attributes)
    wanted = ReferenceEvaluator(model).run(None, {"x0": picture()})[0]
    np.testing.assert_array_equal(ours(model, {"x0": picture()})[0], wanted)


@pytest.mark.parametrize("exclude", [0, 1])
@pytest.mark.parametrize("scales", [(0.6, 0.5), (0.3, 1.7), (2, 1.5)])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_antialias_as_onnxruntime(mode: str, scales: tuple[float, float], exclude: int) -> None:
    attributes = {"mode": mode, "antialias": 1, "exclude_outside": exclude}
    assert_agrees("Resize", [picture(), None, floats(1, 1, *scales)], constants=[2], opset=19, **attributes)


def test_exclude_outside_and_cubic_coefficient_as_onnxruntime() -> None:
    attributes = {"mode": "cubic", "exclude_outside": 1, "cubic_coeff_a": -0.5}
    assert_agrees("Resize", [picture(), None, floats(1, 1, 0.7, 1.9)], constants=[2], opset=13, **attributes)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("roi", [(0.2, -0.3, 0.8, 1.2), (0.3, 0.1, 0.3, 0.9), (0.9, 0, 0.1, 1)])
def test_crop_as_onnxruntime(mode: str, roi: tuple[float, ...]) -> None:
    window = floats(0, 0, *roi[:2], 1, 1, *roi[2:])
    attributes = {"mode": mode, "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0}
    for size in ((4, 3), (5, 14), (1, 20)):
        assert_agrees(
            "Resize", [picture(), window, EMPTY, np.array([1, 2, *size])], constants=[1, 2, 3], opset=13, **attributes
        )


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
@pytest.mark.parametrize("size", [(4, 3), (5, 14), (20, 13)])
def test_aspect_ratio_and_axes_as_onnxruntime(policy: str, size: tuple[int, int]) -> None:
    attributes = {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": policy}
    assert_agrees("Resize", [picture(), None, None, np.array(size)], constants=[3], opset=18, **attributes)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scales", [(0.6, 0.5), (0.3, 1.7), (2, 1.5)])
def test_old_operators_as_onnxruntime(mode: str, scales: tuple[float, float]) -> None:
    assert_agrees("Resize", [picture(), floats(1, 1, *scales)], constants=[1], opset=10, mode=mode)
    larger = [1.0, 1.0, *(max(s, 1.0) for s in scales)]
    assert_agrees("Upsample", [picture(), floats(*larger)], constants=[1], opset=9, mode=mode)
    assert_agrees("Upsample", [picture()], opset=7, mode=mode, scales=larger)


@pytest.mark.parametrize("seed", range(10))
def test_equals_pytorch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = picture(seed)
    size = tuple(map(int, rng.integers(1, 25, 2)))
    t = torch.from_numpy(x)
    for mode, name in (("linear", "bilinear"), ("cubic", "bicubic")):
        for corners in (False, True):
            wanted = torch.nn.functional.interpolate(t, size, mode=name, align_corners=corners).numpy()
            op = Resize((1, 2, *size), (), mode, "align_corners" if corners else "half_pixel")
            np.testing.assert_allclose(op.reference(x), wanted, rtol=1e-4, atol=1e-5)
    exact = torch.nn.functional.interpolate(t, size, mode="nearest-exact").numpy()
    op = Resize((1, 2, *size), (), "nearest", "half_pixel", "round_prefer_ceil")
    np.testing.assert_array_equal(op.reference(x), exact)


@pytest.mark.parametrize(
    ("scale", "fraction"),
    [(0.6, (3, 5)), (1 / 3, (1, 3)), (2.0, (2, 1)), (0.7, (7, 10)), (1.25, (5, 4)), (1e-3, (1, 1000))],
)
def test_scales_mean_what_was_written(scale: float, fraction: tuple[int, int]) -> None:
    assert exact_scale(float(np.float32(scale))) == Fraction(*fraction)


@pytest.mark.parametrize("seed", range(20))
def test_exact_scales_round_to_the_same_float32(seed: int) -> None:
    scale = np.float32(np.random.default_rng(seed).uniform(0.01, 9))
    assert np.float32(float(exact_scale(float(scale)))) == scale


X = TensorType((1, 2, 7, 9))
CROP = {"coordinate_transformation_mode": "tf_crop_and_resize"}
CORNERS = {"coordinate_transformation_mode": "align_corners"}
ANTIALIAS = {"mode": "linear", "antialias": 1}


@pytest.mark.parametrize(
    ("op", "x", "message"),
    [
        (Resize((1, 2, 7)), X, "must be for the 4 axes"),
        (Resize((1, 2, 14, 18), (1.0, 1.0, 2.0)), X, "must be for the 4 axes"),
        (Resize((1, 2, 14, 18), (1.0, 1.0, 0.0, 2.0)), X, "scales .* must be positive"),
        (Resize((1, 2, 14, 18), (1.0, 1.0, -1.0, 2.0)), X, "scales .* must be positive"),
        (Resize((1, 2, 14, 18), mode="lanczos"), X, "mode 'lanczos' is none of nearest, linear, cubic"),
        (Resize((1, 2, 14, 18), coordinate_mode="middle"), X, "coordinate_mode 'middle' is none of"),
        (Resize((1, 2, 14, 18), nearest_mode="up"), X, "nearest_mode 'up' is none of"),
        (Resize((1, 2, 14, 18), coordinate_mode="tf_crop_and_resize"), X, "roi goes with coordinate_mode"),
        (Resize((1, 2, 14, 18), mode="linear"), X.with_dtype(DType.U8), "mode linear takes floats"),
        (Resize((1, 2, 3, 3)), TensorType((1, 2, 0, 3)), "axis 2 is empty and cannot become 3"),
        (Resize((3, 2, 7, 9)), TensorType((Dim.symbol("n", 4), 2, 7, 9)), "known only at run time, cannot become 3"),
        (Resize((1, 2, -3, 9)), X, "negative"),
    ],
)
def test_refuses(op: Resize, x: TensorType, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        infer_types(op, (x,))


@pytest.mark.parametrize(
    ("inputs", "attributes", "error", "message"),
    [
        ([None, floats(1, 1, 0, 1)], {}, ModelError, "scales .* must be positive"),
        ([None, floats(1, 1, -2, 1)], {}, ModelError, "scales .* must be positive"),
        ([None, floats(1, 1, np.nan, 1)], {}, ModelError, "scales .* must be positive"),
        ([None, floats(1, 1, 2)], {}, ModelError, "must have 4 entries"),
        ([None, None, np.array([1, 2, 0, 3])], {}, ModelError, "4 positive numbers"),
        ([None, floats(1, 1, 2, 2), np.array([1, 2, 14, 18])], {}, ModelError, "either scales or sizes"),
        ([None, None, np.array([4, 4])], {"axes": [2, 2]}, ModelError, "name one axis twice"),
        ([None, floats(1, 1, 2, 2)], {"mode": "spline"}, ModelError, "'spline' is none of"),
        ([None, floats(1, 1, 2, 2)], CROP, ModelError, "needs the roi"),
        ([None, floats(1, 1, 2.1, 2)], CORNERS, UnsupportedError, "no whole number"),
        ([None, floats(1, 2, 2, 2)], ANTIALIAS, UnsupportedError, "other axes than the last"),
        ([None, floats(1, 1, 2.0**40, 2.0**40)], {}, LimitError, "more than 2\\*\\*62 elements"),
    ],
)  # fmt: skip
def test_reader_refuses(
    inputs: list[np.ndarray | None], attributes: dict[str, Any], error: type[CnncError], message: str
) -> None:
    constants = [i + 1 for i, a in enumerate(inputs) if a is not None]
    with pytest.raises(error, match=message):
        imported(one_node("Resize", [picture(), *inputs], constants=constants, opset=19, **attributes))
