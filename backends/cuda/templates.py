"""The GPU's kernel templates: the table of contents of this folder."""

from __future__ import annotations

from cnnc.backends.cuda.attention import AttentionTemplate
from cnnc.backends.cuda.attention_mma import AttentionMma
from cnnc.backends.cuda.conv_first import ConvFirst
from cnnc.backends.cuda.conv_gemm import ConvGemm
from cnnc.backends.cuda.conv_mma import ConvMma
from cnnc.backends.cuda.conv_tma import ConvTma
from cnnc.backends.cuda.conv_wgmma import ConvWgmma
from cnnc.backends.cuda.depthwise import Depthwise
from cnnc.backends.cuda.generic import Generic
from cnnc.backends.cuda.matmul_ffma import MatMulFfma
from cnnc.backends.cuda.matmul_mma import MatMulMma
from cnnc.backends.cuda.matmul_tma import MatMulTma
from cnnc.backends.cuda.matmul_wgmma import MatMulWgmma
from cnnc.backends.cuda.matvec import MatVec
from cnnc.backends.cuda.pool import GlobalPool, Pool
from cnnc.backends.cuda.rows import Rows
from cnnc.backends.cuda.winograd import Winograd
from cnnc.backends.lower.template import Template
from cnnc.errors import VerifyError

TEMPLATES: tuple[Template, ...] = (
    ConvFirst(),
    ConvGemm(),
    ConvTma(),
    ConvWgmma(),
    ConvMma(),
    Winograd(),
    Depthwise(),
    MatMulTma(),
    MatMulWgmma(),
    MatMulMma(),
    MatMulFfma(),
    MatVec(),
    Pool(),
    GlobalPool(),
    AttentionMma(),
    AttentionTemplate(),
    Rows(),
    Generic(),
)
"""Of schedules that cost the same the first is taken: where reading is the limit, that which has less to issue."""


def template(name: str) -> Template:
    """Give a template by the name schedules carry."""
    for candidate in TEMPLATES:
        if candidate.name == name:
            return candidate
    raise VerifyError(f"there is no CUDA template {name!r}; there are {', '.join(t.name for t in TEMPLATES)}")
