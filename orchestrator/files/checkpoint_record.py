"""The JSON record next to each checkpoint: `orch repair` can rebuild the board from these records alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orchestrator.errors import CheckpointError
from orchestrator.rules.checkpoint_names import SUFFIX, checkpoint_stem, generation_of, is_file_name, record_name

# Higher than in any real run. These limits prevent a damaged or forged record from filling the database or overflowing
# its integers.
MOST_WORKERS, MOST_POSITIONS = 1_000_000, 100_000_000
OF_THE_LAST = {"ancestors", "launched_at", "import_paths"}  # fields left out of the copies of ancestors' records


def _finite_or_none(value: Any) -> Any:
    """Replace NaN and infinities by None, because JSON has neither."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[int, Field(ge=0, le=10**15)]
Moment = Annotated[float, Field(ge=0, le=32503680000, allow_inf_nan=False)]  # until the year 3000
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")]
Metrics = dict[Text, Annotated[float | None, BeforeValidator(_finite_or_none)]]


class EpochRecord(BaseModel):
    model_config = ConfigDict(frozen=True)

    number: Number  # epochs of the whole lineage, counted from 1
    seconds: Seconds
    metrics: Metrics


class CheckpointRecord(BaseModel):
    """The contents of a record. Records of earlier versions have neither ancestors nor results of single epochs."""

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
    epochs: Number = 0  # of the whole lineage
    metrics: Metrics = {}
    results: tuple[EpochRecord, ...] = ()
    train_seconds: Seconds | None = None
    step: Number | None = None  # suspended chunks: number of steps trained in the interrupted epoch
    ancestors: tuple[CheckpointRecord, ...] = ()
    launched_at: Moment | None = None
    import_paths: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.file != checkpoint_stem(self.generation, self.chunk) + SUFFIX:
            raise ValueError(f"its file is named {self.file[:100]!r}, which belongs to another claim")
        parent = self.parent_file
        if parent is not None:
            older = generation_of(parent) if parent.endswith(SUFFIX) and not parent.startswith(".") else None
            if older is None or older >= self.generation:  # so a checkpoint can't be its own ancestor
                raise ValueError(f"its parent {parent[:100]!r} is not a checkpoint of an earlier claim")
        if (self.score is None and self.kind == "candidate") or not math.isfinite(self.score or 0.0):
            raise ValueError("it has no finite score")
        return self

    @property
    def work(self) -> tuple[str, int]:
        """A key that is equal for chunks that did the same work. Returns (parent's file, position) or, for a founder,
        ("", chunk)."""
        return (self.parent_file, self.position) if self.parent_file else ("", self.chunk)

    @property
    def trained(self) -> tuple[EpochRecord, ...]:
        """The recorded epochs of this chunk: all of them, or in an old record only the last one."""
        return self.results or (EpochRecord(number=self.epochs, seconds=0.0, metrics=self.metrics),)

    def to_json(self) -> str:
        fields = self.model_dump(mode="json", exclude_unset=True)
        return json.dumps(fields, indent=1, allow_nan=False, sort_keys=True)


def parse(raw: Any, file: str | None = None) -> CheckpointRecord:
    """Check a record that was read from JSON. file: the checkpoint that the record must describe; None: any. Raises
    CheckpointError if raw is not a record or describes another checkpoint."""
    try:
        record = CheckpointRecord.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        where, what = "", "nested too deep"
        if isinstance(error, ValidationError):
            problem = error.errors()[0]
            where = ".".join(str(part)[:40] for part in problem["loc"])
            what = problem["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"not a checkpoint's record: {where}{': ' if where else ''}{what}") from error
    if file not in (None, record.file):
        raise CheckpointError(f"not the record of {file}: its file is named {record.file!r}")
    return record


def read_record(folder: Path, file: str) -> CheckpointRecord:
    """Read the record of a checkpoint. Raises CheckpointError if it is missing or not valid."""
    if not is_file_name(file):
        raise CheckpointError(f"{file[:100]!r} does not name a file in {folder}; the database or a record is damaged")
    path = folder / record_name(file)
    try:
        return parse(json.loads(path.read_bytes()), file)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a checkpoint's record: {error}") from error


def lineage(folder: Path, file: str | None) -> tuple[CheckpointRecord, ...]:
    """Return the known records of a checkpoint's lineage, from the founder to the checkpoint itself.

    Each record contains copies of its ancestors' records, because an ancestor's files are deleted some time after the
    ancestor has left the board.
    """
    if file is None:
        return ()
    try:
        last = read_record(folder, file)
    except CheckpointError:
        return ()
    fields: Mapping[str, Any] = last.model_dump(exclude=OF_THE_LAST, exclude_unset=True)
    return (*last.ancestors, CheckpointRecord.model_validate(fields))
