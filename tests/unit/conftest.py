"""Fixtures that several unit tests share. Most unit tests are for the everyday loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

# Files that take more than some seconds: random input, real processes, torch imported anew, distributions.
NOT_QUICK = (
    "augment",
    "davidnet",
    "decoded",
    "doctor",
    "fuzz_cli",
    "fuzz_files",
    "fuzz_settings",
    "fuzz_slurm",
    "soft_lock",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and item.path.stem.removeprefix("test_") not in NOT_QUICK:
            item.add_marker(pytest.mark.quick)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a settings file and return its path; a dict or list becomes JSON, text is written unchanged."""

    def write(content: object, name: str = "some.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write
