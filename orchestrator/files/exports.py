"""The two files of `orch export`: weights, and their description beside them. Only files of an earlier export to the
same place are replaced, never a file that orch did not write or that was changed since."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orchestrator.errors import RunError
from orchestrator.files.atomic import filled, place
from orchestrator.files.checkpoints import HashingWriter

MADE_BY = "orch export"
DESCRIPTION_BYTES = 1 << 20  # a description is smaller
ADVICE = "Choose another --out, or move that file away"


@dataclass(frozen=True)
class Destination:
    """Where an export may be written."""

    weights: Path
    description: Path
    earlier: Mapping[Path, os.stat_result]  # the files of an earlier export, as os.lstat describes them


def destination(out: Path) -> Destination:
    """Return where to write an export to `out`. Raises RunError if that would replace a file that orch did not write,
    or if `out` can't be a file's name."""
    if out.is_dir():
        raise RunError(f"--out {out}: it is a folder; name a file, such as {out / 'best.pt'}")
    if out.suffix.lower() == ".json":
        raise RunError(f"--out {out}: the description gets the suffix .json; use another suffix, such as .pt")
    description = out.with_suffix(".json")
    try:
        earlier = {path: os.lstat(path) for path in (out, description) if os.path.lexists(path)}
    except OSError as error:
        raise RunError(f"--out {out}: {error.strerror or error}") from error
    known = _earlier_export(description, earlier[description]) if description in earlier else None
    if description in earlier and known is None:
        raise RunError(
            f"--out {out}: the description would replace {description}, which `orch export` did not write. {ADVICE}"
        )
    if known is not None and known.get("weights") != out.name:
        raise RunError(f"--out {out}: {description} already describes {known.get('weights')!s:.100}. {ADVICE}")
    if out in earlier and (known is None or known.get("weights_sha256") != _sha256(out, earlier[out])):
        raise RunError(
            f"--out {out}: this file exists, and `orch export` did not write it, or it was changed since. {ADVICE}"
        )
    return Destination(out, description, earlier)


def _earlier_export(path: Path, status: os.stat_result) -> dict[str, Any] | None:
    """Return a description if `orch export` wrote this file, else None."""
    if not stat.S_ISREG(status.st_mode) or status.st_size > DESCRIPTION_BYTES:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("made_by") == MADE_BY else None


def _sha256(path: Path, status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return None
    try:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError:
        return None


def write(to: Destination, save: Callable[[IO[bytes]], object], about: Mapping[str, Any]) -> None:
    """Write both files, and first both of them under temporary names. save: writes the weights sequentially. about:
    JSON values for the description. Raises RunError; a file that has appeared meanwhile is not replaced."""
    writers: list[HashingWriter] = []

    def fill(file: IO[bytes]) -> None:
        writers.append(HashingWriter(file))
        save(writers[0])  # type: ignore[arg-type]  # serialisers call only write and flush

    def describe(file: IO[bytes]) -> None:
        marks = {"made_by": MADE_BY, "weights": to.weights.name, "weights_sha256": writers[0].sha256}
        file.write((json.dumps({**marks, **about}, indent=2) + "\n").encode())

    try:
        to.weights.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror or error
        raise RunError(f"--out {to.weights}: {to.weights.parent}: {reason}") from error
    try:
        with filled(to.weights, fill) as weights, filled(to.description, describe) as description:
            place(weights, to.weights, to.earlier.get(to.weights))
            try:
                place(description, to.description, to.earlier.get(to.description))
            except BaseException:
                if to.weights not in to.earlier:
                    to.weights.unlink(missing_ok=True)
                raise
    except FileExistsError as error:
        raise RunError(
            f"--out {to.weights}: {error.filename2 or error.filename} appeared meanwhile. {ADVICE}"
        ) from error
    except Exception as error:
        cause = error if isinstance(error, OSError) else writers[0].error if writers else None
        if cause is None:
            raise
        raise RunError(f"--out {to.weights}: {cause.strerror or cause}") from error
