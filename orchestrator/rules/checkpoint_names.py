"""The names of a claim's files. Each holds the claim's generation, so it tells which claim wrote the file."""

from __future__ import annotations

import re

SUFFIX, RECORD_SUFFIX = ".pt", ".json"
_NAME = re.compile(r"(?:\.tmp-)?g([0-9]{8,})-c([0-9]{8,})\.(?:pt|json)(?:-[0-9]+)?")


def checkpoint_stem(generation: int, chunk_id: int) -> str:
    """The name of a claim's checkpoint without its suffix."""
    return f"g{generation:08d}-c{chunk_id:08d}"


def record_name(file: str) -> str:
    """The name of the record beside a checkpoint."""
    return file.removesuffix(SUFFIX) + RECORD_SUFFIX


def generation_of(name: str) -> int | None:
    """The generation in the name of a checkpoint, a record or a temporary file of either; None for other files."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def chunk_of(name: str) -> int | None:
    """The chunk in such a name; None for other files."""
    match = _NAME.fullmatch(name)
    return int(match[2]) if match else None


def is_file_name(name: str) -> bool:
    """Does it name a file inside a folder? A damaged database or record may hold a path that leads out of it."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)
