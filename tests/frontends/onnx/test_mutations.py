"""A sound model damaged at random: it imports, or ends in a one-line error; nothing else ever comes out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from cnnc.errors import CnncError
from cnnc.frontends.onnx import import_model
from tests.frontends.onnx.models import residual_net

pytestmark = pytest.mark.filterwarnings("ignore")


def outcome(source: bytes | onnx.ModelProto) -> int:
    """Import, and give the exit code: 0, or that of the error, which must be one line."""
    try:
        import_model(source)
    except CnncError as error:
        return error.exit_code if "\n" not in str(error) else -1
    return 0


def damaged(sound: bytes, rng: np.random.Generator) -> bytes:
    """Flip, overwrite, cut or double a few bytes."""
    data = bytearray(sound)
    for _ in range(rng.integers(1, 5)):
        start = int(rng.integers(len(data)))
        stop = start + int(rng.integers(1, 20))
        match int(rng.integers(4)):
            case 0:
                data[start] ^= 1 << int(rng.integers(8))
            case 1:
                data[start] = int(rng.integers(256))
            case 2:
                del data[start:stop]
            case _:
                data[start:start] = data[start:stop]
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sound = residual_net().SerializeToString()
    codes = [outcome(damaged(sound, rng)) for _ in range(100)]
    assert set(codes) <= {0, 3, 4, 5}
    assert codes.count(3) > 20


def exchanged(sound: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Exchange one name, operator, shape, type, attribute or version for another."""
    m = onnx.ModelProto.FromString(sound.SerializeToString())
    names = [name for n in m.graph.node for name in (*n.input, *n.output)]
    n = m.graph.node[int(rng.integers(len(m.graph.node)))]
    w = m.graph.initializer[int(rng.integers(len(m.graph.initializer)))]
    match int(rng.integers(7)):
        case 0:
            n.input[int(rng.integers(len(n.input)))] = str(rng.choice(names))
        case 1:
            n.op_type = m.graph.node[int(rng.integers(len(m.graph.node)))].op_type
        case 2:
            w.dims.append(int(rng.integers(-2, 3)))
        case 3:
            w.data_type = int(rng.integers(0, 24))
        case 4:
            for attribute in n.attribute:
                attribute.ints[:] = [int(rng.integers(-3, 2**40)) >> int(rng.integers(0, 40)) for _ in attribute.ints]
                if attribute.type == onnx.AttributeProto.INT:
                    attribute.i = int(rng.integers(-3, 4))
        case 5:
            m.opset_import[0].version = int(rng.integers(1, 30))
        case _:
            w.dims[:] = [int(d) for d in rng.permutation(list(w.dims))]
    return m


@pytest.mark.parametrize("seed", range(4))
def test_exchanged_parts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sound = residual_net()
    codes = [outcome(exchanged(sound, rng)) for _ in range(100)]
    assert set(codes) <= {0, 3, 4, 5}
    assert codes.count(3) > 20
