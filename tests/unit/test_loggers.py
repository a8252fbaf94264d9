"""Loggers get the values of the training, and nothing that they do affects the training."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.errors import JobError
from jobs.loggers import Logger, Place, Points, Series, choice, recorder
from jobs.loggers.logger import run_id
from jobs.loggers.recorder import Recorder
from orchestrator.files.checkpoint_record import lineage
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Work
from orchestrator.settings.settings import LOGGERS
from tests.support.checkpoints import write
from tests.support.settings import settings

PROFILE = Profile("fast", learning_rate=0.1, momentum=0.9, weight_decay=0.0)
FOUNDER = Work(PROFILE, 1, 0, 0, None, None, chunk_id=7, generation=9, worker_id=2, position=0)
PLACE = Place("run", Path("logs"))


@dataclass
class Kept(Logger):
    """Records the calls of its methods."""

    calls: list[Any] = field(default_factory=list)
    thread: str = ""

    def begin(self, series: Series) -> None:
        self.thread = threading.current_thread().name
        self.calls.append(series)

    def log(self, points: Points) -> None:
        self.calls.append(points)

    def judge(self, promoted: bool) -> None:
        self.calls.append(promoted)

    def end(self) -> None:
        self.calls.append("end")

    def close(self) -> None:
        self.calls.append("close")

    def curve(self, name: str) -> list[tuple[int, float]]:
        points = [p for p in self.calls if isinstance(p, Points) and name in p.values]
        return [pair for p in points for pair in zip(p.steps, p.values[name], strict=True)]


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def recorder_of(tmp_path: Path, clock: Callable[[], float] = time.time, **loggers: Logger) -> Recorder:
    makers = {name: lambda logger=logger: logger for name, logger in loggers.items()}
    return Recorder("run", tmp_path, "validation", makers, clock)


def steps(observer: Recorder, first: int, last: int, loss: float = 1.0) -> None:
    for step in range(first, last + 1):
        observer.step(step, torch.tensor(loss / step), 0.1 * step)


def result(number: int = 1, **metrics: float) -> EpochResult:
    return EpochResult(number, 2.5, {"train_loss": 0.7, "accuracy": 0.5} | metrics)


# --- the calls of a logger


def test_a_chunk_is_a_series_of_every_step_and_epoch(tmp_path: Path) -> None:
    kept = Kept()
    observer = recorder_of(tmp_path, kept=kept)
    observer.chunk(FOUNDER)
    steps(observer, 1, 3)
    observer.epoch(result(1))
    steps(observer, 4, 6)
    observer.epoch(result(2, accuracy=0.6))
    observer.chunk(replace(FOUNDER, chunk_id=8))
    steps(observer, 1, 1)
    observer.close()
    first, second = (series for series in kept.calls if isinstance(series, Series))
    assert (first.name, first.step, first.new, first.rewrites) == ("chunk-00000007", 1, True, False)
    assert second.name == "chunk-00000008"
    of_first = Kept(kept.calls[: kept.calls.index("end")])
    loss = [(step, torch.tensor(1.0 / step).item()) for step in range(1, 7)]
    assert of_first.curve("train/loss") == loss
    assert of_first.curve("train/learning_rate") == [(step, 0.1 * step) for step in range(1, 7)]
    assert of_first.curve("validation/accuracy") == [(3, 0.5), (6, 0.6)]
    assert of_first.curve("train/epoch_loss") == [(3, 0.7), (6, 0.7)]
    assert of_first.curve("train/epoch_seconds") == [(3, 2.5), (6, 2.5)]
    assert of_first.curve("epoch") == [(3, 1.0), (6, 2.0)]
    assert kept.calls[-2:] == ["end", "close"]
    assert kept.thread == "logger kept"


def test_whether_a_chunk_was_promoted_is_logged_before_its_end(tmp_path: Path) -> None:
    kept = Kept()
    observer = recorder_of(tmp_path, kept=kept)
    for promoted in (True, False):
        observer.chunk(FOUNDER)
        steps(observer, 1, 1)
        observer.judged(promoted)
    observer.chunk(FOUNDER)
    observer.judged(True)  # the chunk has no series
    observer.close()
    assert [calls for calls in kept.calls if isinstance(calls, bool | str)] == [True, "end", False, "end", "close"]


def test_with_selection_on_the_test_set_the_curves_are_named_test(tmp_path: Path) -> None:
    kept = Kept()
    observer = Recorder("run", tmp_path, "test", {"kept": lambda: kept})
    observer.chunk(FOUNDER)
    steps(observer, 1, 1)
    observer.epoch(result())
    observer.close()
    assert kept.curve("test/accuracy") == [(1, 0.5)]
    assert kept.curve("validation/accuracy") == []


def test_a_loop_that_reports_no_steps_has_epochs_on_its_x_axis(tmp_path: Path) -> None:
    kept = Kept()
    observer = recorder_of(tmp_path, kept=kept)
    observer.chunk(FOUNDER)
    observer.epoch(result(11))
    observer.close()
    assert kept.curve("validation/accuracy") == [(11, 0.5)]


def test_a_chunk_without_a_step_makes_no_series(tmp_path: Path) -> None:
    kept = Kept()
    observer = recorder_of(tmp_path, kept=kept)
    observer.chunk(FOUNDER)
    observer.chunk(FOUNDER)
    observer.close()
    assert kept.calls == []


def test_the_lineage_is_read_from_the_records_beside_the_checkpoints(tmp_path: Path) -> None:
    for chunk, parent in ((3, None), (5, "g00000003-c00000003.pt")):
        line = lineage(tmp_path, parent)
        stem = f"g{chunk:08d}-c{chunk:08d}"
        write(tmp_path, stem, lambda target: target.write(b"x"), parent_file=parent, ancestors=line)
    work = replace(FOUNDER, parent_file="g00000005-c00000005.pt", position=2)
    child, founder = (recorder.series_of("run", tmp_path, each, 1) for each in (work, FOUNDER))
    assert child.tags == {
        "run": "run", "chunk": 7, "founder": 3, "parent_chunk": 5, "parent_checkpoint": "g00000005-c00000005.pt",
        "profile": "fast", "position": 2, "worker": 2, "generation": 9,
    }  # fmt: skip
    assert founder.tags["founder"] == 7
    assert "parent_chunk" not in founder.tags


def test_a_resumed_chunk_rewrites_from_its_first_step(tmp_path: Path) -> None:
    kept = Kept()
    observer = recorder_of(tmp_path, kept=kept)
    observer.chunk(replace(FOUNDER, suspended=Path("suspended.pt")))
    steps(observer, 41, 42)
    observer.close()
    assert (kept.calls[0].step, kept.calls[0].new, kept.calls[0].rewrites) == (41, False, True)


# --- when loggers are called


@pytest.mark.parametrize(
    ("apart_s", "count", "handed_over"),
    [(0.0, 10, 0), (recorder.EVERY_S / 4, 10, 8), (0.0, recorder.MOST_POINTS + 5, recorder.MOST_POINTS)],
    ids=["soon after", "every so many seconds", "as many as may wait"],
)
def test_points_are_handed_over_in_bulk(tmp_path: Path, apart_s: float, count: int, handed_over: int) -> None:
    clock, calls = Clock(), []
    observer = recorder_of(tmp_path, clock, kept=Kept())
    observer._channels.put = calls.append  # type: ignore[method-assign]
    observer.chunk(FOUNDER)
    for step in range(1, count + 1):
        clock.now += apart_s
        observer.step(step, torch.tensor(1.0), 0.1)
    kept = Kept()
    for call in calls:
        call(kept)
    assert len(kept.curve("train/loss")) == handed_over


class NothingIsRead(TorchDispatchMode):
    """Fails on any operation of torch, such as reading a value, which would wait for the GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} while the training waits")


def test_loggers_cost_the_training_no_computation_and_no_read(tmp_path: Path) -> None:
    kept = Kept()
    observer = recorder_of(tmp_path, kept=kept)
    observer.chunk(FOUNDER)
    losses = [torch.tensor(1.0) for _ in range(2000)]
    with NothingIsRead():
        for step, loss in enumerate(losses, start=1):
            observer.step(step, loss, 0.1)
        observer.epoch(result())
    observer.close()
    assert len(kept.curve("train/loss")) == 2000


def test_losses_of_any_shape_and_type_are_read(tmp_path: Path) -> None:
    kept = Kept()
    observer = recorder_of(tmp_path, kept=kept)
    observer.chunk(FOUNDER)
    given = [torch.tensor([2.0]), torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(4.0, requires_grad=True)]
    for step, loss in enumerate(given, start=1):
        observer.step(step, loss, 0.1)
    observer.close()
    assert kept.curve("train/loss") == [(1, 2.0), (2, 3.0), (3, 4.0)]


# --- loggers that fail


class Failing(Kept):
    """Fails at one of its methods."""

    def __init__(self, at: str, error: BaseException) -> None:
        super().__init__()
        self.at, self.error = at, error

    def _record(self, what: str) -> None:
        self.calls.append(what)
        if what == self.at:
            raise self.error

    def begin(self, series: Series) -> None:
        self._record("begin")

    def log(self, points: Points) -> None:
        self._record("log")

    def end(self) -> None:
        self._record("end")

    def close(self) -> None:
        self._record("close")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    monkeypatch.setattr(logging.getLogger("orch"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), ImportError("no wandb"), SystemExit(1), ConnectionError("no network")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("at", ["begin", "log", "end", "close"])
def test_a_logger_that_fails_is_off_with_one_warning_and_the_others_go_on(
    tmp_path: Path, at: str, error: BaseException, warnings: Callable[[], list[str]]
) -> None:
    failing, kept = Failing(at, error), Kept()
    observer = recorder_of(tmp_path, failing=failing, kept=kept)
    for chunk in (1, 2, 3):
        observer.chunk(replace(FOUNDER, chunk_id=chunk))
        steps(observer, 1, 2)
        observer.epoch(result())
    observer.close()
    assert failing.calls.count(at) == 1
    assert warnings() == [f"logger failing is off for the rest of this job: {type(error).__name__}: {error}"]
    assert len(kept.curve("train/loss")) == 6


def test_a_logger_that_cannot_be_made_is_off(tmp_path: Path, warnings: Callable[[], list[str]]) -> None:
    def make() -> Logger:
        raise ImportError("No module named 'wandb'")

    observer = Recorder("run", tmp_path, "validation", {"wandb": make})
    observer.chunk(FOUNDER)
    steps(observer, 1, 2)
    observer.close()
    assert warnings() == ["logger wandb is off for the rest of this job: ImportError: No module named 'wandb'"]


class Hanging(Kept):
    """Hangs, as on a file system or network that does not answer."""

    def log(self, points: Points) -> None:
        time.sleep(3600)


def test_a_logger_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(recorder, "CLOSE_S", 0.2)
    monkeypatch.setattr(recorder, "MOST_WAITING", 20)
    kept = Kept()
    observer = recorder_of(tmp_path, hanging=Hanging(), kept=kept)
    began = time.monotonic()
    for chunk in range(12):
        observer.chunk(replace(FOUNDER, chunk_id=chunk))
        steps(observer, 1, 1)
        while len(kept.curve("train/loss")) < chunk:  # the other logger gets every chunk
            assert time.monotonic() - began < 60
            time.sleep(0.01)
    assert warnings() == ["logger hanging is off for the rest of this job: it is too slow: 20 calls are waiting"]
    observer.close()
    assert time.monotonic() - began < 60, "it would sleep for an hour"
    assert len(kept.curve("train/loss")) == 12
    assert len(warnings()) == 1


def test_closing_a_hanging_logger_has_a_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Callable[[], list[str]]
) -> None:
    monkeypatch.setattr(recorder, "CLOSE_S", 0.2)
    observer = recorder_of(tmp_path, hanging=Hanging())
    observer.chunk(FOUNDER)
    steps(observer, 1, 1)
    began = time.monotonic()
    observer.close()
    assert time.monotonic() - began < 60, "it would sleep for an hour"
    assert warnings() == [
        "logger hanging is off for the rest of this job: it has not written everything 0.2 s after the end"
    ]


# --- the choice of loggers


def test_built_in_loggers_import_their_libraries_only_when_they_write(tmp_path: Path) -> None:
    """Otherwise each job would wait for the imports before its first step."""
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from jobs.loggers import choice\n"
        "from tests.support.settings import settings\n"
        f"choice.observer(settings(loggers=['tensorboard', 'wandb', 'mlflow']), Path({str(tmp_path)!r}))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'tensorboard', 'wandb', 'mlflow', 'google'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "install"), [("wandb", "'orch[wandb]'"), ("mlflow", "'orch[mlflow]'")])
def test_an_extra_that_is_not_installed_is_an_error_that_says_how(
    monkeypatch: pytest.MonkeyPatch, name: str, install: str
) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda package: None)
    with pytest.raises(JobError) as caught:
        choice.check_loggers([name])
    assert str(caught.value) == (
        f"loggers: {name!r} needs the package {name}, which is not installed here. Run: pip install {install}; or "
        f'remove {name!r} from "loggers"'
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("not_there:Mine", "not_there can't be imported: ModuleNotFoundError"),
        ("jobs.digits:Digits", "loggers: 'jobs.digits:Digits' is not derived from jobs.loggers.Logger; allowed: "),
        ("jobs.digits:Nothing", "loggers: 'jobs.digits:Nothing': jobs.digits has no class Nothing"),
        ("jobs.digits", "jobs.digits has no class "),
    ],
)
def test_a_name_that_is_not_a_logger_is_an_error_that_says_why(name: str, problem: str) -> None:
    with pytest.raises(JobError) as caught:
        choice.check_loggers(["tensorboard", name])
    assert problem in str(caught.value)


def test_by_default_a_logger_logs_a_test_as_points() -> None:
    kept = Kept()
    Logger.test(kept, 12, {"accuracy": 0.9, "loss": 0.3})
    (points,) = kept.calls
    assert points.steps == [12]
    assert points.values == {"test/accuracy": [0.9], "test/loss": [0.3]}


def test_threads_that_ask_at_once_get_the_same_run_id(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(run_id(folder))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1
    assert len(ids[0]) == 8
    assert [path.name for path in folder.iterdir()] == ["run-id"]


@pytest.mark.parametrize(("lock", "expected"), [("auto", "soft"), ("soft", "soft"), ("flock", "flock")])
def test_a_logger_is_given_the_run_its_folder_and_the_lock_that_holds(tmp_path: Path, lock: str, expected: str) -> None:
    made = choice.makers(settings(loggers=["tensorboard"], lock=lock), tmp_path)["tensorboard"]()
    assert (made.run, made.folder, made.lock) == ("test", tmp_path / "logs", expected)


def test_the_settings_allow_exactly_the_built_in_loggers() -> None:
    assert set(LOGGERS) == set(choice.BUILT_IN)
