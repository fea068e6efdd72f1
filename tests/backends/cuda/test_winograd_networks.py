"""Networks with Winograd's algorithm on GPUs: a small one as a whole, and what is compiled for the large ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import cnnc
from cnnc.backends.cuda.kernels import compiled, kernel_job
from cnnc.backends.lower.identity import anonymous
from cnnc.cli.main import run
from cnnc.driver import Options, Report, load_graphs, lower
from cnnc.frontends.dsl import Tensor, conv, flatten, linear, max_pool, network, relu
from cnnc.ir.graph import Node
from cnnc.ir.text import print_graph
from cnnc.ops.fused import Fused
from cnnc.target import Target
from tests.backends.cuda.artifacts import FakeGpu
from tests.backends.cuda.emulator import needs_gxx
from tests.backends.cuda.test_artifact import EXAMPLES, check_graph
from tests.backends.cuda.test_nvcc import needs_nvcc


@network(x=(3, 28, 30))
def small_vgg(x: Tensor) -> Tensor:
    """VGG's first layers, of half as many channels: 3x3 convolutions, pools between them."""
    x = x >> conv(32, 3, pad=1, name="conv1_1") >> relu >> conv(32, 3, pad=1, name="conv1_2") >> relu
    x = x >> max_pool(2, stride=2) >> conv(64, 3, pad=1, name="conv2_1") >> relu >> max_pool(2, stride=2)
    return x >> flatten >> linear(10, name="fc")


def kernels_of(network: str, options: Options) -> tuple[list[Node], Target]:
    lowered = lower(load_graphs(f"{EXAMPLES / network}", options), options, Report())
    return [node for node in lowered.graphs[0].nodes if isinstance(node.op, Fused)], lowered.target


def templates_of(network: str, **options: object) -> Counter[str]:
    """Count the templates of a network's convolutions."""
    kernels, _ = kernels_of(network, Options(target="cuda:sm_80", **options))  # type: ignore[arg-type]
    schedules = [node.op.schedule for node in kernels if isinstance(node.op, Fused) and node.op.anchor == "conv"]
    return Counter(schedule.template for schedule in schedules if schedule)


@needs_gxx
@pytest.mark.usefixtures("emulating_nvcc")
def test_a_small_network(fake_gpu: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = small_vgg(batch=4).init(seed=5)
    module = cnnc.compile(net, target="cuda:sm_80")
    assert module.build is not None
    algorithms = [call.algorithm for call in module.build.program.calls]
    assert algorithms[1:] == ["winograd", "pool", "winograd", "pool", "matvec"]
    check_graph(net.graph(), fake_gpu, tmp_path, bound=1e-5, target="cuda:sm_80")

    module.save(tmp_path / "shown.so")
    assert run(["inspect", str(tmp_path / "shown.so"), "--json"]) == 0
    shown = [k for k in json.loads(capsys.readouterr().out)["kernels"] if k["template"] == "winograd"]
    assert [len(kernel["launches"]) for kernel in shown] == [3, 3]
    assert not any(launch["tensor_cores"] for kernel in shown for launch in kernel["launches"])
    assert run(["inspect", str(tmp_path / "shown.so")]) == 0
    assert "by Winograd's algorithm a convolution takes fewer" in capsys.readouterr().out


def test_where_it_is_chosen() -> None:
    """For the 3x3 layers of stride 1 of ResNet-18, and all of VGG-16 but the first, which has few channels."""
    assert templates_of("resnet.py:resnet18", batch=8)["winograd"] == 13
    assert templates_of("resnet.py:resnet18", batch=8, exact=True)["winograd"] == 0
    assert templates_of("resnet.py:resnet18", batch=8, dtype="tf32")["winograd"] == 0


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("network", "layers"), [("vgg.py:vgg16", 12), ("resnet.py:resnet18", 13)])
def test_large_networks_are_in_registers(network: str, layers: int, arch: str, batch: int) -> None:
    kernels, target = kernels_of(network, Options(target=f"cuda:{arch}", batch=batch))
    chosen = [
        n.op for n in kernels if isinstance(n.op, Fused) and n.op.schedule and n.op.schedule.template == "winograd"
    ]
    assert len(chosen) == layers
    for kernel in {print_graph(anonymous(k.body)): k for k in chosen}.values():
        done = compiled(kernel_job("hot", kernel, target).make(), target)
        assert len(done.launches) == 3
        assert not done.tensor_cores
        assert all(u.stack_bytes == u.spill_bytes == 0 and u.registers <= 128 for u in done.usage), kernel
