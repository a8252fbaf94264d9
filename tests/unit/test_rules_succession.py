"""Chains of jobs: first tables of inputs and results, then properties that hold for any input."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.records import ChainJob, Evidence, JobState, RunState
from orchestrator.rules import stopping, succession
from tests.support.rules import (
    PROPERTY,
    worker,
)


@pytest.mark.parametrize(
    ("state", "now", "who", "why_not"),
    [
        pytest.param(RunState.ACTIVE, 0.0, worker(), None, id="an active run goes on"),
        pytest.param(RunState.ACTIVE, 0.0, worker(failures=4), None, id="some failures are allowed"),
        pytest.param(RunState.ACTIVE, 0.0, worker(failures=5), "5 failures in a row, 5 allowed", id="not too many"),
        pytest.param(RunState.ACTIVE, 99.9, worker(), None, id="just before the deadline"),
        pytest.param(RunState.ACTIVE, 100.0, worker(), "the run's total lifetime is over", id="at the deadline"),
        pytest.param(RunState.ACTIVE, 0.0, worker(stopped="out of memory"), "out of memory", id="a stopped chain"),
        *(
            pytest.param(state, 0.0, worker(), f"the run is {state}", id=f"a {state} run does not")
            for state in RunState
            if state is not RunState.ACTIVE
        ),
    ],
)
def test_a_chain_gets_a_successor(state, now, who, why_not):
    assert succession.should_resubmit(state, now, 100.0, who, max_failures=5) == why_not


@PROPERTY
@given(
    st.sampled_from(RunState), st.floats(0, 200), st.integers(0, 8), st.none() | st.just("stopped"), st.integers(1, 8)
)
def test_a_successor_is_queued_only_where_a_chunk_may_be_claimed(state, now, failures, stopped, max_failures):
    why_not = succession.should_resubmit(state, now, 100.0, worker(0, failures, stopped), max_failures)
    wanted = stopping.may_claim(state, now, 100.0) and stopped is None and failures < max_failures
    assert (why_not is None) == wanted
    assert why_not is None or why_not


@pytest.mark.parametrize(
    ("total_s", "eon_s", "expected"),
    [
        pytest.param(259200, 2400, 108, id="the report's lifetimes"),
        pytest.param(100, 30, 4, id="the last link may be short"),
        pytest.param(10, 10, 1, id="one is enough"),
        pytest.param(5, 10, 1, id="one is enough for less"),
        pytest.param(0.5, 0.2, 3, id="fractions of a second"),
    ],
)
def test_a_chain_has_at_most_so_many_links(total_s, eon_s, expected):
    assert succession.jobs_at_most(total_s, eon_s) == expected


@PROPERTY
@given(st.integers(1, 10**7), st.integers(1, 10**5))
def test_the_links_fill_the_lifetime_and_one_less_does_not(total_s, eon_s):
    links = succession.jobs_at_most(total_s, eon_s)
    assert (links - 1) * eon_s < total_s <= links * eon_s


SUBMITTED_AT, NOW = 1000.0, 2000.0


def job(
    job_id: int, worker_id: int, state: JobState, submitted_at: float | None = SUBMITTED_AT, after: int | None = None
) -> ChainJob:
    cluster_id = None if state is JobState.SUBMITTING else str(100 + job_id)
    token = f"t{job_id}"
    return ChainJob(
        job_id, worker_id, job_id, token, state, cluster_id=cluster_id, submitted_at=submitted_at, after_job_id=after
    )


SUBMITTING, QUEUED, RUNNING = JobState.SUBMITTING, JobState.QUEUED, JobState.RUNNING


GIVEN_UP = ChainJob(1, 0, 3, "t1", JobState.CANCELLED, cluster_id="101", outcome="the run is paused")


@pytest.mark.parametrize(
    ("link", "cluster_id", "followed", "reason"),
    [
        pytest.param(job(1, 0, QUEUED), "101", False, None, id="the job in the queue works"),
        pytest.param(job(1, 0, SUBMITTING), "101", False, None, id="also before its id was written down"),
        pytest.param(job(1, 0, RUNNING), "101", False, None, id="and when Slurm starts it again"),
        pytest.param(job(1, 0, JobState.LOST), "101", False, None, id="and if it was taken for lost"),
        pytest.param(GIVEN_UP, "101", False, "this job was cancelled: the run is paused", id="a cancelled one"),
        pytest.param(
            job(1, 0, QUEUED), "999", False, "already job 101; job 999 was submitted by mistake", id="a second one"
        ),
        pytest.param(job(1, 0, QUEUED), "101", True, "worker 0 has already started a later link", id="a late one"),
    ],
)
def test_a_job_that_begins_works_or_is_refused(link, cluster_id, followed, reason):
    refusal = succession.refusal(link, cluster_id, followed)
    assert (refusal is None) == (reason is None)
    assert reason is None or reason in refusal


@pytest.mark.parametrize(
    ("state", "cluster_id", "ended_as", "finished_chunks", "counts"),
    [
        pytest.param("running", "1", "lost", 0, True, id="it was lost at work, with no finished chunk"),
        pytest.param("running", "1", "lost", 1, False, id="it has finished a chunk"),
        pytest.param("running", "1", "ended", 0, False, id="it reported its end"),
        pytest.param("queued", "1", "lost", 0, True, id="it vanished from the queue"),
        pytest.param("queued", "1", "cancelled", 0, False, id="it was cancelled in the queue"),
        pytest.param("queued", None, "lost", 0, False, id="the cluster never gave it an id"),
        pytest.param("submitting", None, "lost", 0, False, id="the cluster did not take it"),
    ],
)
def test_the_end_of_a_job_counts_as_a_failure(state, cluster_id, ended_as, finished_chunks, counts):
    ended = ChainJob(1, 0, 0, "t1", JobState(state), cluster_id=cluster_id)
    assert succession.counts_as_failure(ended, JobState(ended_as), finished_chunks) is counts


@pytest.mark.parametrize(
    ("started_at", "failed_at", "counts"),
    [
        pytest.param(10.0, None, True, id="the chain has not failed before"),
        pytest.param(10.0, 9.0, True, id="the last failure was that of an earlier job"),
        pytest.param(10.0, 11.0, False, id="its chunk has failed, which was counted"),
        pytest.param(None, 11.0, True, id="it never started"),
    ],
)
def test_a_lost_job_counts_once(started_at, failed_at, counts):
    gone = ChainJob(1, 0, 0, "t1", JobState.RUNNING, cluster_id="1", started_at=started_at)
    assert succession.counts_as_failure(gone, JobState.LOST, 0, failed_at) is counts


def link(number: int, state: str, started_at: float | None = None) -> ChainJob:
    return ChainJob(number, 0, number, f"t{number}", JobState(state), started_at=started_at)


@pytest.mark.parametrize(
    ("links", "shown"),
    [
        pytest.param([link(0, "ended", 1.0), link(1, "running", 2.0), link(2, "queued")], 1, id="the one that works"),
        pytest.param([link(0, "ended", 1.0), link(1, "queued"), link(2, "lost")], 1, id="else the one in the queue"),
        pytest.param([link(0, "ended", 1.0), link(1, "submitting")], 1, id="or on its way there"),
        pytest.param(
            [link(0, "ended", 1.0), link(1, "lost", 2.0), link(2, "cancelled")], 1, id="else the last that worked"
        ),
        pytest.param([link(0, "lost"), link(1, "cancelled")], 1, id="else the last"),
    ],
)
def test_a_chain_is_shown_by(links, shown):
    assert succession.job_to_show(links).link == shown


@pytest.mark.parametrize(
    ("state", "evidence", "shown"),
    [
        ("submitting", "unknown", "queued"),
        ("submitting", "gone", "queued"),
        ("queued", "queued", "queued"),
        ("queued", "gone", "lost"),
        ("running", "unknown", "running"),
        ("running", "gone", "lost"),
        ("ended", "unknown", "ended"),
        ("cancelled", "unknown", "ended"),
        ("lost", "unknown", "lost"),
    ],
)
def test_a_link_is_shown_as(state, evidence, shown):
    assert succession.shown_state(link(0, state), Evidence(evidence)) == shown


@pytest.mark.parametrize(
    ("jobs", "evidence", "found_ids", "lost", "adopted", "resubmitted"),
    [
        pytest.param([], {}, {}, [], {}, [0], id="a chain without any job gets one"),
        pytest.param([job(1, 0, RUNNING)], {1: "running"}, {}, [], {}, [], id="a chain that works is left alone"),
        pytest.param([job(1, 0, QUEUED)], {1: "queued"}, {}, [], {}, [], id="and so is one in the queue"),
        pytest.param([job(1, 0, RUNNING)], {1: "unknown"}, {}, [], {}, [], id="UNKNOWN is never gone"),
        pytest.param([job(1, 0, RUNNING)], {}, {}, [], {}, [], id="no evidence is never gone"),
        pytest.param([job(1, 0, RUNNING)], {1: "gone"}, {}, [1], {}, [0], id="a job that is gone is followed"),
        pytest.param([job(1, 0, QUEUED)], {1: "gone"}, {}, [1], {}, [0], id="also one that never began"),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, QUEUED)],
            {1: "gone", 2: "queued"},
            {},
            [1],
            {},
            [],
            id="its successor is queued already",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, QUEUED)],
            {1: "gone", 2: "unknown"},
            {},
            [1],
            {},
            [],
            id="its successor may be queued",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, QUEUED)],
            {1: "gone", 2: "gone"},
            {},
            [1, 2],
            {},
            [0],
            id="both are gone",
        ),
        pytest.param(
            [job(1, 0, SUBMITTING)],
            {1: "gone"},
            {"t1": "77"},
            [],
            {1: "77"},
            [],
            id="its submitter died between the cluster and the database",
        ),
        pytest.param(
            [job(1, 0, SUBMITTING)], {1: "gone"}, {}, [1], {}, [0], id="its submitter died before the cluster"
        ),
        pytest.param([job(1, 0, SUBMITTING)], {1: "unknown"}, {}, [], {}, [], id="perhaps the cluster has it"),
        pytest.param(
            [job(1, 0, SUBMITTING, NOW - succession.SUBMITTING_GRACE_S)],
            {1: "gone"},
            {},
            [],
            {},
            [],
            id="it is being submitted just now",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, SUBMITTING, NOW - succession.SUBMITTING_GRACE_S, after=1)],
            {1: "running", 2: "gone"},
            {},
            [],
            {},
            [],
            id="the job before it is submitting it just now",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, SUBMITTING, NOW - succession.ORPHANED_GRACE_S - 1, after=1)],
            {1: "gone", 2: "gone"},
            {},
            [1, 2],
            {},
            [0],
            id="the job that was to submit it is gone",
        ),
        pytest.param(
            [job(2, 0, SUBMITTING, NOW - succession.ORPHANED_GRACE_S - 1, after=1)],
            {2: "gone"},
            {},
            [2],
            {},
            [0],
            id="the job that was to submit it has ended before",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, SUBMITTING, NOW - succession.ORPHANED_GRACE_S, after=1)],
            {1: "gone", 2: "gone"},
            {},
            [1],
            {},
            [],
            id="its submitter is gone, and the cluster may have it all the same",
        ),
        pytest.param(
            [job(1, 0, RUNNING), job(2, 0, SUBMITTING, NOW - succession.ORPHANED_GRACE_S - 1, after=1)],
            {1: "unknown", 2: "gone"},
            {},
            [],
            {},
            [],
            id="the job that was to submit it may be there",
        ),
    ],
)
def test_a_chain_is_mended(jobs, evidence, found_ids, lost, adopted, resubmitted):
    todo = succession.mend([worker(0)], jobs, {k: Evidence(v) for k, v in evidence.items()}, found_ids, NOW)
    assert [j.job_id for j in todo.lost] == lost
    assert {j.job_id: cluster_id for j, cluster_id in todo.adopt} == adopted
    assert list(todo.resubmit) == resubmitted


@pytest.mark.parametrize("state", list(RunState))
def test_only_an_active_run_keeps_jobs_in_the_queue(state):
    jobs = [job(1, 0, RUNNING), job(2, 1, RUNNING), job(3, 2, QUEUED), job(4, 3, SUBMITTING), job(5, 4, QUEUED)]
    evidence = dict(zip(range(1, 6), map(Evidence, ("queued", "running", "queued", "queued", "unknown")), strict=True))
    unwanted = [j.job_id for j in succession.unwanted(state, jobs, evidence)]
    assert unwanted == ([] if state is RunState.ACTIVE else [1, 3])


def test_every_chain_is_mended_by_itself():
    jobs = [job(1, 0, RUNNING), job(2, 1, RUNNING), job(3, 2, QUEUED)]
    evidence = {1: Evidence.GONE, 2: Evidence.UNKNOWN, 3: Evidence.QUEUED}
    todo = succession.mend([worker(i) for i in range(4)], jobs, evidence, {}, NOW)
    assert [j.job_id for j in todo.lost] == [1]
    assert todo.resubmit == (0, 3)


@st.composite
def chains(draw: st.DrawFn) -> dict[str, object]:
    jobs = [
        job(
            job_id,
            draw(st.integers(0, 3)),
            draw(st.sampled_from([SUBMITTING, QUEUED, RUNNING])),
            draw(times),
            draw(st.none() | st.integers(0, job_id)),
        )
        for job_id in range(draw(st.integers(0, 8)))
    ]
    known = [j for j in jobs if draw(st.booleans())]
    return {
        "workers": [worker(i) for i in range(4)],
        "open_jobs": jobs,
        "evidence": {j.job_id: draw(st.sampled_from(Evidence)) for j in known},
        "found_ids": {j.token: f"c{j.job_id}" for j in jobs if j.cluster_id is None and draw(st.booleans())},
        "now": NOW,
        "grace_s": draw(st.sampled_from([0.0, 120.0])),
    }


times = st.none() | st.floats(0.0, NOW)


@PROPERTY
@given(chains())
def test_only_a_job_that_is_proved_gone_is_lost(asked):
    todo = succession.mend(**asked)
    for gone in todo.lost:
        assert gone in asked["open_jobs"]
        assert asked["evidence"].get(gone.job_id) is Evidence.GONE
        assert gone.token not in asked["found_ids"]


@PROPERTY
@given(chains())
def test_a_chain_gets_a_new_link_exactly_if_it_has_no_job_left(asked):
    todo = succession.mend(**asked)
    left = {j.worker_id for j in asked["open_jobs"] if j not in todo.lost}
    assert list(todo.resubmit) == [w.worker_id for w in asked["workers"] if w.worker_id not in left]


@PROPERTY
@given(chains())
def test_a_job_is_adopted_under_the_id_that_the_cluster_gave_it(asked):
    todo = succession.mend(**asked)
    assert not {j.job_id for j, _ in todo.adopt} & {j.job_id for j in todo.lost}
    assert dict(asked["found_ids"]) == {j.token: cluster_id for j, cluster_id in todo.adopt}


@PROPERTY
@given(chains())
def test_a_cluster_that_does_not_answer_changes_nothing_about_open_jobs(asked):
    silent = asked | {"evidence": {j.job_id: Evidence.UNKNOWN for j in asked["open_jobs"]}, "found_ids": {}}
    todo = succession.mend(**silent)
    assert todo.lost == ()
    assert todo.adopt == ()
    assert not {j.worker_id for j in asked["open_jobs"]} & set(todo.resubmit)
