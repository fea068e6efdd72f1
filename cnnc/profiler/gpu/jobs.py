"""What is to be run on a GPU, in a folder: artifacts, their inputs, and the results they must give."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnc.errors import ModelError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Job:
    """An operator's examples or a network, as an artifact; its results may be off by `tolerance`.

    A network has inputs for some images, which are repeated up to each of its batch sizes.
    """

    kind: str
    name: str
    dtype: str
    batches: tuple[int, ...]
    tolerance: float

    @property
    def stem(self) -> str:
        """What its files are called in the folder, before the ending."""
        return f"{self.kind}-{self.name}-{self.dtype}"


@dataclass(frozen=True)
class Manifest:
    """All jobs of a folder, the target they were built for, and by which version of cnnc."""

    cnnc: str
    target: str
    jobs: tuple[Job, ...]

    def write(self, folder: Path) -> None:
        """Write it into the folder, when all it names is there."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read it back; raises `ModelError` where there is none or it cannot be understood."""
        try:
            content = json.loads((folder / MANIFEST).read_text())
            jobs = tuple(Job(**{**job, "batches": tuple(job["batches"])}) for job in content["jobs"])
            return Manifest(content["cnnc"], content["target"], jobs)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{folder} was not made by cnnc bench-gpu --prepare: {error}") from None


def store_arrays(folder: Path, job: Job, inputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    """Keep inputs and results as bytes, since `.npz` knows no bf16; shapes and types are the artifact's."""
    kinds = {"x": inputs, "y": wanted}
    named: dict[str, Any] = {f"{kind}{i}": _bytes(a) for kind, many in kinds.items() for i, a in enumerate(many)}
    np.savez(folder / f"{job.stem}.npz", **named)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def load_arrays(folder: Path, job: Job, kind: str, dtypes: Sequence[np.dtype[Any]]) -> list[np.ndarray]:
    """Give the inputs ("x") or results ("y") of a job, flat."""
    with np.load(folder / f"{job.stem}.npz", allow_pickle=False) as stored:
        return [stored[f"{kind}{i}"].view(dtype) for i, dtype in enumerate(dtypes)]


def repeated(flat: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Fill a shape with images over and over: those of a flat array, whose number the shape's other sizes tell."""
    count = int(np.prod(shape))
    return np.resize(flat, count).reshape(tuple(shape))
