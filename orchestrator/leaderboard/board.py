"""Claims and the ratchet: who trains what, and what becomes of it. One short transaction a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, func, insert, select, update

from orchestrator.errors import StaleClaimError
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.moves import (
    IS_HELD,
    LEASE_ENDED,
    BoardRows,
    BoardView,
    after_discard,
    consume,
    expire,
    finite,
    log_event,
    look,
    look_again,
    progress_of,
    read_board,
    release,
    set_state,
    take_off,
    taken_positions,
)
from orchestrator.leaderboard.results import close, promote
from orchestrator.leaderboard.schema import checkpoint, chunk, entry, epoch, run, worker
from orchestrator.leaderboard.statements import Statement
from orchestrator.records import (
    Candidate,
    ChunkState,
    Claim,
    Discard,
    Evidence,
    FoundAnew,
    JobState,
    Outcome,
    Over,
    Policy,
    Progress,
    Promote,
    RunState,
)
from orchestrator.rules import admission, claiming, stopping
from orchestrator.settings.loading import thaw

# Built once, so that each execution finds its SQL by one look into a cache.
_SETTINGS_VERSION = Statement(select(run.c.settings_version))
# A worker's own first, then the oldest.
_SUSPENDED = Statement(
    select(chunk)
    .where(IS_HELD, chunk.c.state == ChunkState.SUSPENDED)
    .order_by(chunk.c.worker_id != bindparam("by_worker"), chunk.c.chunk_id)
    .limit(1)
)
_RUN, _LEASE, _EPOCHS = Statement(update(run)), Statement(insert(chunk)), Statement(insert(epoch))
_NO_FAILURES = Statement(update(worker).where(worker.c.worker_id == bindparam("by_worker")).values(failures=0))


@dataclass(frozen=True, slots=True)
class _Asker:
    """The job that asks for a chunk, at its start number `starts`."""

    worker_id: int
    job_id: int
    starts: int
    now: float
    lease_until: float


class Board:
    """The write side of the leaderboard, as a worker uses it."""

    def __init__(self, database: Database, policy: Policy) -> None:
        self._database = database
        self._policy = policy

    # --- claims

    def claim(self, worker_id: int, job_id: int, starts: int, now: float, lease_until: float) -> Claim | Over:
        """Lease the next chunk to a job: one that was suspended, else what the rules choose."""
        with self._database.transaction() as tx:
            asker = _Asker(worker_id, job_id, starts, now, lease_until)
            return self._claim(tx, asker, look(tx, worker_id, job_id, None))

    def _claim(self, tx: Connection, asker: _Asker, situation: BoardView) -> Claim | Over:
        standing, board, held = situation.standing, situation.board, situation.held
        policy = self._policy_of(tx, standing.settings_version)
        _check_current(standing, asker)
        if standing.stopped is not None:
            return Over(RunState(standing.state), standing.stopped)
        if held.first_lease_end is not None and claiming.expired(asker.now, held.first_lease_end, Evidence.UNKNOWN):
            situation = self._reap(tx, standing, asker.now)
            board, held = situation.board, situation.held
        over = self._end_if_over(tx, standing, board, policy, asker.now)
        if over is not None:
            return over
        generation: int = standing.generation + 1
        if held.suspended:
            _RUN.write(tx, generation=generation, **progress_of(standing))
            chosen = _SUSPENDED.first(tx, by_worker=asker.worker_id)
            return self._resume(tx, chosen, board, policy, asker, generation)
        return self._lease(tx, situation, policy, asker, generation)

    def _lease(self, tx: Connection, situation: BoardView, policy: Policy, asker: _Asker, generation: int) -> Claim:
        board, held = situation.board, situation.held
        choice = claiming.choose_claim(board.entries, held.founders, policy.num_models, policy.metric)
        if isinstance(choice, FoundAnew):
            parent, position, repeat = None, 0, 0
        else:
            parent = choice.entry
            consumed, leased = taken_positions(tx, parent.entry_id, parent.floor)
            position = claiming.next_profile(parent.floor, consumed, leased)
            repeat = claiming.repeat_number(parent, position, policy.cycle)
        profile = claiming.profile_at(position, policy.cycle)
        source = board.rows[parent.entry_id] if parent else None
        _RUN.write(tx, generation=generation, **progress_of(situation.standing))
        chunk_id = _LEASE.insert(
            tx,
            entry_id=parent.entry_id if parent else None,
            parent_id=parent.checkpoint_id if parent else None,
            position=position,
            profile=profile.name,
            worker_id=asker.worker_id,
            job_id=asker.job_id,
            generation=generation,
            state=ChunkState.LIVE,
            claimed_at=asker.now,
            lease_until=asker.lease_until,
        )
        return Claim(
            chunk_id=chunk_id,
            generation=generation,
            worker_id=asker.worker_id,
            position=position,
            profile=profile,
            repeat=repeat,
            parent_file=source.file if source else None,
            parent_sha256=source.sha256 if source else None,
            parent_epochs=source.epochs if source else 0,
            bar=admission.bar(board.entries, policy.num_models, policy.metric),
            settings_version=policy.version,
        )

    def _resume(
        self, tx: Connection, held: Any, board: BoardRows, policy: Policy, asker: _Asker, generation: int
    ) -> Claim:
        tx.execute(
            update(chunk)
            .where(chunk.c.chunk_id == held.chunk_id)
            .values(
                state=ChunkState.LIVE,
                generation=generation,
                worker_id=asker.worker_id,
                job_id=asker.job_id,
                lease_until=asker.lease_until,
            )
        )
        parent = tx.execute(select(checkpoint).where(checkpoint.c.checkpoint_id == held.parent_id)).one_or_none()
        return Claim(
            chunk_id=held.chunk_id,
            generation=generation,
            worker_id=asker.worker_id,
            position=held.position,
            profile=claiming.profile_at(held.position, policy.cycle),
            repeat=0,
            parent_file=parent.file if parent else None,
            parent_sha256=parent.sha256 if parent else None,
            parent_epochs=parent.epochs if parent else 0,
            bar=admission.bar(board.entries, policy.num_models, policy.metric),
            settings_version=policy.version,
            suspended_file=held.suspended_file,
            suspended_sha256=held.suspended_sha256,
        )

    def bar(self) -> float | None:
        """The score a candidate has to beat just now; None while a slot is free."""
        with self._database.transaction() as tx:
            policy = self._policy_of(tx, _SETTINGS_VERSION.first(tx).settings_version)
            return admission.bar(read_board(tx).entries, policy.num_models, policy.metric)

    # --- what became of them

    def record(self, claim: Claim, candidate: Candidate, now: float) -> Outcome:
        """The ratchet decides. Raises StaleClaimError, having written nothing, if the claim was lost."""
        results = _epoch_rows(claim, candidate)
        with self._database.transaction() as tx:
            situation = look(tx, claim.worker_id, None, claim.chunk_id)
            outcome, standing, _ = self._record(tx, situation, claim, candidate, results, now)
            _RUN.write(tx, **progress_of(standing))
            return outcome

    def record_and_claim(
        self, claim: Claim, candidate: Candidate, job_id: int, starts: int, now: float, lease_until: float
    ) -> tuple[Outcome, Claim | Over]:
        """`record`, and then `claim` for the same job, in one transaction: it waits for the lock and the disk once."""
        results = _epoch_rows(claim, candidate)
        asker = _Asker(claim.worker_id, job_id, starts, now, lease_until)
        with self._database.transaction() as tx:
            situation = look(tx, claim.worker_id, job_id, claim.chunk_id)
            outcome, standing, floor = self._record(tx, situation, claim, candidate, results, now)
            after = look_again(tx, standing) if outcome.promoted else after_discard(situation, standing, floor)
            following = self._claim(tx, asker, after)
            if isinstance(following, Over):
                _RUN.write(tx, **progress_of(standing))
            return outcome, following

    def _record(
        self,
        tx: Connection,
        situation: BoardView,
        claim: Claim,
        candidate: Candidate,
        results: Sequence[dict[str, Any]],
        now: float,
    ) -> tuple[Outcome, Any, int]:
        """What came of it; the standing after it, whose progress is still to be written; and the entry's floor."""
        standing, board = situation.standing, situation.board
        policy = self._policy_of(tx, standing.settings_version)
        decision = admission.ratchet(candidate.score, board.entries, policy.num_models, policy.metric)
        if isinstance(decision, Promote) and candidate.file is None:
            decision = Discard("its checkpoint was not written")
        promoted = isinstance(decision, Promote)
        close(
            tx,
            claim,
            ChunkState.PROMOTED if promoted else ChunkState.DISCARDED,
            now,
            train_seconds=candidate.train_seconds,
            epochs=len(results),
            score=finite(candidate.score),
            suspended_file=None,
            suspended_sha256=None,
        )
        if results:
            _EPOCHS.insert_all(tx, results)
        if standing.failures:
            _NO_FAILURES.write(tx, by_worker=claim.worker_id)
        floor = consume(tx, standing.entry_id, claim.position, standing.floor)
        if isinstance(decision, Promote):
            promote(tx, claim, candidate, decision.evicted, board, standing, policy, now)
            reason = f"evicted entry {decision.evicted.entry_id}" if decision.evicted else "a slot was free"
        else:
            reason = decision.reason
        # While its parent keeps its place, a discarded chunk was the last to refer to nothing.
        freed = promoted or (standing.entry_id is not None and standing.entry_id not in board.rows)
        after = standing._replace(
            epochs=standing.epochs + len(results),
            chunks_since_promotion=0 if promoted else standing.chunks_since_promotion + 1,
        )
        return Outcome(promoted, reason, release(tx) if freed else ()), after, floor

    def suspend(self, claim: Claim, file: str, sha256: str, now: float) -> tuple[str, ...]:
        """Interrupted between two steps; `file` holds everything to go on from. Returns collectable files."""
        with self._database.transaction() as tx:
            close(tx, claim, ChunkState.SUSPENDED, None, suspended_file=file, suspended_sha256=sha256)
            log_event(tx, now, "suspended", claim.worker_id, claim.chunk_id, None, generation=claim.generation)
            return release(tx)

    def give_back(self, claim: Claim, reason: str, now: float) -> None:
        """Nothing came of the claim and nobody is to blame: its position is free again."""
        with self._database.transaction() as tx:
            close(tx, claim, ChunkState.EXPIRED, now, error=reason, suspended_file=None, suspended_sha256=None)
            log_event(tx, now, "expired", claim.worker_id, claim.chunk_id, None, reason=reason)

    def condemn(self, claim: Claim, reason: str, now: float) -> None:
        """The claim's parent is damaged: its entry leaves the board, and its slot is free."""
        with self._database.transaction() as tx:
            close(tx, claim, ChunkState.EXPIRED, now, error=reason, suspended_file=None, suspended_sha256=None)
            entry_id = tx.execute(select(chunk.c.entry_id).where(chunk.c.chunk_id == claim.chunk_id)).scalar_one()
            take_off(tx, entry_id, reason, now, claim.worker_id, claim.chunk_id)

    def condemn_entry(self, entry_id: int, reason: str, now: float) -> None:
        """As `condemn`, by somebody who has looked and holds no claim."""
        with self._database.transaction() as tx:
            take_off(tx, entry_id, reason, now, None, None)

    def fail(self, claim: Claim, error: str, now: float) -> int:
        """Training raised an exception. Its position is free again until it has failed too often; then it is
        consumed, so that one bad combination can't hold up an entry for ever.

        Returns how many failures in a row the worker has now.
        """
        error = error.replace("\0", "\N{REPLACEMENT CHARACTER}")  # PostgreSQL keeps none
        with self._database.transaction() as tx:
            policy = self._policy_of(tx, _SETTINGS_VERSION.first(tx).settings_version)
            where = select(chunk.c.entry_id).where(chunk.c.chunk_id == claim.chunk_id)
            entry_id = tx.execute(where).scalar_one()
            earlier = tx.execute(
                select(func.count()).where(
                    chunk.c.entry_id == entry_id,
                    chunk.c.position == claim.position,
                    chunk.c.state == ChunkState.FAILED,
                )
            ).scalar_one()
            given_up = entry_id is not None and earlier + 1 >= policy.max_chunk_attempts
            state = ChunkState.DISCARDED if given_up else ChunkState.FAILED
            close(tx, claim, state, now, error=error, suspended_file=None, suspended_sha256=None)
            if given_up:
                floor = tx.execute(select(entry.c.floor).where(entry.c.entry_id == entry_id)).scalar_one()
                consume(tx, entry_id, claim.position, floor)
                tx.execute(update(run).values(chunks_since_promotion=run.c.chunks_since_promotion + 1))
            log_event(tx, now, "failed", claim.worker_id, claim.chunk_id, entry_id, error=error[:2000])
            tx.execute(
                update(worker).where(worker.c.worker_id == claim.worker_id).values(failures=worker.c.failures + 1)
            )
            return int(tx.execute(select(worker.c.failures).where(worker.c.worker_id == claim.worker_id)).scalar_one())

    # --- inside a transaction

    def _policy_of(self, tx: Connection, version: int) -> Policy:
        if self._policy.version != version:  # the settings were amended
            self._policy = thaw(tx.execute(select(run.c.settings)).scalar_one()).policy(version)
        return self._policy

    def _reap(self, tx: Connection, standing: Any, now: float) -> BoardView:
        """Claims whose lease is over are taken back."""
        live = tx.execute(select(chunk.c.chunk_id, chunk.c.lease_until).where(IS_HELD)).all()
        late = [h.chunk_id for h in live if claiming.expired(now, h.lease_until, Evidence.UNKNOWN)]
        expire(tx, late, LEASE_ENDED, now)
        return look_again(tx, standing)

    def _end_if_over(self, tx: Connection, row: Any, board: BoardRows, policy: Policy, now: float) -> Over | None:
        state = RunState(row.state)
        if state is not RunState.ACTIVE:
            return Over(state, row.reason or f"the run is {state}")
        best = max((e.score for e in board.entries), key=policy.metric.key, default=None)
        progress = Progress(row.chunks_since_promotion, best, row.epochs)
        ending = stopping.converged(progress, policy.stop, policy.metric)
        if ending is None and stopping.lifetime_over(now, row.deadline):
            ending = (RunState.FINISHED, "the run's total lifetime is over")
        if ending is None:
            return None
        set_state(tx, *ending, now)
        return Over(*ending)


def _epoch_rows(claim: Claim, candidate: Candidate) -> list[dict[str, Any]]:
    """Made before the lock is taken."""
    return [
        {
            "chunk_id": claim.chunk_id,
            "number": r.number,
            "seconds": r.seconds,
            "metrics": {name: finite(value) for name, value in r.metrics.items()},
        }
        for r in candidate.results
    ]


def _check_current(row: Any, asker: _Asker) -> None:
    if row.job_state != JobState.RUNNING or row.starts != asker.starts:
        raise StaleClaimError(
            f"job {asker.job_id} (start {asker.starts}) is no longer the one that works: "
            + ("it is unknown" if row.job_state is None else f"it is {row.job_state}, start {row.starts}")
        )
