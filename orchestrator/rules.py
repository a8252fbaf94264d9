"""Every decision of orch, as pure functions: state and time are arguments, and None means no.

Imports nothing of the project but `records`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from orchestrator.messages import counted
from orchestrator.records import (
    ChunkState,
    Discard,
    Entry,
    Evidence,
    FoundAnew,
    Job,
    JobState,
    Metric,
    Profile,
    Progress,
    Promote,
    RunState,
    StopRules,
    Worker,
    WorkOn,
    base_of,
)

# A chunk is expected to take at most so much longer than the mean of those before it.
CHUNK_MARGIN = 1.25


# --- the board ---------------------------------------------------------------------------------------


def worst(entries: Iterable[Entry], metric: Metric) -> Entry | None:
    """The entry that a better candidate replaces: the lowest score; among equals the most worked on, then
    the newest."""
    return min(entries, key=lambda e: (metric.key(e.score), -e.worked_on, -e.entry_id), default=None)


def ratchet(score: float | None, entries: Sequence[Entry], num_models: int, metric: Metric) -> Promote | Discard:
    """A free slot, or strictly better than the worst. Ties lose; NaN and infinities never enter."""
    if score is None or not math.isfinite(score):
        return Discard(f"{metric.name} is not finite")
    if len(entries) < num_models:
        return Promote(evicted=None)
    last = worst(entries, metric)
    assert last is not None, "num_models is at least 1"
    if metric.better(score, than=last.score):
        return Promote(evicted=last)
    return Discard(f"{metric.name} {score:.6g} is not better than the worst on the board, {last.score:.6g}")


def bar(entries: Sequence[Entry], num_models: int, metric: Metric) -> float | None:
    """The score that a candidate has to beat; None while a slot is free."""
    last = worst(entries, metric)
    return None if last is None or len(entries) < num_models else last.score


def choose_claim(
    entries: Sequence[Entry], founders_in_progress: int, num_models: int, metric: Metric
) -> WorkOn | FoundAnew:
    """What to train next: a founder for a free slot that nobody is filling, else the entry that was least
    worked on (work in progress counts), then the better score, then the older.

    With no entry at all there is nothing to work on but another founder.
    """
    if not entries or len(entries) + founders_in_progress < num_models:
        return FoundAnew()
    chosen = min(entries, key=lambda e: (e.worked_on + e.in_progress, -metric.key(e.score), e.entry_id))
    return WorkOn(chosen)


def next_profile(start: int, consumed: Collection[int], leased: Collection[int]) -> int:
    """The smallest position from `start` that is neither consumed nor leased.

    Positions count on for ever; only what they mean wraps round (`profile_at`). A position whose claim
    expired is in neither set, and so is the next one taken.
    """
    position = start
    while position in consumed or position in leased:
        position += 1
    return position


def advance_floor(floor: int, consumed: Collection[int]) -> int:
    """The first position from `floor` that is not consumed."""
    return next_profile(floor, consumed, ())


def child_start(position: int) -> int:
    """A promoted child starts after the position that made it. A founder's line starts at 0, and the chunk
    that trains the founder itself is the first of it."""
    return position + 1


def profile_at(position: int, cycle: Sequence[Profile]) -> Profile:
    return cycle[position % len(cycle)]


def repeat_number(entry: Entry, position: int, cycle: Sequence[Profile]) -> int:
    """How many earlier positions that were tried from this entry had the same profile.

    0 goes on with the parent's random state, so that chunked training is the uninterrupted training. A
    repeat must draw anew: from the same parent with the same profile and the same random numbers it would
    train the same child again.
    """
    start = entry.start_position + (1 if entry.founder else 0)
    profile = profile_at(position, cycle)
    whole, rest = divmod(position - start, len(cycle))
    each_round = sum(p == profile for p in cycle)
    return whole * each_round + sum(profile_at(start + i, cycle) == profile for i in range(rest))


# --- time --------------------------------------------------------------------------------------------


def expected_chunk_s(durations_s: Sequence[float]) -> float | None:
    """From measured chunks, latest last; None before the first was measured. The longest of the last few
    counts, or the mean with a margin, whichever is more."""
    recent = durations_s[-5:]
    return max(max(recent), CHUNK_MARGIN * fmean(recent)) if recent else None


def should_start_chunk(now: float, job_end: float, durations_s: Sequence[float], chunks_in_job: int) -> bool:
    """Does another chunk fit before the job's end?

    The first chunk of a job starts in any case while there is time at all: where chunks are longer than
    jobs, it is suspended at the end and goes on in the successor, else nothing would ever be trained.
    """
    if now >= job_end:
        return False
    if chunks_in_job == 0:
        return True
    expected_s = expected_chunk_s(durations_s)
    return expected_s is None or now + expected_s <= job_end


def expired(now: float, lease_until: float, evidence: Evidence) -> bool:
    """May a claim be taken from its worker? On evidence that its job is gone, or past the end of its lease,
    which is the hard end of its job. The generation keeps a worker that lives on from writing."""
    return evidence is Evidence.GONE or now > lease_until


# --- the end -----------------------------------------------------------------------------------------


def stale_chunks(stale_cycles: int | None, cycle_length: int, num_models: int) -> int | None:
    """A whole cycle of work is every profile once on every entry of a full board."""
    return None if stale_cycles is None else stale_cycles * cycle_length * num_models


def converged(progress: Progress, stop: StopRules, metric: Metric) -> tuple[RunState, str] | None:
    """Is the run over before its lifetime is? Its last state and the reason, or None."""
    if (
        stop.score is not None
        and progress.best_score is not None
        and (metric.key(progress.best_score) >= metric.key(stop.score))
    ):
        return (
            RunState.CONVERGED,
            f"the best {metric.name} {progress.best_score:.6g} has reached {stop.score:.6g}",
        )
    if stop.epochs is not None and progress.epochs >= stop.epochs:
        trained = counted(progress.epochs, "epoch was", "epochs were")
        return RunState.FINISHED, f"{trained} trained, of {stop.epochs} allowed"
    if stop.stale_chunks is not None and progress.chunks_since_promotion >= stop.stale_chunks:
        if progress.best_score is None:
            return RunState.FAILED, f"{counted(progress.chunks_since_promotion, 'chunk')} and no finite {metric.name}"
        return RunState.CONVERGED, f"no promotion in the last {counted(progress.chunks_since_promotion, 'chunk')}"
    return None


def warnings(chunks: Mapping[str, int], metric: str) -> list[str]:
    """What the user should be told of a run; a line each. chunks: how many have ended as what; metric: its name."""
    discarded = chunks[ChunkState.DISCARDED]
    if chunks[ChunkState.PROMOTED] or not discarded:
        return []
    # While a slot is free, only a score that is no number is discarded.
    which = "the only chunk so far" if discarded == 1 else f"all {discarded} chunks so far"
    return [
        f"{which} ended with a score ({metric}) that is no finite number, and nothing has entered the board; look at "
        'the learning rate (too high?), the precision ("precision": "fp32") and the loss'
    ]


def lifetime_over(now: float, deadline: float) -> bool:
    return now >= deadline


def may_claim(state: RunState, now: float, deadline: float) -> bool:
    """May a chunk be started at all?"""
    return state is RunState.ACTIVE and not lifetime_over(now, deadline)


def should_resubmit(state: RunState, now: float, deadline: float, worker: Worker, max_failures: int) -> str | None:
    """Why this chain gets no successor, or None if it gets one."""
    if state is not RunState.ACTIVE:
        return f"the run is {state}"
    if lifetime_over(now, deadline):
        return "the run's total lifetime is over"
    if worker.stopped is not None:
        return worker.stopped
    if worker.failures >= max_failures:
        return f"{counted(worker.failures, 'failure')} in a row, {max_failures} allowed"
    return None


def jobs_at_most(total_lifetime_s: float, eon_lifetime_s: float) -> int:
    """Links of one chain, if each works its whole time and none waits in the queue."""
    return math.ceil(total_lifetime_s / eon_lifetime_s)


# --- chains ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mend:
    """What brings the database and the cluster together again."""

    lost: tuple[Job, ...]  # their jobs are gone: close them, reap their claims
    adopt: tuple[tuple[Job, str], ...]  # submitted, but its worker died before it could write the cluster's id
    resubmit: tuple[int, ...]  # workers whose chain is broken


# A job that has said its last word is gone so soon. One that the cluster holds on to (its process hangs at its
# end, or the controller missed it in a crash) would keep its successor waiting until its time limit: it is cancelled.
EXIT_GRACE_S = 60.0
# A job that is being submitted for longer than this is treated as one whose submitter died.
SUBMITTING_GRACE_S = 120.0
# Where it did die, only the cluster may still be about to list what it was sent.
ORPHANED_GRACE_S = 10.0


def mend(
    workers: Sequence[Worker],
    open_jobs: Sequence[Job],
    evidence: Mapping[int, Evidence],
    found_ids: Mapping[str, str],
    now: float,
    grace_s: float = SUBMITTING_GRACE_S,
) -> Mend:
    """Compare the chains of the database with what the cluster says.

    evidence is by job_id; found_ids are the cluster's ids of the jobs whose row has none, by token. Nothing
    is done about a job of which the cluster says nothing. A chain with any open job left is whole. A successor is
    submitted by the job before it, so that one's end tells that nobody is about to submit it any more.
    """
    gone = [job for job in open_jobs if evidence.get(job.job_id, Evidence.UNKNOWN) is Evidence.GONE]
    on_their_way = {job.job_id: job for job in open_jobs if job.state is JobState.SUBMITTING and job.cluster_id is None}
    alive = {job.job_id for job in open_jobs} - {job.job_id for job in gone} - on_their_way.keys()
    adopt = tuple((job, found_ids[job.token]) for job in on_their_way.values() if job.token in found_ids)
    lost: dict[int, Job] = {}
    for job in gone:
        if job.job_id in on_their_way:
            orphaned = job.after_job_id is not None and job.after_job_id not in alive
            patience_s = min(grace_s, ORPHANED_GRACE_S) if orphaned else grace_s
            if job.token in found_ids or now - (job.submitted_at or 0.0) <= patience_s:
                continue
        lost[job.job_id] = job
    held = {job.worker_id for job in open_jobs if job.job_id not in lost}
    return Mend(tuple(lost.values()), adopt, tuple(w.worker_id for w in workers if w.worker_id not in held))


def unwanted(state: RunState, open_jobs: Sequence[Job], evidence: Mapping[int, Evidence]) -> list[Job]:
    """Jobs that wait in the queue of a run that starts no work any more. One that had begun is there if Slurm put
    it back (a node failed, it was preempted) after the others were taken out."""
    if state is RunState.ACTIVE:
        return []
    return [j for j in open_jobs if j.cluster_id is not None and evidence.get(j.job_id) is Evidence.QUEUED]


# --- files -------------------------------------------------------------------------------------------


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
