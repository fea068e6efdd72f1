"""Importing sound models: numbers equal onnxruntime's, names and shapes are kept."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from cnnc.errors import LimitError, UnsupportedError, UsageError
from cnnc.frontends.onnx import import_model
from cnnc.frontends.onnx.importer import UnsupportedNodes
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate
from cnnc.ir.types import DType
from cnnc.ops.source import Constant
from cnnc.options import Limits
from tests.frontends.onnx.models import model, node, relu, residual_net, value, weight


def feeds_for(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(v.type.static_shape).astype(v.dtype.numpy)
        for name, v in zip(graph.input_names, graph.inputs, strict=True)
    }


def assert_same(m: onnx.ModelProto, seed: int = 0, **options: Any) -> Graph:
    """Compare the imported graph with onnxruntime, its optimiser off, on fresh inputs."""
    graph = import_model(m, **options)
    feeds = feeds_for(graph, seed)
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(m.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    wanted = session.run(None, feeds)
    results = evaluate(graph, feeds)
    for name, want in zip(graph.output_names, wanted, strict=True):
        np.testing.assert_allclose(results[name], want, rtol=1e-5, atol=1e-6)
    return graph


def operators(graph: Graph) -> list[str]:
    return [n.op.name for n in graph.nodes if n.op.name not in ("input", "constant")]


@pytest.mark.parametrize("seed", range(3))
def test_residual_net_equals_onnxruntime(seed: int) -> None:
    graph = assert_same(residual_net(seed), seed)
    assert graph.input_names == ("x",)
    assert graph.output_names == ("y",)
    assert graph.outputs[0].shape == (2, 5)


def test_shape_arithmetic_leaves_nothing_behind() -> None:
    graph = import_model(residual_net())
    assert not {"gather", "concat", "unsqueeze", "shape"} & set(operators(graph))


def test_nodes_carry_the_models_names() -> None:
    locations = set().union(*(n.loc for n in import_model(residual_net()).nodes))
    assert {"conv1", "bn1", "relu1", "conv2", "add", "pool", "gap", "reshape", "fc", "softmax"} <= locations


def test_weights_keep_their_names() -> None:
    labels = {n.op.label for n in import_model(residual_net()).nodes if isinstance(n.op, Constant)}
    assert {"w1", "b1", "gamma", "w2", "w3"} <= labels


def test_a_path_bytes_and_a_proto_give_the_same(tmp_path: Path) -> None:
    m = residual_net()
    path = tmp_path / "with space'quote.onnx"
    path.write_bytes(m.SerializeToString())
    texts = [str(import_model(source)) for source in (path, str(path), m.SerializeToString(), m)]
    assert len(set(texts)) == 1


def test_the_proto_handed_in_is_left_alone() -> None:
    m = model([node("Relu", "h", "y", "late"), node("Neg", "x", "h", "early")])
    before = m.SerializeToString()
    with pytest.warns(UserWarning, match="put in order"):
        import_model(m)
    assert m.SerializeToString() == before


def test_unordered_nodes_are_sorted() -> None:
    m = model([node("Relu", "h", "y", "late"), node("Neg", "x", "h", "early")])
    with pytest.warns(UserWarning, match="nodes stand before what they read"):
        graph = import_model(m)
    assert operators(graph) == ["neg", "relu"]


def test_duplicate_and_missing_node_names_become_unique() -> None:
    nodes = [
        node("Relu", "x", "a", "n"),
        node("Neg", "a", "b", "n"),
        node("Abs", "b", "c", ""),
        node("Exp", "c", "y", ""),
    ]
    locations = sorted(next(iter(n.loc)) for n in import_model(model(nodes)).nodes if n.loc)
    assert locations == ["Abs_2", "Exp_3", "n", "n_1"]


@pytest.mark.parametrize("name", ['"*/ #include', "; rm -rf", "../../x", "int main", "a\nb", "\u202e", "é" * 200])
def test_hostile_names_are_only_data(name: str) -> None:
    m = model([node("Relu", "in", "out", name)], [], [])
    m.graph.node[0].input[0] = m.graph.node[0].output[0] = ""
    m.graph.name = name
    m.graph.input.append(value(name))
    m.graph.output.append(value(name + "y", None))
    m.graph.node[0].input[0], m.graph.node[0].output[0] = name, name + "y"
    graph = import_model(m)
    assert graph.input_names == (name,)
    assert graph.name.isidentifier()
    assert graph.name.isascii()


def test_output_that_is_an_input() -> None:
    graph = import_model(model([], outputs=[value("x")]))
    x = np.ones((1, 3, 8, 8), np.float32)
    np.testing.assert_array_equal(evaluate(graph, {"x": x})["x"], x)


def test_initializers_among_the_inputs_are_constants() -> None:
    inputs = [value("x"), value("w", (3, 1, 1))]
    m = model([node("Add", "x w")], inputs, weights=[weight("w", np.arange(3).reshape(3, 1, 1))])
    assert import_model(m).input_names == ("x",)


def test_dead_nodes_are_not_compiled() -> None:
    graph = import_model(model([node("Relu", "x"), node("NonMaxSuppression", "x x", "boxes")]))
    assert operators(graph) == ["relu"]


def test_unread_outputs_do_not_count_as_used() -> None:
    graph = assert_same(model([node("MaxPool", "x", "y indices", kernel_shape=[2, 2])]))
    assert len(graph.outputs) == 1


@pytest.mark.parametrize("taken", [True, False])
def test_if_with_a_constant_condition_is_its_branch(taken: bool) -> None:
    then = helper.make_graph([node("Relu", "x", "t")], "then", [], [value("t", None)])
    other = helper.make_graph([node("Neg", "h", "e")], "else", [], [value("e", None)])
    nodes = [
        node("Abs", "x", "h"),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other),
    ]
    graph = assert_same(model(nodes, weights=[weight("c", taken, np.bool_)]))
    assert operators(graph) == (["relu"] if taken else ["abs", "neg"])


def test_if_on_a_shape_is_folded() -> None:
    then = helper.make_graph([node("Relu", "x", "t")], "then", [], [value("t", None)])
    other = helper.make_graph([node("Foo", "x", "e")], "else", [], [value("e", None)])
    nodes = [
        node("Shape", "x", "shape"),
        node("Size", "shape", "rank"),
        node("Equal", "rank four", "c"),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other),
    ]
    assert operators(import_model(model(nodes, weights=[weight("four", 4, np.int64)]))) == ["relu"]


def test_if_at_run_time_is_unsupported() -> None:
    branch = helper.make_graph([node("Relu", "x", "t")], "b", [], [value("t", None)])
    other = helper.make_graph([node("Neg", "x", "e")], "b", [], [value("e", None)])
    m = model(
        [helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch, else_branch=other)],
        [value("x"), value("c", (), TensorProto.BOOL)],
    )
    with pytest.raises(UnsupportedNodes, match="'if': its condition is known only at run time"):
        import_model(m)


def scaled(opset: int = 17) -> onnx.FunctionProto:
    """own::Scaled(a) = Relu(a) * s(factor), with a default for the attribute."""
    multiplier = node("Constant", "", "s")
    multiplier.attribute.append(onnx.AttributeProto(name="value_float", ref_attr_name="factor", type="FLOAT"))
    function = helper.make_function(
        "own",
        "Scaled",
        ["a"],
        ["b"],
        [node("Relu", "a", "r"), multiplier, node("Mul", "r s", "b")],
        [helper.make_opsetid("", opset)],
    )
    function.attribute_proto.append(helper.make_attribute("factor", 2.0))
    return function


def call(op_type: str, read: str, made: str, name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, read.split(), made.split(), name=name, domain="own", **attributes)


def test_functions_run_with_their_attributes() -> None:
    nodes = [call("Scaled", "x", "h", "first"), call("Scaled", "h", "y", "second", factor=3.0)]
    graph = assert_same(model(nodes, functions=[scaled()], imports=["own"]))
    x = -np.ones((1, 3, 8, 8), np.float32)
    np.testing.assert_array_equal(evaluate(graph, {"x": -x})["y"], -6 * x)
    locations = set().union(*(n.loc for n in graph.nodes))
    assert {"first/relu", "second/mul"} <= locations


def test_functions_call_functions() -> None:
    twice = helper.make_function(
        "own",
        "Twice",
        ["a"],
        ["b"],
        [call("Scaled", "a", "m", "in1"), call("Scaled", "m", "b", "in2")],
        [helper.make_opsetid("own", 1)],
    )
    graph = assert_same(model([call("Twice", "x", "y", "t")], functions=[twice, scaled()], imports=["own"]))
    assert "t/in2/mul" in set().union(*(n.loc for n in graph.nodes))


def test_inputs_that_a_call_leaves_out_are_absent() -> None:
    function = helper.make_function(
        "own", "Bound", ["a", "low", "high"], ["b"], [node("Clip", "a low high", "b")], [helper.make_opsetid("", 17)]
    )
    m = model([call("Bound", "x", "y", "b")], functions=[function], imports=["own"])
    x = np.linspace(-9, 9, 192, dtype=np.float32).reshape(1, 3, 8, 8)
    np.testing.assert_array_equal(evaluate(import_model(m), {"x": x})["y"], x)


def test_a_function_of_another_opset_is_read_by_its_own() -> None:
    function = helper.make_function(
        "own", "Old", ["a"], ["b"], [node("Clip", "a", "b", min=0.0, max=0.5)], [helper.make_opsetid("", 7)]
    )
    graph = import_model(model([call("Old", "x", "y", "o")], functions=[function], imports=["own"]))
    x = np.linspace(-1, 1, 192, dtype=np.float32).reshape(1, 3, 8, 8)
    np.testing.assert_array_equal(evaluate(graph, {"x": x})["y"], np.clip(x, 0, 0.5))


def test_composite_operators_become_simple_ones_under_their_name() -> None:
    m = model([node("MeanVarianceNormalization", "x", "y", "mvn")])
    graph = assert_same(m)
    assert {next(iter(n.loc)) for n in graph.nodes if n.op.name not in ("input", "constant")} == {"mvn"}


def test_all_gaps_are_reported_at_once() -> None:
    nodes = [
        node("NonMaxSuppression", "boxes scores", "n", "nms"),
        node("Foo", "x", "f", "foo"),
        node("Relu", "f", "r", "relu"),
        node("Bar", "r", "y", "bar1"),
        node("Bar", "f", "z", "bar2"),
    ]
    inputs = [value("x"), value("boxes", (1, 4, 4)), value("scores", (1, 1, 4))]
    outputs = [value("n", None, TensorProto.INT64), value("y", None), value("z", None)]
    with pytest.raises(UnsupportedNodes) as caught:
        import_model(model(nodes, inputs, outputs))
    assert [(gap.op_type, gap.name, gap.opset) for gap in caught.value.gaps] == [
        ("NonMaxSuppression", "nms", 17),
        ("Foo", "foo", 17),
        ("Bar", "bar1", 17),
        ("Bar", "bar2", 17),
    ]
    assert "4 nodes cannot be compiled" in str(caught.value)
    assert "Bar (opset 17) at 'bar1', 'bar2'" in str(caught.value)


def test_folding_comes_before_unsupported() -> None:
    nodes = [
        node("NonZero", "mask", "where"),
        node("Reshape", "where flat", "indices"),
        node("Gather", "x indices", "y", axis=1),
    ]
    weights = [weight("mask", [0, 1, 1], np.float32), weight("flat", [-1], np.int64)]
    graph = assert_same(model(nodes, weights=weights))
    assert operators(graph) == ["gather"]


def test_constants_beyond_the_folding_limit_stay_nodes() -> None:
    m = model([node("Expand", "w shape", "e"), node("Mul", "x e")], [value("x", (64, 64))], weights=[
        weight("w", [1.5]), weight("shape", [64, 64], np.int64)])  # fmt: skip
    assert "expand" not in operators(import_model(m))
    assert "expand" in operators(import_model(m, limits=Limits(folding=1000)))


def test_a_constant_that_shrinks_is_folded_whatever_its_size() -> None:
    m = model([node("ReduceMean", "w", "r", axes=[0]), node("Add", "x r")], [value("x", (64,))], weights=[
        weight("w", np.ones((64, 64)))])  # fmt: skip
    assert operators(import_model(m, limits=Limits(folding=16))) == ["add"]


def batched(first: int | str) -> onnx.ModelProto:
    return model([node("Relu", "x")], [value("x", (first, 3, 4, 4))])


def test_an_open_batch_is_one_with_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"input 'x': the batch dimension 'N' is open; it is taken as 1"):
        graph = import_model(batched("N"))
    assert graph.inputs[0].shape == (1, 3, 4, 4)


def test_batch_and_shapes_bind_open_dimensions() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_model(batched("N"), batch=5).inputs[0].shape == (5, 3, 4, 4)
        assert import_model(batched("N"), shapes={"x": (7, 3, 4, 4)}).inputs[0].shape == (7, 3, 4, 4)
        assert import_model(batched(4), batch=4).inputs[0].shape == (4, 3, 4, 4)


def test_equal_symbols_get_equal_numbers() -> None:
    m = model([node("Add", "x z")], [value("x", ("N", "C")), value("z", ("N", "C"))])
    assert [v.shape for v in import_model(m, shapes={"x": (2, 3)}).inputs] == [(2, 3), (2, 3)]
    with pytest.raises(UsageError, match="'N' would be both 2 and 4"):
        import_model(m, shapes={"x": (2, 3), "z": (4, 3)})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch": 2}, "has the fixed leading dimension 1, not batch 2"),
        ({"shapes": {"x": (2, 3, 4, 4)}}, r"is \[1,3,4,4\] in the model; it cannot be \[2,3,4,4\]"),
        ({"shapes": {"x": (1, 3, 4)}}, "has 4 dimensions"),
        ({"shapes": {"X": (1, 3, 4, 4)}}, "there is no input 'X' to give a shape; inputs: 'x'"),
        ({"batch": -1}, "batch -1 is negative"),
    ],
)
def test_shapes_that_contradict_the_model(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        import_model(batched(1), **options)


@pytest.mark.filterwarnings("ignore:input 'x'. the batch dimension")
def test_other_open_dimensions_name_the_cure() -> None:
    m = model([node("Relu", "x")], [value("x", ("N", 3, "H", "W"))])
    with pytest.raises(UnsupportedError, match=r"open dimensions \[N,3,H,W\]; give its shape: --shape x=1x3x224x224"):
        import_model(m)


def test_an_input_without_shape_names_the_cure() -> None:
    m = model([node("Relu", "x")], [value("x", None)])
    with pytest.raises(UnsupportedError, match="--shape x=1x3x224x224"):
        import_model(m)
    assert import_model(m, shapes={"x": (2, 3)}).outputs[0].shape == (2, 3)


def test_minus_one_is_an_open_dimension_when_the_shape_is_given() -> None:
    """As old Paddle exporters write it: [-1, 3, 0, 0]."""
    m = model([node("Relu", "x")], [value("x", (-1, 3, 0, 0))], [value("y", (-1, 3, 0, 0))])
    assert import_model(m, shapes={"x": (1, 3, 48, 192)}).outputs[0].shape == (1, 3, 48, 192)
    with pytest.raises(UsageError, match=r"is \[\?,3,\?,\?\] in the model"):
        import_model(m, shapes={"x": (1, 4, 48, 192)})


@pytest.mark.parametrize("mark", ["?", "None", ""])
def test_marks_for_open_dimensions_are_no_names(mark: str) -> None:
    m = model([node("Relu", "x")], [value("x", (mark, 3, mark, mark))])
    assert import_model(m, shapes={"x": (1, 3, 48, 192)}).outputs[0].shape == (1, 3, 48, 192)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_carried_with_a_warning(bad: float) -> None:
    m = model([node("Mul", "x w")], [value("x", (2,))], weights=[weight("w", [1, bad])])
    with pytest.warns(UserWarning, match="initializer 'w' has NaN or infinite values"):
        graph = import_model(m)
    result = evaluate(graph, {"x": np.array([1, 0], np.float32)})["y"]
    assert result[0] == 1
    assert np.isnan(result[1])


def test_an_empty_batch_is_imported() -> None:
    graph = import_model(batched(0))
    assert graph.outputs[0].shape == (0, 3, 4, 4)


def test_ten_thousand_nodes() -> None:
    nodes = [node("Relu", f"t{i}", f"t{i + 1}", f"n{i}") for i in range(10_000)]
    graph = import_model(model(nodes, [value("t0", (2,))], [value("t10000", (2,))]))
    assert len(operators(graph)) == 10_000


def test_live_tensors_are_counted_against_memory() -> None:
    nodes = [node("Relu", "x", "a"), node("Neg", "x", "b"), node("Add", "a b")]
    m = model(nodes, [value("x", (1000,))])
    import_model(m, limits=Limits(memory=12_000))
    with pytest.raises(LimitError, match=r"live tensors take 11\.7 KiB"):
        import_model(m, limits=Limits(memory=11_999))


@pytest.mark.parametrize("key", ["plain", "checksum", "unknown key"])
def test_external_data(tmp_path: Path, key: str) -> None:
    data = np.arange(8, dtype=np.float32)
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "w.bin").write_bytes(data.tobytes())
    w = TensorProto(name="w", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    entries = {"location": "sub/w.bin", "offset": "8", "length": "16"}
    if key == "checksum":
        entries["checksum"] = hashlib.sha1(data.tobytes()).hexdigest()
    if key == "unknown key":
        entries["basepath"] = "/etc"
    for name, text in entries.items():
        w.external_data.add(key=name, value=text)
    path = tmp_path / "m.onnx"
    path.write_bytes(model([node("Add", "x w")], [value("x", (4,))], weights=[w]).SerializeToString())
    result = evaluate(import_model(path), {"x": np.zeros(4, np.float32)})["y"]
    np.testing.assert_array_equal(result, data[2:6])


@pytest.mark.parametrize(
    ("dtype", "field", "stored", "wanted"),
    [
        (TensorProto.FLOAT, "float_data", [1.5, -2], [1.5, -2]),
        (TensorProto.DOUBLE, "double_data", [1.5, -2], [1.5, -2]),
        (TensorProto.INT64, "int64_data", [2**40, -3], [2**40, -3]),
        (TensorProto.INT32, "int32_data", [7, -3], [7, -3]),
        (TensorProto.INT8, "int32_data", [127, -128], [127, -128]),
        (TensorProto.UINT8, "int32_data", [255, 0], [255, 0]),
        (TensorProto.BOOL, "int32_data", [1, 0], [True, False]),
        (TensorProto.FLOAT16, "int32_data", [0x3C00, 0xC000], [1, -2]),
        (TensorProto.BFLOAT16, "int32_data", [0x3F80, 0xC000], [1, -2]),
    ],
)
def test_every_way_of_storing_numbers(dtype: int, field: str, stored: list[Any], wanted: list[Any]) -> None:
    w = TensorProto(name="w", data_type=dtype, dims=[2])
    getattr(w, field).extend(stored)
    graph = import_model(model([node("Identity", "w", "y")], [], [value("y", (2,), dtype)], [w]))
    result = evaluate(graph, {})["y"]
    assert DType.of(result) is graph.outputs[0].dtype
    np.testing.assert_array_equal(result.astype(np.float64), np.asarray(wanted, np.float64))


def test_an_attribute_that_no_reader_looks_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnc.ir import op

    monkeypatch.setitem(op.ONNX_READERS, ("", "LeakyRelu"), lambda node, x: x)
    assert operators(import_model(model([node("LeakyRelu", "x", alpha=0.01)]))) == []  # its default
    m = model([node("LeakyRelu", "x", alpha=0.5)], opset=15)  # opset 15 has no definition to fall back on
    with pytest.raises(UnsupportedError, match="the attribute 'alpha' is not supported"):
        import_model(m)


def test_the_smallest_model() -> None:
    assert_same(relu())
