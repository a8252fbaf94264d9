"""Decide whether to start a chunk, and whether a run is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal

from orchestrator.messages import counted, iso
from orchestrator.profile import Metric
from orchestrator.records import ChunkState, Over, Progress, RunState, StopRules

LEAST_STALE_CHUNKS = 20
CHUNK_MARGIN = 1.25  # a chunk is expected to take at most this many times the mean duration of recent chunks


def expected_chunk_s(durations_s: Sequence[float]) -> float | None:
    """Estimate a chunk's duration: the longest of the last five durations, but at least their mean with a margin.
    durations_s: latest last. Returns None if it is empty."""
    recent = durations_s[-5:]
    return max(max(recent), CHUNK_MARGIN * fmean(recent)) if recent else None


def should_start_chunk(now: float, job_end: float, durations_s: Sequence[float], chunks_in_job: int) -> bool:
    """Does another chunk fit before the job's end?

    The first chunk of a job always starts if any time is left. A chunk that takes longer than a job is suspended at the
    job's end and continues in the successor; if it were not started, it would never be trained.
    """
    if now >= job_end:
        return False
    if chunks_in_job == 0:
        return True
    expected_s = expected_chunk_s(durations_s)
    return expected_s is None or now + expected_s <= job_end


def stale_chunks(stale_cycles: int | Literal["auto"] | None, cycle_length: int, num_models: int) -> int | None:
    """Convert stale cycles to chunks: one cycle uses every profile once on every entry of a full board. "auto": one
    cycle, but at least LEAST_STALE_CHUNKS, since an ordinary training has several epochs in a row without progress."""
    if stale_cycles == "auto":
        return max(LEAST_STALE_CHUNKS, cycle_length * num_models)
    return None if stale_cycles is None else stale_cycles * cycle_length * num_models


def converged(progress: Progress, stop: StopRules, metric: Metric) -> Over | None:
    """Return the run's final state and the stop rule that ended the run; None if no stop rule is met."""
    best, stale = progress.best_score, progress.chunks_since_promotion
    if stop.score is not None and best is not None and metric.key(best) >= metric.key(stop.score):
        return Over(RunState.CONVERGED, f"the best {metric.name} {best:.6g} has reached {stop.score:.6g}")
    if stop.epochs is not None and progress.epochs >= stop.epochs:
        trained = counted(progress.epochs, "epoch was", "epochs were")
        return Over(RunState.FINISHED, f"{trained} trained, of {stop.epochs} allowed")
    if stop.stale_chunks is not None and stale >= stop.stale_chunks:
        if best is None:
            return Over(RunState.FAILED, f"{counted(stale, 'chunk')} and no finite {metric.name}")
        return Over(RunState.CONVERGED, f"no promotion in the last {counted(stale, 'chunk')}")
    return None


def run_over(now: float, deadline: float, stopped: Over | None = None) -> Over | None:
    """Return why an active run ends: `stopped` (the result of `converged`), or the end of the run's lifetime. None if
    the run continues."""
    if stopped is None and lifetime_over(now, deadline):
        return Over(RunState.FINISHED, f"its total_lifetime ended at {iso(deadline)}")
    return stopped


def settled(state: RunState, now: float, deadline: float, open_jobs: int, running_jobs: int) -> Over | None:
    """Return why the run is over: it is draining and no job is running, or its deadline has passed and no job is open.
    Return None if the run is not over."""
    if state is RunState.DRAINING and not running_jobs:
        return Over(RunState.FINISHED, "drained by the user")
    return run_over(now, deadline) if state is RunState.ACTIVE and not open_jobs else None


def warnings(chunks: Mapping[str, int], metric: str) -> list[str]:
    """Return warnings for the user about a run, one line each. chunks: the number of chunks in each state. metric: the
    metric's name."""
    discarded = chunks[ChunkState.DISCARDED]
    if chunks[ChunkState.PROMOTED] or not discarded:
        return []
    # While a slot is free, only non-finite scores are discarded.
    which = "the only chunk so far" if discarded == 1 else f"all {discarded} chunks so far"
    return [
        f"{which} ended with a score ({metric}) that is not a finite number, so the board is empty; check "
        'the learning rate (too high?), the precision ("precision": "fp32") and the loss'
    ]


def lifetime_over(now: float, deadline: float) -> bool:
    return now >= deadline


def may_claim(state: RunState, now: float, deadline: float) -> bool:
    """May the run start another chunk?"""
    return state is RunState.ACTIVE and not lifetime_over(now, deadline)
