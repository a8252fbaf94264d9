"""A real Slurm cluster for the tests in this folder. Each pytest process starts one for the first test that needs it.

With pytest-xdist use `--dist loadgroup`: the tests here are one group, so that one process runs them all. (pytest-xdist
3.8 ignores groups under pytest 9.2. Each process then starts a cluster, which is slower but works.)
ORCH_DEVCLUSTER_KEEP=1 keeps the cluster's folder, with all logs, after the tests.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "slurm" / "devcluster"))
from devcluster import DevCluster, DevClusterError, MissingPackagesError, wait_for
from devcluster_client import FOREIGN_VARIABLES
from devcluster_processes import check_packages

# A job that still exists after this time counts as left behind by its test.
GRACE_S = 20


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "leaves_jobs: the test may leave jobs in the queue; they are cancelled")
    # Register this marker here too, so that it is known without pytest-xdist.
    config.addinivalue_line("markers", "xdist_group(name): run by one pytest-xdist process")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.xdist_group("slurm"))


@pytest.fixture(scope="session")
def slurm_packages() -> None:
    """Skip tests if Slurm is not installed. Use it directly in tests that start their own clusters."""
    try:
        check_packages(accounting=True, faketime=False)
    except MissingPackagesError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def cluster(slurm_packages: None) -> Iterator[DevCluster]:
    """A DevCluster. While this fixture is active, sbatch, squeue and submitit use this cluster."""
    with DevCluster.temporary() as cluster, pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith(FOREIGN_VARIABLES)]:
            environment.delenv(name)
        environment.setenv("SLURM_CONF", str(cluster.conf))
        yield cluster
    assert not cluster.processes()


@pytest.fixture(autouse=True)
def _leaves_an_idle_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves jobs behind. In any case, the next test gets an idle cluster."""
    if "cluster" not in request.fixturenames:
        yield
        return
    cluster: DevCluster = request.getfixturevalue("cluster")
    yield
    cluster.start()  # restarts daemons that the test has killed
    left: list[str] = []
    if request.node.get_closest_marker("leaves_jobs") is None:
        with contextlib.suppress(DevClusterError):
            wait_for(lambda: not left_by(cluster), GRACE_S, "the jobs")
        left = left_by(cluster)
    cluster.clear()
    if left:
        pytest.fail(f"left in the queue: {', '.join(left)}", pytrace=False)


def left_by(cluster: DevCluster) -> list[str]:
    """Return the jobs in the queue, except jobs that have ended and that Slurm is still cleaning up."""
    return [f"{j['id']} {j['name']} {j['state']}" for j in cluster.squeue() if j["state"] != "COMPLETING"]
