"""Where the user's own modules are found."""

from __future__ import annotations

import sys
from collections.abc import Iterable


def look_first_in(folders: Iterable[str]) -> None:
    """Modules are searched in these folders before all others; those that are searched already stay where they are."""
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
