"""The leaderboard with claims, results, deaths and zombies in any order, on both databases. After each step, it is
compared with a model of plain sets and dicts."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orchestrator.errors import StaleClaimError
from orchestrator.profile import Metric
from orchestrator.records import ChainJob, Claim, Over, Started
from tests.support.board_model import EVENTS, LIVE, SUSPENDED, ModelChunk, ModelEntry, ModelWorker
from tests.support.boards import (
    CYCLE,
    LEASE_S,
    MAX_CHUNK_ATTEMPTS,
    NEVER,
    WRITES,
    begin,
    candidate,
    file_of,
    make_board,
)
from tests.support.storage import Storage

# Few values, so that ties are common.
scores = st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, math.nan, math.inf])
mostly = st.sampled_from([True, True, True, False])


class BoardMachine(RuleBasedStateMachine):
    storage: ClassVar[Storage]
    seen: ClassVar[Counter[str]] = Counter()  # how often each event has happened, in all examples together

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="orch-board-"))
        self.now = 1000.0
        self.entries: dict[str, ModelEntry] = {}
        self.chunks: dict[int, ModelChunk] = {}
        self.zombies: list[Claim] = []  # claims that were taken from their workers
        self.settled: list[Claim] = []  # claims that their workers have ended
        self.deleted: set[str] = set()  # files that a worker deletes: those that the board names, and its own
        self.generation = 0
        self.bar: float | None = None
        self.condemned = False
        self.stale_chunks = 0

    def teardown(self) -> None:
        if self.storage.url is not None and hasattr(self, "board"):
            self.storage.remove(self.board)
        shutil.rmtree(self.folder)

    @initialize(
        mode=st.sampled_from(["max", "min"]),
        num_models=st.sampled_from([1, 1, 2, 3]),  # a small board is full sooner, so entries are evicted sooner
        workers=st.integers(2, 3),
        founders=st.integers(0, 3),
    )
    def launch(self, mode: str, num_models: int, workers: int, founders: int) -> None:
        self.metric = Metric("measure", mode)
        self.num_models = num_models
        self.board = make_board(self.storage, self.folder, mode, num_models)
        jobs = self.board.chains.add_workers([None] * workers, self.now)
        self.workers = [ModelWorker(waiting=job) for job in jobs]
        for number in range(workers):
            self._begin(number)
        for number in range(founders):
            self.record(number, [(0.5, True)])

    # --- jobs begin and end

    def _started(self, worker: ModelWorker, job: ChainJob, started: Started | str) -> None:
        assert isinstance(started, Started), started
        if worker.running is not None and worker.running.job_id != job.job_id:
            worker.past.append(worker.running)
        worker.running = started.job
        if worker.waiting is not None and worker.waiting.job_id == job.job_id:
            worker.waiting = None
        worker.waiting = started.successor or worker.waiting
        assert worker.waiting is not None, "a chain never breaks"
        self._take([c for c in self._live() if c.claim.worker_id == job.worker_id])

    @rule(pick=st.integers(0, 2), in_a_chunk=st.booleans())
    def the_next_link_begins(self, pick: int, in_a_chunk: bool) -> None:
        """The chain's running job has died or ended, so its successor starts."""
        if in_a_chunk:
            self.claim(pick)
        self._begin(pick)

    def _begin(self, pick: int) -> None:
        worker = self.workers[pick % len(self.workers)]
        job = worker.waiting
        if job is not None:
            self.now += 1
            self._started(worker, job, begin(self.board, job, self.now))
            self.seen["link begun"] += 1

    @rule(pick=st.integers(0, 2), in_a_chunk=st.booleans())
    def a_job_is_requeued_and_begins_again(self, pick: int, in_a_chunk: bool) -> None:
        if in_a_chunk:
            self.claim(pick)
        worker = self.workers[pick % len(self.workers)]
        if worker.running is not None:
            started = begin(self.board, worker.running, self.now)
            assert isinstance(started, Started)
            assert started.job.starts == worker.running.starts + 1
            worker.past.append(worker.running)  # the process of its first start is a zombie now
            self._started(worker, worker.running, started)
            self.seen["job requeued"] += 1

    @rule(pick=st.integers(0, 2), in_a_chunk=st.booleans())
    def a_job_goes_back_to_the_queue_in_place_of_its_successor(self, pick: int, in_a_chunk: bool) -> None:
        if in_a_chunk:
            self.claim(pick)
        worker = self.workers[pick % len(self.workers)]
        if worker.running is not None and worker.waiting is not None:
            assert self.board.chains.back_to_queue(worker.running, worker.waiting, self.now)
            worker.past += [worker.running, worker.waiting]
            worker.running, worker.waiting = None, worker.running
            self.seen["job back in the queue"] += 1

    @rule(pick=st.integers(0, 2), in_a_chunk=st.booleans())
    def a_job_ends_by_itself(self, pick: int, in_a_chunk: bool) -> None:
        """If an error in orch kept the job from giving back its claim, the claim is taken from it at once."""
        if in_a_chunk:
            self.claim(pick)
        worker = self.workers[pick % len(self.workers)]
        if worker.running is not None:
            successor, why_not = self.board.chains.end(worker.running, "done", in_a_chunk, self.now, max_failures=NEVER)
            assert why_not is None
            assert (successor and successor.job_id) == (worker.waiting and worker.waiting.job_id)
            self._take([c for c in self._live() if c.job_id == worker.running.job_id])
            worker.past.append(worker.running)
            worker.running = None
            self.seen["job ended"] += 1

    @rule(pick=st.integers(0, 2), which=st.sampled_from(["running", "waiting", "both"]), in_a_chunk=st.booleans())
    def jobs_vanish(self, pick: int, which: str, in_a_chunk: bool) -> None:
        """The cluster proves that jobs are gone, and another worker mends the chain."""
        if in_a_chunk:
            self.claim(pick)
        number = pick % len(self.workers)
        worker = self.workers[number]
        gone = [job for job in (worker.running, worker.waiting) if job is not None]
        gone = {"running": gone[:1], "waiting": gone[-1:], "both": gone}[which]
        self.board.chains.apply_mend(gone, [], self.now, {job.job_id: "its job is gone" for job in gone})
        self._take([c for c in self._live() if c.job_id in {job.job_id for job in gone}])
        worker.past += gone
        worker.running = None if worker.running in gone else worker.running
        worker.waiting = None if worker.waiting in gone else worker.waiting
        links = self.board.chains.relink([number], self.now, max_failures=NEVER)
        assert bool(links) == (worker.running is None and worker.waiting is None)
        worker.waiting = links[0] if links else worker.waiting
        self.seen[f"{which} lost"] += 1

    @rule(seconds=st.sampled_from([LEASE_S / 2, LEASE_S, LEASE_S + 1]), pick=st.integers(0, 5))
    def time_passes(self, seconds: float, pick: int) -> None:
        """Time passes while a worker trains a chunk. If its lease ends, another worker's next claim takes it away."""
        self._at_work(pick)
        self.now += seconds

    # --- claims

    def _live(self) -> list[ModelChunk]:
        return [chunk for chunk in self.chunks.values() if chunk.state == LIVE]

    def _take(self, chunks: list[ModelChunk]) -> None:
        """Take these claims from their workers, which may still be alive as zombies."""
        for chunk in chunks:
            chunk.state = SUSPENDED if chunk.suspended_file else "expired"
            self.zombies.append(chunk.claim)
            self.seen["suspended claim taken" if chunk.suspended_file else "claim taken"] += 1

    def _on_board(self) -> list[ModelEntry]:
        return [entry for entry in self.entries.values() if entry.on_board]

    def _bar(self) -> float | None:
        scores = [entry.score for entry in self._on_board()]
        return min(scores, key=self.metric.key) if len(scores) == self.num_models else None

    @rule(pick=st.integers(0, 2))
    def claim(self, pick: int) -> None:
        worker = self.workers[pick % len(self.workers)]
        job = worker.running
        if job is None or any(chunk.job_id == job.job_id for chunk in self._live()):
            return
        claim = self.board.board.claim(job.worker_id, job.job_id, job.starts, self.now, self.now + LEASE_S)
        self._claimed(job, claim)

    def _claimed(self, job: ChainJob, claim: Claim | Over) -> None:
        assert isinstance(claim, Claim)
        self._take([chunk for chunk in self._live() if self.now > chunk.lease_until])
        assert claim.generation > self.generation, "generations are never used twice"
        self.generation = claim.generation
        assert claim.worker_id == job.worker_id
        assert claim.bar == self._bar()
        assert claim.profile.name == CYCLE[claim.position % len(CYCLE)]
        entry = self.entries[claim.parent_file] if claim.parent_file else None
        suspended = [chunk_id for chunk_id, chunk in self.chunks.items() if chunk.state == SUSPENDED]
        if suspended:
            self._check_resumed(claim, entry, suspended)
        elif entry is None:
            self._check_founder(claim)
        else:
            self._check_child(claim, entry)
        was = self.chunks.get(claim.chunk_id)
        self.chunks[claim.chunk_id] = ModelChunk(
            entry,
            claim.position,
            LIVE,
            claim,
            job.job_id,
            self.now + LEASE_S,
            suspended_file=claim.suspended_file,
            failures=was.failures if was else 0,
        )

    def _check_resumed(self, claim: Claim, entry: ModelEntry | None, suspended: list[int]) -> None:
        """Check that suspended chunks are continued before a new chunk starts, the worker's own chunks first."""
        own = [chunk_id for chunk_id in suspended if self.chunks[chunk_id].claim.worker_id == claim.worker_id]
        assert claim.chunk_id == min(own or suspended)
        chunk = self.chunks[claim.chunk_id]
        assert (chunk.entry, chunk.position, chunk.suspended_file) == (entry, claim.position, claim.suspended_file)
        self.seen["resumed by its worker" if own else "resumed by another worker"] += 1

    def _check_founder(self, claim: Claim) -> None:
        founding = sum(chunk.held and chunk.entry is None for chunk in self.chunks.values())
        assert not self._on_board() or len(self._on_board()) + founding < self.num_models
        assert claim.chunk_id not in self.chunks
        assert (claim.position, claim.repeat, claim.parent_epochs, claim.suspended_file) == (0, 0, 0, None)
        self.seen["founder claimed"] += 1

    def _check_child(self, claim: Claim, entry: ModelEntry) -> None:
        assert entry.on_board
        assert claim.chunk_id not in self.chunks
        taken = entry.consumed | {c.position for c in self.chunks.values() if c.held and c.entry is entry}
        free = next(position for position in range(entry.start, NEVER) if position not in taken)
        assert claim.position == free, "the smallest free position from the entry's start"
        first = entry.start + entry.founder
        tried = [CYCLE[position % len(CYCLE)] for position in range(first, claim.position)]
        assert claim.repeat == tried.count(claim.profile.name)
        assert claim.suspended_file is None
        self.seen["child claimed"] += 1
        self.seen["position taken again"] += any(
            c.entry is entry and c.position == free and not c.held for c in self.chunks.values()
        )
        self.seen["position past the cycle"] += claim.position >= len(CYCLE)

    # --- results

    def _at_work(self, pick: int) -> ModelChunk | None:
        """Return some live claim, or that of the chosen worker, which first makes a claim if it has none."""
        live = self._live()
        if live and pick >= len(self.workers):
            return live[pick % len(live)]
        self.claim(pick)
        job = self.workers[pick % len(self.workers)].running
        return next((chunk for chunk in self._live() if job is not None and chunk.job_id == job.job_id), None)

    def _settle(self, chunk: ModelChunk, state: str) -> None:
        chunk.state = state
        self.settled.append(chunk.claim)
        if chunk.suspended_file is not None:
            self.deleted.add(chunk.suspended_file)  # as the worker does
            chunk.suspended_file = None

    @rule(
        pick=st.integers(0, 5),
        results=st.lists(st.tuples(scores, mostly), min_size=1, max_size=3),
        claims_again=st.booleans(),
    )
    def record(self, pick: int, results: list[tuple[float, bool]], claims_again: bool = False) -> None:
        for score, written in results:
            chunk = self._at_work(pick)
            if chunk is not None:
                self._record(chunk, score, written, claims_again)

    def _record(self, chunk: ModelChunk, score: float, written: bool, claims_again: bool) -> None:
        free = len(self._on_board()) < self.num_models
        admitted = written and math.isfinite(score) and (free or self.metric.better(score, than=self._bar()))
        result = (chunk.claim, candidate(chunk.claim, score, written))
        job = next((w.running for w in self.workers if w.running and w.running.job_id == chunk.job_id), None)
        claim = None
        if claims_again and job is not None:
            at = (job.job_id, job.starts, self.now, self.now + LEASE_S)
            outcome, claim = self.board.board.record_and_claim(*result, *at)
        else:
            outcome = self.board.board.record(*result, self.now)
        assert outcome.promoted == admitted
        self._settle(chunk, "promoted" if admitted else "discarded")
        if chunk.entry is not None:
            chunk.entry.consumed.add(chunk.position)
        self.stale_chunks = 0 if admitted else self.stale_chunks + 1
        if admitted:
            self._admit(chunk, score)
        elif written:
            self.deleted.add(file_of(chunk.claim))
        self.deleted |= set(outcome.collectable)
        self.seen["child promoted" if admitted and chunk.claim.parent_file else chunk.state] += 1
        if claim is not None and job is not None:
            self.seen["claimed again"] += 1
            self._claimed(job, claim)

    def _admit(self, chunk: ModelChunk, score: float) -> None:
        bar = self._bar()
        founder = chunk.entry is None
        new = ModelEntry(file_of(chunk.claim), score, 0 if founder else chunk.position + 1, founder)
        if founder:
            chunk.entry = new
            new.consumed.add(0)
        shown = {row["file"] for row in self.board.reader.entries()}
        evicted = [entry for entry in self._on_board() if entry.file not in shown]
        assert len(shown) <= self.num_models
        assert [entry.score for entry in evicted] == ([] if bar is None else [bar]), "one of the worst makes room"
        for entry in evicted:
            entry.on_board = False
            self.seen["entry evicted"] += 1
        self.entries[new.file] = new

    @rule(score=scores, pick=st.integers(0, 2))
    def all_are_at_work_and_one_is_faster(self, score: float, pick: int) -> None:
        for number in range(len(self.workers)):
            self.claim(number)
        self.record(pick, [(score, True)])

    @rule(pick=st.integers(0, 5), goes_on=st.booleans())
    def suspend(self, pick: int, goes_on: bool) -> None:
        chunk = self._at_work(pick)
        if chunk is not None:
            garbage = self.board.board.suspend(chunk.claim, file_of(chunk.claim), "0" * 64, self.now)
            self._settle(chunk, SUSPENDED)
            chunk.suspended_file = file_of(chunk.claim)
            self.deleted |= set(garbage)
            self.seen["suspended"] += 1
            if goes_on:
                self.claim(pick)

    @rule(
        pick=st.integers(0, 5),
        kept=st.lists(st.sampled_from([False, False, True]), min_size=1, max_size=2 * MAX_CHUNK_ATTEMPTS),
    )
    def fail(self, pick: int, kept: list[bool]) -> None:
        """kept: for each failure, whether the worker has kept a state from before it."""
        for one in kept:
            chunk = self._at_work(pick)
            if chunk is not None:
                self._fail(chunk, one)

    def _fail(self, chunk: ModelChunk, kept: bool) -> None:
        source = {"file": file_of(chunk.claim), "sha256": "0" * 64} if kept else None
        failed = self.board.board.fail(chunk.claim, "an exception", self.now, source)
        chunk.failures += 1
        attempts = chunk.failures
        if chunk.entry is not None:
            chunk.entry.failures[chunk.position] += 1
            attempts = chunk.entry.failures[chunk.position]
        given_up = attempts >= MAX_CHUNK_ATTEMPTS
        goes_on_from = None if given_up else file_of(chunk.claim) if kept else chunk.suspended_file
        assert failed.resumes_from == goes_on_from
        if goes_on_from is not None:
            self.seen["failed with a kept state" if kept else "failed after it was resumed"] += 1
            if kept:
                self._settle(chunk, SUSPENDED)
                chunk.suspended_file = goes_on_from
            else:
                self._suspend_again(chunk)
            return
        if given_up and chunk.entry is not None:
            chunk.entry.consumed.add(chunk.position)
            self.stale_chunks += 1
            self.seen["position given up"] += 1
        else:
            self.seen["founder given up" if given_up else "failed"] += 1
        self._settle(chunk, "discarded" if given_up and chunk.entry is not None else "failed")

    def _suspend_again(self, chunk: ModelChunk) -> None:
        """The chunk goes on from the file from which it was resumed."""
        chunk.state = SUSPENDED
        self.settled.append(chunk.claim)

    @rule(pick=st.integers(0, 5), its_parent_is_whole=st.booleans())
    def give_back(self, pick: int, its_parent_is_whole: bool) -> None:
        chunk = self._at_work(pick)
        if chunk is not None and its_parent_is_whole:
            self.board.board.give_back(chunk.claim, "its disk is full", self.now)
            if chunk.suspended_file is not None:
                self._suspend_again(chunk)
                self.seen["suspended chunk given back"] += 1
                return
            self.seen["given back"] += 1
        elif chunk is not None:
            self.board.board.condemn(chunk.claim, "damaged", self.now)
            self.stale_chunks = 0
            if chunk.entry is not None:
                self.condemned |= chunk.entry.on_board
                chunk.entry.on_board = False
                self.seen["entry condemned"] += 1
        if chunk is not None:
            self._settle(chunk, "expired")

    @precondition(lambda self: self.zombies)
    @rule(pick=st.integers(0, 20), write=st.sampled_from(sorted(WRITES)))
    def a_zombie_writes(self, pick: int, write: str) -> None:
        claim = self.zombies[pick % len(self.zombies)]
        self._is_refused(claim, write)
        self.deleted.add(file_of(claim))  # as the worker does
        self.seen["zombie refused"] += 1

    @precondition(lambda self: self.settled)
    @rule(pick=st.integers(0, 20), write=st.sampled_from(sorted(WRITES)))
    def what_is_over_comes_back(self, pick: int, write: str) -> None:
        """A claim that was settled is used again, and a job that has ended asks for work."""
        self._is_refused(self.settled[pick % len(self.settled)], write)
        self.seen["second result refused"] += 1
        past = [job for worker in self.workers for job in worker.past]
        if past:
            job = past[pick % len(past)]
            before = self.storage.contents(self.board)
            with pytest.raises(StaleClaimError):
                self.board.board.claim(job.worker_id, job.job_id, job.starts, self.now, self.now + LEASE_S)
            assert self.storage.contents(self.board) == before
            self.seen["stale job refused"] += 1

    def _is_refused(self, claim: Claim, write: str) -> None:
        before = self.storage.contents(self.board)
        with pytest.raises(StaleClaimError):
            WRITES[write](self.board, claim, self.now)
        assert self.storage.contents(self.board) == before, "a stale generation writes nothing"

    # --- invariants, checked after each step

    @invariant()
    def the_worst_of_a_full_board_never_falls(self) -> None:
        bar = self._bar()
        if self.bar is not None and not self.condemned:
            assert bar is not None, "a full board stays full"
            assert not self.metric.better(self.bar, than=bar)
        self.bar, self.condemned = bar, False

    @invariant()
    def no_position_is_consumed_twice_or_skipped(self) -> None:
        chunks, entries, checkpoints = self.storage.rows(self.board, "chunk", "entry", "checkpoint")
        assert {row["chunk_id"]: row["state"] for row in chunks} == {i: c.state for i, c in self.chunks.items()}
        assert len(entries) == len(checkpoints) == len(self.entries)
        made = {row["checkpoint_id"]: row for row in checkpoints}
        for row in entries:
            checkpoint = made[row["checkpoint_id"]]
            model = self.entries[checkpoint["file"]]
            assert (row["on_board"], checkpoint["score"]) == (model.on_board, model.score)
            mine = [c for c in chunks if c["entry_id"] == row["entry_id"]]
            consumed = [c["position"] for c in mine if c["state"] in ("promoted", "discarded")]
            held = [c["position"] for c in mine if c["state"] in (LIVE, SUSPENDED)]
            assert len({*consumed, *held}) == len(consumed) + len(held), "none twice"
            assert set(consumed) == model.consumed
            tried = {c["position"] for c in mine}
            assert tried == set(range(row["start_position"], row["start_position"] + len(tried))), "none skipped"
            assert row["start_position"] == model.start
            self._check_start(row, checkpoint, chunks)
            assert set(range(row["start_position"], row["floor"])) <= set(consumed)
            assert row["floor"] not in consumed

    def _check_start(self, entry: dict[str, Any], checkpoint: dict[str, Any], chunks: list[dict[str, Any]]) -> None:
        (made_by,) = [c for c in chunks if c["chunk_id"] == checkpoint["chunk_id"]]
        assert made_by["state"] == "promoted"
        if checkpoint["parent_id"] is None:
            assert entry["start_position"] == made_by["position"] == 0
            assert made_by["entry_id"] == entry["entry_id"], "the founding chunk is position 0 of the founder"
            assert checkpoint["founder_id"] == checkpoint["checkpoint_id"]
        else:
            assert entry["start_position"] == made_by["position"] + 1
            assert made_by["entry_id"] != entry["entry_id"], "it consumed a position of its parent"

    @invariant()
    def no_generation_is_held_twice(self) -> None:
        chunks, (run,) = self.storage.rows(self.board, "chunk", "run")
        assert len({row["generation"] for row in chunks}) == len(chunks)
        live = {row["chunk_id"]: row["generation"] for row in chunks if row["state"] == LIVE}
        assert live == {chunk.claim.chunk_id: chunk.claim.generation for chunk in self._live()}
        assert run["generation"] == self.generation

    @invariant()
    def the_run_counts_its_epochs_and_how_long_nothing_was_promoted(self) -> None:
        chunks, (run,) = self.storage.rows(self.board, "chunk", "run")
        assert run["epochs"] == sum(c["epochs"] or 0 for c in chunks if c["state"] in ("promoted", "discarded"))
        assert run["chunks_since_promotion"] == self.stale_chunks

    @invariant()
    def every_file_that_is_needed_stays_and_no_other(self) -> None:
        held = [chunk for chunk in self.chunks.values() if chunk.held]
        needed = {entry.file for entry in self._on_board()}
        needed |= {chunk.claim.parent_file for chunk in held} | {chunk.suspended_file for chunk in held}
        needed -= {None}
        self.seen["work on an entry that lost its place"] += any(c.entry and not c.entry.on_board for c in held)
        files, generations = self.board.reader.references()
        assert files == needed
        assert generations == {chunk.claim.generation for chunk in self._live()}
        assert not files & self.deleted, "what a worker deletes is not needed"


@pytest.mark.timeout(900)  # hypothesis shrinks a failing example before it reports it, which may take minutes
def test_the_invariants_hold_whatever_happens_in_whatever_order(storage):
    BoardMachine.storage = storage
    BoardMachine.seen.clear()
    runs = 4 if storage.url is None else 1
    for number in range(runs):
        run_state_machine_as_test(
            seed(number)(BoardMachine),
            settings=hypothesis_settings(
                derandomize=True,
                deadline=None,
                max_examples=8,
                stateful_step_count=40,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
            ),
        )
    missing = EVENTS - {what for what, times in BoardMachine.seen.items() if times}
    assert runs == 1 or not missing, "it happened in no example, so it was not tested"
