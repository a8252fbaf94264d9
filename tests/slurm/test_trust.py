"""On a real cluster: the files that Slurm writes for a run have the run's modes, whatever the umask at submission."""

from __future__ import annotations

import os
import stat

from devcluster import DevCluster

from tests.support.slurm_runs import launch, over, settings, until


def test_job_logs_and_pickles_are_the_user_s_alone(cluster: DevCluster, tmp_path):
    before = os.umask(0o000)
    try:
        run = launch(settings("private", workers=1, stop_after_epochs=4, eon_lifetime=2), tmp_path)
        until("the end of the run", lambda: over(run))
    finally:
        os.umask(before)
    logs = [path for path in run.folder.glob("jobs/*/*") if path.suffix == ".out"]
    assert len(logs) >= 2, "of the first job and of a successor, which was submitted by a job"
    modes = {str(p.relative_to(run.folder)): stat.S_IMODE(p.stat().st_mode) for p in run.folder.rglob("*")}
    assert {name: f"{mode:o}" for name, mode in modes.items() if mode & 0o077} == {}
