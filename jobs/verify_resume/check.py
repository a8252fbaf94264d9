"""Check that resuming is exact for a job on this machine. A short training runs twice: once uninterrupted, and once
interrupted several times and resumed in fresh processes. All intermediate states must be equal, bit for bit."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from jobs.errors import JobError
from jobs.training.states import read
from jobs.verify_resume.exactness import Difference, count_tensors, differences
from jobs.verify_resume.link import NO_STOP, REFERENCE, RESULT, RESUMED, Trial, write_plan

RunLink = Callable[[Trial, Path, str, int, int | None], dict[str, Any]]


@dataclass(frozen=True)
class Inexact:
    """Where the interrupted training differs from the uninterrupted one."""

    first: Difference  # between states, in checkpoint order; if these are equal, between metrics or batches
    interrupted_after: int | None  # step of the last interruption before the difference; None: there was none
    found_after: int  # step of the first state or metrics that differ
    first_batch: int | None  # the first step whose batch differs, counted from 1; None: all batches are equal
    parts: list[str]  # parts that differ: model, optimizer, rng, ...; or metrics; or batch
    largest: float | None  # the largest absolute difference among all tensors and numbers


@dataclass
class Verdict:
    """The result of a check. Steps are optimizer steps, counted over all chunks."""

    job: str
    device: str
    threads: int
    torch: str
    deterministic: bool
    chunks: int
    epochs_per_chunk: int
    steps_per_epoch: int  # of the first epoch
    steps: int
    interrupted_after: list[int]
    states_compared: int = 0
    tensors_compared: int = 0
    batches_compared: int = 0
    seconds: float = 0.0
    inexact: Inexact | None = None
    advice: list[str] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        return self.inexact is None


def in_fresh_process(trial: Trial, root: Path, name: str, start: int, stop: int | None) -> dict[str, Any]:
    """Run a link in a process that shares only files with the other links, like the jobs of a chain. Its output goes
    to standard error. Raises JobError with the link's error message or, if it left none, with how its process ended."""
    environment = os.environ | {"PYTHONHASHSEED": "0"} | ({"CUDA_VISIBLE_DEVICES": ""} if trial.device == "cpu" else {})
    arguments = [str(root), name, str(start), str(NO_STOP if stop is None else stop)]
    (root / RESULT).unlink(missing_ok=True)
    # -P: modules in the current folder must not replace orch's own
    command = [sys.executable, "-P", "-m", "jobs.verify_resume.link", *arguments]
    # In its own session, so that Ctrl-C reaches only this process, which kills the link without a traceback.
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=2, check=False, start_new_session=True
    )
    try:
        result: dict[str, Any] = json.loads((root / RESULT).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        code = done.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise JobError(
            f"job {trial.settings.job}: its process {how} while it trained from step {start} on. Is there enough "
            f"memory, and enough room in {root.parent} (set TMPDIR to use another folder)?"
        ) from error
    if "error" in result:
        raise JobError(result["error"])
    return result


def verify(trial: Trial, say: Callable[[str], None], run_link: RunLink = in_fresh_process) -> Verdict:
    """Train, interrupt, resume and compare, until the first difference. All files are in a temporary folder,
    which is removed. say: called with a line for each stage. Raises JobError if the job can't be trained."""
    started = time.monotonic()
    with _scratch() as root:
        write_plan(trial, root)
        reference = run_link(trial, root, REFERENCE, 0, None)
        verdict = Verdict(
            job=trial.settings.job,
            device=reference["device"],
            threads=reference["threads"],
            torch=str(torch.__version__),
            deterministic=trial.settings.deterministic,
            chunks=trial.chunks,
            epochs_per_chunk=trial.epochs_per_chunk,
            steps_per_epoch=reference["steps_per_epoch"],
            steps=reference["ends"][-1][-1],
            interrupted_after=reference["breaks"],
        )
        say(f"{verdict.steps} steps without an interruption, on {verdict.device}")
        start = 0
        for stop in [*verdict.interrupted_after, verdict.steps]:
            link = run_link(trial, root, RESUMED, start, stop)
            if not link["own_loop"] and link["steps_per_epoch"] != verdict.steps_per_epoch:
                raise JobError(
                    f"job {verdict.job}: data('train') does not have the same length in each process: an epoch had "
                    f"{verdict.steps_per_epoch} batches, then {link['steps_per_epoch']}"
                )
            verdict.inexact = _compare(verdict, root, reference, link, start, stop)
            if verdict.inexact:
                break
            say(f"steps {start + 1} to {stop} {'in a fresh process ' if start else ''}are the same")
            start = stop
    verdict.seconds = round(time.monotonic() - started, 1)
    verdict.advice = advice(verdict)
    return verdict


def _compare(
    verdict: Verdict, root: Path, reference: dict[str, Any], link: dict[str, Any], start: int, stop: int
) -> Inexact | None:
    """Compare the link from start to stop with the same steps of the reference, and delete the compared files.
    Metrics depend on the state, so they are compared only if the states are equal."""
    batches = zip(reference["batches"][start:stop], link["batches"], strict=True)
    first_batch = next((step for step, (one, other) in enumerate(batches, start + 1) if one != other), None)
    verdict.batches_compared += stop - start
    found_after, unequal = stop, list[Difference]()
    chunk_ends = [epochs[-1] for epochs in reference["ends"]]
    epoch_ends = [end for epochs in reference["ends"] for end in epochs]
    for point in _between(start, stop, chunk_ends):  # each of these steps has a checkpoint
        if reference["own_loop"] and point not in chunk_ends:
            continue
        expected, resumed = (_state(root / name / f"{point}.pt") for name in (REFERENCE, RESUMED))
        (root / REFERENCE / f"{point}.pt").unlink()
        verdict.states_compared += 1
        verdict.tensors_compared += count_tensors(expected)
        if not unequal:
            found_after, unequal = point, list(differences(expected, resumed))
    for point in _between(start, stop, epoch_ends):
        if not unequal:
            metrics, again = (side["metrics"].get(str(point)) for side in (reference, link))
            found_after, unequal = point, list(differences(metrics, again, "metrics"))
    if start:
        (root / RESUMED / f"{start}.pt").unlink()
    if not unequal and first_batch is None:
        return None
    unequal = unequal or [Difference(f"batch {first_batch}", "value", "the same batch", "another")]
    distances = [d.max_abs_difference for d in unequal if d.max_abs_difference is not None]
    return Inexact(
        first=unequal[0],
        interrupted_after=start or None,
        found_after=found_after,
        first_batch=first_batch,
        parts=list(dict.fromkeys(re.split(r"[.\[ ]", d.path)[0] for d in unequal)),
        largest=max(distances, default=None),
    )


def _between(start: int, stop: int, ends: Sequence[int]) -> list[int]:
    """Return the ends between start and stop (both excluded), and stop."""
    return [*(end for end in ends if start < end < stop), stop]


def _state(path: Path) -> dict[str, Any]:
    """Read a state without "cut", which only an interrupted chunk has. A wrong "cut" would show in the metrics."""
    return {key: value for key, value in read(path).items() if key != "cut"}


def advice(verdict: Verdict) -> list[str]:
    """Return the most common causes of such a difference, most likely first."""
    inexact = verdict.inexact
    if inexact is None:
        return []
    if inexact.interrupted_after is None:
        cause = NOT_EVEN_INTERRUPTED
    elif inexact.first_batch is not None:
        cause = f"from step {inexact.first_batch} on the batches differ: {OTHER_BATCHES}"
    else:
        cause = OTHER_METRICS if inexact.parts == ["metrics"] else STATE_OUTSIDE
    return [cause] if verdict.deterministic else [MODE_IS_OFF, cause]


MODE_IS_OFF = (
    'deterministic mode is off ("deterministic": false): kernels may add in a different order each time, which may '
    "be the only cause. Check again with --set deterministic=true"
)
NOT_EVEN_INTERRUPTED = (
    "two processes that train from the start differ, without any interruption. Does the job depend on the "
    "clock, hash(), the order of a set, the order of files in a folder, or files of other processes?"
)
OTHER_BATCHES = (
    "the data set draws from its own generator (random.Random, numpy.random.default_rng, torch.Generator), counts "
    "its calls, or keeps its own order. Make each example depend only on its index, and draw from the global "
    "generators of random, numpy.random or torch, which orch seeds. A loop of the job's own must keep what it counts "
    "in the state that it returns"
)
OTHER_METRICS = (
    "the states are the same, the metrics are not: metrics() or the validation data draw from their own generator, "
    "or keep state between batches"
)
STATE_OUTSIDE = (
    "the batches are the same: something that the training depends on is kept outside the model and the optimizer (a "
    "counter or a generator in the job, its own scheduler or average, a buffer with persistent=False). A checkpoint "
    "contains what state_dict() returns, so make this state a buffer of the model, or return it from a module's "
    "get_extra_state(). For schedules use profiles; for averaged weights, averaging()"
)


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Convert a verdict for `--json`. Infinite differences become null."""
    report = {"exact": verdict.exact, **asdict(verdict)}
    if verdict.inexact is not None:
        for part, name in ((report["inexact"]["first"], "max_abs_difference"), (report["inexact"], "largest")):
            part[name] = None if part[name] == math.inf else part[name]
    return report


@contextmanager
def _scratch() -> Iterator[Path]:
    """Create a temporary folder that is removed afterwards, even if a signal ends this process."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with tempfile.TemporaryDirectory(prefix="orch-verify-resume-") as folder:
            yield Path(folder)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
