"""Write a chunk's checkpoint with its record: at once, or in another thread while the next chunk trains."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from orchestrator.files import checkpoints, disk_budget
from orchestrator.files.checkpoint_record import CheckpointRecord, lineage
from orchestrator.files.checkpoints import Written
from orchestrator.files.run_folder import CHECKPOINTS
from orchestrator.records import Candidate, Claim, Finished
from orchestrator.rules.checkpoint_names import SUFFIX, checkpoint_stem
from orchestrator.worker.opened_run import OpenedRun

Save = Callable[[IO[bytes]], None]  # writes a training state to a file


@dataclass(frozen=True)
class Unrecorded:
    """A finished chunk whose checkpoint is being written. Only when the file is complete is the result recorded."""

    claim: Claim
    result: Finished
    started: float  # when the chunk began
    written: Future[Written]


def file_of(claim: Claim) -> str:
    """Return the name of the checkpoint that a claim's chunk writes."""
    return checkpoint_stem(claim.generation, claim.chunk_id) + SUFFIX


def unwritten(claim: Claim) -> Written:
    """Return the claim's checkpoint as it will be, before it is written: the checksum and the size are not known."""
    return Written(file_of(claim), sha256="", size_bytes=0)


def candidate(result: Finished, written: Written | None) -> Candidate:
    file = (written.file, written.sha256, written.size_bytes) if written else ()
    return Candidate(result.score, result.epochs, result.results, result.train_seconds, *file)


def thread() -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of one job."""

    run: OpenedRun
    clock: Callable[[], float]
    background: Executor = field(default_factory=thread)
    _origin: dict[str, Any] | None = None

    def write_suspended(self, claim: Claim, steps: int, save: Save) -> Written:
        """Write the state of an interrupted chunk. steps: trained in the interrupted epoch. Raises CheckpointError."""
        return self._prepared(claim, save, kind="suspended", step=steps)()

    def write(self, claim: Claim, result: Finished, save: Save) -> Written:
        """Write the state of a finished chunk. Raises CheckpointError."""
        return self._candidate(claim, result, save)()

    def start(self, claim: Claim, result: Finished, started: float, save: Save) -> Unrecorded:
        """Like `write`, in another thread. Raises NoSpaceError if the run's disk budget has no room."""
        return Unrecorded(claim, result, started, self.background.submit(self._candidate(claim, result, save)))

    def _candidate(self, claim: Claim, result: Finished, save: Save) -> Callable[[], Written]:
        return self._prepared(
            claim,
            save,
            kind="candidate",
            score=result.score,
            epochs=result.epochs,
            metrics=dict(result.results[-1].metrics),
            results=[asdict(epoch) for epoch in result.results],
            train_seconds=result.train_seconds,
        )

    def _prepared(self, claim: Claim, save: Save, **result: Any) -> Callable[[], Written]:
        """Make room, and return a function that writes the checkpoint and its record without using the database.

        result: those fields of the record that describe the chunk's result.
        """
        folder = self.run.folder / CHECKPOINTS
        if self._origin is None:
            self._origin = self.run.leaderboard.run_state.origin()
        if self.run.settings.max_disk_gb is not None:
            references = self.run.leaderboard.reader.references
            disk_budget.make_room(self.run.folder, self.run.settings.max_disk_gb, references, save)
        about: dict[str, Any] = self._origin | {
            "chunk": claim.chunk_id,
            "generation": claim.generation,
            "worker": claim.worker_id,
            "position": claim.position,
            "profile": claim.profile.name,
            "parent_file": claim.parent_file,
            "ancestors": lineage(folder, claim.parent_file),
            "created_at": self.clock(),
        }

        def record(written: Written) -> CheckpointRecord:
            return CheckpointRecord(**result, **about, **asdict(written))

        stem = checkpoint_stem(claim.generation, claim.chunk_id)
        return lambda: checkpoints.write(folder, stem, save, record)
