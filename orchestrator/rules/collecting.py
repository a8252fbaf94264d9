"""Decide which files of a run may be deleted, and how much disk space the run needs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from orchestrator.records import base_of
from orchestrator.rules.checkpoint_names import generation_of

KEPT_LINKS = 3  # folders kept per chain, so that a user can see how its last jobs ended
_JOB_FOLDER = re.compile(r"[0-9a-f]{16}(?:-[0-9]+)?")  # named after a submission or, with the local executor, a job
_SERIES = re.compile(r"chunk-([0-9]{8,})|(?:offline-)?run-[0-9]{8}_[0-9]{6}-[0-9a-f]{8}-c([0-9]{8,})(?:-[0-9]+)?")


def collectable(files: Iterable[str], referenced: Collection[str], live_generations: Collection[int]) -> list[str]:
    """Return the files that can be deleted: not referenced, and written by a claim that is no longer live. (A live
    claim's file is not referenced until its result is recorded.)

    List `files` before reading `referenced` and `live_generations`, so that files created meanwhile are kept.
    """
    return [
        name
        for name in files
        if name not in referenced and generation_of(name) is not None and generation_of(name) not in live_generations
    ]


def old_job_folders(ages_s: Mapping[str, float], jobs: Sequence[tuple[int, str, bool]], orphaned_s: float) -> list[str]:
    """Return the job folders that belong neither to an open job nor to the last KEPT_LINKS jobs of a chain.

    ages_s: seconds since the last write to each folder, by name. jobs: (worker, token, whether it is open), in
    the order of each chain. A folder unknown to the database is old if nothing was written to it for orphaned_s.
    """
    chains: dict[int, list[str]] = {}
    for worker_id, token, _ in jobs:
        chains.setdefault(worker_id, []).append(token)
    last = {token for chain in chains.values() for token in chain[-KEPT_LINKS:]}
    kept = {name for _, token, is_open in jobs if is_open or token in last for name in (token, base_of(token))}
    known = {name for _, token, _ in jobs for name in (token, base_of(token))}
    return sorted(
        name
        for name, age_s in ages_s.items()
        if _JOB_FOLDER.fullmatch(name) and name not in kept and (name in known or age_s > orphaned_s)
    )


def old_series(ages_s: Mapping[str, float], lines: Collection[int], kept_s: float) -> list[str]:
    """Return the folders that loggers made for chunks not in `lines`, if nothing was written to them for kept_s.

    ages_s: seconds since the last write to each folder, by name. lines: the chunks in the lineages of all kept
    checkpoints.
    """
    return sorted(
        name
        for name, age_s in ages_s.items()
        if (match := _SERIES.fullmatch(name)) and int(match[1] or match[2]) not in lines and age_s > kept_s
    )


def fits(used_bytes: float, needed_bytes: float, budget_bytes: float) -> bool:
    """Does the disk budget have room for `needed_bytes`?"""
    return used_bytes + needed_bytes <= budget_bytes


def checkpoints_at_most(num_models: int, workers: int) -> int:
    """Return the highest number of checkpoints that a run normally has: one for each entry, and two for each worker.
    A worker's two are the file that it writes and the file that it started from (an evicted entry or a suspended
    state)."""
    return num_models + 2 * workers
