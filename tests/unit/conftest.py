"""Fixtures that several unit tests share. Marks most unit tests as quick, for `make test-quick`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

# Test files that take longer than a few seconds: they use random input or real processes, import torch in a new
# process, or compare distributions.
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
