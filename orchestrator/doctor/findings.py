"""What the doctor says: one value a thing that was looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")  # better to worse


@dataclass(frozen=True, slots=True)
class Finding:
    """ok: as it should be. note: worth knowing. warning: it works, but not well, or it may fail later.
    error: a run would fail or could be damaged.

    Raises ValueError for a finding that is not ok and does not say what to do.
    """

    level: Level
    topic: str
    what: str
    do: str = ""

    def __post_init__(self) -> None:
        if self.level != "ok" and not self.do:
            raise ValueError(f"{self.topic}: {self.what}: a finding that is not ok says what to do")


def exit_code(findings: Iterable[Finding]) -> int:
    """Of the program: 1 if there is an error, else 0."""
    return int(any(finding.level == "error" for finding in findings))


def worst(findings: Iterable[Finding]) -> Level:
    """ok if there is none."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
