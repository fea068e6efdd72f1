"""ONNX readers of elementwise operators of one input."""

from __future__ import annotations

from cnnc.ir.build import call
from cnnc.ir.graph import Value
from cnnc.ir.op import ForeignNode, Op, onnx
from cnnc.ops.unary.activation import (
    Celu,
    Elu,
    Gelu,
    HardSigmoid,
    HardSwish,
    LeakyRelu,
    Mish,
    Relu,
    Selu,
    Shrink,
    Sigmoid,
    Silu,
    Softplus,
    Softsign,
    ThresholdedRelu,
)
from cnnc.ops.unary.elementary import (
    Abs,
    Acos,
    Acosh,
    Asin,
    Asinh,
    Atan,
    Atanh,
    Ceil,
    Cos,
    Cosh,
    Erf,
    Exp,
    Floor,
    Log,
    Neg,
    Reciprocal,
    Round,
    Sign,
    Sin,
    Sinh,
    Sqrt,
    Tan,
    Tanh,
)
from cnnc.ops.unary.predicate import BitwiseNot, IsInf, IsNan, Not

_PLAIN = {
    "IsNaN": IsNan,
    **{
        op.__name__: op
        for op in (
            *(Relu, Sigmoid, HardSwish, Mish, Softplus, Softsign, Neg, Abs, Sign, Floor, Ceil, Round, Reciprocal),
            *(Sqrt, Exp, Log, Erf, Sin, Cos, Tan, Asin, Acos, Atan, Sinh, Cosh, Tanh, Asinh, Acosh, Atanh),
            *(Not, BitwiseNot),
        )
    },
}
"""ONNX operators without attributes."""

_ATTRIBUTES: dict[str, tuple[type[Op], dict[str, float]]] = {
    "LeakyRelu": (LeakyRelu, {"alpha": 0.01}),
    "ThresholdedRelu": (ThresholdedRelu, {"alpha": 1.0}),
    "Elu": (Elu, {"alpha": 1.0}),
    "Selu": (Selu, {"alpha": 1.67326319217681884765625, "gamma": 1.05070102214813232421875}),
    "Celu": (Celu, {"alpha": 1.0}),
    "HardSigmoid": (HardSigmoid, {"alpha": 0.2, "beta": 0.5}),
    "Swish": (Silu, {"alpha": 1.0}),
    "Shrink": (Shrink, {"lambd": 0.5, "bias": 0.0}),
}
"""ONNX operators with attributes, given in the order of the operator's fields, and ONNX's defaults."""


@onnx(*_PLAIN)
def _plain(node: ForeignNode, x: Value) -> Value:
    return call(_PLAIN[node.op_type](), x)


@onnx(*_ATTRIBUTES)
def _with_attributes(node: ForeignNode, x: Value) -> Value:
    op, defaults = _ATTRIBUTES[node.op_type]
    return call(op(*(float(node.attr(name, default)) for name, default in defaults.items())), x)


@onnx("IsInf")
def _is_inf(node: ForeignNode, x: Value) -> Value:
    negative = bool(node.attr("detect_negative", 1))
    positive = bool(node.attr("detect_positive", 1))
    return call(IsInf(negative, positive), x)


@onnx("Gelu")
def _gelu(node: ForeignNode, x: Value) -> Value:
    return call(Gelu(node.attr("approximate", "none")), x)
