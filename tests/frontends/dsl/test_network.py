"""Networks: drawing, loading and saving parameters, cutting, the table of layers."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cnnc.errors import EnvironmentProblem, ModelError, UsageError
from cnnc.frontends.dsl import (
    Network,
    Tensor,
    batch_norm,
    conv,
    flatten,
    global_avg_pool,
    linear,
    load_network,
    max_pool,
    network,
    relu,
    scope,
)
from cnnc.ir.interp import evaluate


@network(x=(3, 12, 12), training_only=("aux.",))
def residual(x: Tensor) -> Tensor:
    """A stem, one residual block, a head."""
    x = x >> conv(8, 3, pad=1, bias=False, name="stem") >> batch_norm(name="bn") >> relu
    with scope("block", 0):
        y = x >> conv(8, 3, pad=1, name="conv1") >> relu >> conv(8, 3, pad=1, name="conv2") >> batch_norm(name="bn2")
        x = relu(y + x)
    return x >> max_pool(2) >> global_avg_pool >> flatten >> linear(5, name="fc")


X = np.random.default_rng(1).standard_normal((1, 3, 12, 12)).astype(np.float32)


def output(net: Network) -> np.ndarray:
    """Run a network."""
    (result,) = evaluate(net.graph(), {"x": X}).values()
    return result


def test_without_numbers_there_is_no_graph(tmp_path: Path) -> None:
    net = residual()
    assert net.weights == {}
    with pytest.raises(UsageError, match=r"network residual: 15 parameters have no numbers yet \(stem.weight, ...\)"):
        net.graph()
    with pytest.raises(UsageError, match="have no numbers yet"):
        net.save(tmp_path / "x.safetensors")


def test_counts_leave_running_statistics_out() -> None:
    net = residual()
    assert net.parameter_count == 3 * 8 * 9 + 16 + 2 * (8 * 8 * 9 + 8) + 16 + 45
    assert sum(t.elements for t in net.parameters.values()) == net.parameter_count + 4 * 8


def test_the_same_seed_gives_the_same_numbers() -> None:
    first, again, other = residual().init(7), residual(batch=3).init(7), residual().init(8)
    for name, array in first.weights.items():
        np.testing.assert_array_equal(array, again.weights[name])
        assert array.dtype == np.float32
        assert not np.array_equal(array, other.weights[name])


def test_the_numbers_do_not_change_from_process_to_process() -> None:
    code = "from cnnc.frontends.dsl import Initial, Role\n"
    code += "print(Initial(Role.WEIGHT, 9).draw((3,), 'a.weight', 5).tobytes().hex())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_weights_are_drawn_by_hes_rule() -> None:
    net = network(x=(64, 8, 8))(lambda x: x >> conv(200, 3, name="c") >> batch_norm(name="b"))().init(0)
    weight = net.weights["c.weight"]
    assert abs(weight.std() / np.sqrt(2 / (64 * 9)) - 1) < 0.02
    assert abs(net.weights["c.bias"]).max() <= 1 / np.sqrt(64 * 9)
    assert net.weights["b.running_var"].min() >= 0.5
    assert net.weights["b.running_mean"].std() > 0.05
    assert 0.9 < (net.weights["b.weight"] ** 2).mean() < 1.15


@pytest.mark.parametrize("name", ["resnet.py:resnet101", "inception_v3.py:inception_v3", "densenet.py:densenet121"])
def test_signals_neither_die_nor_explode(example_path: Callable[[str], str], name: str) -> None:
    net = load_network(example_path(name), x=(3, 79, 79), batch=2).init(0)
    x = np.random.default_rng(20).standard_normal((1, 3, 79, 79)).astype(np.float32)
    graph = net.graph()
    first, second = evaluate(graph, {"x": np.concatenate([x, x[:, :, ::-1]])})["output"]
    assert 0.1 < first.std() < 1e4
    assert np.linalg.norm(first - second) > 0.01 * np.linalg.norm(first)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    net, path = residual().init(2), tmp_path / "weights.safetensors"
    net.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    other = residual().load(str(path))
    np.testing.assert_array_equal(output(other), output(net))
    assert set(load_file(path)) == set(net.parameters)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.mkdir()
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        residual().init(2).save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        residual().init(2).save(tmp_path / "no" / "such" / "folder.safetensors")


def test_loading_lists_everything_that_is_wrong() -> None:
    net = residual().init(3)
    before = dict(net.weights)
    state: dict[str, Any] = dict(net.weights)
    del state["stem.weight"], state["fc.bias"]
    state |= {"fc.wieght": np.zeros(3, np.float32), "bn.bias": np.zeros(9, np.float32), "bn.weight": np.zeros(8)}
    with pytest.raises(ModelError) as caught:
        net.load_state_dict(state)
    message = str(caught.value)
    assert "2 missing: stem.weight, fc.bias" in message
    assert "1 unexpected: fc.wieght" in message
    assert (
        "2 of another type: bn.weight (wanted f32[8], got float64[8]), bn.bias (wanted f32[8], got float32[9])"
        in message
    )
    assert all(net.weights[name] is before[name] for name in before)


def test_what_only_training_uses_is_left_out() -> None:
    net = residual().init(3)
    state = dict(net.weights) | {"bn.num_batches_tracked": np.array(7), "aux.fc.weight": np.zeros((2, 2), np.float32)}
    np.testing.assert_array_equal(output(residual().load_state_dict(state)), output(net))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_single(dtype: Any) -> None:
    halves = {name: array.astype(dtype) for name, array in residual().init(3).weights.items()}
    loaded = residual().load_state_dict(halves).weights
    for name, array in halves.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], array.astype(np.float32))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> Any:
            return (trap.write_text, ("sprung",))

    for name, start in (("a.pt", b"PK\x03\x04"), ("b.safetensors", b""), ("c.bin", b"\x00" * 40)):
        path = tmp_path / name
        path.write_bytes(start + pickle.dumps(Trap()))
        with pytest.raises(ModelError, match="not a safetensors file"):
            residual().load(path)
    assert not trap.exists()
    with pytest.raises(ModelError, match=r"it is a PyTorch checkpoint \(zip\)"):
        residual().load(tmp_path / "a.pt")
    with pytest.raises(EnvironmentProblem, match="there is no such file"):
        residual().load(tmp_path / "none.safetensors")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(residual().init(1).weights, path)
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelError):
            residual().load(path)


def test_any_layer_or_scope_can_be_the_output() -> None:
    net = residual().init(4)
    stem = net.cut("stem")
    assert [v.shape for v in stem.outputs] == [(1, 8, 12, 12)]
    assert list(stem.parameters) == ["stem.weight"]
    both = net.cut("block", "fc")
    assert both.structure.output_names == ("block", "fc")
    results = evaluate(both.graph(), {"x": X})
    assert results["block"].min() == 0
    np.testing.assert_array_equal(results["fc"], output(net))
    np.testing.assert_array_equal(evaluate(net.cut("block.0").graph(), {"x": X})["block.0"], results["block"])
    with pytest.raises(UsageError, match=r"network residual has no layer 'blok'; there are block"):
        net.cut("blok")


def test_a_cut_network_has_only_its_own_parameters(tmp_path: Path) -> None:
    stem = residual().init(4).cut("stem")
    stem.save(tmp_path / "stem.safetensors")
    assert set(load_file(tmp_path / "stem.safetensors")) == {"stem.weight"}
    with pytest.raises(ModelError, match="unexpected"):
        residual().cut("stem").load_state_dict(residual().init(4).weights)


def test_another_batch_keeps_numbers_and_cuts() -> None:
    net = residual().init(5).cut("block")
    four = net.with_batch(4)
    assert four.outputs[0].shape == (4, 8, 12, 12)
    got = evaluate(four.graph(), {"x": np.repeat(X, 4, axis=0)})["block"]
    np.testing.assert_allclose(got[3:], output(net), rtol=1e-5, atol=1e-6)


def test_the_summary_shows_every_layer() -> None:
    text = residual(batch=2).init(0).summary()
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "residual: x : f32[2,3,12,12]" in text
    assert re.search(r"stem +conv +\[2,8,12,12\] +216 +62,208 +3$", rows["stem"])
    assert re.search(r"bn +batch_norm +\[2,8,12,12\] +16 +3$", rows["bn"])
    assert re.search(r"block.0.conv2 +conv +\[2,8,12,12\] +584 +165,888 +7$", rows["block.0.conv2"])
    assert re.search(r"max_pool1 +max_pool +\[2,8,6,6\] +8$", rows["max_pool1"])
    assert re.search(r"fc +linear +\[2,5\] +45 +80 +all$", rows["fc"])
    assert re.search(r"total +1,461 +394,064", rows["total"])
    assert len(max(text.splitlines(), key=len)) < 100


def test_the_summary_of_a_cut_ends_there() -> None:
    rows = residual().cut("stem").summary().splitlines()
    assert [row.split()[0] for row in rows if row.startswith("  ")] == ["layer", "stem", "total"]
