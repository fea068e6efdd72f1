"""`--dtype` from outside: whole networks in tf32, f16 and bf16, what is printed, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import cnnc
from cnnc.backends.cuda import mma_params
from cnnc.backends.host.gpu import Gpu
from cnnc.backends.host.header import emit_header
from cnnc.cli.main import run
from cnnc.cli.precision import BUDGET
from cnnc.frontends.dsl import Tensor, conv, flatten, linear, load_network, network, relu
from cnnc.ir.graph import Graph
from cnnc.ir.interp import evaluate
from cnnc.ops.fused import Fused
from cnnc.profiler.accuracy import relative_error
from cnnc.target import Target
from tests.backends.cuda.artifacts import FakeGpu
from tests.backends.cuda.emulator import needs_gxx
from tests.backends.cuda.test_artifact import EXAMPLES, check_graph, feeds_of, small_resnet

slow = pytest.mark.slow
pytestmark = [needs_gxx, pytest.mark.usefixtures("emulating_nvcc")]

LENET = f"{EXAMPLES / 'lenet5.py'}:lenet5"
BOUND = {"tf32": 2e-3, "f16": 2e-3, "bf16": 1.5e-2}
"""A few roundings, to 11 bits or to 8, of every value between input and output."""


@pytest.mark.parametrize("dtype", ["tf32", "f16", pytest.param("bf16", marks=slow)])
def test_lenet(dtype: str, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    check_graph(load_network(LENET).init(seed=1).graph(), fake_gpu, tmp_path, dtype, BOUND[dtype])


def test_simple_cnn(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    net = load_network(f"{EXAMPLES / 'simple_cnn.py'}:simple_cnn").with_batch(2)
    check_graph(net.init(seed=1).graph(), fake_gpu, tmp_path, "f16", BOUND["f16"])


@pytest.mark.parametrize("dtype", ["f16", pytest.param("tf32", marks=slow)])
def test_a_small_resnet(dtype: str, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    check_graph(small_resnet(batch=2).init(seed=4).graph(), fake_gpu, tmp_path, dtype, BOUND[dtype])


@network(x=(64, 14, 14))
def deep(x: Tensor) -> Tensor:
    """Layers large enough for tensor cores, the second of so few pixels that blocks share its sums."""
    x = x >> conv(256, 3, stride=2, pad=1, name="conv1") >> relu
    x = x >> conv(64, 3, pad=1, name="conv2") >> relu >> conv(40, 1, name="conv3")
    return x >> flatten >> linear(10, name="fc")


@pytest.mark.parametrize("dtype", ["f16", pytest.param("bf16", marks=slow), pytest.param("tf32", marks=slow)])
def test_layers_on_tensor_cores(dtype: str, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    net = deep(batch=1).init(seed=3)
    module = cnnc.compile(net, target="cuda:sm_90", dtype=dtype)
    assert module.build is not None
    convolutions = [call for call in module.build.program.calls if call.algorithm == "conv_mma"]
    assert [call.layers[0].partition(" ")[0] for call in convolutions] == ["conv1", "conv2", "conv3"]
    assert any("splits=1)" not in call.schedule for call in convolutions)
    check_graph(net.graph(), fake_gpu, tmp_path, dtype, BOUND[dtype])


@network(x=(64, 9, 7))
def shallow(x: Tensor) -> Tensor:
    """A layer with a depth of many stages, of few pixels and channels."""
    return x >> conv(72, 3, pad=1, name="conv1") >> relu >> flatten >> linear(10, name="fc")


def test_layers_of_warp_groups(fake_gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the one architecture that has them, where small layers are theirs if `mma` takes ever so long."""
    monkeypatch.setitem(mma_params.CYCLES_OF_MMA, "sm_90a", 10_000)
    net = shallow(batch=2).init(seed=3)
    module = cnnc.compile(net, target="cuda:sm_90a", dtype="f16")
    assert module.build is not None
    convolutions = [call for call in module.build.program.calls if call.algorithm == "conv_wgmma"]
    assert [call.layers[0].partition(" ")[0] for call in convolutions] == ["conv1"]
    check_graph(net.graph(), fake_gpu, tmp_path, "f16", BOUND["f16"], "cuda:sm_90a")
    for capability in (95, 100):
        with pytest.raises(AssertionError, match="the model was compiled for another GPU"):
            fake_gpu.run(tmp_path / "net.so", feeds_of(net.graph(), 3), f"capability={capability}")
    assert "of compute capability 9.0\n * and no other." in emit_header(module.build.program)


@pytest.mark.parametrize("level", [0, 2])
def test_a_binary_is_what_its_graph_says(level: int, fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """All that narrow types change is in the graph, which the interpreter runs; kernels add nothing to it."""
    graph = load_network(LENET).init(seed=2).graph()
    module = cnnc.compile(graph, target="cuda:sm_90", dtype="f16", level=level)
    module.save(tmp_path / "net.so")
    assert module.build is not None
    check_roundings(fake_gpu, tmp_path / "net.so", graph, module.build.graphs[0])


def check_roundings(gpu: FakeGpu, library: Path, graph: Graph, narrow: Graph) -> None:
    """Compare a binary with its graph, where types are narrow, and that with the one it was made of."""
    errors = []
    for seed in range(5):
        feeds = feeds_of(graph, seed)
        (got,) = gpu.run(library, feeds)[0].values()
        (own,) = evaluate(narrow, feeds, precise=True).values()
        (wanted,) = evaluate(graph, feeds, precise=True).values()
        errors.append(relative_error(got, own))
        assert relative_error(own, wanted) > 1e-5
    # An activation just between two numbers of f16 may be rounded either way, and what follows differs by so much;
    # most inputs give no such activation.
    assert sorted(errors)[len(errors) // 2] < 2e-4
    assert max(errors) < 1e-3


def test_several_batch_sizes(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    net = load_network(LENET).init(seed=2)
    module = cnnc.compile(net, target="cuda:sm_90", dtype="f16", batch=(1, 3))
    module.save(tmp_path / "net.so")
    assert module.build is not None
    for batch, own in zip((1, 3), module.build.graphs, strict=True):
        check_roundings(fake_gpu, tmp_path / "net.so", net.with_batch(batch).graph(), own)


def test_the_types_in_memory(tmp_path: Path) -> None:
    module = cnnc.compile(LENET, target="cuda:sm_90", dtype="bf16")
    assert module.build is not None
    (graph,) = module.build.graphs
    kernels = [node for node in graph.nodes if isinstance(node.op, Fused)]
    assert [str(v.dtype) for node in kernels for v in node.values] == ["bf16"] * (len(kernels) - 1) + ["f32"]
    assert [str(port.dtype) for port in (*module.inputs, *module.outputs)] == ["f32", "f32"]


@pytest.mark.parametrize("dtype", ["tf32", "f16"])
def test_compile_says_what_was_stored_and_why_no_error_is_measured(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnnc.backends.host.gpu.cuda_driver", lambda: None)
    command = ["compile", LENET, "-o", str(tmp_path / "n.so"), "--target", "cuda:sm_90", "--dtype", dtype]
    assert run(command) == 0
    text = capsys.readouterr().out
    why = "not measured: this machine lacks a GPU that runs cuda:sm_90; run cnnc verify MODEL BINARY on one that has it"
    assert f"error    {why}" in text
    assert ("weights  5 in f16 (" in text) == (dtype == "f16")
    assert run([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["error"]["reason"] == why.removeprefix("not measured: ")
    assert ("stored" in report) == (dtype == "f16")
    assert cnnc.load(tmp_path / "n.so").meta["options"]["dtype"] == dtype


def test_where_there_is_a_gpu_the_error_is_measured(
    fake_gpu: FakeGpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "n.so")
    script = "import sys; from cnnc.cli.main import main; main(sys.argv[1:])"
    command = ["compile", LENET, "-o", path, "--target", "cuda:sm_90", "--dtype", "f16", "--json"]
    done = fake_gpu.start([sys.executable, "-c", script, *command])
    assert done.returncode == 0, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["against"] == "f32 weights"
    assert 1e-5 < error["relative_l2"]["output"] < BOUND["f16"]
    done = fake_gpu.start([sys.executable, "-c", script, "verify", LENET, path, "--json"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tolerance"] == BUDGET["f16"]


def test_passes_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compile", LENET, "-o", str(tmp_path / "n.so"), "--target", "cuda:sm_90", "--passes", "fuse,tile"]
    assert run([*command, "--dtype", "bf16"]) == 2
    assert "put narrow_activations{dtype=bf16} after fuse into the list" in capsys.readouterr().err
    assert run([*command, "--dtype", "tf32"]) == 2
    assert "put round_products after fuse into the list" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "target", "runs"),
    [
        ("sm_86", "cuda:sm_80", True),
        ("sm_80", "cuda:sm_86", False),
        ("sm_90", "cuda:sm_80", False),
        ("sm_90", "cuda:sm_90", True),
        ("sm_90", "cuda:sm_90a", True),
        ("sm_100", "cuda:sm_90a", False),
    ],
)
def test_a_gpu_runs_code_of_its_generation(arch: str, target: str, runs: bool) -> None:
    assert Gpu("a GPU", arch).runs(Target.parse(target)) == runs
