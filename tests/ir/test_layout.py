"""Layouts: packing, unpacking, index maps, and layouts that are none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnc.errors import ShapeError
from cnnc.ir.layout import Layout

LAYOUTS = ("NCHW", "NHWC", "NCHW4c", "NCHW16c", "OIHW4i8o", "OIHW8o", "IOHW", "NCW8c", "NCDHW2c", "OI16o", "N4nC")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...]]:
    layout = Layout(draw(st.sampled_from(LAYOUTS)))
    return layout, tuple(draw(st.integers(0, 9)) for _ in range(layout.rank))


@given(cases())
def test_unpacking_undoes_packing(case):
    layout, shape = case
    array = np.arange(1, np.prod(shape, dtype=int) + 1).reshape(shape)
    packed = layout.pack(array)
    assert packed.shape == layout.physical_shape(shape)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(layout.unpack(packed, shape), array)
    assert layout.pads(shape) == (packed.size != array.size)
    assert packed.sum() == array.sum(), "pad lanes are 0"


@given(cases())
def test_index_maps_agree_with_packing(case):
    layout, shape = case
    array = np.arange(1, np.prod(shape, dtype=int) + 1).reshape(shape)
    packed = layout.pack(array)
    for index in itertools.islice(itertools.product(*map(range, shape)), 50):
        physical = layout.physical_index(index)
        assert packed[physical] == array[index]
        assert layout.logical_index(physical) == index


def test_parts():
    layout = Layout("OIHW4i8o")
    assert layout.tokens == ["O", "I", "H", "W", "4i", "8o"]
    assert layout.logical_axes == "OIHW"
    assert [layout.block(axis) for axis in "OIHW"] == [8, 4, 1, 1]
    assert layout.physical_shape((9, 5, 3, 3)) == (2, 2, 3, 3, 4, 8)
    assert Layout.parse(str(layout)) == layout
    assert Layout("NHWC").physical_index((0, 1, 2, 3)) == (0, 2, 3, 1)


@pytest.mark.parametrize("axes", ["", "nchw", "NCHW0c", "NCHW4", "NCHWc"])
def test_what_cannot_be_read(axes):
    with pytest.raises(ShapeError, match=r"cannot be read|names an axis"):
        Layout(axes)


@pytest.mark.parametrize("axes", ["NCHC", "NCHW4c2c", "NCHX", "NHW4c"])
def test_axes_named_twice_or_never(axes):
    with pytest.raises(ShapeError, match="names an axis twice, or one that does not exist"):
        Layout(axes)
