"""Check values that are written to #SBATCH lines: a line break in a value would start a command of the script."""

from __future__ import annotations

import re
import sys
from typing import Any

from orchestrator.messages import one_line, shown

# Options that only orch may set: for example, it finds jobs by their name and builds chains with dependencies.
OWNED = {
    "job-name", "output", "error", "dependency", "array", "open-mode", "nodes", "ntasks", "ntasks-per-node", "parsable",
}  # fmt: skip
# Options that must be set through a settings key, because orch computes leases and the end of a job's work from them.
INSTEAD = {"time": "slurm.time_min", "signal": "slurm.signal_delay_s"}
_NAME = re.compile(r"[a-z][a-z0-9-]{0,59}")


def option_name(name: str) -> str:
    return name.replace("_", "-")


def is_owned(name: str) -> bool:
    """Return whether orch sets this option itself. Abbreviations count too, because sbatch accepts them."""
    return any(owned.startswith(option_name(name)) for owned in OWNED) if name else False


def checked_additional(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options. Raises ValueError for an option or a value that is not allowed in settings."""
    for key, value in options.items():
        name = option_name(key)
        if is_owned(name):
            raise ValueError(f"{shown(key, 60)!r} is set by orch itself; leave it out")
        if name in INSTEAD:
            raise ValueError(f"{key!r} is set by {INSTEAD[name]}; leave it out here")
        check_option(name, value)
    return options


def check_option(name: str, value: Any) -> None:
    """Raise ValueError if the option's name or value is not allowed."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{shown(name, 60)!r} is not a long sbatch option; allowed: names such as 'reservation'")
    if isinstance(value, str):
        try:
            one_line(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    elif not (isinstance(value, bool | int | float) and abs(value) <= sys.float_info.max):  # also refuses NaN
        raise ValueError(f"{name}: {type(value).__name__} is not allowed; an option is a string, a number or true")


def checked_setup(lines: list[str]) -> list[str]:
    """Return the lines. Raises ValueError if one contains a line break or control character, or starts with #SBATCH."""
    for line in lines:
        one_line(line, allowed="\t")
        if line.startswith("#SBATCH"):
            options = "sbatch would parse it. Put options into slurm.additional_parameters"
            raise ValueError(f"{shown(line, 60)!r} is not a command: {options}")
    return lines
