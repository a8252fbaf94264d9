"""Which leaderboard follows from the records beside the checkpoints: pure, for `orch repair`.

A record holds its checkpoint's whole line of ancestors, so every checkpoint that led to the board is known. Discarded
chunks and lines that have died out left no record, so nothing is known about them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.errors import CheckpointError
from orchestrator.files.checkpoint_record import CheckpointRecord
from orchestrator.messages import counted
from orchestrator.records import Entry, Metric, Profile
from orchestrator.rules import admission, claiming
from orchestrator.rules.admission import Promote
from orchestrator.rules.checkpoint_names import chunk_of, generation_of

# More than a run claims between two checkpoints. Claims after the repair get generations that no earlier claim can
# have had, even one that left no file: a worker that was taken for dead finds its writes refused.
GENERATION_GAP = 1_000_000
MOST_GAPS = 1_000_000  # more than any run has; damaged records must not fill the database


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A checkpoint, and the entry that it is or was."""

    record: CheckpointRecord
    founder: str  # file
    start: int
    floor: int
    worked_on: int
    on_board: bool
    known: bool  # False: nothing is known but that another one descends from it


@dataclass(frozen=True, slots=True)
class Gap:
    """A position of the entry with this file that was taken before, with an unknown result. The next claim takes it
    again."""

    file: str
    position: int
    profile: str
    worker: int


@dataclass(frozen=True, slots=True)
class RebuildPlan:
    """What is written into the new database."""

    checkpoints: tuple[Rebuilt, ...] = ()  # parents before their children
    suspended: tuple[CheckpointRecord, ...] = ()
    gaps: tuple[Gap, ...] = ()
    generation: int = 0  # the last one that a claim may have
    notes: tuple[str, ...] = ()

    @property
    def board(self) -> list[Rebuilt]:
        return [c for c in self.checkpoints if c.on_board]

    @property
    def workers(self) -> int:
        """How many workers there were at least."""
        named = [c.record.worker for c in self.checkpoints] + [r.worker for r in self.suspended]
        return max(named, default=-1) + 1


@dataclass
class _Family:
    """All checkpoints that the records mention, by file, and their children."""

    records: dict[str, CheckpointRecord]
    complete: set[str]  # files that exist and are whole
    known: set[str]
    children: dict[str, list[CheckpointRecord]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for record in self.records.values():
            if record.parent_file:
                self.children[record.parent_file].append(record)

    def founder(self, file: str) -> str:
        while (parent := self.records[file].parent_file) is not None:
            file = parent
        return file

    def start(self, record: CheckpointRecord) -> int:
        return claiming.child_start(record.position) if record.parent_file else 0

    def consumed(self, file: str) -> set[int]:
        return {child.position for child in self.children[file]}

    def floor(self, record: CheckpointRecord) -> int:
        return claiming.advance_floor(claiming.child_start(record.position), self.consumed(record.file))


def plan(
    records: Sequence[CheckpointRecord], names: Iterable[str], num_models: int, metric: Metric, cycle: Sequence[Profile]
) -> RebuildPlan:
    """The board that follows from the records of complete files. Raises CheckpointError if they contradict each other.

    names: of all files in the folder, whole or not, for the generations in them.
    """
    family = _family([r for r in records if r.kind == "candidate"])
    on_board = _board(family, num_models, metric)
    suspended = _suspended([r for r in records if r.kind == "suspended"], family, cycle)
    ordered = sorted(family.records.values(), key=lambda r: r.generation)  # a claim comes after its parent's
    generations = [generation_of(name) or 0 for name in names] + [r.generation for r in (*ordered, *suspended)]
    _refuse_twins([*ordered, *suspended])
    rebuilt = tuple(
        Rebuilt(
            record,
            family.founder(record.file),
            family.start(record),
            family.floor(record),
            len(family.children[record.file]),
            record.file in on_board,
            record.file in family.known,
        )
        for record in ordered
    )
    return RebuildPlan(
        rebuilt,
        tuple(suspended),
        tuple(_gaps(family, suspended, cycle)),
        max(generations, default=0) + GENERATION_GAP,
        tuple(_notes(rebuilt, sum(r.kind == "suspended" for r in records) - len(suspended), num_models)),
    )


def _refuse_twins(records: Iterable[CheckpointRecord]) -> None:
    """Raises CheckpointError if two records have the same chunk or generation: a claim writes one checkpoint."""
    chunks: dict[int, CheckpointRecord] = {}
    generations: dict[int, CheckpointRecord] = {}
    for record in records:
        for other in (chunks.setdefault(record.chunk, record), generations.setdefault(record.generation, record)):
            if other is not record:
                raise CheckpointError(
                    f"the records of {other.file} and {record.file} contradict each other: both have the same chunk or "
                    "the same claim. Move the one of another run out of the checkpoints folder, and try again"
                )


def _family(candidates: Sequence[CheckpointRecord]) -> _Family:
    """The candidates that may have been admitted, with their ancestors. If two consumed the same position, one was
    refused: its claim had expired, and a later claim took the position."""
    ancestors = {a.file: a for record in candidates for a in record.ancestors}
    mentioned = ancestors | {record.file: record for record in candidates}
    chosen: dict[tuple[str, int], CheckpointRecord] = {}
    for record in sorted(mentioned.values(), key=lambda r: (r.file in ancestors, r.generation)):
        chosen[record.work] = record  # one with descendants was admitted; otherwise the later claim was
    records = {record.file: record for record in chosen.values()}
    known = set(records)
    complete = {record.file for record in candidates} & known
    for child in list(records.values()):
        if child.parent_file and child.parent_file not in records:
            records[child.parent_file] = _forgotten(child.parent_file, child)
    return _Family(records, complete, known)


def _forgotten(file: str, child: CheckpointRecord) -> CheckpointRecord:
    """A parent of which only the name is known; it is taken for the founder."""
    return CheckpointRecord(
        kind="candidate",
        file=file,
        sha256="",
        size_bytes=0,
        chunk=chunk_of(file) or 0,
        generation=generation_of(file) or 0,
        worker=child.worker,
        position=0,
        profile="unknown",
        parent_file=None,
        created_at=child.created_at,
        score=0.0,
        epochs=max(0, child.epochs - len(child.trained)),
    )


def _board(family: _Family, num_models: int, metric: Metric) -> set[str]:
    """The ratchet again, in the order in which the files were written."""
    board: list[Entry] = []
    candidates = sorted((family.records[f] for f in family.complete), key=lambda r: (r.created_at, r.generation))
    for number, record in enumerate(candidates):
        assert record.score is not None, "checked by CheckpointRecord"
        decision = admission.ratchet(record.score, board, num_models, metric)
        if isinstance(decision, Promote):
            entry = Entry(
                entry_id=number,
                checkpoint_id=number,
                score=record.score,
                start_position=family.start(record),
                floor=family.floor(record),
                worked_on=len(family.children[record.file]),
                founder=record.parent_file is None,
            )
            board = [*(other for other in board if other is not decision.evicted), entry]
    return {candidates[entry.entry_id].file for entry in board}


def _suspended(
    records: Sequence[CheckpointRecord], family: _Family, cycle: Sequence[Profile]
) -> list[CheckpointRecord]:
    """Those that can go on: their parent is complete, their position has the same profile still, and no record shows
    that the chunk was finished later."""
    chunks = {record.chunk for record in family.records.values()}
    consumed = {record.work for record in family.records.values()}
    chosen: dict[tuple[str, int], CheckpointRecord] = {}
    for record in sorted(records, key=lambda r: r.generation):
        parent_is_complete = record.parent_file is None or record.parent_file in family.complete
        same_profile = claiming.profile_at(record.position, cycle).name == record.profile
        if parent_is_complete and same_profile and record.chunk not in chunks and record.work not in consumed:
            chosen[record.work] = record
    by_chunk = {record.chunk: record for record in chosen.values()}  # a chunk may have been suspended twice
    return sorted(by_chunk.values(), key=lambda r: r.generation)


def _gaps(family: _Family, suspended: Sequence[CheckpointRecord], cycle: Sequence[Profile]) -> list[Gap]:
    """Positions that must have been taken, since one above them was."""
    taken: dict[str, set[int]] = {file: family.consumed(file) for file in family.known}
    for record in suspended:
        if record.parent_file:
            taken[record.parent_file].add(record.position)
    gaps = []
    for file in sorted(taken):
        worker = family.records[file].worker
        for position in range(claiming.child_start(family.records[file].position), max(taken[file], default=0)):
            if position not in taken[file]:
                gaps.append(Gap(file, position, claiming.profile_at(position, cycle).name, worker))
            if len(gaps) > MOST_GAPS:
                raise CheckpointError(
                    f"the records leave more than {MOST_GAPS} positions of the cycle open: some are damaged or forged"
                )
    return gaps


def _notes(rebuilt: Sequence[Rebuilt], given_up: int, num_models: int) -> list[str]:
    """What the user should know: all that the records do not hold. given_up: suspended chunks that can't go on."""
    notes = [
        "chunks that were discarded are forgotten: their epochs and seconds are not counted, and a profile that "
        "did not improve an entry is tried on it again",
        "test scores are forgotten: `orch evaluate` reads the test set again",
        "why the run stopped, if it had, is forgotten: it is paused now",
    ]
    board = [c for c in rebuilt if c.on_board]
    known = {c.record.file for c in rebuilt if c.known}
    lost = sorted(c.record.file for c in board if c.founder not in known)
    if lost:
        notes.append(f"the founder of {', '.join(lost)} is unknown: no record holds their whole line")
    if len(board) < num_models:
        notes.append(f"{len(board)} of {num_models} models are left; free slots are filled again")
    if given_up:
        notes.append(f"{counted(given_up, 'suspended chunk')} can't go on and must begin again")
    return notes
