"""Errors a user can meet, each with the exit code the command line ends with."""

from __future__ import annotations

from typing import ClassVar


class CnncError(Exception):
    """Anything cnnc refuses; `exit_code` is what the command line returns for it."""

    exit_code: ClassVar[int] = 70


class UsageError(CnncError):
    """The call itself is wrong: an unknown option, target or input name."""

    exit_code = 2


class ModelError(CnncError):
    """The model is invalid: no tool could give it a meaning."""

    exit_code = 3


class ShapeError(ModelError):
    """Shapes, dtypes or layouts that an operator cannot take."""


class UnsupportedError(CnncError):
    """The model is valid, but uses something cnnc does not compile."""

    exit_code = 4


class LimitError(CnncError):
    """A stated limit (bytes, nodes, depth, time) would be passed."""

    exit_code = 5


class EnvironmentProblem(CnncError):
    """Disk, permissions, compiler, device: the surroundings, not the model."""

    exit_code = 6


class CheckFailed(CnncError):
    """A self-check failed: a damaged binary or cache entry, a CPU that lacks a feature."""

    exit_code = 7


class VerifyError(CnncError):
    """A pass or front end made an ill-formed graph: a bug of cnnc itself."""

    exit_code = 70
