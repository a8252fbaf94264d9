"""Random faults in a run on a real cluster; afterwards, every invariant holds. The seed and the faults are printed.

`make chaos` runs the long form (ORCH_CHAOS_FAULTS, ORCH_CHAOS_SEED); the short form,
with each fault once, is part of the test suite.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from devcluster import DevCluster

from orchestrator.run.run import Run
from tests.support.invariants import violations
from tests.support.slurm_runs import epochs, jobs, launch, over, settings, until, worked

FAULTS = int(os.environ.get("ORCH_CHAOS_FAULTS", "10"))
SEED = int(os.environ.get("ORCH_CHAOS_SEED", "1"))
WORKERS = 4
ON_LOW = {"partition": "low", "gpus": 1, "cpus": 1, "mem_gb": 0.5, "signal_delay_s": 10}


class Chaos:
    """The faults. The cluster works again after each of them."""

    def __init__(self, cluster: DevCluster, run: Run, moments: random.Random) -> None:
        self.cluster = cluster
        self.run = run
        self.moments = moments

    def victim(self) -> dict[str, Any]:
        return self.moments.choice(until("a job at work", lambda: jobs(self.run, "running")))

    # --- the faults

    def normal_end(self) -> None:
        """A job ends normally."""
        links = len(worked(self.run))
        until("another link", lambda: len(worked(self.run)) > links)

    def time_limit(self) -> None:
        """The job's time limit is suddenly reached."""
        self.cluster.run(["scontrol", "update", f"jobid={self.victim()['cluster_id']}", "timelimit=0:01"], check=False)

    def scancel_running(self) -> None:
        self.cluster.run(["scancel", self.victim()["cluster_id"]], check=False)

    def scancel_successor(self) -> None:
        queued = jobs(self.run, "queued")
        if queued:
            self.cluster.run(["scancel", self.moments.choice(queued)["cluster_id"]], check=False)

    def preemption(self) -> None:
        """A job of higher priority takes a whole node."""
        node = self.victim()["host"]
        script = "#!/bin/bash\nsleep 4\n"
        self.cluster.sbatch(script, "--partition=main", f"--nodelist={node}", "--exclusive", "--time=1")

    def node_failure(self) -> None:
        """The node fails, and all its processes die."""
        node = self.victim()["host"]
        self.cluster.kill_node(node, jobs=True)
        time.sleep(1)
        self.cluster.start_node(node)

    def double_run(self) -> None:
        """The node is declared down, but the job's old process continues while Slurm starts the job on another node."""
        node = self.victim()["host"]
        self.cluster.kill_node(node, jobs=False)
        time.sleep(3)
        self.cluster.start_node(node)

    def sigkill_of_the_step(self) -> None:
        victim = self.victim()
        if psutil.pid_exists(victim["pid"]):
            os.kill(victim["pid"], signal.SIGKILL)

    def controller_down(self) -> None:
        """The controller is down while jobs end and submit."""
        self.cluster.stop_controller()
        time.sleep(self.moments.uniform(4, 8))
        self.cluster.start_controller()

    def controller_crash(self) -> None:
        """The controller crashes: it forgets the jobs that it has not saved, and uses their ids again."""
        links = len(jobs(self.run))
        until("a new link", lambda: len(jobs(self.run)) > links)
        self.cluster.kill_controller()
        time.sleep(1)
        self.cluster.start_controller()

    def faults(self) -> list[Callable[[], None]]:
        return [
            self.normal_end, self.time_limit, self.scancel_running, self.scancel_successor, self.preemption,
            self.node_failure, self.double_run, self.sigkill_of_the_step, self.controller_down, self.controller_crash,
        ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_after_any_faults_every_invariant_holds_and_every_chain_is_single(cluster: DevCluster, tmp_path: Path) -> None:
    moments = random.Random(SEED)
    changes = {"workers": WORKERS, "eon_lifetime": 6, "total_lifetime": 3000, "max_failures": 100, "slurm": ON_LOW}
    run = launch(settings("chaos", **changes), tmp_path)
    chaos = Chaos(cluster, run, moments)
    drawn = chaos.faults()
    moments.shuffle(drawn)
    drawn += moments.choices(chaos.faults(), k=max(0, FAULTS - len(drawn)))
    started = time.monotonic()
    for number, fault in enumerate(drawn[: max(FAULTS, 10)], start=1):
        until("work", lambda: jobs(run, "running"), 120)
        time.sleep(moments.uniform(0.2, 1.5))
        fault()
        heal(cluster)
        done = epochs(run)
        print(f"{time.monotonic() - started:6.1f} s  seed {SEED}, fault {number}: {fault.__name__}; {done} epochs")
        until("work to go on", lambda done=done: mended(run) and epochs(run) > done, 180)
    until(
        "all chains at work",
        lambda: mended(run) and len({j["worker_id"] for j in jobs(run, "running")}) == WORKERS,
        120,
    )

    run.drain(time.time())
    # A job that only Slurm knows, and not the database, ends at its time limit.
    until("the end", lambda: heal(cluster) or over(run), 300, every_s=2)
    assert violations(run) == []
    assert max_at_work(run) <= WORKERS
    counted = run.leaderboard.reader.counts()
    print(f"{len(drawn)} faults, {len(worked(run))} jobs, {counted['epochs']} epochs, {counted['expirations']} expired")
    left = "the queue to have none of the run's jobs"
    until(left, lambda: mended(run) and not [j for j in cluster.squeue() if "orch" in j["name"]], every_s=1)
    cluster.clear()


def heal(cluster: DevCluster) -> None:
    """Resume nodes that are down or drained, as an administrator does."""
    for node in cluster.node_names:
        cluster.start_node(node)


def mended(run: Run) -> bool:
    """Mend chains as `orch status` and `orch keep` do from a login node."""
    run.reconcile(time.time())
    return True


def max_at_work(run: Run) -> int:
    """Return the maximum number of live claims at the same time. A forked chain would add one."""
    spans = [(c["claimed_at"], c["finished_at"] or time.time()) for c in run.leaderboard.reader.rows("chunk")]
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)
