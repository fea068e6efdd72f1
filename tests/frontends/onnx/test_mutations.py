"""A sound model damaged at random: it imports, or ends in a one-line error; nothing else ever comes out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cnnc.errors import CnncError
from cnnc.frontends.onnx import import_model
from tests.frontends.onnx.models import residual_net
from tests.frontends.onnx.node_cases import as_array, node_tests, with_constants

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


ODD = (-(2**63), -(2**31), -5, -3, -2, -1, 0, 1, 2, 3, 4, 7, 100, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)


def odd_numbers(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """Put odd numbers into one node's attributes, a stored tensor, or an input's shape or type."""
    m = onnx.ModelProto.FromString(model.SerializeToString())
    for output in m.graph.output:
        output.ClearField("type")
    stored = [w for w in m.graph.initializer if numpy_helper.to_array(w).dtype.kind == "i"]
    shaped = [v.type.tensor_type for v in m.graph.input if v.type.tensor_type.shape.dim]
    attributes = [a for n in m.graph.node for a in n.attribute]
    choice = int(rng.integers(4))
    if choice == 0 and attributes:
        attribute = attributes[int(rng.integers(len(attributes)))]
        attribute.ints[:] = [int(rng.choice(ODD)) for _ in attribute.ints]
        if attribute.type == onnx.AttributeProto.INT:
            attribute.i = int(rng.choice(ODD))
        if attribute.type == onnx.AttributeProto.FLOAT:
            attribute.f = float(rng.choice([np.nan, np.inf, -1, 0]))
    elif choice == 1 and stored:
        w = stored[int(rng.integers(len(stored)))]
        old = numpy_helper.to_array(w)
        bounds = np.iinfo(old.dtype)
        new = np.array([min(max(int(rng.choice(ODD)), int(bounds.min)), int(bounds.max)) for _ in range(old.size)])
        w.CopyFrom(numpy_helper.from_array(new.astype(old.dtype).reshape(old.shape), w.name))
    elif choice == 2 and shaped:
        dim = shaped[int(rng.integers(len(shaped)))].shape.dim
        dim[int(rng.integers(len(dim)))].dim_value = int(rng.integers(0, 9))
    elif shaped:
        shaped[int(rng.integers(len(shaped)))].elem_type = int(rng.choice([1, 2, 3, 6, 7, 9, 10, 11, 16]))
    return m


@pytest.mark.parametrize("seed", range(4))
def test_odd_numbers_in_every_operator(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = node_tests()
    codes = set()
    for position in rng.choice(len(cases), 250, replace=False):
        case = cases[position]
        assert case.model is not None
        inputs = [as_array(i) for i in case.data_sets[0][0]] if case.data_sets else []
        model = with_constants(case.model, inputs, lambda place, _: place > 0) or case.model
        codes.add(outcome(odd_numbers(model, rng)))
    assert codes <= {0, 3, 4, 5}
