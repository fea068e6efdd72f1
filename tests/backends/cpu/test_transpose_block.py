"""Blocks transposed in registers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cnnc.backends.cpu.transpose_block import transpose_block


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_rows_become_columns(call_kernel: Any, lanes: int) -> None:
    from cnnc.backends.lower import loops

    x, y = loops.buffer("x", (3, lanes, lanes)), loops.buffer("y", (3, lanes, lanes))

    def one(index: Any) -> Any:
        return transpose_block(
            lanes,
            lambda row: loops.load(x, index, row, 0, lanes=lanes),
            lambda column, vector: loops.store(y, vector, index, column, 0, lanes=lanes),
        )

    blocks = np.arange(3 * lanes * lanes, dtype=np.float32).reshape(3, lanes, lanes)
    got = call_kernel(loops.function([x, y], loops.parallel(3, one)), [blocks], blocks.shape)
    np.testing.assert_array_equal(got, blocks.transpose(0, 2, 1))
