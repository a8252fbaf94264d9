"""Claims and the ratchet: who trains what, and what becomes of it. One short transaction a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from orchestrator import rules
from orchestrator.errors import StaleClaimError
from orchestrator.leaderboard.engine import Database
from orchestrator.leaderboard.moves import (
    LEASE_ENDED,
    BoardRows,
    consume,
    consumed_positions,
    expire,
    finite,
    held_chunks,
    log_event,
    read_board,
    release,
    set_state,
)
from orchestrator.leaderboard.results import close, promote
from orchestrator.leaderboard.schema import checkpoint, chunk, entry, epoch, job, run, worker
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


class Board:
    """The write side of the leaderboard, as a worker uses it."""

    def __init__(self, database: Database, load_policy: Callable[[str, int], Policy]) -> None:
        """load_policy: (settings JSON, version) -> Policy; called when the settings were amended."""
        self._database = database
        self._load_policy = load_policy
        self._policy: Policy | None = None

    # --- claims

    def claim(self, worker_id: int, job_id: int, starts: int, now: float, lease_until: float) -> Claim | Over:
        """Lease the next chunk to a job: one that was suspended, else what the rules choose."""
        with self._database.transaction() as tx:
            row, policy = self._read_run(tx)
            self._check_current(tx, job_id, starts)
            stopped = tx.execute(select(worker.c.stopped).where(worker.c.worker_id == worker_id)).scalar_one()
            if stopped is not None:
                return Over(RunState(row.state), stopped)
            over = self._end_if_over(tx, row, policy, now)
            if over is not None:
                return over
            held = self._expire_past_leases(tx, now)
            generation: int = row.generation + 1
            tx.execute(update(run).values(generation=generation))
            board = read_board(tx, held)
            suspended = [h for h in held if h.state == ChunkState.SUSPENDED]
            if suspended:
                chosen = min(suspended, key=lambda h: (h.worker_id != worker_id, h.chunk_id))
                return self._resume(tx, chosen, board, policy, worker_id, job_id, generation, now, lease_until)
            return self._lease(tx, held, board, policy, worker_id, job_id, generation, now, lease_until)

    def _lease(
        self,
        tx: Connection,
        held: Sequence[Row[Any]],
        board: BoardRows,
        policy: Policy,
        worker_id: int,
        job_id: int,
        generation: int,
        now: float,
        lease_until: float,
    ) -> Claim:
        founding = sum(h.entry_id is None for h in held)
        choice = rules.choose_claim(board.entries, founding, policy.num_models, policy.metric)
        if isinstance(choice, FoundAnew):
            parent, position, repeat = None, 0, 0
        else:
            parent = choice.entry
            consumed = consumed_positions(tx, parent.entry_id, parent.floor)
            leased = {h.position for h in held if h.entry_id == parent.entry_id}
            position = rules.next_profile(parent.floor, consumed, leased)
            repeat = rules.repeat_number(parent, position, policy.cycle)
        profile = rules.profile_at(position, policy.cycle)
        source = board.rows[parent.entry_id] if parent else None
        chunk_id = tx.execute(
            insert(chunk).values(
                entry_id=parent.entry_id if parent else None,
                parent_id=parent.checkpoint_id if parent else None,
                position=position,
                profile=profile.name,
                worker_id=worker_id,
                job_id=job_id,
                generation=generation,
                state=ChunkState.LIVE,
                claimed_at=now,
                lease_until=lease_until,
            )
        ).inserted_primary_key[0]  # type: ignore[index]
        return Claim(
            chunk_id=chunk_id,
            generation=generation,
            worker_id=worker_id,
            position=position,
            profile=profile,
            repeat=repeat,
            parent_file=source.file if source else None,
            parent_sha256=source.sha256 if source else None,
            parent_epochs=source.epochs if source else 0,
            bar=rules.bar(board.entries, policy.num_models, policy.metric),
            settings_version=policy.version,
        )

    def _resume(
        self,
        tx: Connection,
        held: Row[Any],
        board: BoardRows,
        policy: Policy,
        worker_id: int,
        job_id: int,
        generation: int,
        now: float,
        lease_until: float,
    ) -> Claim:
        tx.execute(
            update(chunk)
            .where(chunk.c.chunk_id == held.chunk_id)
            .values(
                state=ChunkState.LIVE,
                generation=generation,
                worker_id=worker_id,
                job_id=job_id,
                lease_until=lease_until,
            )
        )
        parent = tx.execute(select(checkpoint).where(checkpoint.c.checkpoint_id == held.parent_id)).one_or_none()
        return Claim(
            chunk_id=held.chunk_id,
            generation=generation,
            worker_id=worker_id,
            position=held.position,
            profile=rules.profile_at(held.position, policy.cycle),
            repeat=0,
            parent_file=parent.file if parent else None,
            parent_sha256=parent.sha256 if parent else None,
            parent_epochs=parent.epochs if parent else 0,
            bar=rules.bar(board.entries, policy.num_models, policy.metric),
            settings_version=policy.version,
            suspended_file=held.suspended_file,
            suspended_sha256=held.suspended_sha256,
        )

    def bar(self) -> float | None:
        """The score a candidate has to beat just now; None while a slot is free."""
        with self._database.transaction() as tx:
            _, policy = self._read_run(tx)
            return rules.bar(read_board(tx, ()).entries, policy.num_models, policy.metric)

    # --- what became of them

    def record(self, claim: Claim, candidate: Candidate, now: float) -> Outcome:
        """The ratchet decides. Raises StaleClaimError, having written nothing, if the claim was lost."""
        with self._database.transaction() as tx:
            _, policy = self._read_run(tx)
            board = read_board(tx, held_chunks(tx))
            decision = rules.ratchet(candidate.score, board.entries, policy.num_models, policy.metric)
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
                score=finite(candidate.score),
                suspended_file=None,
                suspended_sha256=None,
            )
            if candidate.results:
                tx.execute(
                    insert(epoch),
                    [
                        {
                            "chunk_id": claim.chunk_id,
                            "number": r.number,
                            "seconds": r.seconds,
                            "metrics": {k: finite(v) for k, v in r.metrics.items()},
                        }
                        for r in candidate.results
                    ],
                )
            worked = tx.execute(
                select(chunk.c.entry_id, chunk.c.parent_id).where(chunk.c.chunk_id == claim.chunk_id)
            ).one()
            consume(tx, worked.entry_id, claim.position)
            tx.execute(
                update(run).values(
                    epochs=run.c.epochs + len(candidate.results),
                    chunks_since_promotion=0 if promoted else run.c.chunks_since_promotion + 1,
                )
            )
            tx.execute(update(worker).where(worker.c.worker_id == claim.worker_id).values(failures=0))
            if isinstance(decision, Promote):
                promote(tx, claim, candidate, decision.evicted, worked.parent_id, policy, now)
                reason = f"evicted entry {decision.evicted.entry_id}" if decision.evicted else "a slot was free"
            else:
                reason = decision.reason
            return Outcome(promoted, reason, release(tx))

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
            tx.execute(
                update(entry)
                .where(entry.c.entry_id == entry_id, entry.c.on_board.is_(True))
                .values(on_board=False, evicted_at=now)
            )
            log_event(tx, now, "condemned", claim.worker_id, claim.chunk_id, entry_id, reason=reason)
            release(tx)

    def fail(self, claim: Claim, error: str, now: float) -> int:
        """Training raised an exception. Its position is free again until it has failed too often; then it is
        consumed, so that one bad combination can't hold up an entry for ever.

        Returns how many failures in a row the worker has now.
        """
        with self._database.transaction() as tx:
            _, policy = self._read_run(tx)
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
                consume(tx, entry_id, claim.position)
                tx.execute(update(run).values(chunks_since_promotion=run.c.chunks_since_promotion + 1))
            log_event(tx, now, "failed", claim.worker_id, claim.chunk_id, entry_id, error=error[:2000])
            tx.execute(
                update(worker).where(worker.c.worker_id == claim.worker_id).values(failures=worker.c.failures + 1)
            )
            return int(tx.execute(select(worker.c.failures).where(worker.c.worker_id == claim.worker_id)).scalar_one())

    # --- inside a transaction

    def _read_run(self, tx: Connection) -> tuple[Row[Any], Policy]:
        columns = [
            run.c.state,
            run.c.reason,
            run.c.deadline,
            run.c.generation,
            run.c.epochs,
            run.c.chunks_since_promotion,
            run.c.settings_version,
        ]
        row = tx.execute(select(*columns)).one()
        if self._policy is None or self._policy.version != row.settings_version:
            text = tx.execute(select(run.c.settings)).scalar_one()
            self._policy = self._load_policy(text, row.settings_version)
        return row, self._policy

    def _check_current(self, tx: Connection, job_id: int, starts: int) -> None:
        row = tx.execute(select(job.c.state, job.c.starts).where(job.c.job_id == job_id)).one_or_none()
        if row is None or row.state != JobState.RUNNING or row.starts != starts:
            raise StaleClaimError(
                f"job {job_id} (start {starts}) is no longer the one that works: "
                + ("it is unknown" if row is None else f"it is {row.state}, start {row.starts}")
            )

    def _end_if_over(self, tx: Connection, row: Row[Any], policy: Policy, now: float) -> Over | None:
        state = RunState(row.state)
        if state is RunState.ACTIVE:
            best = tx.execute(
                select(func.max(checkpoint.c.score) if policy.metric.mode == "max" else func.min(checkpoint.c.score))
                .join(entry, entry.c.checkpoint_id == checkpoint.c.checkpoint_id)
                .where(entry.c.on_board.is_(True))
            ).scalar_one()
            progress = Progress(row.chunks_since_promotion, best, row.epochs)
            ending = rules.converged(progress, policy.stop, policy.metric)
            if ending is None and rules.lifetime_over(now, row.deadline):
                ending = (RunState.FINISHED, "the run's total lifetime is over")
            if ending is None:
                return None
            state, reason = ending
            set_state(tx, state, reason, now)
            return Over(state, reason)
        return Over(state, row.reason or f"the run is {state}")

    def _expire_past_leases(self, tx: Connection, now: float) -> list[Row[Any]]:
        held = held_chunks(tx)
        late = [
            h.chunk_id
            for h in held
            if h.state == ChunkState.LIVE and rules.expired(now, h.lease_until, Evidence.UNKNOWN)
        ]
        if late:
            expire(tx, late, LEASE_ENDED, now)
            held = held_chunks(tx)
        return held
