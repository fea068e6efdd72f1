"""Every layer of the DSL computes what PyTorch's module of that name computes, on the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnnc.frontends import dsl
from cnnc.frontends.dsl import Tensor, network
from cnnc.ir.interp import evaluate

torch = pytest.importorskip("torch")
nn = torch.nn
F = torch.nn.functional

IMAGE, ODD, SIGNAL, VOLUME = (6, 9, 8), (8, 11, 7), (6, 13), (4, 5, 6, 7)

MODULES: list[tuple[Any, tuple[int, ...], Callable[[], Any]]] = [
    (dsl.conv(5, 3), IMAGE, lambda: nn.Conv2d(6, 5, 3)),
    (
        dsl.conv(4, (3, 2), stride=(2, 1), pad=(1, 0), dilation=(1, 2)),
        IMAGE,
        lambda: nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 0), (1, 2)),
    ),
    (
        dsl.conv(9, 3, pad="same", groups=3, bias=False),
        IMAGE,
        lambda: nn.Conv2d(6, 9, 3, padding="same", groups=3, bias=False),
    ),
    (dsl.conv(6, 4, pad="same"), IMAGE, lambda: nn.Conv2d(6, 6, 4, padding="same")),
    (dsl.conv(6, 5, pad=2, groups=6), IMAGE, lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6)),
    (dsl.conv(3, 4, pad=2), SIGNAL, lambda: nn.Conv1d(6, 3, 4, padding=2)),
    (dsl.conv1d(3, 4, stride=3), SIGNAL, lambda: nn.Conv1d(6, 3, 4, stride=3)),
    (dsl.conv(2, 3, pad=1), VOLUME, lambda: nn.Conv3d(4, 2, 3, padding=1)),
    (dsl.conv_transpose(4, 3, stride=2, pad=1, output_pad=1), IMAGE, lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1)),
    (
        dsl.conv_transpose(4, (2, 3), groups=2, dilation=2, bias=False),
        IMAGE,
        lambda: nn.ConvTranspose2d(6, 4, (2, 3), groups=2, dilation=2, bias=False),
    ),
    (dsl.conv_transpose(5, 4, stride=3), SIGNAL, lambda: nn.ConvTranspose1d(6, 5, 4, 3)),
    (dsl.linear(5), (7,), lambda: nn.Linear(7, 5)),
    (dsl.linear(5, bias=False), IMAGE, lambda: nn.Linear(8, 5, bias=False)),
    (dsl.batch_norm(epsilon=1e-3), IMAGE, lambda: nn.BatchNorm2d(6, eps=1e-3)),
    (dsl.batch_norm, SIGNAL, lambda: nn.BatchNorm1d(6)),
    (dsl.batch_norm(affine=False), IMAGE, lambda: nn.BatchNorm2d(6, affine=False)),
    (dsl.layer_norm, IMAGE, lambda: nn.LayerNorm(8)),
    (dsl.layer_norm(axis=2, epsilon=1e-3), IMAGE, lambda: nn.LayerNorm((9, 8), eps=1e-3)),
    (dsl.group_norm(3), IMAGE, lambda: nn.GroupNorm(3, 6)),
    (dsl.instance_norm, IMAGE, lambda: nn.InstanceNorm2d(6)),
    (dsl.instance_norm(affine=True, epsilon=0.1), IMAGE, lambda: nn.InstanceNorm2d(6, eps=0.1, affine=True)),
    (dsl.lrn(3, alpha=0.5, beta=0.6, bias=2.0), IMAGE, lambda: nn.LocalResponseNorm(3, 0.5, 0.6, 2.0)),
    (dsl.dropout(0.3), IMAGE, lambda: nn.Dropout(0.3)),
    (dsl.relu, IMAGE, lambda: nn.ReLU()),
    (dsl.relu6, IMAGE, lambda: nn.ReLU6()),
    (dsl.leaky_relu(0.2), IMAGE, lambda: nn.LeakyReLU(0.2)),
    (dsl.leaky_relu, IMAGE, lambda: nn.LeakyReLU()),
    (dsl.elu(1.5), IMAGE, lambda: nn.ELU(1.5)),
    (dsl.silu, IMAGE, lambda: nn.SiLU()),
    (dsl.gelu, IMAGE, lambda: nn.GELU()),
    (dsl.gelu("tanh"), IMAGE, lambda: nn.GELU("tanh")),
    (dsl.hard_sigmoid, IMAGE, lambda: nn.Hardsigmoid()),
    (dsl.hard_swish, IMAGE, lambda: nn.Hardswish()),
    (dsl.sigmoid, IMAGE, lambda: nn.Sigmoid()),
    (dsl.tanh, IMAGE, lambda: nn.Tanh()),
    (dsl.softmax, IMAGE, lambda: nn.Softmax(-1)),
    (dsl.softmax(1), IMAGE, lambda: nn.Softmax(1)),
    (dsl.log_softmax(axis=1), IMAGE, lambda: nn.LogSoftmax(1)),
    (dsl.max_pool(3, stride=2, pad=1), IMAGE, lambda: nn.MaxPool2d(3, 2, 1)),
    (dsl.max_pool((2, 3), ceil_mode=True), IMAGE, lambda: nn.MaxPool2d((2, 3), ceil_mode=True)),
    (dsl.max_pool(2, dilation=3, stride=1), IMAGE, lambda: nn.MaxPool2d(2, 1, dilation=3)),
    (dsl.max_pool(3), SIGNAL, lambda: nn.MaxPool1d(3)),
    (dsl.avg_pool(2), IMAGE, lambda: nn.AvgPool2d(2)),
    (dsl.avg_pool(3, stride=2, pad=1), IMAGE, lambda: nn.AvgPool2d(3, 2, 1)),
    (dsl.avg_pool(3, stride=2, pad=1, ceil_mode=True), IMAGE, lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True)),
    (
        dsl.avg_pool(3, stride=1, pad=1, count_include_pad=False),
        IMAGE,
        lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    ),
    (dsl.global_avg_pool, IMAGE, lambda: nn.AdaptiveAvgPool2d(1)),
    (dsl.global_max_pool, IMAGE, lambda: nn.AdaptiveMaxPool2d(1)),
    (dsl.adaptive_avg_pool(4), ODD, lambda: nn.AdaptiveAvgPool2d(4)),
    (dsl.adaptive_avg_pool((3, 8)), IMAGE, lambda: nn.AdaptiveAvgPool2d((3, 8))),
    (dsl.adaptive_avg_pool((20, 3)), ODD, lambda: nn.AdaptiveAvgPool2d((20, 3))),
    (dsl.adaptive_avg_pool((9, 8)), IMAGE, lambda: nn.AdaptiveAvgPool2d((9, 8))),
    (dsl.adaptive_max_pool((4, 2)), ODD, lambda: nn.AdaptiveMaxPool2d((4, 2))),
    (dsl.adaptive_avg_pool(5), SIGNAL, lambda: nn.AdaptiveAvgPool1d(5)),
    (dsl.flatten, IMAGE, lambda: nn.Flatten()),
    (dsl.flatten(2), IMAGE, lambda: nn.Flatten(2)),
    (dsl.depth_to_space(2), ODD, lambda: nn.PixelShuffle(2)),
    (dsl.space_to_depth(2), (3, 6, 8), lambda: nn.PixelUnshuffle(2)),
    (dsl.pad((1, 2)), IMAGE, lambda: nn.ZeroPad2d((2, 2, 1, 1))),
    (dsl.pad((1, 0, 2, 3), "reflect"), IMAGE, lambda: nn.ReflectionPad2d((0, 3, 1, 2))),
    (dsl.pad(2, "edge"), SIGNAL, lambda: nn.ReplicationPad1d(2)),
    (dsl.pad(3, "wrap"), IMAGE, lambda: nn.CircularPad2d(3)),
    (dsl.pad((-1, -2)), IMAGE, lambda: nn.ZeroPad2d((-2, -2, -1, -1))),
    (dsl.pad(1, value=2.5), IMAGE, lambda: nn.ConstantPad2d(1, 2.5)),
    (dsl.upsample(2), IMAGE, lambda: nn.Upsample(scale_factor=2)),
    (dsl.upsample((2, 3), "linear"), IMAGE, lambda: nn.Upsample(scale_factor=(2, 3), mode="bilinear")),
    (
        dsl.upsample(3, "linear", align_corners=True),
        SIGNAL,
        lambda: nn.Upsample(scale_factor=3, mode="linear", align_corners=True),
    ),
    (dsl.upsample(2, "cubic"), IMAGE, lambda: nn.Upsample(scale_factor=2, mode="bicubic")),
    (dsl.resize((5, 12)), IMAGE, lambda: nn.Upsample((5, 12))),
    (dsl.resize((13, 3), "linear"), IMAGE, lambda: nn.Upsample((13, 3), mode="bilinear")),
    (
        dsl.resize((4, 17), "cubic", align_corners=True),
        IMAGE,
        lambda: nn.Upsample((4, 17), mode="bicubic", align_corners=True),
    ),
]


IDS = [repr(layer).removeprefix("<layer ").rstrip("> ") + f"-{i}" for i, (layer, _, _) in enumerate(MODULES)]


@pytest.mark.parametrize(("layer", "shape", "module"), MODULES, ids=IDS)
def test_layer(layer: Any, shape: tuple[int, ...], module: Callable[[], Any]) -> None:
    @network(x=shape)
    def one(x: Tensor) -> Tensor:
        return x >> layer

    net = one(batch=2).init(seed=11)
    theirs = module().double().eval()
    wanted_names = {name for name in theirs.state_dict() if name != "num_batches_tracked"}
    ours = {name.split(".", 1)[1]: torch.from_numpy(array) for name, array in net.weights.items()}
    assert set(ours) == wanted_names
    theirs.load_state_dict(ours, strict=False)
    x = np.random.default_rng(20).standard_normal((2, *shape)) * 3
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(x)).numpy()
    got = evaluate(net.graph(), {"x": x}, precise=True)["output"]
    assert net.outputs[0].shape == got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


def test_min_pool_is_the_maximum_of_the_negative() -> None:
    @network(x=(3, 9, 8))
    def pooled(x: Tensor) -> Tensor:
        return x >> dsl.min_pool(3, stride=2, pad=1)

    x = np.random.default_rng(20).standard_normal((1, 3, 9, 8))
    wanted = -F.max_pool2d(torch.from_numpy(-x), 3, 2, 1).numpy()
    np.testing.assert_array_equal(evaluate(pooled().graph(), {"x": x}, precise=True)["output"], wanted)


def test_alexnet_with_two_towers_and_lrn(example_path: Callable[[str], str]) -> None:
    net = dsl.load_network(example_path("alexnet.py:alexnet_2012")).init(seed=8)
    relu, pool, norm = nn.ReLU(), nn.MaxPool2d(3, 2), nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)
    layers = {
        "conv1": nn.Conv2d(3, 96, 11, 4),
        "conv2": nn.Conv2d(96, 256, 5, padding=2, groups=2),
        "conv3": nn.Conv2d(256, 384, 3, padding=1),
        "conv4": nn.Conv2d(384, 384, 3, padding=1, groups=2),
        "conv5": nn.Conv2d(384, 256, 3, padding=1, groups=2),
        "fc6": nn.Linear(9216, 4096),
        "fc7": nn.Linear(4096, 4096),
        "fc8": nn.Linear(4096, 1000),
    }
    for name, module in layers.items():
        module.load_state_dict({part: torch.from_numpy(net.weights[f"{name}.{part}"]) for part in ("weight", "bias")})
    steps = ["conv1", relu, norm, pool, "conv2", relu, norm, pool, "conv3", relu, "conv4", relu, "conv5", relu, pool]
    steps += [nn.Flatten(), "fc6", relu, "fc7", relu, "fc8"]
    whole = nn.Sequential(*(layers[step] if isinstance(step, str) else step for step in steps)).double()
    x = np.random.default_rng(20).standard_normal((1, 3, 227, 227))
    with torch.no_grad():
        wanted = whole(torch.from_numpy(x)).numpy()
    got = evaluate(net.graph(), {"x": x}, precise=True)["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-8 * np.abs(wanted).max())


def test_googlenet_of_the_paper(example_path: Callable[[str], str]) -> None:
    net = dsl.load_network(example_path("googlenet.py:googlenet_2014"), x=(3, 64, 64)).init(seed=9)
    w = {name: torch.from_numpy(array).double() for name, array in net.weights.items()}
    x = np.random.default_rng(20).standard_normal((1, 3, 64, 64))

    def unit(h: Any, name: str, stride: int = 1) -> Any:
        weight = w[name + ".weight"]
        return F.relu(F.conv2d(h, weight, w[name + ".bias"], stride, weight.shape[-1] // 2))

    def inception(h: Any, name: str) -> Any:
        pooled = F.max_pool2d(h, 3, 1, 1)
        branches = [["branch1"], ["branch2.0", "branch2.1"], ["branch3.0", "branch3.1"], ["branch4.1"]]
        results = []
        for branch in branches:
            y = pooled if branch == ["branch4.1"] else h
            for layer in branch:
                y = unit(y, f"inception{name}.{layer}")
            results.append(y)
        return torch.cat(results, 1)

    def pool(h: Any) -> Any:
        return F.max_pool2d(h, 3, 2, ceil_mode=True)

    def norm(h: Any) -> Any:
        return F.local_response_norm(h, 5, 1e-4, 0.75, 1.0)

    h = norm(pool(unit(torch.from_numpy(x), "conv1", 2)))
    h = pool(norm(unit(unit(h, "conv2"), "conv3")))
    for names in (["3a", "3b"], ["4a", "4b", "4c", "4d", "4e"], ["5a", "5b"]):
        for name in names:
            h = inception(h, name)
        h = h if names[0] == "5a" else pool(h)
    wanted = F.linear(h.mean((2, 3)), w["fc.weight"], w["fc.bias"]).numpy()
    got = evaluate(net.graph(), {"x": x}, precise=True)["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-9)


def test_lenet5(example_path: Callable[[str], str]) -> None:
    net = dsl.load_network(example_path("lenet5.py")).init(seed=10)
    steps = [nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2)]
    steps += [nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10)]
    whole = nn.Sequential(*steps)
    names = dict(zip(["conv1", "conv2", "fc1", "fc2", "fc3"], ["0", "3", "7", "9", "11"], strict=True))
    state = {f"{names[key.split('.')[0]]}.{key.split('.')[1]}": torch.from_numpy(a) for key, a in net.weights.items()}
    whole.load_state_dict(state)
    x = np.random.default_rng(20).standard_normal((1, 1, 32, 32))
    with torch.no_grad():
        wanted = whole.double()(torch.from_numpy(x)).numpy()
    got = evaluate(net.graph(), {"x": x}, precise=True)["output"]
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parameters_of_a_module_load_as_they_are(dtype: Any) -> None:
    net = network(x=IMAGE)(lambda x: x >> dsl.conv(4, 3, name="0") >> dsl.batch_norm(name="1"))()
    module = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    net.load_state_dict({**module.state_dict(), **dict(module.named_parameters())})
    for name, tensor in module.state_dict().items():
        if name != "1.num_batches_tracked":
            np.testing.assert_array_equal(net.weights[name], tensor.float().numpy())


def test_a_safetensors_file_of_pytorch_loads(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    module = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).bfloat16()
    save_file(module.state_dict(), tmp_path / "m.safetensors")
    net = network(x=IMAGE)(lambda x: x >> dsl.conv(4, 3, name="0") >> dsl.batch_norm(name="1"))()
    net.load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(net.weights["0.weight"], module[0].weight.detach().float().numpy())
