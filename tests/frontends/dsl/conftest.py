"""Fixtures for the DSL's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def example_path() -> Callable[[str], str]:
    """Give the path of a network of the examples."""
    folder = Path(__file__).parents[3] / "examples"
    return lambda spec: str(folder / spec)
