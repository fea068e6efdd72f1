"""Engines that run the same model, for `bench --against` and `verify --against`.

Each is held to the threads it is given and to f32, and called through its own Python interface.
"""

from __future__ import annotations

import re
import runpy
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cnnc.errors import EnvironmentProblem, UnsupportedError, UsageError

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Task:
    """What an engine is to run: a file, on so many threads, with inputs by name, for the outputs so named."""

    model: str
    threads: int
    feeds: Mapping[str, np.ndarray]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Opened:
    """A network ready to run: `run` computes once, `read` turns what it gave into arrays by name.

    What `read` gives holds until the next run.
    """

    run: Callable[[], Any]
    read: Callable[[Any], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Engine:
    """An engine: the package to import, the packages to install, the kind of file it reads, and how it opens one.

    `opener` names a function of the imported package and a `Task`, as `module:function`, so that a process of its
    own can find it.  `convert` turns the file into what the opener reads, in a folder, within so many seconds.
    """

    name: str
    package: str
    needs: tuple[str, ...]
    reads: Literal["so", "onnx", "torch"]
    opener: str
    convert: Callable[[str, Mapping[str, np.ndarray], Path, float], str] | None = None

    def require(self) -> None:
        """Raise `EnvironmentProblem` if a package is missing."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            raise EnvironmentProblem(f"{' and '.join(missing)} not installed; pip install {' '.join(missing)}")


def open_cnnc(cnnc: Any, task: Task) -> Opened:
    """Load a binary made by cnnc."""
    module = cnnc.load(task.model, threads=task.threads)
    return Opened(lambda: module.run(task.feeds), lambda got: got)


def open_onnxruntime(onnxruntime: Any, task: Task) -> Opened:
    """Open an ONNX file with ONNX Runtime, all its optimisations on."""
    session = _session(onnxruntime, task.model, task.threads, optimise=True)
    names = list(task.outputs)
    return Opened(lambda: session.run(names, task.feeds), lambda got: dict(zip(names, got, strict=True)))


def open_openvino(openvino: Any, task: Task) -> Opened:
    """Open an ONNX file with OpenVINO: f32, one stream, for latency."""
    core = openvino.Core()
    model = core.read_model(task.model)
    if model.is_dynamic():
        model.reshape({name: list(array.shape) for name, array in task.feeds.items()})
    options = {
        "INFERENCE_NUM_THREADS": task.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    for name, array in task.feeds.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    return Opened(request.infer, lambda _: {name: request.get_tensor(name).data for name in task.outputs})


def open_ncnn(ncnn: Any, task: Task) -> Opened:
    """Open what `convert_for_ncnn` wrote, with half precision of every kind off."""
    net = ncnn.Net()
    net.opt.num_threads = task.threads
    for option in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage", "bf16_packed", "vulkan_compute"):
        setattr(net.opt, f"use_{option}", False)
    path = Path(task.model)
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise UnsupportedError("ncnn does not load what pnnx made of the model")
    # ncnn's arrays have no batch axis; pnnx says which axis of each input and output that is.
    script = path.with_suffix(".py").read_text()
    axes = {name: int(axis) for name, axis in re.findall(r"(\w+)\.numpy\((?:\), )?batch_index=(\d+)\)", script)}
    blobs = [f"out{i}" for i in range(len(task.outputs))]
    arrays = {f"in{i}": array for i, array in enumerate(task.feeds.values())}
    missing = [name for name in (*arrays, *blobs) if name not in axes]
    if missing:
        raise UnsupportedError(f"pnnx made a network without {', '.join(missing)}")
    inputs = {name: ncnn.Mat(array, batch_index=axes[name]).clone() for name, array in arrays.items()}

    def run() -> list[Any]:
        with net.create_extractor() as extractor:
            for name, mat in inputs.items():
                extractor.input(name, mat)
            results = [extractor.extract(name) for name in blobs]
        if any(code for code, _ in results):
            raise UnsupportedError("ncnn cannot run the network")
        return [mat for _, mat in results]

    def read(mats: list[Any]) -> dict[str, np.ndarray]:
        found = (mat.numpy(batch_index=axes[blob]) for mat, blob in zip(mats, blobs, strict=True))
        return dict(zip(task.outputs, found, strict=True))

    return Opened(run, read)


def open_torch(torch: Any, task: Task) -> Opened:
    """Open an exported program (`net.pt2`), or a module made by a function (`file.py:function`), and run it eagerly."""
    torch.set_num_threads(task.threads)
    torch.set_num_interop_threads(1)
    if task.model.endswith(".pt2"):
        network = torch.export.load(task.model).module()
    else:
        file, _, function = task.model.rpartition(":")
        network = runpy.run_path(file)[function]().eval()
    inputs = [torch.from_numpy(array) for array in task.feeds.values()]

    def run() -> Any:
        with torch.inference_mode():
            return network(*inputs)

    def read(got: Any) -> dict[str, np.ndarray]:
        tensors = [got] if isinstance(got, torch.Tensor) else list(got)
        if len(tensors) != len(task.outputs):
            raise UsageError(f"the torch module gives {len(tensors)} outputs, wanted are {', '.join(task.outputs)}")
        return {name: tensor.numpy() for name, tensor in zip(task.outputs, tensors, strict=True)}

    return Opened(run, read)


def convert_for_ncnn(model: str, feeds: Mapping[str, np.ndarray], folder: Path, timeout: float) -> str:
    """Convert an ONNX file with pnnx, weights kept in f32; gives the path of the `.param` file.

    Raises `UnsupportedError` where pnnx gives up, or takes longer than `timeout` seconds.
    """
    param = folder / "net.param"
    if param.exists():
        return str(param)
    spec = find_spec("pnnx")
    if spec is None or spec.origin is None:
        raise EnvironmentProblem("pnnx not installed; pip install pnnx")
    shapes = (f"[{','.join(map(str, a.shape))}]{a.dtype.kind}{a.dtype.itemsize * 8}" for a in feeds.values())
    made = {"ncnnparam": "made.param", "ncnnbin": "net.bin", "ncnnpy": "net.py"}
    command = [str(Path(spec.origin).parent / "pnnx"), str(Path(model).absolute()), "fp16=0"]
    command += [f"inputshape={','.join(shapes)}", *(f"{key}={name}" for key, name in made.items())]
    # What pnnx writes besides goes into the working folder.
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"pnnx was not done after {timeout:g} s") from None
    if done.returncode or not all((folder / name).is_file() for name in made.values()):
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise UnsupportedError(f"pnnx failed with status {done.returncode}: {said[-1] if said else 'no message'}")
    return str((folder / "made.param").rename(param))


def onnxruntime_runner(model: str, threads: int, *, optimise: bool = True) -> Runner:
    """Make a function that runs an ONNX file with ONNX Runtime.

    `optimise` off gives the reference for accuracy: its optimiser folds a zero pad into a max pool wrongly.
    """
    if not model.endswith(".onnx"):
        raise UsageError(f"onnxruntime runs ONNX files; {model} is none")
    ENGINES["onnxruntime"].require()
    import onnxruntime

    session = _session(onnxruntime, model, threads, optimise)
    names = [output.name for output in session.get_outputs()]
    wanted = [value.name for value in session.get_inputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {name: feeds[name] for name in wanted}), strict=True))

    return run


def _session(onnxruntime: Any, model: str, threads: int, optimise: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


_OPENERS = f"{__name__}:open_"

CNNC = Engine("cnnc", "cnnc", (), "so", _OPENERS + "cnnc")

ENGINES: dict[str, Engine] = {
    "onnxruntime": Engine("onnxruntime", "onnxruntime", ("onnxruntime",), "onnx", _OPENERS + "onnxruntime"),
    "openvino": Engine("openvino", "openvino", ("openvino",), "onnx", _OPENERS + "openvino"),
    "ncnn": Engine("ncnn", "ncnn", ("ncnn", "pnnx"), "onnx", _OPENERS + "ncnn", convert_for_ncnn),
    "torch": Engine("torch", "torch", ("torch",), "torch", _OPENERS + "torch"),
}
"""What `--against` may name."""
