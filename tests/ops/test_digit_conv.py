"""Weights in three int8 digits: what they are, of many outputs at once as one by one."""

from __future__ import annotations

import numpy as np
import pytest

from cnnc.ops.digit_conv import PLACES, weight_digits


@pytest.mark.parametrize(("outputs", "channels"), [(300, 515), (3, 70_001), (70_001, 3), (0, 8), (5, 0)])
def test_digits_are_the_weights_to_24_bits_of_the_largest(rng: np.random.Generator, outputs: int, channels: int):
    scale = np.float32(2.0) ** rng.integers(-60, 30, (outputs, 1)).astype(np.float32)
    w = rng.standard_normal((outputs, channels)).astype(np.float32) * scale
    digits, unit = weight_digits(w)
    assert digits.shape == (outputs, -(-channels // 4), 3, 4)
    recovered = np.einsum("oidj,d->oij", digits.astype(np.float64), np.array(PLACES))
    recovered = recovered.reshape(outputs, 4 * digits.shape[1]) * unit[:, None]
    assert not recovered[:, channels:].any()
    assert (np.abs(recovered[:, :channels] - w) <= 2.0**-24 * unit[:, None]).all()
    largest = np.abs(w).max(axis=1, initial=0.0)
    # Numbers just below a power of two take one more: three digits end at 0x7F7F7F.
    assert (unit[largest > 0] <= 2 * (2**23 / 0x7F7F7F) * largest[largest > 0]).all()


def test_digits_of_an_output_depend_on_its_own_weights_alone(rng: np.random.Generator):
    w = rng.standard_normal((200, 700)).astype(np.float32)
    digits, unit = weight_digits(w)
    for output in (0, 93, 94, 199):
        alone, its_unit = weight_digits(w[output : output + 1])
        np.testing.assert_array_equal(alone[0], digits[output])
        assert its_unit[0] == unit[output]
