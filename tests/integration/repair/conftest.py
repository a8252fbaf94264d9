"""The runs that the tests repair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import OrchError
from orchestrator.run.run import Run
from tests.support.repairs import SCRIPT, SQLITE
from tests.support.small_runs import make_run, work
from tests.support.storage import Storage


@pytest.fixture
def run(storage: Storage, tmp_path: Path) -> Iterator[Run]:
    """A run with some trained chunks. A test with this fixture runs on both databases."""
    made = make_run(storage, tmp_path / "run", workers=2)
    work(made, SCRIPT)
    yield made
    with contextlib.suppress(OrchError):
        made.leaderboard.database.drop(schema_too=True)


@pytest.fixture
def sqlite_run(tmp_path: Path) -> Run:
    made = make_run(SQLITE, tmp_path / "run", workers=2)
    work(made, SCRIPT)
    return made
