"""What follows from a failure: tables of inputs and results."""

from __future__ import annotations

import subprocess

import pytest

from jobs.errors import JobError
from jobs.training.ranks import RankLostError
from orchestrator.records import ChunkState
from orchestrator.rules import failing


@pytest.mark.parametrize(
    ("trained_s", "last_copy_s", "copies"),
    [
        pytest.param(0.0, None, True, id="the first epoch"),
        pytest.param(99.0, 1.0, False, id="a copy would cost more than 1 %"),
        pytest.param(100.0, 1.0, True, id="a copy costs 1 %"),
        pytest.param(1.0, 0.0, True, id="a copy that costs nothing"),
    ],
)
def test_the_state_is_copied(trained_s, last_copy_s, copies):
    assert failing.worth_copying(trained_s, last_copy_s) == copies


@pytest.mark.parametrize(
    ("attempts", "founder", "resumable", "state"),
    [
        pytest.param(1, False, False, ChunkState.FAILED, id="nothing is kept, so the position is free again"),
        pytest.param(1, True, False, ChunkState.FAILED, id="nothing of a founder is kept"),
        pytest.param(2, False, True, ChunkState.SUSPENDED, id="the chunk goes on"),
        pytest.param(2, True, True, ChunkState.SUSPENDED, id="a founder goes on"),
        pytest.param(3, False, True, ChunkState.DISCARDED, id="too many attempts consume the position"),
        pytest.param(4, False, False, ChunkState.DISCARDED, id="max_chunk_attempts was lowered"),
        pytest.param(3, True, True, ChunkState.FAILED, id="another founder takes its place"),
    ],
)
def test_a_chunk_that_failed_is(attempts, founder, resumable, state):
    assert failing.chunk_after(attempts, 3, founder, resumable) is state


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "again"),
    [
        pytest.param(SystemExit("no more credits"), SystemExit("no more credits"), id="sys.exit"),
        pytest.param(
            RuntimeError("size mismatch at 0x7f31ab: 12 and 3.5"),
            RuntimeError("size mismatch at 0xdeadbeef: 7 and 1e-3"),
            id="addresses and numbers vary",
        ),
        pytest.param(JobError("No module named 'mine'"), JobError("No module named 'mine'"), id="a missing module"),
        pytest.param(
            RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu"),
            RuntimeError("Expected all tensors to be on the same device, but found cuda:1 and cpu"),
            id="a mistake that only names the device",
        ),
    ],
)
def test_errors_of_the_same_cause_have_one_signature(error, again):
    assert failing.signature(error) is not None
    assert failing.repeats(failing.signature(error), failing.signature(again))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(ValueError("no"), TypeError("no"), id="another class"),
        pytest.param(ValueError("no model"), ValueError("no data"), id="another text"),
    ],
)
def test_other_errors_have_another_signature(one, other):
    assert not failing.repeats(failing.signature(one), failing.signature(other))


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise ValueError("it can't be shown")


def test_an_error_without_a_text_has_its_class_as_signature():
    assert failing.signature(UnreadableError()) == "UnreadableError"
    assert failing.signature(SystemExit()) == "SystemExit"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:83] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed."),
        RuntimeError("No CUDA GPUs are available"),
        ImportError("libcudart.so.12: cannot open shared object file"),
        JobError("gpus_per_worker is 2, but there is no GPU for each: rank 0 has none"),
        FileNotFoundError("/scratch/data"),
        ConnectionResetError("the server is gone"),
        MemoryError(),
        TimeoutError("no answer"),
        subprocess.TimeoutExpired("curl", 3),
        RankLostError("another process of this job died"),
        caused(JobError("mine can't be imported: OSError"), OSError("stale file handle")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_another_node_may_not_have_never_repeats(error):
    assert failing.signature(error) is None
    assert not failing.repeats(failing.signature(error), failing.signature(error))


def test_an_error_that_is_its_own_cause_is_read_once():
    error = ValueError("no")
    error.__cause__ = caused(TypeError("no"), error)
    assert failing.signature(error) == "ValueError: no"


@pytest.mark.parametrize(
    ("earlier", "stepped", "follows"),
    [
        pytest.param(None, False, False, id="the first failure of the process"),
        pytest.param(True, False, True, id="after an error in a chunk, no chunk makes a step any more"),
        pytest.param(True, True, False, id="the second chunk made steps, so the process works"),
        pytest.param(False, False, False, id="neither chunk made a step"),
        pytest.param(False, True, False, id="the first chunk made no step"),
    ],
)
def test_a_failure_follows_from_the_one_before(earlier, stepped, follows):
    assert failing.follows_from(earlier, stepped) == follows
