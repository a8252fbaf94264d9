"""The workers' chains of jobs: adding, starting, ending and repairing links."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from sqlalchemy import ColumnElement, Connection, func, insert, select, update

from orchestrator.leaderboard import links
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.moves import expire, job_of, log_event, worker_of
from orchestrator.leaderboard.schema import chunk, job, worker
from orchestrator.records import ChainJob, ExpiredBy, JobState, Started, Submitted, Worker
from orchestrator.rules import succession


@dataclass(frozen=True, slots=True)
class JobStart:
    """A job that starts: its token and worker, and where it runs."""

    token: str
    worker_id: int
    cluster_id: str
    host: str
    pid: int
    pid_created_at: float


class Chains:
    """Reads and changes the chains. Every method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_workers(self, devices: Sequence[str | None], now: float) -> list[ChainJob]:
        """Add a worker for each device (CUDA_VISIBLE_DEVICES). Returns the chains' first links, to be submitted."""
        base = new_base()
        with self._database.transaction() as tx:
            first = tx.execute(select(func.coalesce(func.max(worker.c.worker_id) + 1, 0))).scalar_one()
            jobs = []
            for index, device in enumerate(devices):
                tx.execute(insert(worker).values(worker_id=first + index, device=device, failures=0))
                jobs.append(links.add_link(tx, first + index, None, f"{base}-{index}", now))
            return jobs

    def start(self, start: JobStart, now: float, max_failures: int, successor: bool = True) -> Started | str:
        """Record the start of a job, which becomes the only running link of its chain. If the job must not run, return
        the reason instead.

        The claims of earlier links expire: their jobs have ended, or their writes are refused from now on. successor:
        whether to add a next link, which the started job must submit.
        """
        token, worker_id = start.token, start.worker_id
        with self._database.transaction() as tx:
            row = links.job_with(tx, token, worker_id)
            if row is None:
                return f"the database has no job {token} of worker {worker_id}; another job has replaced it"
            mine = job_of(row)
            begun = job.c.state.in_((JobState.RUNNING, JobState.ENDED))
            refusal = succession.refusal(mine, start.cluster_id, _count_later(tx, mine, begun) > 0)
            if refusal is not None:
                return refusal
            place = {key: value for key, value in asdict(start).items() if key not in ("token", "worker_id")}
            begins = {"state": JobState.RUNNING, "starts": mine.starts + 1, "started_at": now}
            this_job = update(job).where(job.c.job_id == mine.job_id)
            tx.execute(this_job.values(**place, **begins, ended_at=None, outcome=None))
            earlier = select(job.c.job_id).where(job.c.worker_id == worker_id, job.c.link < mine.link, links.IS_OPEN)
            for number, job_id in enumerate(tx.execute(earlier.order_by(job.c.link)).scalars().all()):
                reason = "the job never reported its end"
                links.close_link(tx, job_id, JobState.LOST, reason, now, may_count=number == 0)  # one gap, one failure
            expire(tx, chunk.c.worker_id == worker_id, ExpiredBy.JOB_SILENT, now)
            who, why_not = links.why_no_successor(tx, worker_id, now, max_failures)
            link = None
            # Add no second successor: an earlier start of this job may already have added one.
            if successor and why_not is None and not _count_later(tx, mine, links.IS_OPEN):
                link = links.add_link(tx, worker_id, mine.job_id, f"{new_base()}-0", now)
            return Started(job_of(tx.execute(select(job).where(job.c.job_id == mine.job_id)).one()), who, link)

    def find(self, token: str, worker_id: int) -> tuple[ChainJob | None, ChainJob | None]:
        """Return the job with this token, and its predecessor in the chain. Each is None if it does not exist."""
        with self._database.transaction() as tx:
            mine = links.job_with(tx, token, worker_id)
            if mine is None:
                return None, None
            before = tx.execute(select(job).where(job.c.job_id == mine.after_job_id)).one_or_none()
            return job_of(mine), job_of(before) if before else None

    def workers(self) -> list[Worker]:
        with self._database.transaction() as tx:
            return [worker_of(w) for w in tx.execute(select(worker).order_by(worker.c.worker_id)).all()]

    def submitted(self, taken: Iterable[Submitted]) -> list[ChainJob]:
        """Record that the cluster has accepted these jobs. Jobs that have already started are not changed.

        Returns the jobs that were cancelled or given up meanwhile; the caller must remove them from the queue.
        """
        unwanted = []
        with self._database.transaction() as tx:
            for it in taken:
                place = {key: value for key, value in asdict(it).items() if key != "job_id"}
                waiting = update(job).where(job.c.job_id == it.job_id, job.c.state == JobState.SUBMITTING)
                if tx.execute(waiting.values(state=JobState.QUEUED, **place)).rowcount == 0:
                    row = tx.execute(select(job).where(job.c.job_id == it.job_id)).one()
                    if row.state in (JobState.CANCELLED, JobState.LOST):
                        unwanted.append(replace(job_of(row), **place))
        return unwanted

    def close(self, jobs: Sequence[ChainJob], state: JobState, reason: str, now: float) -> None:
        """Close the given links, except those that are running. state: LOST if the cluster did not accept the jobs, so
        that their chains are mended later; CANCELLED if the jobs are not wanted. A cancelled job that starts does
        nothing."""
        with self._database.transaction() as tx:
            for it in jobs:
                if tx.execute(select(job.c.state).where(job.c.job_id == it.job_id)).scalar_one() != JobState.RUNNING:
                    links.close_link(tx, it.job_id, state, reason, now)

    def end(
        self, mine: ChainJob, outcome: str, error: bool, now: float, max_failures: int, early: str | None = None
    ) -> tuple[ChainJob | None, str | None]:
        """Record the end of a job. Returns its open successor, and why that successor is not wanted; each may be None.
        early: the signature of the error if the job could not be opened (see `failing.signature`).

        A successor that is not wanted is marked as cancelled in the database; the caller must cancel it on the cluster.
        """
        with self._database.transaction() as tx:
            if not links.close_link(tx, mine.job_id, JobState.ENDED, outcome, now, mine.starts):
                return None, None
            expire(tx, chunk.c.job_id == mine.job_id, ExpiredBy.JOB_ENDED, now)  # claims that the job still holds
            if error:
                links.count_failure(tx, mine.worker_id, now, early, outcome)
            later = select(job).where(job.c.worker_id == mine.worker_id, job.c.link > mine.link, links.IS_OPEN)
            row = tx.execute(later.order_by(job.c.link)).first()
            _, why_not = links.why_no_successor(tx, mine.worker_id, now, max_failures)
            if row is not None and why_not is not None:
                links.close_link(tx, row.job_id, JobState.CANCELLED, why_not, now)
            links.settle(tx, now)
            return (None, None) if row is None else (job_of(row), why_not)

    def wants_successor(self, worker_id: int, now: float, max_failures: int) -> bool:
        with self._database.transaction() as tx:
            return links.why_no_successor(tx, worker_id, now, max_failures)[1] is None

    def back_to_queue(self, mine: ChainJob, successor: ChainJob, now: float) -> bool:
        """Mark a job as queued again, because the queue has no room for its successor. Returns False if the job is not
        running."""
        with self._database.transaction() as tx:
            done = tx.execute(
                update(job)
                .where(job.c.job_id == mine.job_id, job.c.state == JobState.RUNNING, job.c.starts == mine.starts)
                .values(state=JobState.QUEUED, outcome="back to the queue", ended_at=now)
            )
            if done.rowcount != 1:
                return False
            links.close_link(tx, successor.job_id, JobState.CANCELLED, "no room in the queue", now)
            log_event(tx, now, "requeued", worker_id=mine.worker_id, why="no room", cluster_id=mine.cluster_id)
            return True

    # --- mending

    def apply_mend(
        self, lost: Sequence[ChainJob], adopt: Sequence[tuple[ChainJob, str]], now: float, reasons: Mapping[int, str]
    ) -> None:
        """Record what the cluster reported. lost: jobs that no longer exist. reasons: how lost jobs ended, by job_id.
        adopt: jobs that the cluster has accepted but that are still marked as SUBMITTING, each with its cluster_id."""
        failed: set[int] = set()  # a running job and its queued successor that vanish together are one failure
        with self._database.transaction() as tx:
            for gone in sorted(lost, key=lambda job: job.link):
                may_count = gone.worker_id not in failed
                failed.add(gone.worker_id)
                if links.close_link(tx, gone.job_id, JobState.LOST, reasons[gone.job_id], now, gone.starts, may_count):
                    expire(tx, chunk.c.job_id == gone.job_id, ExpiredBy.JOB_GONE, now)
                    log_event(tx, now, "lost", worker_id=gone.worker_id, job=gone.job_id, cluster_id=gone.cluster_id)
            for known, cluster_id in adopt:
                tx.execute(
                    update(job)
                    .where(job.c.job_id == known.job_id, job.c.state == JobState.SUBMITTING)
                    .values(state=JobState.QUEUED, cluster_id=cluster_id)
                )
            links.settle(tx, now)

    def relink(self, worker_ids: Sequence[int], now: float, max_failures: int) -> list[ChainJob]:
        """Add a link to each given chain that has no open link and should continue. Returns the new links."""
        base = new_base()
        made: list[ChainJob] = []
        with self._database.transaction() as tx:
            for worker_id in worker_ids:
                who, why_not = links.why_no_successor(tx, worker_id, now, max_failures)
                if tx.execute(select(func.count()).where(job.c.worker_id == worker_id, links.IS_OPEN)).scalar_one():
                    continue
                if why_not is None:
                    made.append(links.add_link(tx, worker_id, None, f"{base}-{len(made)}", now))
                elif who.failures >= max_failures and who.stopped is None:
                    last = select(job.c.outcome).where(job.c.worker_id == worker_id, job.c.outcome.is_not(None))
                    outcome = tx.execute(last.order_by(job.c.link.desc()).limit(1)).scalar_one_or_none()
                    links.stop_worker(tx, worker_id, f"{why_not}; the last: {outcome}" if outcome else why_not, now)
        return made

    def stop_worker(self, worker_id: int, reason: str, now: float) -> None:
        """Stop a chain that has failed too often. If every chain is now stopped, mark the run as failed."""
        with self._database.transaction() as tx:
            links.stop_worker(tx, worker_id, reason, now)


def _count_later(tx: Connection, mine: ChainJob, which: ColumnElement[bool]) -> int:
    """Count the later links of the job's chain that satisfy `which`."""
    later = select(func.count()).where(job.c.worker_id == mine.worker_id, job.c.link > mine.link, which)
    count: int = tx.execute(later).scalar_one()
    return count


def new_base() -> str:
    """Return a unique name for a submission. A job's token is this name, followed by its index in the submission."""
    return secrets.token_hex(8)
