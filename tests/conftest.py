"""Fixtures for every kind of test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import postgres
from tests.support.command_line import umask_as_it_was
from tests.support.storage import Storage


@pytest.fixture(autouse=True)
def _own_umask() -> Iterator[None]:
    """Restore the umask after each test: commands change it permanently, and tests may run commands in this process."""
    with umask_as_it_was():
        yield


@pytest.fixture(autouse=True)
def _no_children() -> Iterator[None]:
    """Wait for the local jobs that a test started from this process. They have ended, or are killed here."""
    yield
    if local := sys.modules.get("orchestrator.cluster.local"):
        while local._children:
            job = local._children.pop()
            try:
                job.wait(10)
            except subprocess.TimeoutExpired:
                job.kill()
                job.wait()


@contextmanager
def _process_set_up_as_it_was() -> Iterator[None]:
    """Undo what opening a job changes in its process: threads, deterministic mode, environment variables."""
    names = ("CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME")
    variables = {name: os.environ.get(name) for name in names}
    had = None
    if torch := sys.modules.get("torch"):  # else nothing has changed yet, and torch is slow to import
        had = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if torch := sys.modules.get("torch"):
        threads, deterministic, benchmark = had or (os.cpu_count() or 1, False, False)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark


@pytest.fixture(scope="module", autouse=True)
def _module_as_it_was() -> Iterator[None]:
    with _process_set_up_as_it_was():
        yield


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    with _process_set_up_as_it_was():
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[postgres.Postgres]:
    """A server for each pytest process, started by the first test that needs it. Its password is in the environment."""
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
    """A test with this fixture runs twice: on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        return Storage(None)
    return Storage(request.getfixturevalue("postgres_server").url)


@pytest.fixture(scope="module")
def one_thread(_module_as_it_was: None) -> None:
    """Let torch use one thread: the result of a sum depends on the number of threads, and tests run in parallel."""
    import torch

    torch.set_num_threads(1)
