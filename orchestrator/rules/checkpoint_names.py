"""File names of checkpoints and records. A name contains the generation of the claim that wrote the file."""

from __future__ import annotations

import re

SUFFIX, RECORD_SUFFIX = ".pt", ".json"
_NAME = re.compile(r"(?:\.tmp-)?g([0-9]{8,})-c([0-9]{8,})\.(?:pt|json)(?:-[0-9]+)?")


def checkpoint_stem(generation: int, chunk_id: int) -> str:
    """Return the name of a claim's checkpoint without its suffix."""
    return f"g{generation:08d}-c{chunk_id:08d}"


def record_name(file: str) -> str:
    """Return the name of the record beside a checkpoint."""
    return file.removesuffix(SUFFIX) + RECORD_SUFFIX


def generation_of(name: str) -> int | None:
    """Return the generation in the name of a checkpoint, record or temporary file of either; None for other files."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def chunk_of(name: str) -> int | None:
    """Return the chunk in the name of a checkpoint, record or temporary file of either; None for other files."""
    match = _NAME.fullmatch(name)
    return int(match[2]) if match else None


def is_file_name(name: str) -> bool:
    """Is this a plain file name? A damaged database or record may hold a path that leads out of the folder."""
    return name not in ("", ".", "..") and not {"/", "\0"} & set(name)
