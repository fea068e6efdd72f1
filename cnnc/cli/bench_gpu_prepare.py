"""Build all that `cnnc bench-gpu` runs, where no GPU is needed: artifacts, inputs, and results by the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import cnnc
from cnnc.cli.precision import BUDGET
from cnnc.errors import UsageError
from cnnc.frontends.dsl import load_network
from cnnc.ir.interp import evaluate, run
from cnnc.module import Module
from cnnc.ops.example_graph import buildable_examples, draw, graph_of, operator_names, rng_for
from cnnc.profiler.gpu.jobs import Job, Manifest, store_arrays

NETWORKS = (
    "resnet.py:resnet50",
    "vgg.py:vgg16",
    "resnet.py:resnet18",
    "densenet.py:densenet121",
    "efficientnet.py:efficientnet_b0",
    "googlenet.py:googlenet",
    "alexnet.py:alexnet",
    "inception_v3.py:inception_v3",
    "lenet5.py:lenet5",
    "mobilenet_v2.py:mobilenet_v2",
    "senet.py:seresnet50",
    "shufflenet_v2.py:shufflenet_v2_x1_0",
    "simple_cnn.py:simple_cnn",
    "squeezenet.py:squeezenet1_1",
)
"""What is run if nothing is named: of each file of the examples at least one."""

IMAGES = 2
"""Different images in the inputs of a network: each takes the interpreter seconds in float64."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Preparation:
    """What to build, for which target."""

    models: Sequence[str]
    operators: Sequence[str]
    dtypes: Sequence[str]
    batches: tuple[int, ...]
    target: str

    def make(self, folder: Path, progress: Progress) -> Manifest:
        """Build everything into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        total = len(self.operators) + len(self.models) * len(self.dtypes)
        jobs: list[Job] = []
        progress(0, total)
        for job in self._build(folder):
            jobs.append(job)
            progress(len(jobs), total)
        manifest = Manifest(cnnc.__version__, self.target, tuple(jobs))
        manifest.write(folder)
        return manifest

    def _build(self, folder: Path) -> Iterator[Job]:
        for name in self.operators:
            yield self._operator(folder, name)
        for model in self.models:
            for dtype in self.dtypes:
                yield self._network(folder, model, dtype)

    def _operator(self, folder: Path, name: str) -> Job:
        """Build all examples of an operator in one artifact."""
        examples = buildable_examples(name)
        graph = graph_of(examples)
        inputs = [a for number, e in enumerate(examples) for a in draw(e, rng_for(name, 4000 + number))]
        job = Job("operator", name, "f32", (), 0.0)
        self._save(folder, job, cnnc.compile(graph, target=self.target, name="model"))
        store_arrays(folder, job, inputs, run(graph, inputs))
        return job

    def _network(self, folder: Path, model: str, dtype: str) -> Job:
        """Build a network for all batch sizes, with random weights."""
        path, _, name = model.rpartition(":")
        job = Job("network", name or Path(path).stem, dtype, self.batches, BUDGET[dtype])
        drawn = load_network(model).init(seed=6)
        narrow: dict[str, Any] = {} if dtype == "f32" else {"dtype": dtype}
        module = cnnc.compile(drawn, target=self.target, batch=self.batches, name="model", **narrow)
        self._save(folder, job, module)
        graph = drawn.with_batch(IMAGES).graph()
        rng = rng_for(job.name, 21)
        feeds = {
            label: rng.standard_normal(value.type.static_shape).astype(value.dtype.numpy)
            for label, value in zip(graph.input_names, graph.inputs, strict=True)
        }
        results = evaluate(graph, feeds, precise=True)
        wanted = [results[label].astype(np.float32) for label in graph.output_names]
        store_arrays(folder, job, list(feeds.values()), wanted)
        return job

    def _save(self, folder: Path, job: Job, module: Module) -> None:
        module.save(folder / f"{job.stem}.so", emit=("so",))


def default_models() -> list[str]:
    """Give the networks of the examples beside the package; raises `UsageError` where there are none."""
    examples = Path(cnnc.__file__).resolve().parents[1] / "examples"
    if not examples.is_dir():
        raise UsageError("the examples are not there, which a checkout of cnnc has; name networks, as file.py:network")
    return [str(examples / name) for name in NETWORKS]


def chosen_operators(text: str) -> list[str]:
    """Read `all`, `none`, or names with commas; raises `UsageError` for a name that is no operator with examples."""
    known = [name for name in operator_names() if buildable_examples(name)]
    if text in ("all", "none"):
        return known if text == "all" else []
    chosen = text.split(",")
    for name in chosen:
        if name not in known:
            raise UsageError(f"--operators {name!r} is not known; use all, none or some of {', '.join(known)}")
    return chosen
