"""Derive a leaderboard from the records beside the checkpoints, for `orch repair`. Pure functions.

A record contains its checkpoint's whole lineage, so all ancestors of the board's entries are known. Discarded chunks
and lineages that died out left no record, so nothing is known about them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.errors import CheckpointError
from orchestrator.files.checkpoint_record import CheckpointRecord
from orchestrator.messages import counted
from orchestrator.profile import Metric, Profile
from orchestrator.records import Entry
from orchestrator.rules import admission, claiming
from orchestrator.rules.admission import Promote
from orchestrator.rules.checkpoint_names import chunk_of, generation_of

# Added to the highest generation found. New generations must be higher than all old ones, even those that left no file:
# then the writes of a worker that was wrongly presumed dead are refused. No run issues this many generations between
# two checkpoints.
GENERATION_GAP = 1_000_000
MOST_GAPS = 1_000_000  # more than any run has; a limit, so that damaged records can't fill the database


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A checkpoint with its current or former entry."""

    record: CheckpointRecord
    founder: str  # the founder's file
    start: int
    floor: int
    worked_on: int
    on_board: bool
    known: bool  # False: the checkpoint has no record; another record names it as a parent


@dataclass(frozen=True, slots=True)
class Gap:
    """A position that was claimed before the repair, but whose result is unknown. It will be claimed again. file: the
    file of the entry's checkpoint."""

    file: str
    position: int
    profile: str
    worker: int


@dataclass(frozen=True, slots=True)
class RebuildPlan:
    """The contents of the new database."""

    checkpoints: tuple[Rebuilt, ...] = ()  # parents before their children
    suspended: tuple[CheckpointRecord, ...] = ()
    gaps: tuple[Gap, ...] = ()
    generation: int = 0  # the highest generation that a claim from before the repair may have
    notes: tuple[str, ...] = ()

    @property
    def board(self) -> list[Rebuilt]:
        return [c for c in self.checkpoints if c.on_board]

    @property
    def workers(self) -> int:
        """Return one more than the highest worker in the records."""
        named = [c.record.worker for c in self.checkpoints] + [r.worker for r in self.suspended]
        return max(named, default=-1) + 1


@dataclass
class _Family:
    """All checkpoints that the records mention, by file, and their children."""

    records: dict[str, CheckpointRecord]
    complete: set[str]  # files that exist and are intact
    known: set[str]  # files that a record describes
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
    """Derive the board from the records of complete files. Raises CheckpointError if the records contradict each other.

    names: the names of all files in the folder, intact or not. They count for the highest generation too.
    """
    family = _family([r for r in records if r.kind == "candidate"])
    on_board = _board(family, num_models, metric)
    suspended = _suspended([r for r in records if r.kind == "suspended"], family, cycle)
    ordered = sorted(family.records.values(), key=lambda r: r.generation)  # parents before children
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
    """Raise CheckpointError if two records share a chunk or a generation: each claim writes only one checkpoint."""
    chunks: dict[int, CheckpointRecord] = {}
    generations: dict[int, CheckpointRecord] = {}
    for record in records:
        for other in (chunks.setdefault(record.chunk, record), generations.setdefault(record.generation, record)):
            if other is not record:
                raise CheckpointError(
                    f"the records of {other.file} and {record.file} contradict each other: both have the same chunk or "
                    "claim. Move the file that belongs to another run out of the checkpoints folder, and try again"
                )


def _family(candidates: Sequence[CheckpointRecord]) -> _Family:
    """Collect the candidates that may have been promoted, and their ancestors. If two consumed the same position, keep
    only one: the claim of the other had expired, so its result was refused."""
    ancestors = {a.file: a for record in candidates for a in record.ancestors}
    mentioned = ancestors | {record.file: record for record in candidates}
    chosen: dict[tuple[str, int], CheckpointRecord] = {}
    for record in sorted(mentioned.values(), key=lambda r: (r.file in ancestors, r.generation)):
        chosen[record.work] = record  # the last one wins: a record with descendants, else the later claim
    records = {record.file: record for record in chosen.values()}
    known = set(records)
    complete = {record.file for record in candidates} & known
    for child in list(records.values()):
        if child.parent_file and child.parent_file not in records:
            records[child.parent_file] = _forgotten(child.parent_file, child)
    return _Family(records, complete, known)


def _forgotten(file: str, child: CheckpointRecord) -> CheckpointRecord:
    """Return a substitute for the missing record of a parent. The parent is treated as a founder."""
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
    """Apply the ratchet to the candidates in order of creation. Returns the files that are on the board at the end."""
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
    """Return the suspended chunks that can continue: the parent's file is intact, the position still has the same
    profile, and no record shows that the chunk was finished later."""
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
    """Return the positions that were claimed but have no record. An entry's lower positions are claimed first."""
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
                    f"the records leave more than {MOST_GAPS} positions of the cycle open; they are damaged or forged"
                )
    return gaps


def _notes(rebuilt: Sequence[Rebuilt], given_up: int, num_models: int) -> list[str]:
    """Return notes for the user on what is lost. given_up: number of suspended chunks that can't continue."""
    notes = [
        "chunks that were discarded are forgotten: their epochs and seconds are not counted, and a profile that "
        "did not improve an entry is used on it again",
        "test scores are forgotten: run `orch evaluate` to compute them again",
        "the run's state before the repair is forgotten: the run is paused now",
    ]
    board = [c for c in rebuilt if c.on_board]
    known = {c.record.file for c in rebuilt if c.known}
    lost = sorted(c.record.file for c in board if c.founder not in known)
    if lost:
        notes.append(f"the founder of {', '.join(lost)} is unknown: no record holds their whole lineage")
    if len(board) < num_models:
        notes.append(f"{len(board)} of {num_models} models are left; new chunks will fill the free slots")
    if given_up:
        notes.append(f"{counted(given_up, 'suspended chunk')} can't continue and must begin again")
    return notes
