"""Dealing out channels: against numpy by hand, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import ShapeError
from cnnc.ir.build import call, infer_types
from cnnc.ir.layout import Layout
from cnnc.ir.types import TensorType
from cnnc.ops import ShuffleChannels, graph_input


def test_groups_take_turns() -> None:
    x = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1)
    assert ShuffleChannels(2, 0, 6).reference(x).reshape(-1).tolist() == [0, 3, 1, 4, 2, 5]
    assert ShuffleChannels(3, 1, 4).reference(x).reshape(-1).tolist() == [2, 4, 1, 3]
    assert ShuffleChannels(2, 2, 3).reference(x[:, :2], x[:, 2:]).reshape(-1).tolist() == [1, 4, 2]


def test_it_is_the_reshape_transpose_reshape_of_the_paper(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 12, 3, 5))
    wanted = x.reshape(2, 3, 4, 3, 5).transpose(0, 2, 1, 3, 4).reshape(x.shape)
    assert np.array_equal(ShuffleChannels(3, 0, 12).reference(x), wanted)


def test_what_is_refused() -> None:
    x, y = graph_input("x", (2, 6, 3, 3)), graph_input("y", (2, 6, 3, 4))
    with pytest.raises(ShapeError, match="groups=4 must divide the 6 channels"):
        call(ShuffleChannels(4, 0, 6), x)
    with pytest.raises(ShapeError, match="channels 3 to 7 are not among 6"):
        call(ShuffleChannels(2, 3, 4), x)
    with pytest.raises(ShapeError, match=r"f32\[2,6,3,4\] does not join f32\[2,6,3,3\] along the channels"):
        call(ShuffleChannels(2, 0, 4), x, y)
    with pytest.raises(ShapeError, match="needs axes N, C"):
        call(ShuffleChannels(2, 0, 4), graph_input("v", (6,)))
    with pytest.raises(ShapeError, match="do not share one layout"):
        infer_types(ShuffleChannels(2, 0, 4), (x.type, TensorType((2, 6, 3, 3), layout=Layout("NCHW4c"))))
