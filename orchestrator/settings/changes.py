"""What differs between two JSON values: a line for each place, and nothing of what is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any


def changes(old: Any, new: Any, place: str = "") -> list[str]:
    """A line for each value that differs: "profiles[0].learning_rate: 0.1 -> 0.05". What only one of the two has was
    added or removed; a place in a list is that in the new one, of what was removed in the old one."""
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
            lines.append(_removed(inner, old[key]))
        elif key not in old:
            lines.append(_added(inner, new[key]))
        else:
            lines += changes(old[key], new[key], inner)
    return lines


def _of_lists(old: Sequence[Any], new: Sequence[Any], place: str) -> list[str]:
    """What stays is found first, so that an item at the beginning does not change all that follow."""
    lines = []
    before, after = ([json.dumps(item, sort_keys=True) for item in items] for items in (old, new))
    alike = SequenceMatcher(None, before, after, autojunk=False)
    for _, at, end, new_at, new_end in (opcode for opcode in alike.get_opcodes() if opcode[0] != "equal"):
        both = min(end - at, new_end - new_at)
        for i in range(both):
            lines += changes(old[at + i], new[new_at + i], f"{place}[{new_at + i}]")
        lines += [_removed(f"{place}[{i}]", old[i]) for i in range(at + both, end)]
        lines += [_added(f"{place}[{i}]", new[i]) for i in range(new_at + both, new_end)]
    return lines


def _added(place: str, value: Any) -> str:
    return f"{place}: added {json.dumps(value)}"


def _removed(place: str, value: Any) -> str:
    return f"{place}: removed {json.dumps(value)}"
