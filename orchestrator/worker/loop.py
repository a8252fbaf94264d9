"""The main loop of a job: claim, train, publish and ratchet until time is up. The caller supplies trainer and clock."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator.cluster.protocol import ThisJob
from orchestrator.errors import CheckpointError, DamagedCheckpointError, OrchError, StaleClaimError
from orchestrator.files import checkpoints, disk_budget
from orchestrator.files.checkpoint_record import CheckpointRecord, lineage
from orchestrator.files.checkpoints import Written
from orchestrator.files.run_folder import CHECKPOINTS
from orchestrator.messages import counted
from orchestrator.records import Candidate, ChainJob, Claim, EpochResult, Finished, Interrupted, Over, Started, Work
from orchestrator.rules import stopping
from orchestrator.rules.checkpoint_names import SUFFIX, checkpoint_stem
from orchestrator.worker.mending import reconcile
from orchestrator.worker.opened_run import OpenedRun
from orchestrator.worker.successor import Successor
from orchestrator.worker.trainer import Ending, StopFlag, Trainer

log = logging.getLogger("orch")


@dataclass
class JobLoop:
    """The work of one job of a chain."""

    run: OpenedRun
    this_job: ThisJob
    open_trainer: Callable[[], Trainer]
    clock: Callable[[], float]
    stop: StopFlag = field(default_factory=StopFlag)

    def __post_init__(self) -> None:
        self.leaderboard = self.run.leaderboard
        self.files = self.run.folder / CHECKPOINTS
        self._trainer: Trainer | None = None
        self._next: Claim | Over | None = None  # what record_and_claim returned for the next chunk
        self._durations_s: list[float] = []  # durations of recent chunks, the latest last
        self._origin: dict[str, Any] | None = None
        self._stepped = False  # whether the current chunk has made a step
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
        try:
            successor.submit()
            reconcile(self.leaderboard, self.run.queue, self.run.settings, self.clock())
            removed = checkpoints.collect(self.files, self.leaderboard.reader.references)
            if removed:
                log.info("deleted %d files that are no longer needed", len(removed))
            if self._may_work():
                self._trainer = self.open_trainer()
                self._began = self.clock()
                self._job_end = min(self._job_end, self._began + self.this_job.working_s())
            ending = self._work(job, successor)
        except StaleClaimError as error:
            ending = Ending(str(error))
        except Exception as error:  # the next job of the chain tries again, until there are max_failures in a row
            log.error("%s", traceback.format_exc())
            ending = Ending(f"{type(error).__name__}: {error}", error=True)
        try:
            self._finish(job, successor, ending)
        except OrchError as error:  # another worker or `orch status` will see that the job is gone and repair the chain
            log.error("the job ends, but its end could not be recorded in the database: %s", error)
            return Ending(f"{type(error).__name__}: {error}", error=True)
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
        link, why_not = chains.end(job, ending.outcome, ending.error, self.clock(), max_failures)
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
        chunks = failed = 0
        while True:
            if self.stop.reason:
                return Ending(f"stopped by {self.stop.reason}")
            successor.submit()
            now = self.clock()
            claim, self._next = self._next, None
            if claim is None:
                if not stopping.should_start_chunk(now, self._job_end, self._durations_s, chunks):
                    return Ending("no time is left for another chunk")
                claim = self.leaderboard.board.claim(job.worker_id, job.job_id, job.starts, now, self._lease_until)
            if isinstance(claim, Over):
                return Ending(claim.reason)
            what = (claim.profile.name, claim.position, claim.parent_file or "a founder")
            log.info("chunk %d (generation %d): %s at position %d of %s", claim.chunk_id, claim.generation, *what)
            if claim.settings_version != self.run.version:
                self._take_amendment()
            result = self._chunk(claim, job)
            if isinstance(result, Ending):
                failed += 1
                if failed > 1 or result.final:  # this process or node may be broken, so continue in a new job
                    return result
            elif not result:
                continue
            else:
                failed = 0
            chunks += 1

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
        self.leaderboard.database.release_connection()
        self._stepped = False
        try:
            result = self._trainer.train(work, self._should_stop, self._on_epoch)
        except Exception as error:  # from the user's model, data or device
            log.error("%s", traceback.format_exc())
            message = f"{type(error).__name__}: {error}"
            failures = self.leaderboard.board.fail(claim, message, self.clock())
            self._remove(claim)
            outcome = f"chunk {claim.chunk_id} failed ({failures} in a row): {message}"
            return Ending(outcome, final=failures >= self.run.settings.max_failures)
        try:
            if isinstance(result, Interrupted):
                self._suspend(claim, result)
                return False
            self._offer(claim, result, job, started)
        except StaleClaimError as error:
            log.warning("%s", error)
            checkpoints.remove(self.files, [checkpoint_stem(claim.generation, claim.chunk_id) + SUFFIX])
            return False
        except CheckpointError as error:
            self.leaderboard.board.give_back(claim, str(error), self.clock())
            raise
        return True

    def _should_stop(self) -> bool:
        """Decide, before each step, whether to stop. A chunk makes its first step even if the job's time is up:
        otherwise, a chunk would never advance if one step takes longer than a job."""
        first, self._stepped = not self._stepped, True
        return self.stop.reason is not None or (not first and self.clock() >= self._job_end)

    def _on_epoch(self, result: EpochResult) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        log.info("epoch %d: %s (%.1f s)", result.number, shown, result.seconds)

    def _prepare(self, claim: Claim) -> Work | None:
        """Verify the files that the claim starts from. If one is damaged, report it to the board and return None."""
        parent = suspended = None
        try:
            if claim.suspended_file and claim.suspended_sha256:
                suspended = checkpoints.verify(self.files, claim.suspended_file, claim.suspended_sha256)
        except CheckpointError as error:
            self.leaderboard.board.give_back(claim, f"the suspended state is lost: {error}", self.clock())
            return None
        try:
            if claim.parent_file and claim.parent_sha256 and suspended is None:
                parent = checkpoints.verify(self.files, claim.parent_file, claim.parent_sha256)
        except DamagedCheckpointError as error:
            log.error("%s; its entry is removed from the board", error)
            self.leaderboard.board.condemn(claim, str(error), self.clock())
            return None
        return Work(
            profile=claim.profile,
            epochs=self.run.settings.epochs_per_chunk,
            seed=self.run.settings.seed * 1_000_003 + claim.chunk_id,
            repeat=claim.repeat,
            parent=parent,
            suspended=suspended,
            chunk_id=claim.chunk_id,
            generation=claim.generation,
            worker_id=claim.worker_id,
            position=claim.position,
            parent_file=claim.parent_file,
            parent_epochs=claim.parent_epochs,
        )

    # --- results

    def _suspend(self, claim: Claim, result: Interrupted) -> None:
        written = self._write(claim, kind="suspended", step=result.steps)
        garbage = self.leaderboard.board.suspend(claim, written.file, written.sha256, self.clock())
        self._remove(claim, *garbage)
        log.info("chunk %d is suspended after %d steps of an epoch", claim.chunk_id, result.steps)

    def _offer(self, claim: Claim, result: Finished, job: ChainJob, started: float) -> None:
        """Write the checkpoint if the board would admit it. Then record the result in a transaction, which decides
        whether the board admits it. If there is time for another chunk, the same transaction claims one."""
        metric = self.run.settings.metric
        bar = claim.bar
        if bar is None or metric.better(result.score, than=bar):
            bar = self.leaderboard.board.bar()  # the bar may have risen since the claim
        written: Written | None = None
        if metric.better(result.score, than=bar):
            written = self._write(
                claim,
                kind="candidate",
                score=result.score,
                epochs=result.epochs,
                metrics=dict(result.results[-1].metrics),
                results=[asdict(epoch) for epoch in result.results],
                train_seconds=result.train_seconds,
            )
        file = (written.file, written.sha256, written.size_bytes) if written else ()
        candidate = Candidate(result.score, result.epochs, result.results, result.train_seconds, *file)
        board, now = self.leaderboard.board, self.clock()
        self._durations_s.append(now - started)
        if not self.stop.reason and stopping.should_start_chunk(now, self._job_end, self._durations_s, 1):
            at = (job.job_id, job.starts, now, self._lease_until)
            outcome, self._next = board.record_and_claim(claim, candidate, *at)
        else:
            outcome = board.record(claim, candidate, now)
        refused = () if outcome.promoted or not written else (written.file,)
        self._remove(claim, *outcome.collectable, *refused)
        what = "promoted" if outcome.promoted else "discarded"
        log.info("chunk %d: %s %.6g, %s (%s)", claim.chunk_id, metric.name, result.score, what, outcome.reason)
        assert self._trainer is not None
        self._trainer.judged(outcome.promoted)

    def _write(self, claim: Claim, **result: Any) -> Written:
        """Write the checkpoint and its record. result: those fields of the record that describe the chunk's result."""
        assert self._trainer is not None
        if self._origin is None:
            self._origin = self.leaderboard.run_state.origin()
        if self.run.settings.max_disk_gb is not None:
            references = self.leaderboard.reader.references
            disk_budget.make_room(self.run.folder, self.run.settings.max_disk_gb, references, self._trainer.save)
        about_claim: dict[str, Any] = {
            "chunk": claim.chunk_id,
            "generation": claim.generation,
            "worker": claim.worker_id,
            "position": claim.position,
            "profile": claim.profile.name,
            "parent_file": claim.parent_file,
            "ancestors": lineage(self.files, claim.parent_file),
            "created_at": self.clock(),
        }

        def record(written: Written) -> CheckpointRecord:
            return CheckpointRecord(**result, **about_claim, **asdict(written), **(self._origin or {}))

        stem = checkpoint_stem(claim.generation, claim.chunk_id)
        return checkpoints.write(self.files, stem, self._trainer.save, record)

    def _remove(self, claim: Claim, *garbage: str) -> None:
        """Delete the given files, and the file with the claim's suspended state, if it has one."""
        checkpoints.remove(self.files, [*garbage, *([claim.suspended_file] if claim.suspended_file else [])])
