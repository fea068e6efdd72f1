"""Depth to space and back: numbers against ONNX Runtime and PyTorch, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.errors import ModelError, ShapeError
from cnnc.ir.build import infer_types
from cnnc.ir.types import TensorType
from cnnc.ops.space import DepthToSpace, SpaceToDepth
from tests.ops.onnx_nodes import assert_agrees, imported, one_node

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("block", [1, 2, 3])
def test_as_onnxruntime_and_pytorch(block: int) -> None:
    x = np.random.default_rng(block).standard_normal((2, 2 * block**2, 3, 4)).astype(np.float32)
    for mode in ("DCR", "CRD"):
        assert_agrees("DepthToSpace", [x], opset=13, blocksize=block, mode=mode)
        np.testing.assert_array_equal(SpaceToDepth(block, mode).reference(DepthToSpace(block, mode).reference(x)), x)
    assert_agrees("SpaceToDepth", [DepthToSpace(block).reference(x)], opset=13, blocksize=block)
    shuffled = torch.nn.functional.pixel_shuffle(torch.from_numpy(x), block).numpy()
    np.testing.assert_array_equal(DepthToSpace(block, "CRD").reference(x), shuffled)
    unshuffled = torch.nn.functional.pixel_unshuffle(torch.from_numpy(shuffled), block).numpy()
    np.testing.assert_array_equal(SpaceToDepth(block, "CRD").reference(shuffled), unshuffled)


@pytest.mark.parametrize("block", [0, -2, 2**32])
@pytest.mark.parametrize("op_type", ["DepthToSpace", "SpaceToDepth"])
def test_bad_blocks_are_refused(op_type: str, block: int) -> None:
    with pytest.raises(ModelError, match="block"):
        imported(one_node(op_type, [np.zeros((1, 4, 2, 2), np.float32)], opset=13, blocksize=block))


def test_refuses() -> None:
    with pytest.raises(ShapeError, match=r"depth_to_space: block\^2 = 4 must divide the 6 channels"):
        infer_types(DepthToSpace(2), (TensorType((1, 6, 2, 2)),))
    with pytest.raises(ShapeError, match="space_to_depth: block=2 must divide height and width"):
        infer_types(SpaceToDepth(2), (TensorType((1, 6, 2, 3)),))
    with pytest.raises(ShapeError, match="mode 'XYZ' is neither"):
        infer_types(DepthToSpace(2, "XYZ"), (TensorType((1, 4, 2, 2)),))
    with pytest.raises(ShapeError, match="needs axes N, C, H, W"):
        infer_types(DepthToSpace(2), (TensorType((4, 2, 2)),))
