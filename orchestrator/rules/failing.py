"""What follows from a failure: whether its chunk goes on from a saved state, and whether its chain ends at once."""

from __future__ import annotations

import re

from orchestrator.messages import described
from orchestrator.records import ChunkState

COPY_EVERY = 100.0  # the state is copied again once training has taken this many times the last copy's duration
PASSING = {  # classes of errors that another node, or the same node later, may not have
    "OSError", "MemoryError", "OutOfMemoryError", "AcceleratorError", "TimeoutError", "TimeoutExpired", "RankLostError",
    "DistError",
}  # fmt: skip
# torch raises a plain RuntimeError for most errors of devices and loader processes, so only its text identifies them.
_PASSING_TEXT = re.compile(
    r"cuda (?:error|out of memory|driver|initialization)|no cuda|cudnn[ _](?:error|status)|cublas_status|nccl error|"
    r"nvidia driver|nvml|no gpu|lib(?:cu|nv)\w+\.so|out of memory|not enough memory|can't allocate memory|"
    r"timed? ?out|dataloader worker \(pid",
    re.IGNORECASE,
)
_VARIES = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)  # addresses, pids, sizes, times


def worth_copying(trained_s: float, last_copy_s: float | None) -> bool:
    """Should the training copy its state now? trained_s: how long it has trained since the last copy. last_copy_s: how
    long that copy took; None: there was none. So all copies together take about 1 % of the training time."""
    return last_copy_s is None or trained_s >= COPY_EVERY * last_copy_s


def chunk_after(attempts: int, max_attempts: int, founder: bool, resumable: bool) -> ChunkState:
    """Return the state of a chunk that has failed.

    attempts: failures at its position (of a founder: of the chunk itself), this one included. resumable: there is a
    saved state from which the chunk can go on. After max_attempts the position counts as consumed, except a founder's:
    another founder takes its place.
    """
    if attempts >= max_attempts:
        return ChunkState.FAILED if founder else ChunkState.DISCARDED
    return ChunkState.SUSPENDED if resumable else ChunkState.FAILED


def signature(error: BaseException) -> str | None:
    """Return a text that is equal for errors of the same cause, without numbers and addresses, which vary. None if
    another attempt may succeed, because the error, or an error that caused it, depends on the node or the moment."""
    kinds: set[str] = set()
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        kinds |= {kind.__name__ for kind in type(cause).__mro__}
        chain.append(cause)
        cause = cause.__cause__
    message = described(error)
    return None if PASSING & kinds or _PASSING_TEXT.search(message) else _VARIES.sub("#", message)[:1000]


def repeats(earlier: str | None, now: str | None) -> bool:
    """Is this the second failure in a row of the same kind before the first step? earlier, now: the signatures of the
    worker's last two failures; None: the failure came later, or may pass. Such a chain fails for ever, so it ends."""
    return now is not None and now == earlier


def why_it_ends(message: str) -> str:
    """Return why a chain ends whose failure `repeats`."""
    return f"failed twice before its first step, in the same way: {message}"


def follows_from(earlier_stepped: bool | None, stepped: bool) -> bool:
    """Did the process's last failure also cause this one? An error in the middle of a chunk can leave the process
    unusable (after a CUDA error, every call fails); then its next chunk fails before its first step.

    earlier_stepped: whether the chunk that failed just before in this process had made a step; None: none failed.
    """
    return earlier_stepped is True and not stepped
