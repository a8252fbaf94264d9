"""Fixtures that several unit tests share. Unit tests are for the everyday loop, unless they are slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.quick)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Write a settings file and return its path; a dict or list becomes JSON, text is written unchanged."""

    def write(content: object, name: str = "some.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write
