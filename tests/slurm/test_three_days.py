"""A shortened three-day run: 8 chains, in which each job trains for one second. `make three-days` runs all 864 jobs
(259200 s of lifetime in jobs of 2400 s, for 8 workers); the test suite runs fewer links of each chain."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path

import psutil
import pytest
from devcluster import DevCluster

from tests.support.invariants import violations
from tests.support.slurm_runs import epochs, jobs, launch, over, settings, until, worked

WORKERS = 8
LINKS = int(os.environ.get("ORCH_LINKS", "3"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_chain_stays_whole_and_single_for_all_its_links(cluster: DevCluster, tmp_path: Path) -> None:
    wanted = settings(
        "three-days",
        workers=WORKERS,
        total_lifetime=7000,
        eon_lifetime=1.5,  # so that each job trains exactly one chunk
        job_params={"seconds": 1.0},
        stop_after_epochs=WORKERS * LINKS,
    )
    controller = next(psutil.Process(p.pid) for p in cluster.processes() if p.program == "slurmctld")
    used, started = sum(controller.cpu_times()[:2]), time.monotonic()
    run = launch(wanted, tmp_path)
    until("the end", lambda: over(run), timeout_s=60 + 6 * WORKERS * LINKS, every_s=5)
    took = time.monotonic() - started
    load = (sum(controller.cpu_times()[:2]) - used) / took

    trained = [j for j in worked(run) if j["outcome"] == "no time is left for another chunk"]
    chains = [len([j for j in trained if j["worker_id"] == w]) for w in range(WORKERS)]
    gaps = gaps_s(run.leaderboard.reader.rows("job"))
    print(
        f"{len(trained)} jobs in {took:.0f} s: {60 * len(trained) / took:.0f} jobs a minute; links a chain {chains}; "
        f"gap between links {statistics.median(gaps):.2f} s (median); slurmctld used {100 * load:.1f} % of a core"
    )
    assert WORKERS * LINKS <= epochs(run) < WORKERS * (LINKS + 1), "chunks that were under way are finished"
    assert len(run.leaderboard.reader.rows("chunk")) == epochs(run)
    assert violations(run) == []
    assert not jobs(run, "lost")
    assert min(chains) >= LINKS / 2
    until("an empty queue", lambda: not cluster.squeue())


def gaps_s(rows: list[dict[str, float]]) -> list[float]:
    """Return the seconds from the end of each job to the start of the next job in its chain."""
    by_key = {(r["worker_id"], r["link"]): r for r in rows if r["started_at"]}
    return [
        row["started_at"] - by_key[worker, link - 1]["ended_at"]
        for (worker, link), row in by_key.items()
        if (worker, link - 1) in by_key
    ]
