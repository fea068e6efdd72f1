"""PyTorch as a peer on the GPU: eager, replayed as a CUDA graph, and compiled, each in its usual best form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from cnnc.profiler.gpu.turns import Engine

PEERS = ("torch-eager", "torch-graph", "torch-compile")
"""`torch-compile` is `torch.compile(mode="max-autotune")` on channels_last, which takes minutes to get ready."""


@dataclass(frozen=True)
class TorchEngine:
    """A PyTorch model ready to run."""

    name: str
    run: Callable[[], object]
    synchronise: Callable[[], None]

    def start(self) -> None:
        """Put a run into the current stream."""
        self.run()

    def wait(self) -> None:
        """Return when all runs are done."""
        self.synchronise()


def find_peers(
    names: tuple[str, ...], network: str, dtype: str, shape: tuple[int, ...]
) -> tuple[list[Engine], dict[str, str]]:
    """Make the peers of a network for an input's shape; the second result says why others are missing."""
    try:
        import torch
    except ImportError:
        return [], dict.fromkeys(names, "torch is not installed")
    if not torch.cuda.is_available():
        return [], dict.fromkeys(names, "torch sees no GPU")
    found: list[Engine] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            model, x = _model(torch, network, dtype, shape)
            run = {"torch-eager": _eager, "torch-graph": _graph, "torch-compile": _compiled}[name](torch, model, x)
            found.append(TorchEngine(name, run, torch.cuda.synchronize))
        except Exception as error:
            # Whatever a peer fails with is its own affair, and is reported.
            missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return found, missing


def _model(torch: Any, network: str, dtype: str, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Make the published model of a network's name, of torchvision or timm, with random weights."""
    kind = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    torch.backends.cudnn.benchmark = True
    model = _published(network).eval().to("cuda", kind).to(memory_format=torch.channels_last)
    x = torch.randn(shape, device="cuda", dtype=kind)
    return model, x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def _published(network: str) -> Any:
    try:
        models = import_module("torchvision.models")
        # Heads that only training uses would be run for nothing.
        options = {"aux_logits": False, "init_weights": False} if network in ("googlenet", "inception_v3") else {}
        if network in models.list_models():
            return models.get_model(network, weights=None, **options)
    except ImportError:
        pass
    return import_module("timm").create_model(network)


def _eager(torch: Any, model: Any, x: Any) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(x)

    return run


def _graph(torch: Any, model: Any, x: Any) -> Callable[[], object]:
    run = _eager(torch, model, x)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], object] = graph.replay
    return replay


def _compiled(torch: Any, model: Any, x: Any) -> Callable[[], object]:
    run = _eager(torch, torch.compile(model, mode="max-autotune"), x)
    for _ in range(3):
        run()
    return run
