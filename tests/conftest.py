"""Fixtures for every kind of test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from orchestrator import trust
from tests import postgres
from tests.storage import Storage


@pytest.fixture(autouse=True)
def _own_umask() -> Iterator[None]:
    """Commands that a test calls in this very process change it for good, as they may in one of their own."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
    trust._users.clear()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Postgres]:
    """One for each pytest process, started by the first test that asks; its password is in the environment."""
    try:
        postgres._bin()
    except postgres.MissingServerError as missing:
        pytest.skip(str(missing))
    with postgres.temporary() as server, pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment().items():
            environment.setenv(name, value)
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest) -> Storage:
    """Either database: what a test shows with this fixture holds for both."""
    if request.param == "sqlite":
        return Storage(None)
    return Storage(request.getfixturevalue("postgres_server").url)
