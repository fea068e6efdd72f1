"""Parameters in files: strict checking of a `state_dict`, reading and writing `.safetensors`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnc.errors import EnvironmentProblem, ModelError
from cnnc.ir.types import DType, TensorType, format_shape

_UNUSED = ("num_batches_tracked",)
_SHOWN = 8
_FOREIGN = {b"PK": "a PyTorch checkpoint (zip)", b"\x80": "a pickle", b"\x89HDF": "an HDF5 file"}


def checked_weights(
    network: str, wanted: Mapping[str, TensorType], state: Mapping[str, Any], training_only: tuple[str, ...]
) -> dict[str, np.ndarray]:
    """Give the arrays of a `state_dict` as the parameters want them.

    Raises `ModelError` that lists what is missing, unexpected, or of another shape or dtype.
    """
    used = {name: _array(value) for name, value in state.items() if not _is_unused(name, training_only)}
    missing = [name for name in wanted if name not in used]
    unexpected = [name for name in used if name not in wanted]
    mismatched = [
        f"{name} (wanted {wanted[name]}, got {used[name].dtype}{format_shape(used[name].shape)})"
        for name in wanted
        if name in used and not _fits(used[name], wanted[name])
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another type": mismatched}
    problems = [f"{len(names)} {what}: {_some(names)}" for what, names in found.items() if names]
    if problems:
        raise ModelError(f"network {network}: these weights are not its own; " + "; ".join(problems))
    return {name: np.ascontiguousarray(used[name], type_.dtype.numpy) for name, type_ in wanted.items()}


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read a `.safetensors` file; raises `ModelError` for anything else (nothing is ever unpickled)."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.is_file():
        raise EnvironmentProblem(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        return dict(load_file(path))
    except OSError as error:
        raise EnvironmentProblem(f"{path}: cannot be read: {error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        kind = next((f"it is {what}; " for magic, what in _FOREIGN.items() if head.startswith(magic)), "")
        raise ModelError(
            f"{path}: {kind}not a safetensors file ({error});"
            " convert checkpoints with safetensors.torch.save_file(model.state_dict(), path)"
        ) from None


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a `.safetensors` file beside its place, then move it there in one step."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        save_file(arrays, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise EnvironmentProblem(f"{path}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _is_unused(name: str, training_only: tuple[str, ...]) -> bool:
    return name.rpartition(".")[2] in _UNUSED or any(name.startswith(prefix) for prefix in training_only)


def _array(value: Any) -> np.ndarray:
    """Give an array of anything numpy reads; PyTorch's bf16 tensors it does not, so those go through f32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()
    return np.asarray(value)


def _fits(array: np.ndarray, wanted: TensorType) -> bool:
    """Whether the shape is right and the numbers can be taken over exactly."""
    exact = array.dtype == wanted.dtype.numpy or array.dtype in (DType.F16.numpy, DType.BF16.numpy)
    return exact and array.shape == wanted.shape


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
