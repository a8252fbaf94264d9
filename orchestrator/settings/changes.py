"""Describe the differences between two JSON values, one per line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any


def changes(old: Any, new: Any, place: str = "") -> list[str]:
    """Return a line for each value that differs, such as "profiles[0].learning_rate: 0.1 -> 0.05". An index is the
    item's position in the new list or, for a removed item, in the old list."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        return _of_objects(old, new, place)
    if isinstance(old, list) and isinstance(new, list):
        return _of_lists(old, new, place)
    return [f"{place}: {json.dumps(old)} -> {json.dumps(new)}"]


def _of_objects(old: Mapping[str, Any], new: Mapping[str, Any], place: str) -> list[str]:
    lines = []
    for key in [*old, *(key for key in new if key not in old)]:
        inner = f"{place}.{key}" if place else key
        if key not in new:
            lines.append(f"{inner}: removed {json.dumps(old[key])}")
        elif key not in old:
            lines.append(f"{inner}: added {json.dumps(new[key])}")
        else:
            lines += changes(old[key], new[key], inner)
    return lines


def _of_lists(old: Sequence[Any], new: Sequence[Any], place: str) -> list[str]:
    """Compare lists. Equal items are matched first, so that inserting an item at the beginning counts as one change."""
    lines = []
    before, after = ([json.dumps(item, sort_keys=True) for item in items] for items in (old, new))
    opcodes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    for _, at, end, new_at, new_end in (opcode for opcode in opcodes if opcode[0] != "equal"):
        both = min(end - at, new_end - new_at)
        for i in range(both):
            lines += changes(old[at + i], new[new_at + i], f"{place}[{new_at + i}]")
        lines += [f"{place}[{i}]: removed {json.dumps(old[i])}" for i in range(at + both, end)]
        lines += [f"{place}[{i}]: added {json.dumps(new[i])}" for i in range(new_at + both, new_end)]
    return lines
