"""Claims and the ratchet: which worker trains what, and what happens to the result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, select, update

from orchestrator.errors import StaleClaimError
from orchestrator.leaderboard import moves
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.links import count_failure
from orchestrator.leaderboard.moves import BoardView
from orchestrator.leaderboard.results import close, promote
from orchestrator.leaderboard.schema import checkpoint, chunk, epoch, run, worker
from orchestrator.leaderboard.statements import Statement
from orchestrator.records import Candidate, ChunkState, Claim, ExpiredBy, JobState, Over, Policy, Progress, RunState
from orchestrator.rules import admission, claiming, failing, stopping
from orchestrator.rules.admission import Discard, Promote
from orchestrator.settings.loading import thaw

_SETTINGS_VERSION = Statement(select(run.c.settings_version))
# Selects the suspended chunk to resume: the oldest of the same worker or, if there is none, the oldest of all.
_SUSPENDED = Statement(
    select(chunk)
    .where(moves.IS_HELD, chunk.c.state == ChunkState.SUSPENDED)
    .order_by(chunk.c.worker_id != bindparam("by_worker"), chunk.c.chunk_id)
    .limit(1)
)
_RUN, _LEASE, _EPOCHS = Statement(update(run)), Statement(insert(chunk)), Statement(insert(epoch))
_NO_FAILURES = Statement(
    update(worker).where(worker.c.worker_id == bindparam("by_worker")).values(failures=0, early_failure=None)
)
_NOT_SUSPENDED: Mapping[str, None] = {"suspended_file": None, "suspended_sha256": None}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The ratchet's decision on a candidate."""

    promoted: bool
    reason: str
    collectable: tuple[str, ...] = ()  # files that may be deleted, because nothing refers to them any more


@dataclass(frozen=True, slots=True)
class Failed:
    """What follows from a failure of a chunk."""

    failures: int  # of the worker, in a row
    stopped: str | None  # why the worker's chain ends; None: it goes on
    resumes_from: str | None  # the file with the state from which the chunk goes on; None: its training is lost


@dataclass(frozen=True, slots=True)
class _Claimant:
    """The job that asks for a chunk. starts: how many times the job has been started."""

    worker_id: int
    job_id: int
    starts: int
    now: float
    lease_until: float


class Board:
    """The workers' operations on the board. Every method is one short transaction."""

    def __init__(self, database: Database, policy: Policy) -> None:
        self._database = database
        self._policy = policy

    # --- claims

    def claim(self, worker_id: int, job_id: int, starts: int, now: float, lease_until: float) -> Claim | Over:
        """Lease the next chunk to a job: a suspended chunk if there is one, else a new chunk chosen by the rules."""
        claimant = _Claimant(worker_id, job_id, starts, now, lease_until)
        with self._database.transaction() as tx:
            return self._claim(tx, claimant, moves.context_of(tx, worker_id, job_id, None))

    def _claim(self, tx: Connection, claimant: _Claimant, context: Any) -> Claim | Over:
        now = claimant.now
        policy = self._policy_of(tx, context.settings_version)
        _refuse_stale(context, claimant)
        if context.stopped is not None:
            return Over(RunState(context.state), context.stopped)
        view = moves.look(tx, context)
        if view.first_lease_end is not None and claiming.expired(now, view.first_lease_end):
            _expire_late(tx, now)
            view = moves.look(tx, context)
        over = self._end_if_over(tx, view, policy, now)
        if over is not None:
            return over
        generation: int = context.generation + 1
        _RUN.write(tx, generation=generation, **_progress(context))
        if view.suspended:
            work, source = self._resume(tx, claimant, generation)
        else:
            work, source = self._begin(tx, view, policy, claimant, generation)
        return Claim(
            **work,
            generation=generation,
            worker_id=claimant.worker_id,
            profile=claiming.profile_at(work["position"], policy.cycle),
            parent_file=source.file if source else None,
            parent_sha256=source.sha256 if source else None,
            parent_epochs=source.epochs if source else 0,
            bar=admission.bar(view.entries, policy.num_models, policy.metric),
            settings_version=policy.version,
        )

    def _begin(
        self, tx: Connection, view: BoardView, policy: Policy, claimant: _Claimant, generation: int
    ) -> tuple[dict[str, Any], Any]:
        """Insert a new chunk. Returns fields of its claim, and the parent's row (None if it trains a founder)."""
        parent = claiming.choose_claim(view.entries, view.founders, policy.num_models, policy.metric)
        source, position, repeat = None, 0, 0
        if parent is not None:
            consumed, leased = moves.taken_positions(tx, parent.entry_id, parent.floor)
            position = claiming.next_profile(parent.floor, consumed, leased)
            repeat = claiming.repeat_number(parent, position, policy.cycle)
            source = view.rows[parent.entry_id]
        chunk_id = _LEASE.insert(
            tx,
            entry_id=parent.entry_id if parent else None,
            parent_id=parent.checkpoint_id if parent else None,
            position=position,
            profile=claiming.profile_at(position, policy.cycle).name,
            worker_id=claimant.worker_id,
            job_id=claimant.job_id,
            generation=generation,
            state=ChunkState.LIVE,
            claimed_at=claimant.now,
            lease_until=claimant.lease_until,
            failures=0,
        )
        return {"chunk_id": chunk_id, "position": position, "repeat": repeat}, source

    def _resume(self, tx: Connection, claimant: _Claimant, generation: int) -> tuple[dict[str, Any], Any]:
        """Resume a suspended chunk. Returns the same as `_begin`."""
        suspended = _SUSPENDED.first(tx, by_worker=claimant.worker_id)
        tx.execute(
            update(chunk)
            .where(chunk.c.chunk_id == suspended.chunk_id)
            .values(
                state=ChunkState.LIVE,
                generation=generation,
                worker_id=claimant.worker_id,
                job_id=claimant.job_id,
                lease_until=claimant.lease_until,
            )
        )
        source = tx.execute(select(checkpoint).where(checkpoint.c.checkpoint_id == suspended.parent_id)).one_or_none()
        names = ("chunk_id", "position", "suspended_file", "suspended_sha256")
        return {name: getattr(suspended, name) for name in names} | {"repeat": 0}, source

    def bar(self) -> float | None:
        """Return the score that a candidate has to beat now; None while a slot is free."""
        with self._database.transaction() as tx:
            policy = self._policy_now(tx)
            return admission.bar(moves.read_entries(tx), policy.num_models, policy.metric)

    # --- results

    def record(self, claim: Claim, candidate: Candidate, now: float) -> Outcome:
        """Record a result and apply the ratchet. If the claim expired, writes nothing and raises StaleClaimError."""
        with self._database.transaction() as tx:
            view = moves.look(tx, moves.context_of(tx, claim.worker_id, None, claim.chunk_id))
            outcome, context = self._record(tx, view, claim, candidate, now)
            _RUN.write(tx, **_progress(context))
            return outcome

    def record_and_claim(
        self, claim: Claim, candidate: Candidate, job_id: int, starts: int, now: float, lease_until: float
    ) -> tuple[Outcome, Claim | Over]:
        """Do `record` and `claim` in one transaction, so that the job waits for the lock and the disk only once."""
        claimant = _Claimant(claim.worker_id, job_id, starts, now, lease_until)
        with self._database.transaction() as tx:
            view = moves.look(tx, moves.context_of(tx, claim.worker_id, job_id, claim.chunk_id))
            outcome, context = self._record(tx, view, claim, candidate, now)
            following = self._claim(tx, claimant, context)
            if isinstance(following, Over):
                _RUN.write(tx, **_progress(context))
            return outcome, following

    def foresee(
        self, claim: Claim, candidate: Candidate, job_id: int, starts: int, now: float, lease_until: float
    ) -> Claim | Over:
        """Return what `record_and_claim` would claim now, and change nothing."""
        claimant = _Claimant(claim.worker_id, job_id, starts, now, lease_until)
        with self._database.transaction(keep=False) as tx:
            view = moves.look(tx, moves.context_of(tx, claim.worker_id, job_id, claim.chunk_id))
            _, context = self._record(tx, view, claim, candidate, now)
            return self._claim(tx, claimant, context)

    def _record(
        self, tx: Connection, view: BoardView, claim: Claim, candidate: Candidate, now: float
    ) -> tuple[Outcome, Any]:
        """Record a result. Returns the outcome and an updated context, whose `_progress` the caller must write."""
        context = view.context
        policy = self._policy_of(tx, context.settings_version)
        decision = admission.ratchet(candidate.score, view.entries, policy.num_models, policy.metric)
        if isinstance(decision, Promote) and candidate.file is None:
            decision = Discard("its checkpoint was not written")
        promoted = isinstance(decision, Promote)
        close(
            tx,
            claim,
            ChunkState.PROMOTED if promoted else ChunkState.DISCARDED,
            now,
            train_seconds=candidate.train_seconds,
            epochs=len(candidate.results),
            score=candidate.score if math.isfinite(candidate.score) else None,
            **_NOT_SUSPENDED,
        )
        if candidate.results:
            epochs = [asdict(result) | {"metrics": moves.json_safe(result.metrics)} for result in candidate.results]
            _EPOCHS.insert_all(tx, [{"chunk_id": claim.chunk_id, **values} for values in epochs])
        if context.failures:
            _NO_FAILURES.write(tx, by_worker=claim.worker_id)
        moves.consume(tx, context.entry_id, claim.position, context.floor)
        if isinstance(decision, Promote):
            promote(tx, claim, candidate, view, now, evicted=decision.evicted, metric=policy.metric)
            reason = f"evicted entry {decision.evicted.entry_id}" if decision.evicted else "a slot was free"
        else:
            reason = decision.reason
        # If the chunk was discarded, a file can be released only if the chunk's parent has left the board meanwhile.
        freed = promoted or (context.entry_id is not None and context.entry_id not in view.rows)
        after = context._replace(
            epochs=context.epochs + len(candidate.results),
            chunks_since_promotion=0 if promoted else context.chunks_since_promotion + 1,
        )
        return Outcome(promoted, reason, moves.release(tx) if freed else ()), after

    def suspend(self, claim: Claim, file: str, sha256: str, now: float) -> tuple[str, ...]:
        """Suspend a chunk that was interrupted between two steps. file: contains the state to continue from. Returns
        the files that may now be deleted.

        If an amendment has given the chunk's position another profile meanwhile, the chunk expires instead.
        """
        whose = {"worker_id": claim.worker_id, "chunk_id": claim.chunk_id}
        with self._database.transaction() as tx:
            if claiming.profile_at(claim.position, self._policy_now(tx).cycle) != claim.profile:
                close(tx, claim, ChunkState.EXPIRED, now, expired_by=ExpiredBy.AMENDED, **_NOT_SUSPENDED)
                moves.log_event(tx, now, "expired", **whose, by=str(ExpiredBy.AMENDED))
                return (file, *moves.release(tx))
            close(tx, claim, ChunkState.SUSPENDED, None, suspended_file=file, suspended_sha256=sha256)
            moves.log_event(tx, now, "suspended", **whose, generation=claim.generation)
            return moves.release(tx)

    def give_back(self, claim: Claim, reason: str, now: float, state_lost: bool = False) -> None:
        """Expire the claim, because the worker can't continue for a reason unrelated to the chunk. A chunk that was
        resumed is suspended again, unless state_lost: its suspended state can't be used any more."""
        with self._database.transaction() as tx:
            whose = {"worker_id": claim.worker_id, "chunk_id": claim.chunk_id}
            moves.log_event(tx, now, "expired", **whose, by=str(ExpiredBy.GIVEN_BACK), reason=reason)
            about = {"error": reason, "error_at": now}
            file = tx.execute(select(chunk.c.suspended_file).where(chunk.c.chunk_id == claim.chunk_id)).scalar_one()
            if file is not None and not state_lost:
                close(tx, claim, ChunkState.SUSPENDED, None, **about)
                return
            close(tx, claim, ChunkState.EXPIRED, now, expired_by=ExpiredBy.GIVEN_BACK, **about, **_NOT_SUSPENDED)

    def condemn(self, claim: Claim, reason: str, now: float) -> None:
        """Expire the claim and remove its parent's entry from the board, because the parent's checkpoint is damaged."""
        damaged = ExpiredBy.PARENT_DAMAGED
        with self._database.transaction() as tx:
            about = {"error": reason, "error_at": now, "expired_by": damaged}
            close(tx, claim, ChunkState.EXPIRED, now, **about, **_NOT_SUSPENDED)
            entry_id = tx.execute(select(chunk.c.entry_id).where(chunk.c.chunk_id == claim.chunk_id)).scalar_one()
            moves.take_off(tx, entry_id, reason, now, worker_id=claim.worker_id, chunk_id=claim.chunk_id)

    def condemn_entry(self, entry_id: int, reason: str, now: float) -> None:
        """Remove an entry from the board, because its checkpoint is damaged. If a claim found this, call `condemn`."""
        with self._database.transaction() as tx:
            moves.take_off(tx, entry_id, reason, now)

    def fail(
        self, claim: Claim, error: str, now: float, kept: Mapping[str, str] | None = None, early: str | None = None
    ) -> Failed:
        """Record that training raised an exception; error: its class and text.

        kept: the file with a state from before the failure, and its sha256. The chunk is suspended and goes on from
        there or, without such a file, from the file that it was resumed from. If there is neither, its position becomes
        free for another attempt. After max_chunk_attempts failures at a position, the position is consumed instead, so
        that its entry can continue with the next position. early: see `count_failure`.
        """
        with self._database.transaction() as tx:
            policy, context = self._policy_now(tx), moves.context_of(tx, claim.worker_id, None, claim.chunk_id)
            entry_id = context.entry_id
            columns = chunk.c["failures", "suspended_file", "suspended_sha256"]
            row = tx.execute(select(*columns).where(chunk.c.chunk_id == claim.chunk_id)).one()
            earlier: int = row.failures or 0  # None: claimed by an earlier version
            if entry_id is not None:
                total = select(func.coalesce(func.sum(chunk.c.failures), 0))
                of_position = chunk.c.entry_id == entry_id, chunk.c.position == claim.position
                earlier = tx.execute(total.where(*of_position)).scalar_one()
            source = kept or {"file": row.suspended_file, "sha256": row.suspended_sha256}
            same_profile = claiming.profile_at(claim.position, policy.cycle) == claim.profile
            state = failing.chunk_after(
                earlier + 1, policy.max_chunk_attempts, entry_id is None, bool(source["file"]) and same_profile
            )
            about: dict[str, Any] = {"error": error, "error_at": now, "failures": (row.failures or 0) + 1}
            about |= _NOT_SUSPENDED
            if state is ChunkState.SUSPENDED:
                about |= {"suspended_file": source["file"], "suspended_sha256": source["sha256"]}
            close(tx, claim, state, None if state is ChunkState.SUSPENDED else now, **about)
            if state is ChunkState.DISCARDED:
                moves.consume(tx, entry_id, claim.position, context.floor)
                tx.execute(update(run).values(chunks_since_promotion=run.c.chunks_since_promotion + 1))
            whose = {"worker_id": claim.worker_id, "chunk_id": claim.chunk_id, "entry_id": entry_id}
            moves.log_event(tx, now, "failed", **whose, error=error[:2000], resumes_from=about["suspended_file"])
            who = count_failure(tx, claim.worker_id, now, early, error)
            return Failed(who.failures, who.stopped, about["suspended_file"])

    def record_test(self, checkpoint_id: int, sha256: str, metrics: Mapping[str, float], now: float) -> None:
        """Store a checkpoint's test metrics. Raises StaleClaimError if the checkpoint was replaced meanwhile."""
        tested = update(checkpoint).where(checkpoint.c.checkpoint_id == checkpoint_id, checkpoint.c.sha256 == sha256)
        with self._database.transaction() as tx:
            if tx.execute(tested.values(test_metrics=dict(metrics), tested_at=now)).rowcount != 1:
                raise StaleClaimError(f"checkpoint {checkpoint_id} was replaced after it was tested")
            moves.log_event(tx, now, "tested", checkpoint=checkpoint_id, metrics=dict(metrics))

    # --- inside a transaction

    def _policy_now(self, tx: Connection) -> Policy:
        return self._policy_of(tx, _SETTINGS_VERSION.first(tx).settings_version)

    def _policy_of(self, tx: Connection, version: int) -> Policy:
        if self._policy.version != version:  # the settings were amended
            self._policy = thaw(tx.execute(select(run.c.settings)).scalar_one()).policy(version)
        return self._policy

    def _end_if_over(self, tx: Connection, view: BoardView, policy: Policy, now: float) -> Over | None:
        context, state = view.context, RunState(view.context.state)
        if state is not RunState.ACTIVE:
            return Over(state, context.reason or f"the run is {state}")
        best = max((e.score for e in view.entries), key=policy.metric.key, default=None)
        progress = Progress(context.chunks_since_promotion, best, context.epochs)
        over = stopping.run_over(now, context.deadline, stopping.converged(progress, policy.stop, policy.metric))
        if over is not None:
            moves.set_state(tx, over.state, over.reason, now)
        return over


def _expire_late(tx: Connection, now: float) -> None:
    """Expire the claims whose lease has ended."""
    live = tx.execute(select(chunk.c.chunk_id, chunk.c.lease_until).where(moves.IS_HELD)).all()
    late = [row.chunk_id for row in live if claiming.expired(now, row.lease_until)]
    moves.expire(tx, chunk.c.chunk_id.in_(late), ExpiredBy.LEASE_ENDED, now)


def _progress(context: Any) -> dict[str, int]:
    """Return new values for the columns of the run's row that each result changes."""
    return {"epochs": context.epochs, "chunks_since_promotion": context.chunks_since_promotion}


def _refuse_stale(context: Any, claimant: _Claimant) -> None:
    """Raise StaleClaimError if the claimant's job is not running, or if it has been started again meanwhile."""
    if context.job_state != JobState.RUNNING or context.starts != claimant.starts:
        raise StaleClaimError(
            f"job {claimant.job_id} (start {claimant.starts}) is no longer the running job of its chain: "
            + ("it is unknown" if context.job_state is None else f"it is {context.job_state}, start {context.starts}")
        )
