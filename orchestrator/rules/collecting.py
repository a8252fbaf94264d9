"""Which files of a run may be deleted, and how many it needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from orchestrator.records import base_of


def collectable(files: Iterable[str], referenced: Collection[str], live_generations: Collection[int]) -> list[str]:
    """The files that nothing refers to: not an entry, not a live or suspended claim, and not written by a
    claim that is still live (its candidate may not be recorded yet).

    `files` must have been listed before the other two were read: a file that appears later is not judged.
    """
    return [
        name
        for name in files
        if name not in referenced and generation_of(name) is not None and generation_of(name) not in live_generations
    ]


_OURS = re.compile(r"(?:\.tmp-)?g([0-9]{8,})-c([0-9]{8,})\.(?:pt|json)(?:-[0-9]+)?")


def generation_of(name: str) -> int | None:
    """The generation in a file's name (`Claim.file_stem`), None for a file that is not ours."""
    match = _OURS.fullmatch(name)
    return int(match[1]) if match else None


def chunk_of(name: str) -> int | None:
    """The chunk in a file's name, None for a file that is not ours."""
    match = _OURS.fullmatch(name)
    return int(match[2]) if match else None


# Of each chain the folders of its last jobs stay, for somebody who wants to know how they ended.
KEPT_LINKS = 3


_JOB_FOLDER = re.compile(r"[0-9a-f]{16}(?:-[0-9]+)?")  # a submission's, or (on the local executor) a job's


def old_job_folders(ages_s: Mapping[str, float], jobs: Sequence[tuple[int, str, bool]], orphaned_s: float) -> list[str]:
    """Of these folders, those that no job needs: neither an open one nor the last of a chain.

    ages_s: since something in a folder was written last, by its name. jobs: (worker, token, open?), each chain in its
    order. A folder of which the database knows nothing is old when nothing was written to it for orphaned_s.
    """
    chains: dict[int, list[str]] = {}
    kept: set[str] = set()
    for worker_id, token, is_open in jobs:
        chains.setdefault(worker_id, []).append(token)
        if is_open:
            kept.add(token)
    kept |= {token for chain in chains.values() for token in chain[-KEPT_LINKS:]}
    known = {token for chain in chains.values() for token in chain}
    kept, known = ({name for token in tokens for name in (token, base_of(token))} for tokens in (kept, known))
    return sorted(
        name
        for name, age_s in ages_s.items()
        if _JOB_FOLDER.fullmatch(name) and name not in kept and (name in known or age_s > orphaned_s)
    )


_SERIES = re.compile(r"chunk-([0-9]{8,})|(?:offline-)?run-[0-9]{8}_[0-9]{6}-[0-9a-f]{8}-c([0-9]{8,})(?:-[0-9]+)?")


def old_series(ages_s: Mapping[str, float], lines: Collection[int], kept_s: float) -> list[str]:
    """Of these folders of loggers, those of chunks that led to nothing, when nothing was written to them for kept_s.

    ages_s: since something in a folder was written last, by its name. lines: the chunks that a checkpoint which stays
    comes from. A folder of which its name does not tell the chunk is not ours.
    """
    return sorted(
        name
        for name, age_s in ages_s.items()
        if (match := _SERIES.fullmatch(name)) and int(match[1] or match[2]) not in lines and age_s > kept_s
    )


def fits(used_bytes: float, needed_bytes: float, budget_bytes: float) -> bool:
    """Is there room in a disk budget?"""
    return used_bytes + needed_bytes <= budget_bytes


def checkpoints_at_most(num_models: int, workers: int) -> int:
    """Files at the same time, nearly always: those on the board, and of each worker the one that it writes and the
    one that it started from (an entry that was evicted since, or a suspended state)."""
    return num_models + 2 * workers
