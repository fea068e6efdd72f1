"""The CPU's kernel templates: the table of contents of this folder.

The tile pass takes, for each kernel, the cheapest schedule of the templates that match it.
"""

from __future__ import annotations

from cnnc.backends.cpu.attention import AttentionTemplate
from cnnc.backends.cpu.conv_bf16x3 import ConvBf16x3
from cnnc.backends.cpu.conv_direct import ConvDirect
from cnnc.backends.cpu.conv_int8x3 import ConvInt8x3
from cnnc.backends.cpu.dense_bf16x3 import DenseBf16x3
from cnnc.backends.cpu.dense_int8x3 import DenseInt8x3
from cnnc.backends.cpu.depthwise import Depthwise
from cnnc.backends.cpu.gemm import DenseTemplate
from cnnc.backends.cpu.gemm_packed import PackedDense
from cnnc.backends.cpu.generic import Generic
from cnnc.backends.cpu.matmul import MatMulTemplate
from cnnc.backends.cpu.norm import NormTemplate
from cnnc.backends.cpu.pool import GlobalPool, Pool
from cnnc.backends.cpu.shuffle import Shuffle
from cnnc.backends.cpu.softmax import SoftmaxTemplate
from cnnc.backends.cpu.unpool import Unpool
from cnnc.backends.cpu.winograd import Winograd
from cnnc.backends.cpu.winograd_int8x3 import WinogradInt8x3
from cnnc.backends.lower.template import Template
from cnnc.errors import VerifyError

TEMPLATES: tuple[Template, ...] = (
    ConvDirect(),
    ConvBf16x3(),
    ConvInt8x3(),
    Winograd(),
    WinogradInt8x3(),
    Depthwise(),
    Pool(),
    GlobalPool(),
    DenseTemplate(),
    PackedDense(),
    DenseBf16x3(),
    DenseInt8x3(),
    MatMulTemplate(),
    AttentionTemplate(),
    NormTemplate(),
    SoftmaxTemplate(),
    Unpool(),
    Shuffle(),
    Generic(),
)


def template(name: str) -> Template:
    """Give a template by the name schedules carry."""
    for candidate in TEMPLATES:
        if candidate.name == name:
            return candidate
    raise VerifyError(f"there is no kernel template {name!r}; there are {', '.join(t.name for t in TEMPLATES)}")
