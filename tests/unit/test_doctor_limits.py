"""The limits on a user's jobs, as tables: rows of sacctmgr and the findings that they give."""

from __future__ import annotations

import pytest

from orchestrator.doctor.limits import (
    Accounting,
    Limit,
    judge_cluster,
    judge_running,
    judge_submission,
    rows,
    run_limits,
    submit_limits,
)
from tests.support.doctoring import levels

NO_LIMITS = {"Account": "lab", "MaxSubmit": "", "GrpSubmit": "", "MaxJobs": "", "GrpJobs": ""}


def qos(name: str = "normal", flags: str = "", **limits: str) -> dict[str, str]:
    return {"Name": name, "Flags": flags, **limits}


@pytest.mark.parametrize(
    ("accounting", "limits"),
    [
        (Accounting(), []),
        (Accounting(NO_LIMITS), []),
        (Accounting(NO_LIMITS | {"MaxSubmit": "10"}), ["MaxSubmitJobs=10 of account lab"]),
        # a QOS overrides the association, and the partition's QOS overrides the job's
        (
            Accounting(NO_LIMITS | {"MaxSubmit": "10"}, job_qos=qos(MaxSubmitPU="4")),
            ["MaxSubmitJobsPerUser=4 of QOS normal"],
        ),
        (
            Accounting(job_qos=qos(MaxSubmitPU="4"), partition_qos=qos("part", MaxSubmitPU="7")),
            ["MaxSubmitJobsPerUser=7 of QOS part"],
        ),
        (
            Accounting(job_qos=qos(flags="OverPartQOS", MaxSubmitPU="4"), partition_qos=qos("part", MaxSubmitPU="7")),
            ["MaxSubmitJobsPerUser=4 of QOS normal"],
        ),
        (
            Accounting(job_qos=qos(MaxSubmitPA="9", GrpSubmit="30")),
            ["MaxSubmitJobsPerAccount=9 of QOS normal", "GrpSubmitJobs=30 of QOS normal"],
        ),
        # an account without a limit has that of the account above it
        (
            Accounting(NO_LIMITS, ({"Account": "lab", "GrpSubmit": ""}, {"Account": "school", "GrpSubmit": "50"})),
            ["GrpSubmitJobs=50 of account school"],
        ),
        (Accounting(job_qos=qos(MaxSubmitPU="0")), ["MaxSubmitJobsPerUser=0 of QOS normal"]),
    ],
)
def test_the_limits_that_apply(accounting, limits):
    assert [str(limit) for limit in submit_limits(accounting)] == limits


def test_running_jobs_and_submitted_jobs_have_different_limits():
    accounting = Accounting(NO_LIMITS | {"MaxJobs": "3", "MaxSubmit": "10"}, job_qos=qos(MaxSubmitPU="4"))
    assert [str(limit) for limit in run_limits(accounting)] == ["MaxJobs=3 of account lab"]


@pytest.mark.parametrize(
    ("limit", "workers", "others", "level"),
    [
        (1, 2, 0, "error"),
        (3, 4, 0, "error"),
        (0, 1, 0, "error"),
        (1, 1, 0, "warning"),
        (2, 2, 0, "warning"),
        (7, 4, 0, "warning"),
        (2, 1, 0, "ok"),
        (8, 4, 0, "ok"),
        (8, 4, 1, "warning"),  # room for 7 more jobs: fewer than two per worker
        (8, 4, 5, "warning"),  # room for 3 more jobs: too few, but only until the other jobs end
        (1000, 4, 5, "ok"),
    ],
)
def test_a_submit_limit_against_the_number_of_workers(limit, workers, others, level):
    findings = judge_submission([Limit(limit, "MaxSubmitJobs", "account lab")], workers, others, enforced=True)
    assert levels(findings) == [level]


def test_a_limit_that_is_too_small_for_successors_says_what_happens_then():
    (finding,) = judge_submission([Limit(5, "MaxSubmitJobsPerUser", "QOS two")], 4, 0, enforced=True)
    assert "submits its successor at its end" in finding.what
    assert "puts itself back into the queue" in finding.what
    assert "set workers to 2 at most" in finding.do


def test_a_limit_that_is_not_enforced_is_ok():
    (finding,) = judge_submission([Limit(1, "MaxSubmitJobs", "account lab")], 4, 0, enforced=False)
    assert finding.level == "ok"
    assert "does not enforce" in finding.what


@pytest.mark.parametrize(
    ("config", "workers", "expected"),
    [
        ({}, 10, []),
        ({"MaxArraySize": "1001", "MaxJobCount": "10000"}, 1001, []),
        ({"MaxArraySize": "1001"}, 1002, ["error"]),
        ({"MaxArraySize": "0"}, 1, []),  # job arrays are not allowed, but one worker needs none
        ({"MaxArraySize": "0"}, 2, ["error"]),
        ({"SchedulerParameters": "bf_interval=1,max_array_tasks=4"}, 5, ["error"]),
        ({"MaxJobCount": "9"}, 10, ["error"]),
        ({"MaxJobCount": "19"}, 10, ["warning"]),
        ({"MaxJobCount": "20"}, 10, []),
    ],
)
def test_what_the_whole_cluster_takes(config, workers, expected):
    assert levels(judge_cluster(config, workers)) == expected


@pytest.mark.parametrize(
    ("accounting", "workers", "gpus", "expected"),
    [
        (Accounting(), 4, 1, []),
        (Accounting(NO_LIMITS | {"MaxJobs": "4"}), 4, 1, []),
        (Accounting(NO_LIMITS | {"MaxJobs": "3"}), 4, 1, ["warning"]),
        (Accounting(NO_LIMITS | {"MaxJobs": "0"}), 4, 1, ["error"]),
        (Accounting(job_qos=qos(MaxTRESPU="cpu=64,gres/gpu=8")), 4, 2, []),
        (Accounting(job_qos=qos(MaxTRESPU="cpu=64,gres/gpu=7")), 4, 2, ["warning"]),
        (Accounting(job_qos=qos(MaxTRESPU="cpu=64,gres/gpu=7")), 4, 0, []),
        (Accounting(job_qos=qos(MaxTRESPU="gres/gpu=1")), 1, 2, ["error"]),
    ],
)
def test_limits_on_what_runs_at_the_same_time(accounting, workers, gpus, expected):
    assert levels(judge_running(accounting, workers, gpus, enforced=True)) == expected
    assert judge_running(accounting, workers, gpus, enforced=False) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, ()),
        ("", ()),
        ("lab||7\n", ({"a": "lab", "b": "", "c": "7"},)),
        ("a line of another kind\nlab|x|7\n", ({"a": "lab", "b": "x", "c": "7"},)),
    ],
)
def test_rows_of_sacctmgr(text, expected):
    assert rows(text, ("a", "b", "c")) == expected
