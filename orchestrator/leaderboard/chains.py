"""The workers' chains of jobs: which links exist, which are open, and the state of the run."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.links import OPEN, add_link, close_link, count_failure, expire_claims, settle, stop_worker
from orchestrator.leaderboard.moves import (
    JOB_ENDED,
    JOB_GONE,
    NO_WORD,
    ON_BOARD,
    expire,
    job_of,
    log_event,
    set_state,
    worker_of,
)
from orchestrator.leaderboard.schema import checkpoint, chunk, entry, job, run, worker
from orchestrator.records import (
    ChainJob,
    ChunkState,
    JobState,
    Metric,
    Progress,
    RunState,
    Snapshot,
    Started,
    Submitted,
    Worker,
)
from orchestrator.rules import succession


class Chains:
    """Every method is one transaction."""

    def __init__(self, database: Database, metric: Metric) -> None:
        self._database = database
        self._metric = metric

    def add_workers(self, devices: Sequence[str | None], now: float) -> list[ChainJob]:
        """New workers, numbered on, each with its first link to submit."""
        base = new_base()
        with self._database.transaction() as tx:
            first = tx.execute(select(func.coalesce(func.max(worker.c.worker_id) + 1, 0))).scalar_one()
            jobs = []
            for index, device in enumerate(devices):
                tx.execute(insert(worker).values(worker_id=first + index, device=device, failures=0))
                jobs.append(add_link(tx, first + index, None, f"{base}-{index}", now))
            return jobs

    def start(
        self,
        token: str,
        worker_id: int,
        cluster_id: str,
        host: str,
        pid: int,
        pid_created_at: float,
        now: float,
        max_failures: int,
        successor: bool = True,
    ) -> Started | str:
        """A job begins: it becomes the one link of its chain that works, and gets a successor to submit.

        Whatever the chain had running before is over (or a zombie, which the generations keep out): its
        claims expire. Returns a reason instead if this job must not run at all.
        """
        with self._database.transaction() as tx:
            mine = tx.execute(select(job).where(job.c.token == token, job.c.worker_id == worker_id)).one_or_none()
            if mine is None:
                return f"no job {token} of worker {worker_id} is known; another one took its place"
            if mine.state == JobState.CANCELLED:
                return f"this job was cancelled: {mine.outcome}"
            if mine.cluster_id not in (None, cluster_id):
                return f"this job is job {mine.cluster_id} already; {cluster_id} was submitted by mistake"
            newer = select(func.count()).where(
                job.c.worker_id == worker_id,
                job.c.link > mine.link,
                job.c.state.in_((JobState.RUNNING, JobState.ENDED)),
            )
            if tx.execute(newer).scalar_one():
                return f"link {mine.link} of worker {worker_id} was followed by a later one already"
            tx.execute(
                update(job)
                .where(job.c.job_id == mine.job_id)
                .values(
                    state=JobState.RUNNING,
                    cluster_id=cluster_id,
                    host=host,
                    pid=pid,
                    pid_created_at=pid_created_at,
                    starts=mine.starts + 1,
                    started_at=now,
                    ended_at=None,
                    outcome=None,
                )
            )
            self._close_earlier(tx, mine, now)
            me = worker_of(tx.execute(select(worker).where(worker.c.worker_id == worker_id)).one())
            state = tx.execute(select(run.c.state, run.c.deadline)).one()
            why_not = succession.should_resubmit(RunState(state.state), now, state.deadline, me, max_failures)
            link = self._successor(tx, mine, now) if successor and why_not is None else None
            row = tx.execute(select(job).where(job.c.job_id == mine.job_id)).one()
            return Started(job_of(row), me, link, why_not)

    def _successor(self, tx: Connection, mine: Row[Any], now: float) -> ChainJob | None:
        """A new link after this one, or None where an earlier start of this job has queued one already."""
        later = select(func.count()).where(
            job.c.worker_id == mine.worker_id, job.c.link > mine.link, job.c.state.in_(OPEN)
        )
        if tx.execute(later).scalar_one():
            return None
        return add_link(tx, mine.worker_id, mine.job_id, f"{new_base()}-0", now)

    def _close_earlier(self, tx: Connection, mine: Row[Any], now: float) -> None:
        earlier = tx.execute(
            select(job).where(job.c.worker_id == mine.worker_id, job.c.link < mine.link, job.c.state.in_(OPEN))
        ).all()
        for row in earlier:
            close_link(tx, row.job_id, JobState.LOST, "it ended without a word", now)
        live = select(chunk.c.chunk_id).where(chunk.c.worker_id == mine.worker_id, chunk.c.state == ChunkState.LIVE)
        expire(tx, tx.execute(live).scalars().all(), NO_WORD, now)

    def find(self, token: str, worker_id: int) -> tuple[ChainJob | None, ChainJob | None]:
        """The job with this token, and the one that it follows."""
        with self._database.transaction() as tx:
            mine = tx.execute(select(job).where(job.c.token == token, job.c.worker_id == worker_id)).one_or_none()
            if mine is None:
                return None, None
            before = tx.execute(select(job).where(job.c.job_id == mine.after_job_id)).one_or_none()
            return job_of(mine), job_of(before) if before else None

    def workers(self) -> list[Worker]:
        with self._database.transaction() as tx:
            return [worker_of(w) for w in tx.execute(select(worker).order_by(worker.c.worker_id)).all()]

    def submitted(self, taken: Iterable[Submitted]) -> list[ChainJob]:
        """The cluster has taken these jobs. One that has begun already knows better what it is.

        Returns those that were cancelled meanwhile: the caller takes them out of the queue again.
        """
        unwanted = []
        with self._database.transaction() as tx:
            for it in taken:
                place: dict[str, Any] = {
                    "cluster_id": it.cluster_id,
                    "pid": it.pid,
                    "pid_created_at": it.pid_created_at,
                    "host": it.host,
                }
                done = tx.execute(
                    update(job)
                    .where(job.c.job_id == it.job_id, job.c.state == JobState.SUBMITTING)
                    .values(state=JobState.QUEUED, **place)
                )
                if done.rowcount == 0:
                    row = tx.execute(select(job).where(job.c.job_id == it.job_id)).one()
                    if row.state in (JobState.CANCELLED, JobState.LOST):
                        unwanted.append(replace(job_of(row), **place))
        return unwanted

    def close(self, jobs: Sequence[ChainJob], state: JobState, reason: str, now: float) -> None:
        """LOST: the cluster did not take them, their chains are broken until somebody mends them. CANCELLED: not
        wanted any more; should one begin all the same, it does nothing."""
        with self._database.transaction() as tx:
            for it in jobs:
                begun = (
                    tx.execute(select(job.c.state).where(job.c.job_id == it.job_id)).scalar_one() == JobState.RUNNING
                )
                if not begun:
                    close_link(tx, it.job_id, state, reason, now)

    def end(
        self, mine: ChainJob, outcome: str, error: bool, now: float, max_failures: int
    ) -> tuple[ChainJob | None, str | None]:
        """A job ends by its own will. Returns its open successor, and why that one is not wanted if so.

        An unwanted successor is marked cancelled here; the caller cancels it on the cluster.
        """
        with self._database.transaction() as tx:
            if not close_link(tx, mine.job_id, JobState.ENDED, outcome, now, mine.starts):
                return None, None
            expire_claims(tx, mine.job_id, JOB_ENDED, now)  # one that it could not give back, after an error
            if error:
                count_failure(tx, mine.worker_id)
            query = select(job).where(job.c.worker_id == mine.worker_id, job.c.link > mine.link, job.c.state.in_(OPEN))
            row = tx.execute(query.order_by(job.c.link)).first()
            me = worker_of(tx.execute(select(worker).where(worker.c.worker_id == mine.worker_id)).one())
            state = tx.execute(select(run.c.state, run.c.deadline)).one()
            why_not = succession.should_resubmit(RunState(state.state), now, state.deadline, me, max_failures)
            if row is None or why_not is None:
                settle(tx, now)
                return (job_of(row) if row else None), None
            close_link(tx, row.job_id, JobState.CANCELLED, why_not, now)
            settle(tx, now)
            return job_of(row), why_not

    def wants_successor(self, worker_id: int, now: float, max_failures: int) -> bool:
        with self._database.transaction() as tx:
            me = worker_of(tx.execute(select(worker).where(worker.c.worker_id == worker_id)).one())
            state = tx.execute(select(run.c.state, run.c.deadline)).one()
            return succession.should_resubmit(RunState(state.state), now, state.deadline, me, max_failures) is None

    def back_to_queue(self, mine: ChainJob, successor: ChainJob, now: float) -> bool:
        """This very job is queued again in place of a successor, for which there is no room."""
        with self._database.transaction() as tx:
            done = tx.execute(
                update(job)
                .where(job.c.job_id == mine.job_id, job.c.state == JobState.RUNNING, job.c.starts == mine.starts)
                .values(state=JobState.QUEUED, outcome="back to the queue", ended_at=now)
            )
            if done.rowcount != 1:
                return False
            close_link(tx, successor.job_id, JobState.CANCELLED, "no room in the queue", now)
            log_event(tx, now, "requeued", mine.worker_id, None, None, why="no room", cluster_id=mine.cluster_id)
            return True

    # --- mending

    def apply_mend(
        self,
        lost: Sequence[ChainJob],
        adopt: Sequence[tuple[ChainJob, str]],
        now: float,
        reasons: Mapping[int, str] | None = None,
    ) -> None:
        """Write down what the cluster proved: these jobs are gone, those have an id after all. reasons: what is known
        of how they ended, by job_id."""
        with self._database.transaction() as tx:
            for gone in lost:
                outcome = (reasons or {}).get(gone.job_id, JOB_GONE)
                if close_link(tx, gone.job_id, JobState.LOST, outcome, now, gone.starts):
                    expire_claims(tx, gone.job_id, JOB_GONE, now)
                    what = {"job": gone.job_id, "cluster_id": gone.cluster_id}
                    log_event(tx, now, "lost", gone.worker_id, None, None, **what)
            for known, cluster_id in adopt:
                tx.execute(
                    update(job)
                    .where(job.c.job_id == known.job_id, job.c.state == JobState.SUBMITTING)
                    .values(state=JobState.QUEUED, cluster_id=cluster_id)
                )
            settle(tx, now)

    def relink(self, worker_ids: Sequence[int], now: float, max_failures: int) -> list[ChainJob]:
        """New links for chains that have none open, as far as the rules still want them."""
        base = new_base()
        links: list[ChainJob] = []
        with self._database.transaction() as tx:
            state = tx.execute(select(run.c.state, run.c.deadline)).one()
            for worker_id in worker_ids:
                me = worker_of(tx.execute(select(worker).where(worker.c.worker_id == worker_id)).one())
                opened = select(func.count()).where(job.c.worker_id == worker_id, job.c.state.in_(OPEN))
                unwanted = succession.should_resubmit(RunState(state.state), now, state.deadline, me, max_failures)
                if tx.execute(opened).scalar_one():
                    continue
                if unwanted is None:
                    links.append(add_link(tx, worker_id, None, f"{base}-{len(links)}", now))
                elif me.failures >= max_failures and me.stopped is None:
                    last = select(job.c.outcome).where(job.c.worker_id == worker_id, job.c.outcome.is_not(None))
                    outcome = tx.execute(last.order_by(job.c.link.desc()).limit(1)).scalar_one_or_none()
                    stop_worker(tx, worker_id, f"{unwanted}; the last: {outcome}" if outcome else unwanted, now)
        return links

    # --- the run

    def snapshot(self) -> Snapshot:
        with self._database.transaction() as tx:
            row = tx.execute(select(run)).one()
            order = checkpoint.c.score.desc() if self._metric.mode == "max" else checkpoint.c.score.asc()
            best = tx.execute(
                select(checkpoint.c.score)
                .join(entry, entry.c.checkpoint_id == checkpoint.c.checkpoint_id)
                .where(ON_BOARD)
                .order_by(order)
                .limit(1)
            ).scalar_one_or_none()
            workers = tx.execute(select(worker).order_by(worker.c.worker_id)).all()
            jobs = tx.execute(select(job).where(job.c.state.in_(OPEN)).order_by(job.c.job_id)).all()
            return Snapshot(
                name=row.name,
                state=RunState(row.state),
                reason=row.reason,
                created_at=row.created_at,
                deadline=row.deadline,
                settings_version=row.settings_version,
                progress=Progress(row.chunks_since_promotion, best, row.epochs),
                workers=tuple(worker_of(w) for w in workers),
                open_jobs=tuple(job_of(j) for j in jobs),
            )

    def change_state(
        self, wanted: RunState, allowed_from: Sequence[RunState], reason: str | None, now: float
    ) -> RunState:
        """Set the run's state if it is in one of these; the state it had."""
        with self._database.transaction() as tx:
            had = RunState(tx.execute(select(run.c.state)).scalar_one())
            if had in allowed_from and had is not wanted:
                set_state(tx, wanted, reason, now)
                settle(tx, now)
            return had

    def revive(self, workers: int) -> None:
        """Forget the failures of the first so many workers: somebody has looked into them."""
        with self._database.transaction() as tx:
            tx.execute(update(worker).where(worker.c.worker_id < workers).values(failures=0, stopped=None))

    def amend(self, settings: str, deadline: float, workers: int, what: str, now: float) -> list[ChainJob]:
        """Write amended settings down. Workers beyond their number stop; their queued jobs are returned."""
        with self._database.transaction() as tx:
            tx.execute(
                update(run).values(settings=settings, deadline=deadline, settings_version=run.c.settings_version + 1)
            )
            log_event(tx, now, "amended", None, None, None, what=what)
            if "training_profiles:" in what:  # positions mean something else now: begin these chunks anew
                suspended = update(chunk).where(chunk.c.state == ChunkState.SUSPENDED)
                tx.execute(
                    suspended.values(state=ChunkState.EXPIRED, error="the profiles were amended", finished_at=now)
                )
            reason = f"the run was amended to {workers} workers"
            tx.execute(update(worker).where(worker.c.worker_id >= workers).values(stopped=reason))
            tx.execute(
                update(worker)
                .where(worker.c.worker_id < workers, worker.c.stopped.like("the run was amended to %"))
                .values(stopped=None)
            )
            rows = tx.execute(
                select(job).where(job.c.worker_id >= workers, job.c.state.in_((JobState.SUBMITTING, JobState.QUEUED)))
            ).all()
            for row in rows:
                close_link(tx, row.job_id, JobState.CANCELLED, reason, now)
            return [job_of(row) for row in rows]

    def settle(self, now: float) -> None:
        """Write down that the run is over, if it is: its jobs may have died before they could."""
        with self._database.transaction() as tx:
            settle(tx, now)

    def stop_worker(self, worker_id: int, reason: str, now: float) -> None:
        """This chain ends. With the last one, the run has failed."""
        with self._database.transaction() as tx:
            stop_worker(tx, worker_id, reason, now)


def new_base() -> str:
    """Names one submission for ever; with the index of a job in it, that job's token."""
    return secrets.token_hex(8)
