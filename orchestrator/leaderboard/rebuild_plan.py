"""Which leaderboard follows from the records beside the checkpoints: pure, for `orch repair`.

A record holds its checkpoint's whole line of ancestors, so every generation that led to the board is known. What
left no record is not known: chunks that were discarded, and lines that have died out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from orchestrator.errors import CheckpointError
from orchestrator.files.checkpoints import SUFFIX
from orchestrator.messages import counted
from orchestrator.records import Entry, Metric, Profile, Promote
from orchestrator.rules import admission, claiming, collecting

# No claim after the repair has a generation that one before it may have had, though it left no file: a worker that
# was taken for dead must find its writes refused. More than a run claims between two checkpoints.
GENERATION_GAP = 1_000_000


# More than any run has; a damaged or forged record must not fill the database, nor overflow its integers.
MOST_WORKERS, MOST_POSITIONS, MOST_GAPS = 1_000_000, 100_000_000, 1_000_000
Number = Annotated[int, Field(ge=0, le=10**15)]
Moment = Annotated[float, Field(ge=0, le=32503680000, allow_inf_nan=False)]  # until the year 3000
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")]
Metrics = dict[Text, FiniteFloat | None]


class EpochRecord(BaseModel):
    model_config = ConfigDict(frozen=True)

    number: Number
    seconds: Seconds
    metrics: Metrics


class Record(BaseModel):
    """What stands beside a checkpoint. Those written by earlier versions lack the ancestors and single epochs."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["candidate", "suspended"]
    file: str
    sha256: Text
    size_bytes: Number
    chunk: Number
    generation: Number
    worker: Annotated[int, Field(ge=0, lt=MOST_WORKERS)]
    position: Annotated[int, Field(ge=0, lt=MOST_POSITIONS)]
    profile: Text
    parent_file: str | None
    created_at: Moment
    score: float | None = None
    epochs: Number = 0
    metrics: Metrics = {}
    results: tuple[EpochRecord, ...] = ()
    train_seconds: Seconds | None = None
    ancestors: tuple[Record, ...] = ()
    launched_at: Moment | None = None
    import_paths: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _names_are_of_their_claims(self) -> Self:
        if self.file != f"g{self.generation:08d}-c{self.chunk:08d}{SUFFIX}":
            raise ValueError(f"its file is named {self.file[:100]!r}, of another claim")
        parent = self.parent_file
        if parent is not None and (not parent.endswith(SUFFIX) or parent.startswith(".")):
            raise ValueError(f"its parent {parent[:100]!r} is no checkpoint of ours")
        older = None if parent is None else collecting.generation_of(parent)
        if parent is not None and (older is None or older >= self.generation):  # so a line of parents has an end
            raise ValueError(f"its parent {parent[:100]!r} is no checkpoint of ours, or of a later claim")
        if (self.score is None and self.kind == "candidate") or not math.isfinite(self.score or 0.0):
            raise ValueError("it has no finite score")
        return self

    @property
    def work(self) -> tuple[str, int]:
        """Which position of which entry it has consumed; of a founder, its own."""
        return (self.parent_file, self.position) if self.parent_file else ("", self.chunk)

    @property
    def trained(self) -> tuple[EpochRecord, ...]:
        """The epochs of its chunk, as far as they are known: the last one is."""
        return self.results or (EpochRecord(number=self.epochs, seconds=0.0, metrics=self.metrics),)


def parse(raw: Mapping[str, Any], file: str | None = None) -> Record:
    """file: that it was found beside. Raises CheckpointError if it is no checkpoint's record."""
    try:
        record = Record.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        place, what = "", "nested too deep"
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            place = ".".join(str(part)[:40] for part in problem["loc"])
            what = problem["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"not a checkpoint's record: {place}{': ' if place else ''}{what}") from error
    if file not in (None, record.file):
        raise CheckpointError(
            f"not a checkpoint's record: its file is named {record.file!r}, and it lies beside {file}"
        )
    return record


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A checkpoint, and the entry that it is or was."""

    record: Record
    founder: str  # file
    start: int
    floor: int
    worked_on: int
    on_board: bool
    known: bool  # False: it must have been there, since another one descends from it, and that is all


@dataclass(frozen=True, slots=True)
class Gap:
    """A position of the entry that `file` is: taken once, but nothing is known of what came of it. The next claim
    takes it again."""

    file: str
    position: int
    profile: str
    worker: int


@dataclass(frozen=True, slots=True)
class RebuildPlan:
    """What is written into the new database."""

    checkpoints: tuple[Rebuilt, ...] = ()  # parents before their children
    suspended: tuple[Record, ...] = ()
    gaps: tuple[Gap, ...] = ()
    generation: int = 0  # the last one that may have been given to a claim
    notes: tuple[str, ...] = ()

    @property
    def board(self) -> list[Rebuilt]:
        return [c for c in self.checkpoints if c.on_board]

    @property
    def workers(self) -> int:
        """Workers that are named in it, at least."""
        named = [c.record.worker for c in self.checkpoints] + [r.worker for r in self.suspended]
        return max(named, default=-1) + 1


@dataclass
class _Family:
    """All checkpoints that are known of, by file, and who descends from whom."""

    records: dict[str, Record]
    here: set[str]  # files that are there, complete
    known: set[str]
    children: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for record in self.records.values():
            if record.parent_file:
                self.children[record.parent_file].append(record)

    def founder(self, file: str) -> str:
        while (parent := self.records[file].parent_file) is not None:
            file = parent
        return file

    def start(self, record: Record) -> int:
        return claiming.child_start(record.position) if record.parent_file else 0

    def consumed(self, file: str) -> set[int]:
        return {child.position for child in self.children[file]}

    def floor(self, record: Record) -> int:
        return claiming.advance_floor(claiming.child_start(record.position), self.consumed(record.file))


def plan(
    records: Sequence[Record], names: Iterable[str], num_models: int, metric: Metric, cycle: Sequence[Profile]
) -> RebuildPlan:
    """The board that follows from the records of files that are complete. Raises CheckpointError if they contradict
    each other.

    names: of every file in the folder, whatever its state, for the generations in them.
    """
    family = _family([r for r in records if r.kind == "candidate"])
    on_board = _board(family, num_models, metric)
    suspended = _suspended([r for r in records if r.kind == "suspended"], family, cycle)
    ordered = sorted(family.records.values(), key=lambda r: r.generation)  # a claim comes after its parent's
    seen = [collecting.generation_of(name) or 0 for name in names] + [r.generation for r in (*ordered, *suspended)]
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
        max(seen, default=0) + GENERATION_GAP,
        tuple(_notes(rebuilt, [r for r in records if r.kind == "suspended"], suspended, num_models)),
    )


def _refuse_twins(records: Iterable[Record]) -> None:
    """Each claim makes one chunk's files, and of a chunk one claim at a time is alive. Raises CheckpointError."""
    chunks: dict[int, Record] = {}
    generations: dict[int, Record] = {}
    for record in records:
        for other in (chunks.setdefault(record.chunk, record), generations.setdefault(record.generation, record)):
            if other is not record:
                raise CheckpointError(
                    f"the records of {other.file} and {record.file} contradict each other: both have the same chunk or "
                    "the same claim. Move the one that is not of this run out of the checkpoints folder, and try again"
                )


def _family(candidates: Sequence[Record]) -> _Family:
    """The candidates that may have been admitted, with their ancestors. Of two that consumed the same position, one
    was refused: its claim had expired, and the position was given to a later claim."""
    ancestors = {a.file: a for record in candidates for a in record.ancestors}
    told = ancestors | {record.file: record for record in candidates}
    chosen: dict[tuple[str, int], Record] = {}
    for record in sorted(told.values(), key=lambda r: (r.file in ancestors, r.generation)):
        chosen[record.work] = record  # who has descendants was admitted, else the later claim was the live one
    records = {record.file: record for record in chosen.values()}
    known = set(records)
    here = {record.file for record in candidates} & known
    for child in list(records.values()):
        if child.parent_file and child.parent_file not in records:
            records[child.parent_file] = _forgotten(child.parent_file, child)
    return _Family(records, here, known)


def _forgotten(file: str, child: Record) -> Record:
    """A parent of which only the name is known; it stands for its founder too."""
    return Record(
        kind="candidate",
        file=file,
        sha256="",
        size_bytes=0,
        chunk=collecting.chunk_of(file) or 0,
        generation=collecting.generation_of(file) or 0,
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
    board: dict[int, tuple[Entry, str]] = {}
    there = [family.records[file] for file in family.here]
    for number, record in enumerate(sorted(there, key=lambda r: (r.created_at, r.generation))):
        assert record.score is not None, "`parse` has seen to it"
        decision = admission.ratchet(record.score, [entry for entry, _ in board.values()], num_models, metric)
        if isinstance(decision, Promote):
            if decision.evicted is not None:
                del board[decision.evicted.entry_id]
            entry = Entry(
                entry_id=number,
                checkpoint_id=number,
                score=record.score,
                start_position=family.start(record),
                floor=family.floor(record),
                worked_on=len(family.children[record.file]),
                founder=record.parent_file is None,
            )
            board[number] = (entry, record.file)
    return {file for _, file in board.values()}


def _suspended(records: Sequence[Record], family: _Family, cycle: Sequence[Profile]) -> list[Record]:
    """Those that can go on: of a parent that is there, under the profile that its position still means, and with
    nothing that says that the chunk was finished since."""
    chunks = {record.chunk for record in family.records.values()}
    consumed = {record.work for record in family.records.values()}
    chosen: dict[tuple[str, int], Record] = {}
    for record in sorted(records, key=lambda r: r.generation):
        parent_is_here = record.parent_file is None or record.parent_file in family.here
        same_profile = claiming.profile_at(record.position, cycle).name == record.profile
        if parent_is_here and same_profile and record.chunk not in chunks and record.work not in consumed:
            chosen[record.work] = record
    by_chunk = {record.chunk: record for record in chosen.values()}  # a chunk may have been suspended twice
    return sorted(by_chunk.values(), key=lambda r: r.generation)


def _gaps(family: _Family, suspended: Sequence[Record], cycle: Sequence[Profile]) -> list[Gap]:
    """Positions below one that was taken: they were taken before it."""
    taken: dict[str, set[int]] = {file: family.consumed(file) for file in family.known}
    for record in suspended:
        if record.parent_file:
            taken[record.parent_file].add(record.position)
    open_positions = sum(
        max(0, max(taken[file], default=0) - claiming.child_start(family.records[file].position) - len(taken[file]))
        for file in taken
    )
    if open_positions > MOST_GAPS:
        raise CheckpointError(
            f"the records leave {open_positions} positions of the cycle open: some of them are damaged, or of no run"
        )
    return [
        Gap(file, position, claiming.profile_at(position, cycle).name, family.records[file].worker)
        for file in sorted(taken)
        for position in range(claiming.child_start(family.records[file].position), max(taken[file], default=0))
        if position not in taken[file]
    ]


def _notes(
    rebuilt: Sequence[Rebuilt], suspended: Collection[Record], going_on: Collection[Record], num_models: int
) -> list[str]:
    """What the user should know that the records can't tell."""
    notes = [
        "chunks that were discarded are forgotten: their epochs and seconds are not counted, and a profile that was "
        "tried on an entry in vain is tried again",
        "test scores are forgotten: `orch evaluate` reads the test set again",
        "why the run stopped, if it had, is forgotten: it is paused now",
    ]
    board = [c for c in rebuilt if c.on_board]
    known = {c.record.file for c in rebuilt if c.known}
    lost = sorted(c.record.file for c in board if c.founder not in known)
    if lost:
        notes.append(f"the founder is unknown of {', '.join(lost)}: no record tells their whole line")
    if len(board) < num_models:
        notes.append(f"{len(board)} of {num_models} models are left; free slots are filled again")
    if len(going_on) < len(suspended):
        notes.append(f"{counted(len(suspended) - len(going_on), 'suspended chunk')} can't go on: begun anew")
    return notes
