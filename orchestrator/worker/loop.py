"""The loop inside a job: claim, train, publish, ratchet, until time is up. Everything it needs is passed in."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tenacity import Retrying, retry_if_result, stop_after_delay, wait_exponential

from orchestrator.cluster.protocol import Cluster
from orchestrator.errors import (
    CheckpointError,
    ClusterUnreachableError,
    DamagedCheckpointError,
    NoRoomError,
    OrchError,
    StaleClaimError,
    SubmissionError,
)
from orchestrator.files import checkpoints, disk_budget
from orchestrator.files.checkpoint_record import CheckpointRecord, lineage
from orchestrator.files.checkpoints import Written
from orchestrator.leaderboard.leaderboard import Leaderboard
from orchestrator.messages import counted
from orchestrator.records import (
    Candidate,
    ChainJob,
    Claim,
    EpochResult,
    Finished,
    Interrupted,
    JobState,
    Over,
    Started,
    Work,
)
from orchestrator.rules import stopping
from orchestrator.rules.checkpoint_names import SUFFIX, checkpoint_stem
from orchestrator.settings.loading import thaw
from orchestrator.settings.settings import Settings
from orchestrator.worker.mending import reconcile
from orchestrator.worker.trainer import Ending, StopFlag, Trainer

INSIST_S = 300.0
log = logging.getLogger("orch")


@dataclass
class JobLoop:
    """One job of one chain."""

    folder: Path  # the run's
    settings: Settings
    version: int  # of the settings
    leaderboard: Leaderboard
    cluster: Cluster
    open_trainer: Callable[[], Trainer]
    clock: Callable[[], float]
    stop: StopFlag = field(default_factory=StopFlag)

    def __post_init__(self) -> None:
        self.files = self.folder / "checkpoints"
        self._trainer: Trainer | None = None
        self._unsubmitted: ChainJob | None = None
        self._next: Claim | Over | None = None  # claimed with the last result
        self._durations_s: list[float] = []  # of chunks, latest last
        self._origin: dict[str, Any] | None = None
        self._no_room = False  # a submit limit is why
        self._refusal: str | None = None  # why the cluster did not take the successor, for good
        self._stepped = False  # in the chunk at hand
        self._began = 0.0  # when the model and the data were loaded
        self._job_end = 0.0
        self._lease_until = 0.0

    # --- the job

    def run(self, started: Started) -> Ending:
        """Work until the job's time, the run or the chain is over. Never raises for what can be reported."""
        job = started.job
        self._job_end = (job.started_at or self.clock()) + self.cluster.latest_work_s()
        self._lease_until = (job.started_at or self.clock()) + self.cluster.time_limit_s()
        self._unsubmitted = started.successor
        try:
            self._submit_successor(job)
            reconcile(self.leaderboard, self.cluster, self.settings, self.clock())
            removed = checkpoints.collect(self.files, self.leaderboard.reader.references)
            if removed:
                log.info("collected %d files that nothing refers to", len(removed))
            if self._may_work():
                self._trainer = self.open_trainer()
                self._began = self.clock()
                self._job_end = min(self._job_end, self._began + self.cluster.working_s())
            ending = self._work(job)
        except StaleClaimError as error:
            ending = Ending(str(error))
        except Exception as error:  # the chain goes on in a fresh process; too many in a row end it
            log.error("%s", traceback.format_exc())
            ending = Ending(f"{type(error).__name__}: {error}", error=True)
        try:
            self._finish(job, ending)
        except OrchError as error:  # any peer, or `orch status`, sees that the job is gone and mends the chain
            log.error("the job ends, and this could not be written down: %s", error)
            return Ending(f"{type(error).__name__}: {error}", error=True)
        return ending

    def _may_work(self) -> bool:
        """Opening the trainer imports torch and loads data, which takes a while: not for a run that is over,
        and before a claim, so that none is held meanwhile."""
        now = self.clock()
        snapshot = self.leaderboard.run_state.snapshot()
        return (
            not self.stop.reason and now < self._job_end and stopping.may_claim(snapshot.state, now, snapshot.deadline)
        )

    def _finish(self, job: ChainJob, ending: Ending) -> None:
        chains, max_failures = self.leaderboard.chains, self.settings.max_failures
        if chains.wants_successor(job.worker_id, self.clock(), max_failures):
            self._insist_on_successor(job)
            if self._unsubmitted and self._no_room and chains.back_to_queue(job, self._unsubmitted, self.clock()):
                log.info("a submit limit leaves no room for a successor: this job goes back to the queue itself")
                if self.cluster.back_to_queue(job):
                    return
            if self._unsubmitted and self._refusal:  # so that whoever looks next tries anew, and is told
                chains.close([self._unsubmitted], JobState.LOST, self._refusal, self.clock())
        successor, why_not = chains.end(job, ending.outcome, ending.error, self.clock(), max_failures)
        if why_not is not None and successor is not None:
            log.info("no successor: %s", why_not)
            self.cluster.cancel([successor], now=False)
        worker = next(w for w in chains.workers() if w.worker_id == job.worker_id)
        if worker.failures >= max_failures and worker.stopped is None:
            reason = f"{counted(worker.failures, 'failure')} in a row; the last: {ending.outcome}"
            chains.stop_worker(job.worker_id, reason, self.clock())
        log.info("job ends: %s", ending.outcome)

    def _submit_successor(self, job: ChainJob) -> bool:
        """Queue the successor, which is written down already. If the cluster does not take it, another try is
        made before each chunk and at the end; then any peer, or `orch status`, mends the chain.

        False if it is worth another try at once: the cluster does not answer.
        """
        if self._unsubmitted is None:
            return True
        try:
            taken = self.cluster.submit([self._unsubmitted], after=job)
        except SubmissionError as error:
            log.warning("the successor is not queued yet: %s", error)
            self._no_room = isinstance(error, NoRoomError)
            self._refusal = None if isinstance(error, ClusterUnreachableError) else str(error)
            return self._refusal is not None
        self.cluster.cancel(self.leaderboard.chains.submitted(taken), now=True)
        log.info("successor queued: %s", taken[0].cluster_id)
        self._unsubmitted = None
        return True

    def _insist_on_successor(self, job: ChainJob) -> None:
        """The last chance of this job: try for minutes where the cluster does not answer. If it is killed
        meanwhile, nothing is lost but the chain's place, which any peer or `orch status` restores."""
        retrying = Retrying(
            stop=stop_after_delay(INSIST_S),
            wait=wait_exponential(max=30),
            retry=retry_if_result(lambda settled: not settled),
            retry_error_callback=lambda _state: None,
        )
        retrying(self._submit_successor, job)

    # --- the loop

    def _work(self, job: ChainJob) -> Ending:
        self._durations_s = self.leaderboard.reader.recent_chunk_seconds()
        chunks = failed = 0
        while True:
            if self.stop.reason:
                return Ending(f"stopped by {self.stop.reason}")
            self._submit_successor(job)
            now = self.clock()
            claim, self._next = self._next, None
            if claim is None:
                if not stopping.should_start_chunk(now, self._job_end, self._durations_s, chunks):
                    return Ending("no time is left for another chunk")
                claim = self.leaderboard.board.claim(job.worker_id, job.job_id, job.starts, now, self._lease_until)
            if isinstance(claim, Over):
                return Ending(claim.reason)
            log.info(
                "chunk %d (generation %d): %s at position %d of %s",
                claim.chunk_id,
                claim.generation,
                claim.profile.name,
                claim.position,
                claim.parent_file or "a founder",
            )
            if claim.settings_version != self.version:
                self._take_amendment()
            result = self._chunk(claim, job)
            if isinstance(result, Ending):
                failed += 1
                if failed > 1 or result.final:  # perhaps this process or node is broken: go on in a fresh one
                    return result
            elif not result:
                continue
            else:
                failed = 0
            chunks += 1

    def _take_amendment(self) -> None:
        """The settings were changed while this job runs. It can get shorter, but Slurm grants it no more time."""
        text, self.version = self.leaderboard.run_state.settings()
        self.settings = thaw(text)
        self._job_end = min(self._job_end, self._began + self.settings.eon_lifetime)
        log.info("the settings were amended (version %d)", self.version)

    def _chunk(self, claim: Claim, job: ChainJob) -> bool | Ending:
        """One chunk: was it finished, or how did it fail?"""
        work = self._prepare(claim)
        if work is None:
            return False
        assert self._trainer is not None, "opened before anything was claimed"
        started = self.clock()
        self.leaderboard.database.release_connection()
        self._stepped = False
        try:
            result = self._trainer.train(work, self._should_stop, self._on_epoch)
        except Exception as error:  # the user's model, data or device
            log.error("%s", traceback.format_exc())
            message = f"{type(error).__name__}: {error}"
            failures = self.leaderboard.board.fail(claim, message, self.clock())
            checkpoints.remove(self.files, [claim.suspended_file] if claim.suspended_file else [])
            return Ending(
                f"chunk {claim.chunk_id} failed ({failures} in a row): {message}",
                final=failures >= self.settings.max_failures,
            )
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
        """Asked before each step. Time alone does not stop a job before its first: else, where a step takes longer
        than a job is given, nothing would ever be trained."""
        first, self._stepped = not self._stepped, True
        return self.stop.reason is not None or (not first and self.clock() >= self._job_end)

    def _on_epoch(self, result: EpochResult) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
        log.info("epoch %d: %s (%.1f s)", result.number, shown, result.seconds)

    def _prepare(self, claim: Claim) -> Work | None:
        """Check the files that the claim starts from; None if one is damaged, which is then dealt with."""
        parent = suspended = None
        try:
            if claim.suspended_file and claim.suspended_sha256:
                suspended = checkpoints.verify(self.files, claim.suspended_file, claim.suspended_sha256)
        except CheckpointError as error:
            self.leaderboard.board.give_back(claim, f"its suspended state is lost: {error}", self.clock())
            return None
        try:
            if claim.parent_file and claim.parent_sha256 and suspended is None:
                parent = checkpoints.verify(self.files, claim.parent_file, claim.parent_sha256)
        except DamagedCheckpointError as error:
            log.error("%s; its entry leaves the board", error)
            self.leaderboard.board.condemn(claim, str(error), self.clock())
            return None
        return Work(
            profile=claim.profile,
            epochs=self.settings.epochs_per_chunk,
            seed=self.settings.seed * 1_000_003 + claim.chunk_id,
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
        self._remove(claim, garbage)
        log.info("chunk %d is suspended after %d steps of an epoch", claim.chunk_id, result.steps)

    def _offer(self, claim: Claim, result: Finished, job: ChainJob, started: float) -> None:
        """Publish the checkpoint if it would be admitted; the transaction decides again. If there is time for
        another chunk, that is claimed with it."""
        metric = self.settings.policy(0).metric
        bar = claim.bar
        if bar is None or metric.better(result.score, than=bar):
            bar = self.leaderboard.board.bar()  # it has risen, perhaps, since the claim
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
        candidate = Candidate(
            result.score,
            result.epochs,
            result.results,
            result.train_seconds,
            file=written.file if written else None,
            sha256=written.sha256 if written else None,
            size_bytes=written.size_bytes if written else 0,
        )
        board, now = self.leaderboard.board, self.clock()
        self._durations_s.append(now - started)
        if not self.stop.reason and stopping.should_start_chunk(now, self._job_end, self._durations_s, 1):
            at = (job.job_id, job.starts, now, self._lease_until)
            outcome, self._next = board.record_and_claim(claim, candidate, *at)
        else:
            outcome = board.record(claim, candidate, now)
        garbage = outcome.collectable if outcome.promoted or not written else (*outcome.collectable, written.file)
        self._remove(claim, garbage)
        what = "promoted" if outcome.promoted else "discarded"
        log.info("chunk %d: %s %.6g, %s (%s)", claim.chunk_id, metric.name, result.score, what, outcome.reason)
        judged = getattr(self._trainer, "judged", None)  # a trainer of the user's own need not want to know
        if judged is not None:
            judged(outcome.promoted)

    def _write(self, claim: Claim, **result: Any) -> Written:
        """result: the fields of the checkpoint's record that tell what came of the chunk."""
        assert self._trainer is not None
        if self._origin is None:
            self._origin = self.leaderboard.run_state.origin()
        if self.settings.max_disk_gb is not None:
            references = self.leaderboard.reader.references
            disk_budget.make_room(self.folder, self.settings.max_disk_gb, references, self._trainer.save)
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

    def _remove(self, claim: Claim, garbage: tuple[str, ...]) -> None:
        checkpoints.remove(self.files, [*garbage, *([claim.suspended_file] if claim.suspended_file else [])])
