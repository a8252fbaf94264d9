"""On a real cluster: a run with the soft lock, and the doctor's two-node test of the soft lock."""

from __future__ import annotations

import json

import pytest
from devcluster import DevCluster

from orchestrator.doctor.examine import examine
from tests.support.invariants import violations
from tests.support.slurm_runs import QUICK, jobs, launch, over, settings, until


def test_chains_of_jobs_share_the_soft_lock_that_was_chosen_at_launch(cluster: DevCluster, tmp_path):
    run = launch(settings("soft", lock="soft", workers=2, stop_after_epochs=12, eon_lifetime=2), tmp_path)
    until("the end of the run", lambda: over(run))
    assert violations(run) == []
    assert max(j["link"] for j in jobs(run)) >= 1, "successors too"
    assert run.leaderboard.database.lock_choice.kind == "soft"
    assert list((run.folder / "orch.db.lock.filelock/claims").iterdir()) == []


@pytest.mark.long
def test_the_two_node_test_tries_the_lock_that_a_run_would_take(cluster: DevCluster, tmp_path):
    (tmp_path / "soft.json").write_text(json.dumps(QUICK | {"name": "soft", "lock": "soft"}))
    said = {
        finding.what: finding.level
        for finding in examine(tmp_path / "soft.json", tmp_path / "runs", two_nodes=True, say=lambda _: None)
    }
    assert any(what.startswith("a run uses this lock: soft lock (files), proven on") for what in said)
    counted = [what for what in said if "updates, 0 lost" in what]
    assert [what.partition(",")[0] for what in counted] == ["file lock", "SQLite database"]
