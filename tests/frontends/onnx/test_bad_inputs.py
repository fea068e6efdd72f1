"""Bad inputs: each ends in its documented exit code with one line that names the reason."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cnnc.errors import CnncError
from cnnc.frontends.onnx import import_model
from tests.frontends.onnx.models import model, node, relu, value, weight

Source = Any


@dataclass(frozen=True)
class Case:
    """One bad input: what it is called, how it is made, and how it must end."""

    title: str
    make: Callable[[Path], Source]
    code: int
    text: str


def written(data: bytes | Callable[[], bytes]) -> Callable[[Path], Source]:
    def make(folder: Path) -> Path:
        path = folder / "m.onnx"
        path.write_bytes(data if isinstance(data, bytes) else data())
        return path

    return make


def built(make: Callable[[], onnx.ModelProto]) -> Callable[[Path], Source]:
    return lambda folder: make()


def edited(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], Source]:
    """The smallest sound model, changed."""

    def make(folder: Path) -> onnx.ModelProto:
        m = relu()
        edit(m)
        return m

    return make


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"x")
    return buffer.getvalue()


class Trap:
    """Unpickling this ends the process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (99,)


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "m.onnx")
    return folder / "m.onnx"


def unix_socket(folder: Path) -> Path:
    path = folder / "m.onnx"
    here = os.open(".", os.O_RDONLY)
    os.chdir(folder)  # a socket's whole path must be short
    try:
        socket.socket(socket.AF_UNIX).bind("m.onnx")
    finally:
        os.fchdir(here)
        os.close(here)
    return path


def sparse_file(folder: Path) -> Path:
    path = folder / "m.onnx"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    return path


def sound() -> bytes:
    return relu().SerializeToString()


FILES = [
    Case("1 empty", written(b""), 3, "empty file"),
    Case("2 random bytes", written(np.random.default_rng(1).bytes(4096)), 3, "not an ONNX file"),
    Case("3 half", written(lambda: sound()[: len(sound()) // 2]), 3, "bytes are missing"),
    Case("3 last byte", written(lambda: sound()[:-1]), 3, "cut short"),
    Case("4 zip", written(zip_bytes), 3, "zip archive"),
    Case("4 gzip", written(lambda: gzip.compress(sound())), 3, "gzip"),
    Case("4 pickle", written(lambda: pickle.dumps(Trap())), 3, "pickle"),
    Case("4 git lfs", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), 3, "git lfs pull"),
    Case("4 json", written(b'{"irVersion": "8"}'), 3, "text (JSON"),
    Case("5 3 GiB", sparse_file, 5, "limit file=2.0 GiB"),
    Case("5 length beyond the limit", written(b"\x08\x08\x3a\x80\x80\x80\x80\x80\x80\x01"), 5, "claims 4.0 TiB"),
    Case("5 length beyond the file", written(b"\x08\x08\x3a\x80\x80\x04abc"), 3, "cut short"),
    Case("6 folder", lambda folder: folder, 3, "is a folder"),
    Case("6 fifo", fifo, 3, "is a FIFO"),
    Case("6 device", lambda folder: Path("/dev/zero"), 3, "is a device"),
    Case("6 socket", unix_socket, 3, "is a socket"),
    Case("6 missing", lambda folder: folder / "none.onnx", 6, "No such file"),
    Case("6 NUL in the path", lambda folder: Path("a\0b"), 3, "NUL"),
]


def message(field: int, *parts: bytes) -> bytes:
    """Encode a length-delimited protobuf field."""
    content = b"".join(parts)
    return varint(field << 3 | 2) + varint(len(content)) + content


def varint(number: int) -> bytes:
    encoded = b""
    while number > 0x7F:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


def deep_ifs() -> bytes:
    """Forty branches in one another, which protobuf's own writer refuses to make."""
    graph = b""
    for _ in range(40):
        attribute = message(5, message(1, b"then_branch"), message(6, graph))
        graph = message(1, message(2, b"y"), message(4, b"If"), attribute)
    return b"\x08\x08" + message(7, graph)


def both_fields(m: onnx.ModelProto) -> None:
    tensor = weight("w", np.ones(3))
    tensor.float_data.extend([2, 2, 2])
    m.graph.initializer.append(tensor)


def metadata_bomb() -> bytes:
    return sound() + b"\x72\x00" * 6_000_000


def node_bomb() -> bytes:
    return b"\x08\x08" + message(7, message(1) * 1_000_000)


def unreadable_name() -> bytes:
    return relu(name="marker").SerializeToString().replace(b"marker", b"\xff\xfe\xfd\xfc\xfb\xfa")


PROTOBUF = [
    Case("8 deep ifs", written(deep_ifs), 5, "subgraph_depth=16"),
    Case("9 no opset", edited(lambda m: m.ClearField("opset_import")), 3, "no opset"),
    Case("9 opset -1", built(lambda: model([node("Relu", "x")], opset=-1)), 3, "opset -1"),
    Case("9 opset 0", built(lambda: model([node("Relu", "x")], opset=0)), 3, "opset 0"),
    Case("9 no IR version", edited(lambda m: m.ClearField("ir_version")), 3, "IR version"),
    Case("9 two opsets", edited(lambda m: m.opset_import.append(helper.make_opsetid("ai.onnx", 8))), 3, "two versions"),
    Case("10 opset 9999", built(lambda: model([node("Relu", "x")], opset=9999)), 4, "7 to"),
    Case("10 opset 6", built(lambda: model([node("Relu", "x")], opset=6)), 4, "7 to"),
    Case("10 IR version 99", edited(lambda m: setattr(m, "ir_version", 99)), 4, "IR version 99"),
    Case("11 two value fields", edited(both_fields), 3, "raw_data and in float_data"),
    Case("12 long name", edited(lambda m: setattr(m.graph.node[0], "name", "n" * (1 << 20))), 5, "limit name=512"),
    Case("12 NUL in a name", edited(lambda m: setattr(m.graph.node[0], "name", "a\0b")), 3, r"'a\x00b'"),
    Case("12 name is no UTF-8", written(unreadable_name), 3, "not valid UTF-8"),
    Case("12 metadata bomb", written(metadata_bomb), 5, "limit fields"),
    Case("25 a million nodes", written(node_bomb), 5, "limit nodes=100000"),
    Case("no graph", edited(lambda m: m.ClearField("graph")), 3, "no graph"),
]


def function(name: str, nodes: list[onnx.NodeProto], **more: Any) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["a"], ["b"], nodes, opsets, **more)


def own(op_type: str, read: str, made: str) -> onnx.NodeProto:
    return helper.make_node(op_type, [read], [made], name=op_type, domain="own")


def recursive() -> onnx.ModelProto:
    functions = [function("F", [own("G", "a", "b")]), function("G", [own("F", "a", "b")])]
    return model([own("F", "x", "y")], functions=functions, imports=["own"])


def deep_functions() -> onnx.ModelProto:
    functions = [function("F0", [node("Relu", "a", "b")])]
    functions += [function(f"F{i}", [own(f"F{i - 1}", "a", "b")]) for i in range(1, 3000)]
    return model([own("F2999", "x", "y")], functions=functions, imports=["own"])


def left_out() -> onnx.ModelProto:
    nodes = [helper.make_node("F", [], ["y"], name="call", domain="own")]
    return model(nodes, functions=[function("F", [node("Relu", "a", "b")])], imports=["own"])


def fan_out() -> onnx.ModelProto:
    functions = [function("F0", [node("Relu", "a", "b")])]
    for i in range(1, 25):
        functions.append(function(f"F{i}", [own(f"F{i - 1}", "a", "m"), own(f"F{i - 1}", "m", "b")]))
    return model([own("F24", "x", "y")], functions=functions, imports=["own"])


def loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Identity", "go", "more"), node("Relu", "v", "w")],
        "body",
        [value("i", (), TensorProto.INT64), value("go", (), TensorProto.BOOL), value("v", None)],
        [value("more", (), TensorProto.BOOL), value("w", None)],
    )
    trips = weight("trips", 100_000_000, np.int64)
    return model([helper.make_node("Loop", ["trips", "", "x"], ["y"], name="loop", body=body)], weights=[trips])


def foreign_domain() -> onnx.ModelProto:
    return model([helper.make_node("Relu", ["x"], ["y"], name="relu", domain="evil")], imports=["evil"])


def shadow() -> onnx.ModelProto:
    branch = helper.make_graph([node("Relu", "x", "h")], "g", [], [value("h", None)])
    other = helper.make_graph([node("Relu", "x", "k")], "g", [], [value("k", None)])
    nodes = [node("Relu", "x", "h"), helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=other)]
    return model(nodes, [value("x"), value("c", (), TensorProto.BOOL)])


GRAPHS = [
    Case(
        "13 cycle",
        built(lambda: model([node("Relu", "b", "a", "p"), node("Neg", "a", "b", "q"), node("Relu", "a")])),
        3,
        "cycle: Neg 'q' -> Relu 'p' -> Neg 'q'",
    ),
    Case("13 self loop", built(lambda: model([node("Add", "x y", "y", "self")])), 3, "cycle: Add 'self' -> Add 'self'"),
    Case(
        "15 made twice",
        built(lambda: model([node("Relu", "x", "y", "p"), node("Neg", "x", "y", "q")])),
        3,
        "'y' is made twice: by Relu 'p' and by Neg 'q'",
    ),
    Case(
        "15 output is an input", built(lambda: model([node("Relu", "x", "x"), node("Relu", "x")])), 3, "'x' is an input"
    ),
    Case(
        "15 initializer twice",
        built(lambda: model([node("Relu", "x")], weights=[weight("w", 1), weight("w", 2)])),
        3,
        "initializer 'w' is defined twice",
    ),
    Case("15 shadowed in a branch", built(shadow), 3, "'h' is another node's output"),
    Case(
        "17 undefined",
        built(lambda: model([node("Conv", "x conv1.weigth")], weights=[weight("conv1.weight", [1])])),
        3,
        "reads 'conv1.weigth', which nothing defines; did you mean 'conv1.weight'?",
    ),
    Case("17 undefined output", built(lambda: model([node("Relu", "x", "yy")])), 3, "output 'y' is made by no node"),
    Case("18 no outputs", built(lambda: model([node("Relu", "x")], outputs=[])), 3, "no outputs"),
    Case(
        "20 unknown operators",
        built(lambda: model([node("Foo", "x", "a"), node("Bar", "a", "y")])),
        4,
        "2 nodes cannot be compiled: Foo (opset 17) at 'foo': ONNX has no such operator; Bar (opset 17) at 'bar'",
    ),
    Case("21 unknown domain", built(foreign_domain), 4, "evil::Relu"),
    Case(
        "22 unknown attribute",
        built(lambda: model([node("Softmax", "x", axes=1)])),
        3,
        "Softmax 'softmax': has no attribute 'axes'; did you mean 'axis'?",
    ),
    Case("22 attribute type", built(lambda: model([node("Softmax", "x", axis=1.0)])), 3, "'axis' is FLOAT, not INT"),
    Case("22 missing attribute", built(lambda: model([node("Concat", "x x")])), 3, "needs the attribute 'axis'"),
    Case("22 too many inputs", built(lambda: model([node("Relu", "x x")])), 3, "takes 1 inputs, not 2"),
    Case("22 too many outputs", built(lambda: model([node("Relu", "x", "y z")])), 3, "gives 1 outputs, not 2"),
    Case("22 too new", built(lambda: model([node("Gelu", "x")])), 3, "came with opset 20"),
    Case("22 taken out", built(lambda: model([node("Upsample", "x x")])), 3, "was taken out of ONNX with opset 10"),
    Case(
        "22 reference outside",
        edited(lambda m: m.graph.node[0].attribute.add(name="axis", ref_attr_name="k", type=2)),
        3,
        "stands in no function",
    ),
    Case("23 too few inputs", built(lambda: model([node("Add", "x")])), 3, "takes 2 inputs, not 1"),
    Case("23 empty input", built(lambda: model([node("Add", "x -")])), 3, "input 1 is left out"),
    Case("26 recursive functions", built(recursive), 3, "call themselves: 'own::F', 'own::G', 'own::F'"),
    Case("26 deep functions", built(deep_functions), 5, "limit function_depth=64"),
    Case("23 input left out by a call", built(left_out), 3, "input 0 ('a') is left out by the call"),
    Case("27 fan-out", built(fan_out), 5, "33554431 calls"),
    Case("28 long loop", built(loop), 4, "Loop (opset 17) at 'loop'"),
]


def tensor(**fields: Any) -> onnx.TensorProto:
    return TensorProto(name="w", **fields)


def with_weight(w: onnx.TensorProto, op: str = "Add") -> Callable[[Path], Source]:
    return built(lambda: model([node(op, "x w")], weights=[w]))


def string_input() -> onnx.ModelProto:
    return model(
        [node("Identity", "x")], [value("x", (1,), TensorProto.STRING)], [value("y", None, TensorProto.STRING)]
    )


def sequence_input() -> onnx.ModelProto:
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, (1,))
    return model([node("SequenceAt", "x i")], [sequence], weights=[weight("i", 0, np.int64)])


def sparse_weight() -> onnx.ModelProto:
    m = relu()
    m.graph.sparse_initializer.add().values.CopyFrom(weight("w", [1]))
    return m


def typed(dtype: int, **fields: Any) -> onnx.TensorProto:
    return tensor(data_type=dtype, **fields)


VALUES = [
    Case("29 string input", built(string_input), 4, "'x': elements of type STRING"),
    Case("29 sequence input", built(sequence_input), 4, "is no tensor (sequence_type)"),
    Case("29 sparse weight", built(sparse_weight), 4, "sparse initializer 'w'"),
    Case("29 string weight", with_weight(typed(8, dims=[1], string_data=[b"a"])), 4, "STRING"),
    Case("30 dtype 99", with_weight(typed(99, dims=[1], raw_data=b"1234")), 3, "type 99 does not exist"),
    Case("30 dtype 0", with_weight(typed(0, dims=[1], raw_data=b"1234")), 3, "type 0 does not exist"),
    Case("31 f64 weights", with_weight(weight("w", np.ones(8), np.float64)), 3, "f64"),
    Case("31 i32 weights", with_weight(weight("w", np.ones(8), np.int32)), 3, "i32"),
    Case("31 f64 conv weights", with_weight(weight("w", np.ones((2, 3, 1, 1)), np.float64), "Conv"), 3, "f64"),
    Case("32 raw too short", with_weight(typed(1, dims=[2], raw_data=b"1234")), 3, "needs 8 bytes in raw_data, not 4"),
    Case("32 raw too long", with_weight(typed(1, dims=[1], raw_data=b"12345")), 3, "needs 4 bytes in raw_data, not 5"),
    Case("32 no values", with_weight(typed(1, dims=[1])), 3, "needs 1 values in float_data, not 0"),
    Case("32 wrong field", with_weight(typed(1, dims=[1], int64_data=[1])), 3, "belong in float_data"),
    Case("32 negative dims", with_weight(typed(1, dims=[-1], raw_data=b"1234")), 3, "negative"),
    Case("32 overflow", with_weight(typed(1, dims=[2**31 - 1] * 3)), 5, "limit tensor"),
    Case("32 product wraps", with_weight(typed(1, dims=[2**30, 2**30, 16], raw_data=b"")), 5, "limit tensor"),
    Case("32 huge dimension", with_weight(typed(1, dims=[2**62], raw_data=b"1234")), 5, "limit dim"),
    Case("32 rank 9", with_weight(typed(1, dims=[1] * 9, raw_data=b"1234")), 5, "limit rank=8"),
    Case("32 out of range", with_weight(typed(3, dims=[1], int32_data=[300])), 3, "-128..127"),
    Case("32 bool is 2", with_weight(typed(9, dims=[1], raw_data=b"\2")), 3, "other than 0 and 1"),
    Case(
        "32 segment",
        with_weight(typed(1, dims=[1], raw_data=b"1234", segment=TensorProto.Segment(begin=0))),
        3,
        "segment",
    ),
    Case(
        "35 division by 0",
        built(
            lambda: model(
                [node("Div", "x w")],
                [value("x", (2,), TensorProto.INT32)],
                [value("y", None, TensorProto.INT32)],
                [weight("w", [1, 0], np.int32)],
            )
        ),
        3,
        "constant 0",
    ),
    Case("36 gather", with_weight(weight("w", 1, np.int64), "Gather"), 3, "index 1 is outside of axis 0, which has 1"),
    Case("36 gather below", with_weight(weight("w", [0, -2], np.int64), "Gather"), 3, "index -2"),
    Case("36 gather_nd", with_weight(weight("w", [[0, 3]], np.int64), "GatherND"), 3, "index 3 is outside of axis 1"),
    Case(
        "36 scatter_elements",
        built(
            lambda: model(
                [node("ScatterElements", "x w u")],
                weights=[weight("w", np.full((1, 1, 1, 1), 7), np.int64), weight("u", np.ones((1, 1, 1, 1)))],
            )
        ),
        3,
        "index 7",
    ),
    Case(
        "36 scatter_nd",
        built(
            lambda: model(
                [node("ScatterND", "x w u")], weights=[weight("w", [[0, 0, 9, 0]], np.int64), weight("u", [1.0])]
            )
        ),
        3,
        "index 9",
    ),
]


def conv(shape: tuple[int, ...] = (4, 3, 3, 3), **attributes: Any) -> Callable[[Path], Source]:
    return built(lambda: model([node("Conv", "x w", **attributes)], weights=[weight("w", np.ones(shape))]))


def one(op: str, **attributes: Any) -> Callable[[Path], Source]:
    return built(lambda: model([node(op, "x", **attributes)]))


def pool(**attributes: Any) -> Callable[[Path], Source]:
    return one("MaxPool", **({"kernel_shape": [2, 2]} | attributes))


def shaped(
    op: str, numbers: Any, dtype: Any = np.int64, read: str = "x w", **attributes: Any
) -> Callable[[Path], Source]:
    return built(lambda: model([node(op, read, **attributes)], weights=[weight("w", numbers, dtype)]))


def from_shape(shape: tuple[int, ...]) -> Callable[[Path], Source]:
    return built(lambda: model([node("Relu", "x")], [value("x", shape)]))


def declared(shape: tuple[int, ...], dtype: int = TensorProto.FLOAT) -> Callable[[Path], Source]:
    return built(lambda: model([node("Relu", "x")], outputs=[value("y", shape, dtype)]))


def wrapping_reshape() -> onnx.ModelProto:
    target = weight("w", [7, 2635249153387078912], np.int64)
    return model([node("Reshape", "x w")], [value("x", (1, 3, 16, 16))], weights=[target])


def ranged(count: int) -> onnx.ModelProto:
    scalars = [weight(n, v, np.int64) for n, v in (("start", 0), ("limit", count), ("delta", 1))]
    nodes = [node("Range", "start limit delta", "r"), node("Cast", "r", "f", to=1), node("Mul", "x f")]
    return model(nodes, weights=scalars)


def doubling() -> onnx.ModelProto:
    nodes = [node("Concat", f"t{i} t{i}", f"t{i + 1}", f"concat{i}", axis=0) for i in range(40)]
    return model(
        [node("Identity", "w", "t0"), *nodes, node("Mul", "x t40")], weights=[weight("w", np.ones((1, 3, 8, 8)))]
    )


def dropping() -> onnx.ModelProto:
    """Dropout that drops: random numbers."""
    weights = [weight("ratio", 0.5), weight("training", True, np.bool_)]
    return model([node("Dropout", "x ratio training")], weights=weights)


def resized(scales: list[float]) -> onnx.ModelProto:
    return model([node("Resize", "x - s", mode="nearest")], weights=[weight("s", scales)])


SHAPES = [
    Case("38 negative input dim", from_shape((1, -3, 8, 8)), 3, "negative"),
    Case("38 input dim -1", from_shape((-1, 3, 0, 0)), 3, "--shape x=1x3x224x224"),
    Case("40 stride 0", conv(strides=[0, 1]), 3, "strides [0, 1] must be positive"),
    Case("40 stride -1", pool(strides=[-1, 1]), 3, "strides [-1, 1] must be positive"),
    Case("41 dilation 0", conv(dilations=[0, 1]), 3, "dilations [0, 1] must be positive"),
    Case("42 kernel too large", conv((4, 3, 9, 9)), 3, "9"),
    Case("42 pool too large", pool(kernel_shape=[9, 9]), 3, "9"),
    Case("43 group 0", conv(group=0), 3, "group is 0"),
    Case("43 group -1", conv(group=-1), 3, "group is -1"),
    Case("43 group 2 of 3", conv(group=2), 3, "2"),
    Case(
        "44 kernel_shape", conv(kernel_shape=[5, 5]), 3, "kernel_shape [5, 5] contradicts the weights' shape [4,3,3,3]"
    ),
    Case("45 pads too short", conv(pads=[1, 1]), 3, "pads [1, 1] does not fit"),
    Case("45 pads odd", conv(pads=[1, 1, 1]), 3, "begin and an end"),
    Case("45 negative pads", conv(pads=[-1, 0, 0, 0]), 3, "must not be negative"),
    Case("46 pads 2^30", conv(pads=[2**30] * 4), 5, "2147483654"),
    Case("46 pads 2^62", conv(pads=[2**62] * 4), 5, "limit dim"),
    Case("46 kernel 2^30", pool(kernel_shape=[2**30, 1]), 3, "1073741824"),
    Case("47 pool kernel 0", pool(kernel_shape=[0, 2]), 3, "kernel_shape [0, 2] must be positive"),
    Case("49 declared shape", declared((1, 3, 8, 9)), 3, "'y' is declared FLOAT[1,3,8,9], but it is f32[1,3,8,8]"),
    Case("49 declared rank", declared((1, 3, 8)), 3, "'y' is declared FLOAT[1,3,8]"),
    Case("49 declared type", declared((1, 3, 8, 8), TensorProto.DOUBLE), 3, "'y' is declared DOUBLE"),
    Case("50 2^31 x 2^31", from_shape((2**31, 2**31)), 5, "limit dim"),
    Case("50 2^62", from_shape((2**62,)), 5, "limit dim"),
    Case("50 large product", from_shape((2**30, 2**30)), 5, "limit tensor"),
    Case("51 wrapping reshape", built(wrapping_reshape), 3, "2635249153387078912"),
    Case("52 two -1", shaped("Reshape", [-1, -1]), 3, "-1"),
    Case("52 -5", shaped("Reshape", [-5, 192]), 3, "-5"),
    Case("52 wrong count", shaped("Reshape", [1, 191]), 3, "191"),
    Case("53 expand", shaped("Expand", [2**20, 3, 2**10, 2**10]), 3, "1024"),
    Case("53 expand to 2^40", shaped("Expand", [2**30, 2**7, 1, 3, 8, 8]), 5, "limit"),
    Case("53 tile", shaped("Tile", [2**20, 2**20, 1, 1]), 5, "limit"),
    Case("53 pad", shaped("Pad", [0, 0, 2**20, 2**20, 0, 0, 0, 0]), 5, "limit"),
    Case("53 resize", built(lambda: resized([1, 1, 2**20, 2**20])), 5, "limit"),
    Case("54 pad -9", shaped("Pad", [0, 0, -9, 0, 0, 0, 0, 0]), 3, "-9"),
    Case("54 scale 0", built(lambda: resized([1, 1, 0, 1])), 3, "0"),
    Case("54 scale -1", built(lambda: resized([1, 1, -1, 1])), 3, "-1"),
    Case("55 blocksize 0", one("SpaceToDepth", blocksize=0), 3, "blocksize is 0"),
    Case("55 blocksize 2^32", one("DepthToSpace", blocksize=2**32), 3, "blocksize is 4294967296"),
    Case("55 blocksize -2", one("DepthToSpace", blocksize=-2), 3, "blocksize is -2"),
    Case(
        "56 split",
        built(lambda: model([node("Split", "x w", "y z", axis=1)], weights=[weight("w", [1, 1], np.int64)])),
        3,
        "3",
    ),
    Case(
        "56 slice step 0",
        built(
            lambda: model(
                [node("Slice", "x a b c d")],
                weights=[weight(n, [v], np.int64) for n, v in (("a", 0), ("b", 2), ("c", 2), ("d", 0))],
            )
        ),
        3,
        "0",
    ),
    Case(
        "57 ConstantOfShape 2^36",
        built(
            lambda: model(
                [node("ConstantOfShape", "w", "c"), node("Mul", "x c")], weights=[weight("w", [2**18, 2**18], np.int64)]
            )
        ),
        5,
        "limit folding",
    ),
    Case("57 Range 2^32", built(lambda: ranged(2**32)), 5, "limit folding"),
    Case("57 Range without end", built(lambda: ranged(2**63 - 1)), 5, "limit folding"),
    Case("57 doubling", built(doubling), 5, "limit"),
    Case("58 dropout in training", built(dropping), 4, "Dropout (opset 17)"),
    Case("axis outside", one("Softmax", axis=4), 3, "4"),
    Case(
        "concat shapes",
        built(lambda: model([node("Concat", "x w", axis=0)], weights=[weight("w", np.ones((1, 2, 8, 8)))])),
        3,
        "concat",
    ),
    Case(
        "matmul shapes", built(lambda: model([node("MatMul", "x w")], weights=[weight("w", np.ones((7, 2)))])), 3, "7"
    ),
    Case("broadcast shapes", built(lambda: model([node("Add", "x w")], weights=[weight("w", np.ones(7))])), 3, "7"),
]


def external(folder: Path, data: bytes = b"\0" * 32, **entries: Any) -> onnx.ModelProto:
    """A model whose weights, 4 floats, lie in a file."""
    keys = {"location": "w.bin", "offset": "0", "length": "16"} | entries
    w = typed(1, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in keys.items():
        if text is not None:
            w.external_data.add(key=key, value=str(text))
    (folder / "w.bin").write_bytes(data)
    return model([node("Add", "x w")], [value("x", (4,))], weights=[w])


def stored(prepare: Callable[[Path], object] | None = None, **entries: Any) -> Callable[[Path], Source]:
    def make(folder: Path) -> Path:
        inside = folder / "inside"
        inside.mkdir()
        (folder / "x").write_bytes(b"\0" * 32)
        m = external(inside, **entries)
        if prepare is not None:
            prepare(inside)
        (inside / "m.onnx").write_bytes(m.SerializeToString())
        return inside / "m.onnx"

    return make


def link_file(folder: Path) -> None:
    (folder / "link").symlink_to(folder / "w.bin")


def link_folder(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "w.bin").write_bytes(b"\0" * 32)
    (folder / "linked").symlink_to(folder / "real")


def shorten(folder: Path) -> None:
    (folder / "w.bin").write_bytes(b"\0" * 8)


EXTERNAL = [
    Case("59 parent", stored(location="../x"), 3, "leaves the model's folder"),
    Case("59 parent within", stored(location="a/../../x"), 3, "leaves the model's folder"),
    Case("59 absolute", stored(location="/dev/zero"), 3, "absolute"),
    Case("59 empty", stored(location=""), 3, "without a location"),
    Case("59 dot", stored(location="."), 3, "leaves the model's folder"),
    Case("60 symlink", stored(link_file, location="link"), 3, "symbolic link"),
    Case("60 linked folder", stored(link_folder, location="linked/w.bin"), 3, "cannot be opened"),
    Case("60 hardlink", stored(lambda f: os.link(f / "w.bin", f / "hard"), location="hard"), 3, "hard link"),
    Case("60 fifo", stored(lambda f: os.mkfifo(f / "fifo"), location="fifo"), 3, "no regular file"),
    Case("60 folder", stored(lambda f: (f / "sub").mkdir(), location="sub"), 3, "no regular file"),
    Case("61 missing", stored(location="none.bin"), 3, "No such file"),
    Case("61 short", stored(shorten), 3, "has 8 bytes; bytes 0 to 16 are asked for"),
    Case("61 negative offset", stored(offset=-4), 3, "offset '-4' is no byte count"),
    Case("61 text offset", stored(offset="1e3"), 3, "offset '1e3' is no byte count"),
    Case("61 offset 2^60", stored(offset=2**59), 3, "are asked for"),
    Case("61 length 2^50", stored(length=2**50), 3, "take 16"),
    Case("61 wrong length", stored(length=12), 3, "12 bytes, where shape and type take 16"),
    Case("62 wrong checksum", stored(checksum="0" * 40), 3, "has SHA-1"),
    Case("external data without a folder", lambda folder: external(folder), 3, "came as bytes"),
]

CASES = [*FILES, *PROTOBUF, *GRAPHS, *VALUES, *SHAPES, *EXTERNAL]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_ends_in_its_exit_code_with_one_line(case: Case, tmp_path: Path) -> None:
    source = case.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    start = time.process_time()
    with pytest.raises(CnncError) as caught:
        import_model(source)
    seconds = time.process_time() - start
    message = str(caught.value)
    assert (caught.value.exit_code, case.text in message, "\n" in message) == (case.code, True, False), message
    assert message.startswith(str(source) if isinstance(source, Path) and "\0" not in str(source) else ("<model>", "a"))
    assert len(message) < 2000
    assert seconds < 10
    assert sorted(tmp_path.rglob("*")) == before, "a file was left"
