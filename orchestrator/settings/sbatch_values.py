"""What may stand in a batch script's #SBATCH lines. Pure: a line break in a value would begin a line of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.messages import one_line, shown

# orch decides these itself: by its name a job is known, by its dependency a chain holds together.
OWNED = {
    "job-name", "output", "error", "dependency", "array", "open-mode", "nodes", "ntasks", "ntasks-per-node", "parsable",
}  # fmt: skip
# Leases and the end of each job's work are reckoned from these.
INSTEAD = {"time": "slurm.time_min", "signal": "slurm.signal_delay_s"}
_NAME = re.compile(r"[a-z][a-z0-9-]{0,59}")


def option_name(name: str) -> str:
    return name.replace("_", "-")


def is_owned(name: str) -> bool:
    """sbatch takes the beginning of a long option for the whole."""
    return any(owned.startswith(option_name(name)) for owned in OWNED) if name else False


def checked_additional(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option of sbatch that can't be given in settings, or not with that value."""
    for key, value in options.items():
        name = option_name(key)
        if is_owned(name):
            raise ValueError(f"{shown(key, 60)!r} is decided by orch itself; leave it out")
        if name in INSTEAD:
            raise ValueError(f"{key!r} is asked for by {INSTEAD[name]}, which orch reckons with; leave it out here")
        check_option(name, value)


def check_option(name: str, value: Any) -> None:
    """Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{shown(name, 60)!r} is no long option of sbatch; allowed are names such as 'reservation'")
    if isinstance(value, str):
        try:
            one_line(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    elif not isinstance(value, bool | int | float) or not math.isfinite(_as_float(value)):
        raise ValueError(
            f"{name}: a {type(value).__name__} is no value of an option; allowed are a text, a number or true"
        )


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def checked_setup(lines: Sequence[str]) -> None:
    """Raises ValueError for a line that would be more than a line, or read by sbatch."""
    for line in lines:
        one_line(line, allowed="\t")
        if line.startswith("#SBATCH"):
            raise ValueError(
                f"{shown(line, 60)!r} is no command: sbatch would read it. Options go to slurm.additional_parameters"
            )
