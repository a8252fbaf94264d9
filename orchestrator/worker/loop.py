"""The main loop of a job: claim, train, publish and ratchet until time is up. The caller supplies trainer and clock."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.cluster.protocol import ThisJob
from orchestrator.errors import CheckpointError, DamagedCheckpointError, OrchError, StaleClaimError
from orchestrator.files import checkpoints
from orchestrator.files.checkpoints import Written
from orchestrator.files.run_folder import CHECKPOINTS
from orchestrator.messages import counted, described
from orchestrator.records import ChainJob, Claim, EpochResult, Finished, Interrupted, Over, Started, Work
from orchestrator.rules import claiming, failing, stopping
from orchestrator.worker.failures import Failures, trace
from orchestrator.worker.mending import reconcile
from orchestrator.worker.opened_run import OpenedRun
from orchestrator.worker.successor import Successor
from orchestrator.worker.trainer import Ending, StopFlag, Trainer
from orchestrator.worker.writing import CheckpointWriter, Unrecorded, candidate, file_of, thread, unwritten

log = logging.getLogger("orch")

Trained = Finished | Interrupted | BaseException  # what became of a chunk's training


@dataclass
class Ahead:
    """The next chunk, trained while the checkpoint of the last one is written."""

    last: Unrecorded
    claim: Claim  # as foreseen; the real claim if confirmed
    job: ChainJob
    started: float
    decided: bool = False  # has the last result been recorded, or has this failed?
    confirmed: bool = False  # is the claim real?
    result: Trained | None = None
    error: BaseException | None = None  # why the last result could not be recorded
    epochs: list[EpochResult] = field(default_factory=list)  # finished before the claim was confirmed


def _log_claim(claim: Claim) -> None:
    what = (claim.profile.name, claim.position, claim.parent_file or "a founder")
    log.info("chunk %d (generation %d): %s at position %d of %s", claim.chunk_id, claim.generation, *what)


@dataclass
class JobLoop:
    """The work of one job of a chain."""

    run: OpenedRun
    this_job: ThisJob
    open_trainer: Callable[[], Trainer]
    clock: Callable[[], float]
    stop: StopFlag = field(default_factory=StopFlag)
    background: Executor | None = None  # writes checkpoints while the next chunk trains; None: a thread

    def __post_init__(self) -> None:
        self.leaderboard = self.run.leaderboard
        self.files = self.run.folder / CHECKPOINTS
        self.writer = CheckpointWriter(self.run, self.clock, self.background or thread())
        self.failures = Failures(self.run, self.writer, self.clock)
        self._trainer: Trainer | None = None
        self._next: Claim | Over | None = None  # what record_and_claim returned for the next chunk
        self._durations_s: list[float] = []  # durations of recent chunks, the latest last
        self._ahead: Ahead | None = None
        self._snapshots = True  # whether the trainer can go on while a checkpoint is written
        self._asked = 0  # how often the current chunk has asked whether to stop: once before each step
        self._began = 0.0  # when the model and the data had been loaded
        self._job_end = 0.0
        self._lease_until = 0.0

    # --- the job

    def work(self, started: Started) -> Ending:
        """Work until the job's time, the run or the chain is over. The returned Ending also describes errors."""
        job = started.job
        self._job_end = (job.started_at or self.clock()) + self.this_job.latest_work_s()
        self._lease_until = (job.started_at or self.clock()) + self.this_job.time_limit_s()
        successor = Successor(started, self.leaderboard.chains, self.run.queue, self.clock)
        opening = False
        try:
            successor.submit()
            reconcile(self.leaderboard, self.run.queue, self.run.settings, self.clock())
            removed = checkpoints.collect(self.files, self.leaderboard.reader.references)
            if removed:
                log.info("deleted %d files that are no longer needed", len(removed))
            if self._may_work():
                opening = True
                self._trainer = self.open_trainer()
                opening = False
                self._began = self.clock()
                self._job_end = min(self._job_end, self._began + self.this_job.working_s())
            ending = self._work(job, successor)
        except StaleClaimError as error:
            ending = Ending(str(error))
        except BaseException as error:  # the next job of the chain tries again, until there are max_failures in a row
            self.stop.raise_if_pressed_again(error)
            log.error("%s", trace())
            ending = Ending(described(error), error=True, early=failing.signature(error) if opening else None)
        self.writer.background.shutdown()
        try:
            self._finish(job, successor, ending)
        except OrchError as error:  # another worker or `orch status` will see that the job is gone and repair the chain
            log.error("the job ends, but its end could not be recorded in the database: %s", error)
            return Ending(described(error), error=True)
        return ending

    def _may_work(self) -> bool:
        """Decide whether to open the trainer. That takes a while, since it imports torch and loads data. So the trainer
        is not opened if the run is over, and it is opened before the first claim, so that no claimed chunk waits."""
        now, run = self.clock(), self.leaderboard.run_state.snapshot()
        return not self.stop.reason and now < self._job_end and stopping.may_claim(run.state, now, run.deadline)

    def _finish(self, job: ChainJob, successor: Successor, ending: Ending) -> None:
        chains, max_failures = self.leaderboard.chains, self.run.settings.max_failures
        if chains.wants_successor(job.worker_id, self.clock(), max_failures) and successor.retry_at_end():
            return
        link, why_not = chains.end(job, ending.outcome, ending.error, self.clock(), max_failures, ending.early)
        if why_not is not None and link is not None:
            log.info("no successor: %s", why_not)
            self.run.queue.cancel([link], now=False)
        worker = next(w for w in chains.workers() if w.worker_id == job.worker_id)
        if worker.failures >= max_failures and worker.stopped is None:
            reason = f"{counted(worker.failures, 'failure')} in a row; the last: {ending.outcome}"
            chains.stop_worker(job.worker_id, reason, self.clock())
        log.info("job ends: %s", ending.outcome)

    # --- the loop

    def _work(self, job: ChainJob, successor: Successor) -> Ending:
        self._durations_s = self.leaderboard.reader.recent_chunk_seconds()
        chunks = 0
        while True:
            if not self.stop.reason:
                successor.submit()
            if self._ahead is not None:  # its chunk was trained ahead, and claimed meanwhile
                ahead, self._ahead = self._ahead, None
                assert ahead.result is not None, "training has ended"
                result = self._settle(ahead.claim, ahead.result, job, ahead.started)
            else:
                claim = self._next_claim(job, chunks)
                if isinstance(claim, Ending):
                    return claim
                result = self._chunk(claim, job)
            if isinstance(result, Ending):
                if self.failures.in_a_row > 1 or result.final:  # this process or node may be broken; a new job goes on
                    return result
            elif not result:
                continue
            else:
                self.failures.forget()
            chunks += 1

    def _next_claim(self, job: ChainJob, chunks: int) -> Claim | Ending:
        """Return the next chunk to train, or why there is none. chunks: how many this job has trained."""
        if self.stop.reason:
            return Ending(f"stopped by {self.stop.reason}")
        now = self.clock()
        claim, self._next = self._next, None
        if claim is None:
            if not stopping.should_start_chunk(now, self._job_end, self._durations_s, chunks):
                return Ending("no time is left for another chunk")
            claim = self.leaderboard.board.claim(job.worker_id, job.job_id, job.starts, now, self._lease_until)
        if isinstance(claim, Over):
            return Ending(claim.reason)
        _log_claim(claim)
        if claim.settings_version != self.run.version:
            self._take_amendment()
        return claim

    def _take_amendment(self) -> None:
        """Use the amended settings. They can shorten this job, but not extend it: its time limit in Slurm is fixed."""
        self.run.refresh()
        self._job_end = min(self._job_end, self._began + self.run.settings.eon_lifetime)
        log.info("the settings were amended (version %d)", self.run.version)

    def _chunk(self, claim: Claim, job: ChainJob) -> bool | Ending:
        """Train one chunk. Return True if it was finished, an Ending if training raised an error, else False."""
        work = self._prepare(claim)
        if work is None:
            return False
        assert self._trainer is not None, "the trainer is opened before the first claim"
        started = self.clock()
        return self._settle(claim, self._train(work, self._should_stop), job, started)

    def _train(self, work: Work, should_stop: Callable[[], bool]) -> Trained:
        """Train a chunk. Returns any error of the user's model, data or device."""
        assert self._trainer is not None, "the trainer is opened before the first claim"
        self.leaderboard.database.release_connection()
        self._asked = 0

        def before_step() -> bool:
            self._asked += 1
            self.stop.listen_again()
            return should_stop()

        self.stop.listen_again()
        try:
            return self._trainer.train(work, before_step, self._on_epoch)
        except BaseException as error:
            self.stop.raise_if_pressed_again(error)
            log.error("%s", trace())
            return error

    def _settle(self, claim: Claim, result: Trained, job: ChainJob, started: float) -> bool | Ending:
        """Record what became of a chunk. Returns the same as `_chunk`."""
        assert self._trainer is not None
        try:
            if isinstance(result, BaseException):
                kept = self._trainer.kept()
                return self.failures.record(claim, result, kept, stepped=self._asked > 1 or bool(kept))
            if isinstance(result, Interrupted):
                self._suspend(claim, result)
                return False
            self._offer(claim, result, job, started)
        except StaleClaimError as error:
            log.warning("%s", error)
            checkpoints.remove(self.files, [file_of(claim)])
            return False
        except CheckpointError as error:
            self.leaderboard.board.give_back(claim, str(error), self.clock())
            raise
        return True

    def _should_stop(self) -> bool:
        """Decide, before each step, whether to stop. A chunk makes its first step even if the job's time is up:
        otherwise, a chunk would never advance if one step takes longer than a job."""
        return self.stop.reason is not None or (self._asked > 1 and self.clock() >= self._job_end)

    def _on_epoch(self, result: EpochResult) -> None:
        self._asked = max(self._asked, 2)  # it has made steps, even if a loop of the user's own asks too rarely
        if self._ahead is not None and not self._ahead.decided:
            self._ahead.epochs.append(result)
        else:
            self._log_epoch(result)

    def _log_epoch(self, result: EpochResult) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        log.info("epoch %d: %s (%.1f s)", result.number, shown, result.seconds)

    def _prepare(self, claim: Claim) -> Work | None:
        """Verify the files that the claim starts from. If one is damaged, report it to the board and return None."""
        parent = suspended = None
        try:
            if claim.suspended_file and claim.suspended_sha256:
                suspended = checkpoints.verify(self.files, claim.suspended_file, claim.suspended_sha256)
        except CheckpointError as error:
            self.leaderboard.board.give_back(claim, f"the suspended state is lost: {error}", self.clock(), True)
            return None
        try:
            if claim.parent_file and claim.parent_sha256 and suspended is None:
                parent = checkpoints.verify(self.files, claim.parent_file, claim.parent_sha256)
        except DamagedCheckpointError as error:
            log.error("%s; its entry is removed from the board", error)
            self.leaderboard.board.condemn(claim, str(error), self.clock())
            return None
        return self._work_of(claim, parent=parent, suspended=suspended)

    def _work_of(self, claim: Claim, **how: Any) -> Work:
        """how: the fields of Work that say where the chunk starts."""
        return Work(
            profile=claim.profile,
            epochs=claim.profile.epochs or self.run.settings.epochs_per_chunk,
            seed=self.run.settings.seed * 1_000_003 + claim.chunk_id,
            repeat=claim.repeat,
            chunk_id=claim.chunk_id,
            generation=claim.generation,
            worker_id=claim.worker_id,
            position=claim.position,
            parent_file=claim.parent_file,
            parent_epochs=claim.parent_epochs,
            **how,
        )

    # --- results

    def _suspend(self, claim: Claim, result: Interrupted) -> None:
        assert self._trainer is not None
        written = self.writer.write_suspended(claim, result.steps, self._trainer.save)
        garbage = self.leaderboard.board.suspend(claim, written.file, written.sha256, self.clock())
        self._remove(claim, *garbage)
        log.info("chunk %d is suspended after %d steps of an epoch", claim.chunk_id, result.steps)

    def _offer(self, claim: Claim, result: Finished, job: ChainJob, started: float) -> None:
        """Record a result. If the board would admit it, its checkpoint is written first; if the trainer can go on
        meanwhile, the chunk that the worker will claim next is trained during that time."""
        assert self._trainer is not None
        metric = self.run.settings.metric
        bar = claim.bar
        if bar is None or metric.better(result.score, than=bar):
            bar = self.leaderboard.board.bar()  # the bar may have risen since the claim
        if not metric.better(result.score, than=bar):
            self._record(claim, result, None, job, started)
            return
        foreseen = self._foresee(claim, result, job) if self._snapshots else None
        save = self._trainer.snapshot() if foreseen is not None else None
        if foreseen is None or save is None:
            self._snapshots = foreseen is None and self._snapshots  # after a refusal, don't ask again
            self._record(claim, result, self.writer.write(claim, result, self._trainer.save), job, started)
            return
        work, following = foreseen
        self._train_ahead(Ahead(self.writer.start(claim, result, started, save), following, job, self.clock()), work)

    def _record(self, claim: Claim, result: Finished, written: Written | None, job: ChainJob, started: float) -> None:
        """Record a result in a transaction, which decides whether the board admits it. If there is time for another
        chunk, the same transaction claims one. written: None if the board would not admit it."""
        board, now = self.leaderboard.board, self.clock()
        self._durations_s.append(now - started)
        if self._goes_on(now):
            at = (job.job_id, job.starts, now, self._lease_until)
            outcome, self._next = board.record_and_claim(claim, candidate(result, written), *at)
        else:
            outcome = board.record(claim, candidate(result, written), now)
        refused = () if outcome.promoted or not written else (written.file,)
        self.writer.background.submit(self._remove, claim, *outcome.collectable, *refused)  # large files take a while
        what, metric = "promoted" if outcome.promoted else "discarded", self.run.settings.metric
        log.info("chunk %d: %s %.6g, %s (%s)", claim.chunk_id, metric.name, result.score, what, outcome.reason)
        assert self._trainer is not None
        self._trainer.judged(outcome.promoted)

    def _goes_on(self, now: float) -> bool:
        return not self.stop.reason and stopping.should_start_chunk(now, self._job_end, self._durations_s, 1)

    # --- training ahead

    def _foresee(self, claim: Claim, result: Finished, job: ChainJob) -> tuple[Work, Claim] | None:
        """Return the chunk that this worker will most likely claim when the result is recorded; None if unknown."""
        now = self.clock()
        if not self._goes_on(now):
            return None
        at = (job.job_id, job.starts, now, self._lease_until)
        foreseen = self.leaderboard.board.foresee(claim, candidate(result, unwritten(claim)), *at)
        if isinstance(foreseen, Over) or foreseen.suspended_file or foreseen.settings_version != self.run.version:
            return None
        in_memory = foreseen.parent_file == file_of(claim)
        parent: Path | None = None
        if foreseen.parent_file is None:
            if self.run.settings.uses_server:  # its sequence gives the real founder another id, and so another seed
                return None
        elif in_memory:
            parent = self.files / foreseen.parent_file
        else:
            try:
                parent = checkpoints.verify(self.files, foreseen.parent_file, foreseen.parent_sha256 or "")
            except CheckpointError:  # the claim will report it
                return None
        work = self._work_of(foreseen, parent=parent, suspended=None, in_memory=in_memory, tentative=True)
        return work, foreseen

    def _train_ahead(self, ahead: Ahead, work: Work) -> None:
        """Train the foreseen chunk. As soon as the checkpoint of the last chunk is complete, its result is recorded and
        the next chunk claimed. If that is another chunk than the foreseen one, the training is thrown away."""
        self._ahead = ahead
        ahead.result = self._train(work, self._should_stop_ahead)
        if not ahead.decided:
            self._decide(ahead)
        if not ahead.confirmed:
            self._ahead = None
        if ahead.error is not None:
            raise ahead.error

    def _should_stop_ahead(self) -> bool:
        ahead = self._ahead
        assert ahead is not None
        if not ahead.decided:
            if not ahead.last.written.done():
                return self.stop.reason is not None or self.clock() >= self._job_end
            self._decide(ahead)
            self.leaderboard.database.release_connection()
        return not ahead.confirmed or self._should_stop()

    def _decide(self, ahead: Ahead) -> None:
        """Record the last result when its checkpoint is complete, and see whether the foreseen chunk is claimed."""
        last, ahead.decided = ahead.last, True
        assert self._trainer is not None
        try:
            self._record(last.claim, last.result, last.written.result(), ahead.job, last.started)
        except BaseException as error:  # raised again when the training has stopped
            self.stop.raise_if_pressed_again(error)
            ahead.error = error
            return
        if isinstance(self._next, Claim) and claiming.same_work(ahead.claim, self._next):
            ahead.claim, ahead.confirmed, self._next = self._next, True, None
            _log_claim(ahead.claim)
            self._trainer.confirmed(self._work_of(ahead.claim, parent=None, suspended=None))
            for result in ahead.epochs:
                self._log_epoch(result)
        elif self._next is not None:
            log.info("the chunk trained ahead was not the next one; its training is thrown away")

    def _remove(self, claim: Claim, *garbage: str) -> None:
        """Delete the given files, and the file with the claim's suspended state, if it has one."""
        checkpoints.remove(self.files, [*garbage, *([claim.suspended_file] if claim.suspended_file else [])])
