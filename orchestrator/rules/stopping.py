"""When to start a chunk, and when a run is over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from orchestrator.messages import counted
from orchestrator.records import ChunkState, Metric, Progress, RunState, StopRules

# A chunk is expected to take at most so much longer than the mean of those before it.
CHUNK_MARGIN = 1.25


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
