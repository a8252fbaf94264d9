"""Ways to remove single safeguards of orch. The crash tests must detect each missing safeguard."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import sqlalchemy

from orchestrator.files import atomic, checkpoints
from orchestrator.leaderboard import board, engine, results
from orchestrator.leaderboard.schema import chunk
from orchestrator.records import ChunkState, Claim
from orchestrator.rules import admission, collecting


def _no_sync_of_the_file() -> None:
    def publish(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        with open(temporary, "wb") as target:
            fill(target)
        os.rename(temporary, path)
        atomic.sync_folder(path.parent)

    atomic.publish = publish


def _no_sync_of_the_folder() -> None:
    atomic.sync_folder = lambda folder: None


def _no_rename() -> None:
    def publish(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
        with open(path, "wb") as target:
            fill(target)
            target.flush()
            os.fsync(target.fileno())
        atomic.sync_folder(path.parent)

    atomic.publish = publish


def _no_sync_under(ending: bytes) -> Callable[[], None]:
    return lambda: ctypes.CDLL(None).fault_ignore_sync(ending)  # a function of faults.c, which is preloaded


def _pragma(wanted: str) -> Callable[[], None]:
    def change() -> None:
        prepare = engine._prepare_sqlite

        def also(connection: Any, record: object) -> None:
            prepare(connection, record)
            connection.execute(f"PRAGMA {wanted}")

        engine._prepare_sqlite = also

    return change


def _evict_before_the_commit() -> None:
    record = board.Board._record

    def too_soon(self: board.Board, tx: Any, view: Any, claim: Claim, candidate: Any, *others: Any) -> Any:
        policy = self._policy
        assert policy is not None
        decision = admission.ratchet(candidate.score, view.entries, policy.num_models, policy.metric)
        evicted = getattr(decision, "evicted", None)
        if evicted is not None:
            folder = Path(str(self._database.file)).parent / "checkpoints"
            checkpoints.remove(folder, [view.rows[evicted.entry_id].file])
        return record(self, tx, view, claim, candidate, *others)

    board.Board._record = too_soon


def _record_before_the_file() -> None:
    """Record each checkpoint on the board before its file is written."""
    publish = atomic.publish
    waiting: list[Callable[[], None]] = []

    def later(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
        import io

        data = io.BytesIO()
        fill(data)
        waiting.append(lambda: publish(path, lambda target: target.write(data.getvalue())))

    def after(method: Callable[..., Any]) -> Callable[..., Any]:
        def early(self: board.Board, *arguments: Any) -> Any:
            outcome = method(self, *arguments)
            while waiting:
                waiting.pop(0)()
            return outcome

        return early

    atomic.publish = later
    board.Board.record = after(board.Board.record)
    board.Board.record_and_claim = after(board.Board.record_and_claim)


def _no_generation_check() -> None:
    def close(tx: Any, claim: Claim, state: ChunkState, finished_at: float | None, **values: Any) -> None:
        what = sqlalchemy.update(chunk).where(chunk.c.chunk_id == claim.chunk_id)
        tx.execute(what.values(state=state, finished_at=finished_at, **values))

    for module in (results, board):
        with suppress(AttributeError):
            module.close  # noqa: B018
            module.close = close


def _collect_what_is_being_written() -> None:
    collectable = collecting.collectable
    collecting.collectable = lambda files, referenced, live: collectable(files, referenced, ())


def _collect_what_is_on_the_board() -> None:
    collectable = collecting.collectable
    collecting.collectable = lambda files, referenced, live: collectable(files, (), live)


def _no_checksum() -> None:
    checkpoints.verify = lambda folder, file, sha256: folder / file


# For each removed safeguard: the kind of fault that must reveal its absence, and the function that removes it.
MUTATIONS: dict[str, tuple[str, Callable[[], None]]] = {
    "no fsync of a checkpoint": ("power cut", _no_sync_of_the_file),
    "no fsync of the checkpoints' folder": ("power cut", _no_sync_of_the_folder),
    "no fsync by SQLite": ("power cut", _pragma("synchronous=OFF")),
    "no fsync of SQLite's journal": ("power cut", _no_sync_under(b"/orch.db-journal")),
    "no fsync of SQLite's pages": ("power cut", _no_sync_under(b"/orch.db")),
    "a journal that is deleted, and no fsync of the folder": ("power cut", _pragma("journal_mode=DELETE")),
    "no rename": ("kill", _no_rename),
    "no journal": ("kill", _pragma("journal_mode=OFF")),
    "a journal in memory": ("kill", _pragma("journal_mode=MEMORY")),
    "the evicted file is deleted before the commit": ("kill", _evict_before_the_commit),
    "the board records a checkpoint before its file is written": ("kill", _record_before_the_file),
    "no generation check": ("zombie", _no_generation_check),
    "files on the board are collected": ("kill", _collect_what_is_on_the_board),
    "no checksum": ("truncated", _no_checksum),
}
