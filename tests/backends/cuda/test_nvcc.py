"""nvcc: found or asked for, and what it says understood; with the real one where there is one."""

from __future__ import annotations

import json
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cnnc
from cnnc.backends.cuda import nvcc
from cnnc.backends.cuda.generic import Generic
from cnnc.backends.cuda.kernels import compiled, kernel_job
from cnnc.backends.cuda.nvcc import Usage, find_nvcc, read_usage
from cnnc.backends.host.device import DeviceCode
from cnnc.backends.lower.identity import anonymous
from cnnc.driver import Options, Report, load_graphs, lower
from cnnc.errors import EnvironmentProblem
from cnnc.frontends.dsl import load_network
from cnnc.ir.build import call
from cnnc.ir.graph import Graph
from cnnc.ir.text import print_graph
from cnnc.ir.types import DType, TensorType
from cnnc.ops import Conv, ReduceSum, Relu
from cnnc.ops.fused import Fused
from cnnc.ops.source import Input
from cnnc.target import CUDA_ARCHS, Target, is_portable
from tests.backends.running import fused_op

ROOT = Path(__file__).parents[3]
NETWORKS = json.loads((ROOT / "tests/examples/networks.json").read_text())
SMALLEST = {"filters.py": "filters", **{entry["file"]: name for name, entry in reversed(NETWORKS.items())}}
SM_90 = Target.parse("cuda:sm_90")

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None and nvcc._in_wheel() is None, reason="there is no nvcc")

SAID = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'softmax_1_kernel_1' for 'sm_90'
ptxas info    : Function properties for softmax_1_kernel_1
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 28 registers, used 0 barriers
ptxas info    : Compile time = 16.954 ms
ptxas info    : Compiling entry function 'softmax_1_kernel' for 'sm_90'
ptxas info    : Function properties for softmax_1_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 15 registers, used 1 barriers, 96 bytes smem, 376 bytes cmem[0]
"""


def scheduled(fused: Fused) -> Fused:
    return replace(fused, schedule=next(iter(Generic().space(fused, SM_90))))


def test_reads_what_ptxas_says() -> None:
    assert read_usage(SAID) == (Usage("softmax_1_kernel_1", 28, 16, 20, 0), Usage("softmax_1_kernel", 15, 0, 0, 96))
    assert read_usage("ptxas info    : 0 bytes gmem\n") == ()
    with pytest.raises(EnvironmentProblem, match="ptxas does not say what x needs"):
        read_usage("Compiling entry function 'x' for 'sm_90'\n")


def test_what_only_one_architecture_has_is_not_portable() -> None:
    assert is_portable("sm_90")
    assert not is_portable("sm_90a")
    assert DeviceCode("sm_90a", ()).capability == DeviceCode("sm_90", ()).capability == (9, 0)


@pytest.fixture
def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_nvcc")
def test_a_missing_nvcc_is_asked_for() -> None:
    with pytest.raises(EnvironmentProblem, match="pip install nvidia-cuda-nvcc nvidia-cuda-cccl") as missing:
        cnnc.compile(Graph("g", (x := call(Input("x", TensorType((3,)))),), (call(Relu(), x),)), target="cuda:sm_80")
    assert missing.value.exit_code == 6


def test_the_wheel_is_found_where_path_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path / "nvidia"),)

    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    monkeypatch.setattr(nvcc.importlib.util, "find_spec", lambda name: Spec())
    program = tmp_path / "nvidia/cu13/bin/nvcc"
    program.parent.mkdir(parents=True)
    with pytest.raises(EnvironmentProblem, match="nvcc not found"):
        find_nvcc()
    program.touch()
    assert find_nvcc() == str(program)


# The real nvcc

FATBIN_MAGIC = 0xBA55ED50


def parts_of(fatbin: bytes) -> list[tuple[str, int]]:
    """List what is in a fat binary: PTX or machine code, each for an architecture, 90 for sm_90."""
    magic, _, header, size = struct.unpack_from("<IHHQ", fatbin)
    assert (magic, header + size) == (FATBIN_MAGIC, len(fatbin))
    parts, at = [], header
    while at < len(fatbin):
        kind, _, part_header, part_size = struct.unpack_from("<HHIQ", fatbin, at)
        (arch,) = struct.unpack_from("<I", fatbin, at + 28)
        parts.append(({1: "ptx", 2: "elf"}[kind], arch))
        at += part_header + part_size
    return parts


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CNNC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@needs_nvcc
@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_hot_kernels_need_no_stack(arch: str) -> None:
    """A convolution and a long sum for each architecture: everything in registers."""
    target = Target.parse(f"cuda:{arch}")
    for op, types in (
        (Conv((1, 1), (1, 1, 1, 1), (1, 1)), (TensorType((1, 8, 14, 14)), TensorType((8, 8, 3, 3)))),
        (ReduceSum((1,), False), (TensorType((8, 4000), DType.F16),)),
    ):
        kernel = compiled(kernel_job("hot", scheduled(fused_op(op, types)), target).make(), target)
        assert {u.function for u in kernel.usage} == {launch.function for launch in kernel.launches}
        assert all(u.stack_bytes == u.spill_bytes == 0 and 0 < u.registers < 64 for u in kernel.usage)
        number = int(arch[3:5])
        assert parts_of(kernel.code) == [("elf", number), *([("ptx", number)] if is_portable(arch) else [])]


@needs_nvcc
@pytest.mark.usefixtures("kept")
def test_lenet5_compiles(tmp_path: Path) -> None:
    compile_example("lenet5.py:lenet5", "cuda:sm_90", "f32", tmp_path)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("network", [f"{file}:{name}" for file, name in SMALLEST.items()])
def test_every_example_compiles(network: str, arch: str, dtype: str, tmp_path: Path) -> None:
    """The smallest network of each file; the others of a file are of the same layers."""
    compile_example(network, f"cuda:{arch}", dtype, tmp_path)


def compile_example(network: str, target: str, dtype: str, folder: Path) -> None:
    net = load_network(f"{ROOT / 'examples' / network}")
    net = net if net.weights else net.init(seed=0)
    report = Report()
    module = cnnc.compile(net, target=target, dtype=dtype, report=report)
    module.save(folder / "net.so")
    assert report.kernels == len({kernel.symbol for kernel in module.build.program.calls})
    assert module.target == target
    total = sum(np.prod(array.shape) for array in net.weights.values())
    assert (folder / "net.so").stat().st_size > total * (4 if dtype == "f32" else 2) * 0.9


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("dtype", ["f16", "tf32"])
@pytest.mark.parametrize(("arch", "batch"), [("sm_80", 1), ("sm_90", 1), ("sm_90a", 8)])
def test_resnet50_is_on_tensor_cores_and_in_registers(arch: str, batch: int, dtype: str) -> None:
    options = Options(target=f"cuda:{arch}", dtype=dtype, batch=batch)
    lowered = lower(load_graphs(f"{ROOT / 'examples/resnet.py'}:resnet50", options), options, Report())
    kernels = [node.op for node in lowered.graphs[0].nodes if isinstance(node.op, Fused)]
    templates = Counter(k.schedule.template for k in kernels if k.anchor == "conv" and k.schedule)
    in_groups = templates["conv_wgmma"] + templates["conv_tma"]
    assert templates["conv_mma"] + in_groups == templates.total() == 53
    assert (in_groups > 26) == (templates["conv_tma"] > 0) == (arch == "sm_90a" and dtype == "f16")
    for kernel in {print_graph(anonymous(k.body)): k for k in kernels}.values():
        done = compiled(kernel_job("hot", kernel, lowered.target).make(), lowered.target)
        assert all(u.stack_bytes == u.spill_bytes == 0 for u in done.usage), kernel
