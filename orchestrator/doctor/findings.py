"""The doctor's findings: one `Finding` for each check."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")  # from best to worst


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. Levels: ok. note: information. warning: a run works, but not well, or may fail later.
    error: a run would fail or could be damaged.

    Raises ValueError for a finding that is not ok and has no advice in `do`.
    """

    level: Level
    topic: str
    what: str
    do: str = ""

    def __post_init__(self) -> None:
        if self.level != "ok" and not self.do:
            raise ValueError(f"{self.topic}: {self.what}: a finding that is not ok must say what to do")


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the program's exit code: 1 if there is an error, else 0."""
    return int(any(finding.level == "error" for finding in findings))


def worst(findings: Iterable[Finding]) -> Level:
    """Return the worst level; ok if there are no findings."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")
