"""Other engines that run the same model, for `bench --against` and `verify --against`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from cnnc.errors import EnvironmentProblem, UsageError

Runner = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def onnxruntime_runner(model: str, threads: int, *, optimise: bool = True) -> Runner:
    """Make a function that runs an ONNX file with ONNX Runtime.

    `optimise` off gives the reference for accuracy: its optimiser folds a zero pad into a max pool wrongly.
    """
    if not model.endswith(".onnx"):
        raise UsageError(f"onnxruntime runs ONNX files; {model} is none")
    try:
        import onnxruntime
    except ImportError:
        raise EnvironmentProblem("onnxruntime is not installed; pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = [value.name for value in session.get_inputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {name: feeds[name] for name in wanted}), strict=True))

    return run
