"""Find the processes that a test has started, and wait for conditions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def processes_of(folder: Path) -> list[psutil.Process]:
    """Return the processes whose command line contains the folder."""
    listed = psutil.process_iter(["cmdline"])
    return [process for process in listed if any(str(folder) in part for part in process.info["cmdline"] or ())]


def until(what: str, condition: Callable[[], Any], timeout_s: float = 120) -> None:
    """Wait until the condition is true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for: {what}"
        time.sleep(0.05)
