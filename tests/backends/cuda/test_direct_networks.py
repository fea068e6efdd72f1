"""Small networks of the layers that are computed directly: which templates they get, the numbers, what is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cnnc
from cnnc.cli.main import run
from cnnc.frontends.dsl import Tensor, conv, global_avg_pool, linear, max_pool, network, relu
from tests.backends.cuda.artifacts import FakeGpu
from tests.backends.cuda.emulator import needs_gxx
from tests.backends.cuda.test_artifact import check_graph
from tests.backends.cuda.test_dtype import BOUND

pytestmark = [needs_gxx, pytest.mark.usefixtures("emulating_nvcc")]


@network(x=(3, 40, 40))
def mobile(x: Tensor) -> Tensor:
    """What mobile networks consist of, and a residual network's first layers."""
    x = x >> conv(16, 3, stride=2, pad=1, name="first") >> relu >> max_pool(3, stride=2, pad=1)
    x = x >> conv(16, 5, pad=2, groups=16, name="depthwise") >> relu >> conv(24, 1, name="pointwise")
    return x >> global_avg_pool >> linear(10, name="fc")


@pytest.mark.parametrize(("dtype", "pointwise"), [("f32", "conv_gemm"), ("f16", "conv_mma")])
def test_layers_are_computed_directly(dtype: str, pointwise: str, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    net = mobile(batch=2).init(seed=3)
    module = cnnc.compile(net, target="cuda:sm_90", dtype=dtype)
    assert module.build is not None
    algorithms = [call.algorithm for call in module.build.program.calls]
    assert algorithms[:5] == ["conv_first", "pool", "depthwise", pointwise, "pool_global"]
    check_graph(net.graph(), fake_gpu, tmp_path, dtype, BOUND.get(dtype, 1e-5))


def test_inspect_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cnnc.compile(mobile(batch=2).init(seed=3), target="cuda:sm_90", dtype="f16").save(tmp_path / "net.so")
    assert run(["inspect", str(tmp_path / "net.so"), "--json"]) == 0
    kernels = {kernel["template"]: kernel for kernel in json.loads(capsys.readouterr().out)["kernels"]}
    for template in ("conv_first", "depthwise", "pool", "pool_global"):
        (launch,) = kernels[template]["launches"]
        assert launch["grid"][0] >= 1
        assert 0 < launch["occupancy"] <= 1
        assert kernels[template]["bound_by"] in ("arithmetic", "memory")
        assert kernels[template]["roofline_seconds"] > 0
    assert kernels["conv_first"]["launches"][0]["shared_bytes"] > 0
    assert kernels["conv_first"]["flops"] >= 2 * 2 * 16 * 20 * 20 * 27
