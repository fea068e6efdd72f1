"""Change of layout: there and back through memory, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.types import TensorType
from cnnc.ops.layout_transform import LayoutTransform
from tests.ops.kernels import run_compute


@pytest.mark.parametrize("layouts", [(None, "NCHW4c"), ("NCHW4c", "NCHW8c"), ("NCHW8c", None), ("NHWC", "NCHW4c")])
def test_meaning_stays(layouts: tuple[str | None, str | None]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 7, 3, 2)).astype(np.float32)
    source, target = (None if name is None else Layout(name) for name in layouts)
    type_ = TensorType(x.shape, layout=source)
    assert infer_types(LayoutTransform(target), (type_,)) == (TensorType(x.shape, layout=target),)
    np.testing.assert_array_equal(run_compute(LayoutTransform(target), [type_], [x])[0], x)


def test_refuses_another_rank() -> None:
    with pytest.raises(ShapeError, match="layout_transform: layout NCHW4c is for rank 4, not for x"):
        infer_types(LayoutTransform(Layout("NCHW4c")), (TensorType((1, 2, 3)),))
