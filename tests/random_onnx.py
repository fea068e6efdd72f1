"""Draws valid ONNX networks from a seed: convolutions, pools, norms, joins, views and attention of any small shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

OPSETS = (13, 17, 18, 21)

MOST_ELEMENTS = 30_000
"""Of one value, so that a network runs in milliseconds."""

CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 20, 24, 31, 32, 33, 40)

UNARY = (
    "Relu", "Relu", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Elu", "HardSigmoid", "HardSwish", "Softplus", "Softsign",
    "Abs", "Neg", "Exp", "Erf", "Cos", "Selu", "Celu", "Identity",
)  # fmt: skip


class Misfit(Exception):
    """What a step wanted to add is not valid here."""


class Builder:
    """A network in the making: nodes, weights, and the shape of every value."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = int(self.choose(OPSETS))
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.values: list[str] = []

    # Chance

    def choose(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    # Values

    def input(self, shape: tuple[int, ...]) -> None:
        self.values.append(f"x{len(self.values)}")
        self.shapes[self.values[-1]] = shape

    def weight(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> str:
        """Make a constant of normal numbers; scalars have no dimensions."""
        return self.constant((self.rng.standard_normal(shape) * scale + offset).astype(np.float32))

    def constant(self, array: Any, dtype: type = np.float32) -> str:
        array = np.asarray(array) if isinstance(array, np.ndarray | np.generic) else np.asarray(array, dtype)
        name = f"w{len(self.weights)}"
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def indices(self, numbers: Sequence[int]) -> str:
        return self.constant(list(numbers), np.int64)

    def pick(self, rank: int | None = None) -> str:
        """Pick a value, late ones rather, so that networks get deep."""
        fitting = [v for v in self.values if rank is None or len(self.shapes[v]) == rank]
        if not fitting:
            raise Misfit
        return fitting[-1 - min(int(self.rng.geometric(0.5)) - 1, len(fitting) - 1)]

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; raises Misfit where onnx finds it invalid, or its output empty or large."""
        names = [f"v{len(self.nodes)}_{i}" if outputs > 1 else f"v{len(self.nodes)}" for i in range(outputs)]
        node = helper.make_node(op, inputs, names, name=f"{op}_{len(self.nodes)}", **attributes)
        for name, shape in zip(names, self._infer(node), strict=True):
            self.shapes[name] = shape
        self.nodes.append(node)
        self.values += names
        return names[0]

    def _infer(self, node: onnx.NodeProto) -> list[tuple[int, ...]]:
        given = [i for i in dict.fromkeys(node.input) if i and i not in self.weights]
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(i, TensorProto.FLOAT, self.shapes[i]) for i in given],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in node.output],
            [self.weights[i] for i in dict.fromkeys(node.input) if i in self.weights],
        )
        try:
            inferred = shape_inference.infer_shapes(self._model(graph), check_type=True, strict_mode=True)
        except shape_inference.InferenceError as error:
            raise Misfit from error
        shapes = [tuple(d.dim_value for d in o.type.tensor_type.shape.dim) for o in inferred.graph.output]
        if any(min(s, default=1) < 1 or math.prod(s) > MOST_ELEMENTS for s in shapes):
            raise Misfit
        return shapes

    def _model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def finish(self, inputs: Sequence[str], outputs: Sequence[str]) -> onnx.ModelProto:
        """Give the model of what the outputs need."""
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info(i, TensorProto.FLOAT, self.shapes[i]) for i in inputs],
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, self.shapes[o]) for o in outputs],
            list(self.weights.values()),
        )
        return pruned(self._model(graph))


def pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the nodes and weights that no output needs; inputs stay."""
    graph = model.graph
    needed = {o.name for o in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.insert(0, node)
    weights = [w for w in graph.initializer if w.name in needed]
    fresh = helper.make_graph(kept, graph.name, graph.input, graph.output, weights)
    return helper.make_model(fresh, opset_imports=model.opset_import, ir_version=model.ir_version)


def random_network(seed: int, largest: int = 12) -> onnx.ModelProto:
    """Draw a valid network of up to `largest` steps, with one to three outputs."""
    b = Builder(seed)
    spatial = [b.choose((1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13)) for _ in range(b.choose((1, 2, 2, 2, 2)))]
    batch = b.choose((1, 1, 2, 3))
    b.input((batch, b.choose(CHANNELS), *spatial))
    if b.chance(0.2):
        b.input((batch, b.choose(CHANNELS), *spatial))
    inputs = tuple(b.values)
    for _ in range(b.between(2, largest)):
        try:
            b.choose(STEPS)(b)
        except Misfit:
            continue
    made = [v for v in b.values if v not in inputs]
    while not made:
        made = [b.add("Relu", inputs[0])]
    outputs = dict.fromkeys([made[-1], *(b.choose(made) for _ in range(b.choose((0, 0, 1, 2))))])
    return b.finish(inputs, tuple(outputs))


# Steps


def _conv(b: Builder) -> str:
    return conv_of(b, b.pick())


def conv_of(b: Builder, x: str, **fixed: Any) -> str:
    """Add a convolution: dense, grouped or depthwise, any stride, pad and dilation."""
    shape = b.shapes[x]
    if len(shape) < 3:
        raise Misfit
    rank, channels = len(shape) - 2, shape[1]
    groups = fixed.get("groups") or b.choose([g for g in (1, 1, 1, 1, 2, 3, 4, 8, channels) if channels % g == 0])
    outputs = fixed.get("outputs") or groups * b.choose((1, 2) if groups > 3 else CHANNELS)
    kernel = fixed.get("kernel") or [b.choose((1, 1, 3, 3, 2, 5, 7)) for _ in range(rank)]
    fan_in = channels // groups * math.prod(kernel)
    operands = [x, b.weight(outputs, channels // groups, *kernel, scale=fan_in**-0.5)]
    if b.chance(0.6):
        operands.append(b.weight(outputs))
    attributes: dict[str, Any] = {"group": groups, "kernel_shape": kernel}
    if "kernel" in fixed:
        return b.add("Conv", *operands, pads=[k // 2 for k in kernel] * 2, **attributes)
    if b.chance(0.15):
        attributes["auto_pad"] = b.choose(("SAME_UPPER", "SAME_LOWER", "VALID"))
    else:
        attributes["pads"] = (
            [b.between(0, 3) for _ in range(2 * rank)] if b.chance(0.4) else [k // 2 for k in kernel * 2]
        )
        if b.chance(0.25):
            attributes["dilations"] = [b.between(1, 3) for _ in range(rank)]
    if b.chance(0.5):
        # With auto_pad, steps beyond the window would make padding negative, which engines see differently.
        attributes["strides"] = [b.choose((1, 2, 2, 3, 5)) if "pads" in attributes else b.between(1, k) for k in kernel]
    pads, dilations = (attributes.get(name, [d] * 2 * rank) for name, d in (("pads", 0), ("dilations", 1)))
    for axis, size in enumerate(shape[2:]):
        if (kernel[axis] - 1) * dilations[axis] + 1 > size + pads[axis] + pads[rank + axis]:
            raise Misfit
    return b.add("Conv", *operands, **attributes)


def _conv_transpose(b: Builder) -> str:
    x = b.pick()
    shape = b.shapes[x]
    if len(shape) < 3:
        raise Misfit
    rank, channels = len(shape) - 2, shape[1]
    groups = b.choose([g for g in (1, 1, 1, 2, 4, channels) if channels % g == 0])
    kernel = [b.choose((1, 2, 3, 4)) for _ in range(rank)]
    strides = [b.choose((1, 2, 2, 3)) for _ in range(rank)]
    w = b.weight(channels, b.choose((1, 2, 3, 8, 11)), *kernel, scale=(channels / groups * math.prod(kernel)) ** -0.5)
    attributes: dict[str, Any] = {"group": groups, "strides": strides}
    if b.chance(0.5):
        attributes["pads"] = [b.between(0, 1) for _ in range(2 * rank)]
    if b.chance(0.3):
        attributes["output_padding"] = [b.between(0, s - 1) for s in strides]
    if b.chance(0.2):
        attributes["dilations"] = [b.between(1, 2) for _ in range(rank)]
    bias = [b.weight(b.weights[w].dims[1] * groups)] if b.chance(0.5) else []
    return b.add("ConvTranspose", x, w, *bias, **attributes)


def _pool(b: Builder) -> str:
    x = b.pick()
    rank = len(b.shapes[x]) - 2
    if rank < 1:
        raise Misfit
    kernel = [b.choose((1, 2, 2, 3, 3, 5)) for _ in range(rank)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": [b.choose((1, 2, 2, 3)) for _ in range(rank)]}
    if b.chance(0.6):
        attributes["pads"] = [b.between(0, k - 1) for k in kernel * 2]
    if b.chance(0.4):
        attributes["ceil_mode"] = 1
    pads = attributes.get("pads", [0] * 2 * rank)
    for axis, (size, reach) in enumerate(zip(b.shapes[x][2:], kernel, strict=True)):
        # Every window must see something: what it is otherwise differs between engines.
        if reach > size + pads[axis] + pads[rank + axis] or max(pads[axis], pads[rank + axis]) >= size:
            raise Misfit
    shape = (*b.shapes[x][:2], *_pooled(b.shapes[x][2:], **attributes))
    if b.chance(0.5):
        y = b.add("MaxPool", x, **attributes)
    else:
        y = b.add("AveragePool", x, count_include_pad=b.between(0, 1), **attributes)
    b.shapes[y] = shape
    return y


def _pooled(
    sizes: Sequence[int],
    kernel_shape: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int] = (),
    ceil_mode: int = 0,
) -> list[int]:
    """Give the output sizes.

    No window may start in the padding after the image, which onnx's inference forgets: where that matters, ONNX
    Runtime refuses the model for the sizes it infers behind it.
    """
    rank = len(sizes)
    made = []
    for axis, (size, k, s) in enumerate(zip(sizes, kernel_shape, strides, strict=True)):
        low, high = (pads[axis], pads[rank + axis]) if pads else (0, 0)
        free = size + low + high - k
        count = (-(-free // s) if ceil_mode else free // s) + 1
        if ceil_mode and (count - 1) * s >= size + low:
            raise Misfit
        made.append(count)
    return made


def _global_pool(b: Builder) -> str:
    x = b.pick(4)
    return b.add(b.choose(("GlobalAveragePool", "GlobalAveragePool", "GlobalMaxPool")), x)


def _batch_norm(b: Builder) -> str:
    x = b.pick()
    if len(b.shapes[x]) < 2:
        raise Misfit
    channels = b.shapes[x][1]
    variance = b.constant(b.rng.uniform(0.3, 2.0, channels).astype(np.float32))
    return b.add(
        "BatchNormalization", x, b.weight(channels, offset=1.0), b.weight(channels), b.weight(channels), variance
    )


def _unary(b: Builder) -> str:
    op = b.choose(UNARY)
    x = b.pick()
    if op == "HardSwish" and b.opset < 14:
        raise Misfit
    if op == "Exp":
        return b.add("Exp", b.add("Neg", b.add("Abs", x)))
    if b.chance(0.15):
        return b.add("Clip", x, b.constant(b.choose((-1.0, 0.0, 0.5))), b.constant(b.choose((1.0, 6.0))))
    return b.add(op, x)


def _gate(b: Builder) -> str:
    x = b.pick()
    return b.add("Mul", x, b.add("Sigmoid", x))


def _binary(b: Builder) -> str:
    return b.add(b.choose(("Add", "Add", "Sub", "Mul", "Max", "Min")), b.pick(), b.pick())


def _with_constant(b: Builder) -> str:
    x = b.pick()
    shape = b.shapes[x]
    rank = b.between(0, len(shape))
    c = b.weight(*(b.choose((1, s)) for s in shape[len(shape) - rank :]))
    if b.chance(0.2):
        return b.add("Div", x, b.constant(b.choose((2.0, 3.0, -0.5))))
    if b.chance(0.1):
        return b.add("Pow", b.add("Abs", x), b.constant(b.choose((1.0, 2.0, 3.0))))
    if b.chance(0.1):
        return b.add("PRelu", x, c)
    operands = (x, c) if b.chance(0.5) else (c, x)
    return b.add(b.choose(("Add", "Sub", "Mul", "Max", "Min")), *operands)


def _residual(b: Builder) -> str:
    x = b.pick(4)
    channels = b.shapes[x][1]
    y = b.add("Relu", conv_of(b, x, outputs=channels, kernel=[3, 3], groups=1))
    if b.chance(0.5):
        y = conv_of(b, y, outputs=channels, kernel=[1, 1], groups=1)
    y = b.add("Add", *((x, y) if b.chance(0.5) else (y, x)))
    return b.add("Relu", y) if b.chance(0.5) else y


def _squeeze_excite(b: Builder) -> str:
    x = b.pick(4)
    channels = b.shapes[x][1]
    s = b.add("GlobalAveragePool", x)
    s = b.add("Relu", conv_of(b, s, outputs=max(channels // 4, 1), kernel=[1, 1], groups=1))
    s = b.add("Sigmoid", conv_of(b, s, outputs=channels, kernel=[1, 1], groups=1))
    return b.add("Mul", x, s)


def _dense_block(b: Builder) -> str:
    x = b.pick(4)
    for _ in range(b.between(1, 3)):
        y = conv_of(b, b.add("Relu", x), outputs=b.choose((3, 4, 8, 12)), kernel=[3, 3], groups=1)
        x = b.add("Concat", x, y, axis=1)
    return x


def _layer_norm(b: Builder) -> str:
    x = b.pick()
    last = b.shapes[x][-1]
    if last < 2:
        raise Misfit
    if b.opset >= 17 and b.chance(0.5):
        return b.add("LayerNormalization", x, b.weight(last, offset=1.0), b.weight(last), axis=-1, epsilon=1e-3)
    centred = b.add("Sub", x, _reduced(b, "ReduceMean", x, [-1]))
    variance = _reduced(b, "ReduceMean", b.add("Mul", centred, centred), [-1])
    return b.add("Div", centred, b.add("Sqrt", b.add("Add", variance, b.constant(1e-3))))


def _instance_norm(b: Builder) -> str:
    x = b.pick()
    shape = b.shapes[x]
    if len(shape) < 3 or math.prod(shape[2:]) < 2:
        raise Misfit
    return b.add("InstanceNormalization", x, b.weight(shape[1], offset=1.0), b.weight(shape[1]), epsilon=1e-3)


def _lrn(b: Builder) -> str:
    return b.add("LRN", b.pick(4), size=b.choose((1, 3, 5)), alpha=b.choose((1e-2, 1.0)), bias=2.0)


def _attention(b: Builder) -> str:
    x = b.pick(4)
    batch, channels, height, width = b.shapes[x]
    tokens = b.add("Transpose", b.add("Reshape", x, b.indices((batch, channels, height * width))), perm=[0, 2, 1])
    heads = b.choose((1, 2))
    size = b.choose((1, 3, 8))
    parts = []
    for _ in range(3):
        y = b.add("MatMul", tokens, b.weight(channels, heads * size, scale=channels**-0.5))
        y = b.add("Reshape", y, b.indices((batch, height * width, heads, size)))
        parts.append(b.add("Transpose", y, perm=[0, 2, 1, 3]))
    q, k, v = parts
    scores = b.add("MatMul", q, b.add("Transpose", k, perm=[0, 1, 3, 2]))
    weights = b.add("Softmax", b.add("Mul", scores, b.constant(size**-0.5)), axis=-1)
    y = b.add("Transpose", b.add("MatMul", weights, v), perm=[0, 2, 1, 3])
    return b.add("Reshape", y, b.indices((batch, height * width, heads * size)))


def _reduced(b: Builder, op: str, x: str, axes: list[int], keep: int = 1) -> str:
    if b.opset >= 18 or op == "ReduceSum":
        return b.add(op, x, b.indices(axes), keepdims=keep)
    return b.add(op, x, axes=axes, keepdims=keep)


def _reduce(b: Builder) -> str:
    x = b.pick()
    rank = len(b.shapes[x])
    axes = sorted({b.between(0, rank - 1) for _ in range(b.between(1, 2))}) if b.chance(0.6) else [*range(2, rank)]
    op = b.choose(("ReduceMean", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2", "ReduceL1"))
    return _reduced(b, op, x, axes, b.between(0, 1))


def _softmax(b: Builder) -> str:
    x = b.pick()
    rank = len(b.shapes[x])
    return b.add(b.choose(("Softmax", "Softmax", "LogSoftmax")), x, axis=b.choose((1, -1, rank - 1, 0)))


def _concat(b: Builder) -> str:
    x = b.pick()
    rank = len(b.shapes[x])
    axis = 1 if b.chance(0.7) else b.between(0, rank - 1)
    others = [v for v in b.values if len(b.shapes[v]) == rank and _equal_but(b.shapes[v], b.shapes[x], axis)]
    parts = [x, *(b.choose(others) for _ in range(b.between(1, 2)))]
    b.rng.shuffle(parts)
    return b.add("Concat", *parts, axis=axis)


def _equal_but(one: tuple[int, ...], other: tuple[int, ...], axis: int) -> bool:
    return one[:axis] + one[axis + 1 :] == other[:axis] + other[axis + 1 :]


def _split(b: Builder) -> str:
    x = b.pick()
    axis = 1 if b.chance(0.7) else b.between(0, len(b.shapes[x]) - 1)
    size = b.shapes[x][axis]
    if size < 2:
        raise Misfit
    first = b.between(1, size - 1)
    return b.add("Split", x, b.indices((first, size - first)), outputs=2, axis=axis)


def _slice(b: Builder) -> str:
    x = b.pick()
    axis = b.between(0, len(b.shapes[x]) - 1)
    size = b.shapes[x][axis]
    if b.chance(0.2):
        return b.add("Slice", x, *map(b.indices, ([size - 1], [-size - 1], [axis], [-1])))
    start = b.between(0, size - 1)
    return b.add("Slice", x, *map(b.indices, ([start], [b.between(start + 1, size)], [axis], [b.between(1, 3)])))


def _pad(b: Builder) -> str:
    x = b.pick()
    rank = len(b.shapes[x])
    mode = b.choose(("constant", "constant", "constant", "reflect", "edge"))
    if mode == "reflect" and min(b.shapes[x][2:], default=1) < 3:
        raise Misfit
    fixed = 0 if mode == "constant" and b.chance(0.2) else 2
    pads = [b.between(0, 2) if axis >= fixed else 0 for axis in [*range(rank)] * 2]
    value = [b.constant(b.choose((0.0, 0.0, 1.5, -2.0)))] if mode == "constant" else []
    return b.add("Pad", x, b.indices(pads), *value, mode=mode)


def _resize(b: Builder) -> str:
    x = b.pick()
    rank = len(b.shapes[x])
    if rank < 3:
        raise Misfit
    mode = b.choose(("nearest", "nearest", "linear"))
    attributes: dict[str, Any] = {"mode": mode}
    by_scales = b.chance(0.5)
    # With align_corners the standard says two things of scales that give no whole size.
    modes = ("half_pixel", "asymmetric") if by_scales else ("half_pixel", "asymmetric", "align_corners")
    attributes["coordinate_transformation_mode"] = b.choose(modes)
    if mode == "nearest":
        attributes["nearest_mode"] = b.choose(("round_prefer_floor", "floor", "ceil"))
    if by_scales:
        scales = b.constant(
            np.array([1, 1, *(b.choose((2.0, 2.0, 1.0, 3.0, 0.5)) for _ in range(rank - 2))], np.float32)
        )
        return b.add("Resize", x, "", scales, **attributes)
    sizes = (*b.shapes[x][:2], *(b.between(1, 2 * s + 1) for s in b.shapes[x][2:]))
    return b.add("Resize", x, "", "", b.indices(sizes), **attributes)


def _transpose(b: Builder) -> str:
    x = b.pick()
    return b.add("Transpose", x, perm=b.rng.permutation(len(b.shapes[x])).tolist())


def _reshape(b: Builder) -> str:
    x = b.pick()
    shape = b.shapes[x]
    kind = b.choose(("flatten", "merge", "split", "squeeze", "channels"))
    if kind == "flatten":
        return b.add("Flatten", x, axis=b.between(0, len(shape)))
    if kind == "merge":
        return b.add("Reshape", x, b.indices((0, 0, -1)))
    if kind == "squeeze" and 1 in shape:
        return b.add("Squeeze", x, b.indices([shape.index(1)]))
    if kind == "split" and len(shape) < 5:
        return b.add("Unsqueeze", x, b.indices([b.between(0, len(shape))]))
    even = next((axis for axis, s in enumerate(shape) if s % 2 == 0), None)
    if even is None or len(shape) > 4:
        raise Misfit
    return b.add("Reshape", x, b.indices((*shape[:even], 2, shape[even] // 2, *shape[even + 1 :])))


def _shuffle(b: Builder) -> str:
    x = b.pick(4)
    batch, channels, *spatial = b.shapes[x]
    groups = next((g for g in (2, 3, 4) if channels % g == 0), None)
    if groups is None:
        raise Misfit
    y = b.add("Reshape", x, b.indices((batch, groups, channels // groups, *spatial)))
    y = b.add("Transpose", y, perm=[0, 2, 1, 3, 4])
    return b.add("Reshape", y, b.indices((batch, channels, *spatial)))


def _space(b: Builder) -> str:
    x = b.pick(4)
    if b.chance(0.5):
        if b.shapes[x][1] % 4:
            raise Misfit
        return b.add("DepthToSpace", x, blocksize=2, mode=b.choose(("DCR", "CRD")))
    if b.shapes[x][2] % 2 or b.shapes[x][3] % 2:
        raise Misfit
    return b.add("SpaceToDepth", x, blocksize=2)


def _dense(b: Builder) -> str:
    x = b.pick()
    features = b.shapes[x][-1]
    outputs = b.choose(CHANNELS)
    if len(b.shapes[x]) == 2 and b.chance(0.6):
        transposed = b.between(0, 1)
        w = b.weight(*((outputs, features) if transposed else (features, outputs)), scale=features**-0.5)
        return b.add("Gemm", x, w, b.weight(outputs), transB=transposed, alpha=b.choose((1.0, 0.5)))
    y = b.add("MatMul", x, b.weight(features, outputs, scale=features**-0.5))
    return b.add("Add", y, b.weight(outputs)) if b.chance(0.5) else y


def _matmul(b: Builder) -> str:
    x = b.pick()
    axes = [*range(len(b.shapes[x]))]
    if len(axes) < 2:
        raise Misfit
    turned = b.add("Transpose", b.pick(len(axes)) if b.chance(0.3) else x, perm=[*axes[:-2], axes[-1], axes[-2]])
    return b.add("MatMul", x, b.add("Mul", turned, b.constant(b.shapes[x][-1] ** -0.5)))


def _gather(b: Builder) -> str:
    x = b.pick()
    axis = b.between(0, len(b.shapes[x]) - 1)
    size = b.shapes[x][axis]
    picked = [b.between(-size, size - 1) for _ in range(b.between(1, 4))]
    return b.add("Gather", x, b.indices(picked), axis=axis)


STEPS: tuple[Callable[[Builder], str], ...] = (
    _conv, _conv, _conv, _conv, _conv, _conv, _conv_transpose, _pool, _pool, _pool, _global_pool, _batch_norm,
    _batch_norm, _unary, _unary, _unary, _gate, _binary, _binary, _binary, _with_constant, _with_constant, _residual,
    _squeeze_excite, _dense_block, _layer_norm, _instance_norm, _lrn, _attention, _reduce, _softmax, _concat, _concat,
    _split, _slice, _pad, _resize, _transpose, _reshape, _reshape, _shuffle, _space, _dense, _dense, _matmul, _gather,
)  # fmt: skip
