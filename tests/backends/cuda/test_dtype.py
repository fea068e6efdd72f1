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


@pytest.fixture
def for_warp_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Have small layers be for groups of warps, as `mma` takes ever so long; nothing of that is remembered."""
    monkeypatch.setenv("CNNC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setitem(mma_params.CYCLES_OF_MMA, "sm_90a", 10_000)
    return monkeypatch


@pytest.fixture
def in_boxes(for_warp_groups: pytest.MonkeyPatch) -> None:
    """Have all that groups of warps multiply be copied in boxes, as chunks take ever so long."""
    for_warp_groups.setattr(mma_params, "_WGMMA_CYCLES_OF_STEP", 10_000)


@pytest.mark.parametrize(
    ("template", "slow"), [("conv_wgmma", "_TMA_CYCLES_OF_STEP"), ("conv_tma", "_WGMMA_CYCLES_OF_STEP")]
)
def test_layers_of_warp_groups(
    template: str, slow: str, fake_gpu: FakeGpu, tmp_path: Path, for_warp_groups: pytest.MonkeyPatch
) -> None:
    """On the one architecture that has them, copied in chunks or in boxes, whichever is not ever so slow."""
    for_warp_groups.setattr(mma_params, slow, 10_000)
    net = shallow(batch=2).init(seed=3)
    module = cnnc.compile(net, target="cuda:sm_90a", dtype="f16")
    assert module.build is not None
    convolutions = [call for call in module.build.program.calls if call.algorithm == template]
    assert [call.layers[0].partition(" ")[0] for call in convolutions] == ["conv1"]
    check_graph(net.graph(), fake_gpu, tmp_path, "f16", BOUND["f16"], "cuda:sm_90a")
    for capability in (95, 100):
        with pytest.raises(AssertionError, match="the model was compiled for another GPU"):
            fake_gpu.run(tmp_path / "net.so", feeds_of(net.graph(), 3), f"capability={capability}")
    assert "of compute capability 9.0\n * and no other." in emit_header(module.build.program)


@pytest.mark.usefixtures("in_boxes")
def test_a_small_resnet_in_boxes(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """Strides, windows of 3 and 1, residuals: all but the first of the convolutions."""
    net = small_resnet(batch=2).init(seed=4)
    module = cnnc.compile(net, target="cuda:sm_90a", dtype="f16")
    assert module.build is not None
    assert [call.algorithm for call in module.build.program.calls].count("conv_tma") == 9
    check_graph(net.graph(), fake_gpu, tmp_path, "f16", BOUND["f16"], "cuda:sm_90a")


@network(x=(16, 3, 3))
def layer_and_product(x: Tensor) -> Tensor:
    """A convolution, then a layer of so many rows that it is a product of matrices."""
    return x >> conv(24, 3, pad=1, name="conv1") >> relu >> flatten >> linear(256, name="fc")


@pytest.fixture
def boxes(tmp_path: Path, in_boxes: None) -> tuple[Path, Graph]:
    """A model for two batch sizes, of which each kernel has maps of its own, in the arena and the weights."""
    net = layer_and_product(batch=48).init(seed=1)
    module = cnnc.compile(net, target="cuda:sm_90a", dtype="f16", batch=(48, 40))
    assert module.build is not None
    variants = module.build.program.variants
    assert [[c.algorithm for c in v.calls if c.algorithm.endswith("_tma")] for v in variants] == [
        ["conv_tma", "matmul_tma"]
    ] * 2
    launches = [launch for v in variants for c in v.calls for launch in c.launches if launch.maps]
    assert {slot.space for launch in launches for slot, _ in launch.maps} == {"arena", "weights"}
    module.save(tmp_path / "net.so")
    return tmp_path / "net.so", net.graph()


def test_maps_of_several_batch_sizes(boxes: tuple[Path, Graph], fake_gpu: FakeGpu) -> None:
    library, graph = boxes
    feeds = feeds_of(graph, 2)
    for batch in (48, 40):
        part = {name: array[:batch] for name, array in feeds.items()}
        (result,) = fake_gpu.run(library, part, runs=2)[0].values()
        (wanted,) = evaluate(graph, feeds, precise=True).values()
        assert relative_error(result, wanted[:batch]) <= BOUND["f16"]


@pytest.mark.parametrize("function", ["cuTensorMapEncodeTiled", "cuTensorMapEncodeIm2col"])
def test_a_driver_that_makes_no_maps(
    function: str, boxes: tuple[Path, Graph], fake_gpu: FakeGpu, tmp_path: Path
) -> None:
    """It says so: where it refuses one, and where it is older than they are.  Others do without."""
    library, graph = boxes
    for calls in range(2):
        with pytest.raises(AssertionError, match=r"the GPU or its driver failed: .* \(CUDA error 1\)"):
            fake_gpu.run(library, feeds_of(graph, 2), f"fail={function}:1:{calls}")
    old = FakeGpu.build(tmp_path, without=function)
    with pytest.raises(AssertionError, match=r"no CUDA driver: .* older than CUDA 11.4 \(12.0 for sm_90a\)"):
        old.run(library, feeds_of(graph, 2))
    plain = load_network(LENET).init(seed=2).graph()
    cnnc.compile(plain, target="cuda:sm_90a").save(tmp_path / "plain.so")
    old.run(tmp_path / "plain.so", feeds_of(plain, 2))


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
