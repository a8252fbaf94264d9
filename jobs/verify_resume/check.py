"""Is resume exact for a job, on this machine? A short training is done twice: once in one go, once interrupted again
and again and resumed in fresh processes. Every state on the way must be the same, bit for bit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from jobs.errors import JobError
from jobs.training.states import read
from jobs.verify_resume.exactness import Difference, count_tensors, differences
from jobs.verify_resume.link import NO_STOP, REFERENCE, RESUMED, Trial, write_plan

RunLink = Callable[[Trial, Path, str, int, int | None], dict[str, Any]]


@dataclass(frozen=True)
class Inexact:
    """Where the interrupted training left the uninterrupted one."""

    first: Difference  # of the state, in the order of a checkpoint; or of the metrics or batches if states agree
    interrupted_after: int | None  # steps before the last interruption; None: nothing had been interrupted yet
    found_after: int  # steps before the state in which the difference shows
    first_batch: int | None  # the first step whose batch differs, counted from 1; None: all batches are the same
    parts: list[str]  # of the state that differ: model, optimizer, rng
    largest: float | None  # max abs difference of all tensors and numbers


@dataclass
class Verdict:
    """What a check found. Steps are optimizer steps, counted over all chunks."""

    job: str
    device: str
    threads: int
    torch: str
    deterministic: bool
    chunks: int
    epochs_per_chunk: int
    steps_per_epoch: int
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

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs_per_chunk * self.chunks


def in_fresh_process(plan: Trial, root: Path, name: str, start: int, stop: int | None) -> dict[str, Any]:
    """A link as a job of a chain is: a process that knows the files only. What it prints goes to standard error.

    Raises JobError with the link's own message, or saying how the process ended.
    """
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if plan.device == "cpu" else {})
    arguments = [str(root), name, str(start), str(NO_STOP if stop is None else stop)]
    (root / "link.json").unlink(missing_ok=True)
    # -P: what lies in the current folder must not stand in for orch's own modules
    command = [sys.executable, "-P", "-m", "jobs.verify_resume.link", *arguments]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=2,
        check=False,
        start_new_session=True,  # a terminal's Ctrl-C ends this process, which ends that one without a traceback
    )
    try:
        found: dict[str, Any] = json.loads((root / "link.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError) as error:
        how = f"was killed by {_signal(-done.returncode)}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise JobError(
            f"job {plan.settings['job']}: its process {how} while it trained from step {start} on. "
            f"Is there room in memory, and in {root.parent} (set TMPDIR to another folder)?"
        ) from error
    if "error" in found:
        raise JobError(found["error"])
    return found


def verify(plan: Trial, say: Callable[[str], None], run_link: RunLink = in_fresh_process) -> Verdict:
    """Train, interrupt, resume and compare, in a temporary folder that is removed. say: is told how it goes on.

    Stops at the first state that differs. Raises JobError if the job can't be trained.
    """
    started = time.monotonic()
    with _scratch() as root:
        write_plan(plan, root)
        reference = run_link(plan, root, REFERENCE, 0, None)
        verdict = Verdict(
            job=plan.settings["job"],
            device=reference["device"],
            threads=reference["threads"],
            torch=str(torch.__version__),
            deterministic=plan.settings["deterministic"],
            chunks=plan.chunks,
            epochs_per_chunk=plan.epochs_per_chunk,
            steps_per_epoch=reference["steps_per_epoch"],
            interrupted_after=reference["breaks"],
        )
        say(f"{verdict.steps} steps without an interruption, on {verdict.device}")
        start = 0
        for stop in [*verdict.interrupted_after, verdict.steps]:
            link = run_link(plan, root, RESUMED, start, None if stop == verdict.steps else stop)
            if link["steps_per_epoch"] != verdict.steps_per_epoch:
                raise JobError(
                    f"job {verdict.job}: data('train') is not of the same length in each process: an epoch had "
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
    """The link from start to stop, with the same steps of the reference. Files that are done with are removed.

    A tensor of a state says more than a metric that follows from it: the metrics count where the states are the same.
    """
    batches = zip(reference["batches"][start:stop], link["batches"], strict=True)
    first_batch = next((step for step, (one, other) in enumerate(batches, start + 1) if one != other), None)
    verdict.batches_compared += stop - start
    found_after, all_found = stop, list[Difference]()
    per_chunk = verdict.steps_per_epoch * verdict.epochs_per_chunk
    for point in _between(start, stop, per_chunk):  # each has a checkpoint
        expected, found = (_state(root / name / f"{point}.pt") for name in (REFERENCE, RESUMED))
        (root / REFERENCE / f"{point}.pt").unlink()
        verdict.states_compared += 1
        verdict.tensors_compared += count_tensors(expected)
        if not all_found:
            found_after, all_found = point, list(differences(expected, found))
    for point in _between(start, stop, verdict.steps_per_epoch):
        if not all_found:
            metrics, again = (side["metrics"].get(str(point)) for side in (reference, link))
            found_after, all_found = point, list(differences(metrics, again, "metrics"))
    if start:
        (root / RESUMED / f"{start}.pt").unlink()
    if not all_found and first_batch is None:
        return None
    all_found = all_found or [Difference(f"batch {first_batch}", "value", "the same batch", "another")]
    distances = [d.max_abs_difference for d in all_found if d.max_abs_difference is not None]
    return Inexact(
        first=all_found[0],
        interrupted_after=start or None,
        found_after=found_after,
        first_batch=first_batch,
        parts=list(dict.fromkeys(re.split(r"[.\[ ]", d.path)[0] for d in all_found)),
        largest=max(distances, default=None),
    )


def _between(start: int, stop: int, every: int) -> list[int]:
    """The multiples of `every` between start and stop, and stop."""
    return [*range((start // every + 1) * every, stop, every), stop]


def _state(path: Path) -> dict[str, Any]:
    """Without where the chunk was cut, which the reference was not: what matters of that shows in the metrics."""
    return {key: value for key, value in read(path).items() if key != "cut"}


def advice(verdict: Verdict) -> list[str]:
    """What usually makes a difference like this one, likeliest first."""
    inexact = verdict.inexact
    if inexact is None:
        return []
    lines = [] if verdict.deterministic else [MODE_IS_OFF]
    if inexact.interrupted_after is None:
        lines.append(NOT_EVEN_INTERRUPTED)
    elif inexact.first_batch is not None:
        lines.append(f"from step {inexact.first_batch} on the batches differ: {OTHER_BATCHES}")
    elif inexact.parts == ["metrics"]:
        lines.append(OTHER_METRICS)
    else:
        lines.append(STATE_OUTSIDE)
    return lines


MODE_IS_OFF = (
    'deterministic mode is off ("deterministic": false): kernels may add in another order each time, on a GPU above '
    "all, and that alone can be why. Check again with --set deterministic=true: what still differs then has another "
    "cause"
)
NOT_EVEN_INTERRUPTED = (
    "nothing had been interrupted yet: two processes that train from the beginning differ. Does the job seed something "
    "from the clock, or depend on hash(), the order of a set, the order of files in a folder, or what other processes "
    "leave behind?"
)
OTHER_BATCHES = (
    "the data set draws from a generator of its own (random.Random, numpy.random.default_rng, torch.Generator), counts "
    "its calls, or keeps an order of its own. Let an example depend on its index alone, and draw from random, "
    "numpy.random or torch, which orch seeds"
)
OTHER_METRICS = (
    "the states are the same, the metrics are not: metrics() or the validation data draw from a generator of their "
    "own, or keep something from one batch to the next"
)
STATE_OUTSIDE = (
    "the batches are the same: something that the training depends on is kept outside the model and the optimizer (a "
    "counter or a generator in the job, a scheduler or an average of its own, a buffer with persistent=False). A "
    "checkpoint holds what state_dict() gives: make it a buffer of the model, or return it from a module's "
    "get_extra_state(); profiles have schedules, and averaging() keeps an average"
)


def as_json(verdict: Verdict) -> dict[str, Any]:
    """For `--json`; a difference that is no finite number is null there."""
    found = {"exact": verdict.exact, "steps": verdict.steps, **asdict(verdict)}
    if verdict.inexact is not None:
        first = found["inexact"]["first"]
        first["max_abs_difference"] = _finite(first["max_abs_difference"])
        found["inexact"]["largest"] = _finite(found["inexact"]["largest"])
    return found


def _finite(value: float | None) -> float | None:
    return None if value is None or value == float("inf") else value


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder that is gone afterwards, also when this process is told to end."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with tempfile.TemporaryDirectory(prefix="orch-verify-resume-") as folder:
            yield Path(folder)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
