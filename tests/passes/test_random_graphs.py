"""Every pass, and all of them together, keep the numbers of random networks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnc.ir.graph import Graph
from cnnc.options import LEVELS
from cnnc.passes.check_plan import check_plan
from cnnc.passes.fuse import Fuse
from cnnc.passes.pipeline import pipeline, run_pipeline
from cnnc.passes.plan_memory import live_bytes, plan_memory
from cnnc.passes.registry import parse_passes
from cnnc.target import Target
from tests.passes.graphs import TARGET, assert_same_numbers, check
from tests.passes.random_graphs import networks
from tests.passes.test_fuse import Eager
from tests.passes.test_pipeline import Anything

MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
PASSES = (
    "simplify", "fold_constants", "fold_batch_norm", "fold_pad", "cse", "choose_algorithm", "assign_layouts",
    "assign_layouts{block=4}", "fuse", "fuse{grow=False}", "fuse{most=3}",
)  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
@given(graph=networks(), seed=st.integers(0, 1000))
@MANY
def test_a_pass_keeps_the_numbers(name: str, graph: Graph, seed: int):
    (step,) = parse_passes(name)
    check(step, graph, np.random.default_rng(seed))


@given(graph=networks(), most=st.sampled_from([4, 32]), seed=st.integers(0, 1000))
@MANY
def test_prologues_keep_the_numbers(graph: Graph, most: int, seed: int):
    check(Fuse(most=most, templates=(Eager(),)), graph, np.random.default_rng(seed))


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v4"])
@given(graph=networks(largest=20), level=st.sampled_from(LEVELS), seed=st.integers(0, 1000))
@MANY
def test_the_pipeline_keeps_the_numbers(arch: str, graph: Graph, level: int, seed: int):
    target = Target.parse(f"cpu:{arch}")
    done = run_pipeline(graph, target, pipeline(level, [Anything()]))
    assert_same_numbers(graph, done, np.random.default_rng(seed))
    plan = plan_memory(done, target)
    check_plan(done, plan)
    assert plan.size >= live_bytes(done)


@pytest.mark.parametrize(("dtype", "tolerance"), [("tf32", 2e-3), ("f16", 2e-3), ("bf16", 1.6e-2)])
@given(graph=networks(largest=20), level=st.sampled_from(LEVELS), seed=st.integers(0, 1000))
@MANY
def test_narrow_products_keep_the_numbers(dtype: str, tolerance: float, graph: Graph, level: int, seed: int):
    target = Target.parse("cuda:sm_90")
    done = run_pipeline(graph, target, pipeline(level, [Anything()], dtype=dtype, tensor_cores=True))
    assert_same_numbers(graph, done, np.random.default_rng(seed), tolerance)
    check_plan(done, plan_memory(done, target))


@given(graph=networks(), text=st.lists(st.sampled_from(PASSES[:7]), max_size=5), seed=st.integers(0, 1000))
@MANY
def test_passes_in_any_order_keep_the_numbers(graph: Graph, text: list[str], seed: int):
    done = run_pipeline(graph, TARGET, parse_passes(",".join([*text, "fuse"])))
    assert_same_numbers(graph, done, np.random.default_rng(seed))
