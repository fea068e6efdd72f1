"""Kernels of several operators: what single operators do not show of a default schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cnnc.ir.build import call
from cnnc.ir.graph import Graph, Value
from cnnc.ir.types import TensorType
from cnnc.ops import binary, concat, norm, reduce, softmax, unary
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input, constant

Network = Callable[..., Sequence[Value]]


def silu_residual(x: Value, y: Value) -> Sequence[Value]:
    return [call(unary.Relu(), call(binary.Add(), call(unary.Silu(), x), call(binary.Mul(), y, constant(0.5))))]


def normalised_silu(x: Value) -> Sequence[Value]:
    return [call(softmax.Softmax(1), call(unary.Silu(), x))]


def softmax_then_scale(x: Value) -> Sequence[Value]:
    return [call(unary.Tanh(), call(binary.Mul(), call(softmax.Softmax(1), x), constant(3.0)))]


def mean_of_gelu(x: Value) -> Sequence[Value]:
    return [call(reduce.ReduceMean((2, 3), True), call(unary.Gelu(), x))]


def two_outputs(x: Value, y: Value) -> Sequence[Value]:
    return [call(binary.Add(), x, y), call(unary.Exp(), x)]


def output_twice_and_input(x: Value) -> Sequence[Value]:
    y = call(unary.Neg(), x)
    return [y, y, x]


def output_read_by_output(x: Value) -> Sequence[Value]:
    y = call(unary.Exp(), x)
    return [y, call(reduce.ReduceSum((1,), True), y)]


def constant_output(x: Value) -> Sequence[Value]:
    return [call(binary.Add(), call(binary.Mul(), x, constant(0.0)), constant(7.0))]


def many_stages(x: Value) -> Sequence[Value]:
    for _ in range(14):
        x = call(unary.HardSwish(), call(unary.LeakyRelu(0.5), x))
    return [x]


def concatenated(x: Value, y: Value) -> Sequence[Value]:
    return [call(unary.Relu(), call(concat.Concat(1), x, call(unary.Neg(), y)))]


def normalised(x: Value, gamma: Value, beta: Value) -> Sequence[Value]:
    return [call(unary.Relu(), call(norm.InstanceNorm(), x, gamma, beta))]


def sum_of_all(x: Value) -> Sequence[Value]:
    return [call(unary.Sqrt(), call(reduce.ReduceSumSquare(tuple(range(x.type.rank)), False), x))]


def fused_network(build: Network, types: Sequence[TensorType]) -> Fused:
    inputs = tuple(call(Input(f"x{i}", type_)) for i, type_ in enumerate(types))
    return Fused(Graph("kernel", inputs, tuple(build(*inputs))), "network")
