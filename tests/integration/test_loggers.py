"""Real chunks and real runs: the curves of the training can be read with each logger's own library."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.training.opening import open_session
from jobs.training.states import read
from orchestrator.errors import JobSpecError
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Finished, Interrupted, Work
from orchestrator.run.run import Run
from orchestrator.settings.settings import Settings
from orchestrator.worker import user_job
from tests.integration.test_local_chains import processes_of
from tests.support.command_line import orch_here, output
from tests.support.curves import READERS, Curves, needed
from tests.support.settings import settings as common_settings

ROOT = Path(__file__).parents[2]
FAST = Profile("fast", learning_rate=0.05, momentum=0.9, weight_decay=0.0005)
STEPS = 6  # steps in an epoch of the digits, with the settings below
FILE = "g00000001-c00000007.pt"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("loggers"),  # all tests share one run
    # Ignore warnings from the loggers' libraries.
    *(pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("Deprecation", "PendingDeprecation", "Future")),
]
each_logger = pytest.mark.parametrize("logger", READERS)
close_to = pytest.approx  # TensorBoard keeps values as float32


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each test, undo changes of environment variables, because loggers set those that the user has not set."""
    for name in ("WANDB_MODE", "WANDB_ERROR_REPORTING", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_SQLALCHEMYSTORE_POOLCLASS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def settings(*loggers: str, **changes: Any) -> Settings:
    values = {"name": "mine", "job": "jobs.digits:Digits", "max_batch_size": 250, "loggers": list(loggers)}
    return common_settings(**values | changes)


def work(folder: Path, epochs: int = 2, **changes: Any) -> Work:
    (folder / "checkpoints").mkdir(exist_ok=True, parents=True)
    given = {"parent": None, "suspended": None, "chunk_id": 7, "generation": 1, "worker_id": 3} | changes
    return Work(profile=FAST, epochs=epochs, seed=0, repeat=0, **given)


class Job:
    """One job of the chain: a session and its results."""

    def __init__(self, folder: Path, *loggers: str, **changes: Any) -> None:
        self.folder = folder
        self.session = open_session(settings(*loggers, **changes), 1, run_folder=folder)
        self.results: list[EpochResult] = []

    def train(self, work: Work, steps: int | None = None) -> Finished | Interrupted:
        """steps: after how many steps to stop; None: at the end of the chunk."""
        asked = itertools.count()
        return self.session.train(work, lambda: next(asked) == steps, self.results.append)

    def save(self) -> Path:
        path = self.folder / "checkpoints" / FILE
        with open(path, "wb") as target:
            self.session.save(target)
        return path


def at_each_epoch(curves: Curves, name: str) -> list[float]:
    return [value for _, value in curves[name]]


@each_logger
def test_a_suspended_chunk_whose_next_job_dies_is_one_series_without_repeated_steps(
    logger: str, tmp_path: Path
) -> None:
    needed(logger)
    first = Job(tmp_path, logger)
    assert isinstance(first.train(work(tmp_path), steps=4), Interrupted)
    suspended = first.save()
    first.session.close()

    killed = Job(tmp_path, logger)  # dies after it has logged steps and before it has saved its state
    assert isinstance(killed.train(work(tmp_path, suspended=suspended), steps=4), Interrupted)
    killed.session.close()

    last = Job(tmp_path, logger)
    finished = last.train(work(tmp_path, suspended=suspended))
    last.session.close()

    assert isinstance(finished, Finished)
    curves, tags = READERS[logger](tmp_path / "logs", 7)
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 2 * STEPS + 1))
    assert curves["train/learning_rate"] == [(step, close_to(0.05)) for step in range(1, 2 * STEPS + 1)]
    assert [step for step, _ in curves["validation/accuracy"]] == [STEPS, 2 * STEPS]
    accuracies = [result.metrics["accuracy"] for result in finished.results]
    assert at_each_epoch(curves, "validation/accuracy") == close_to(accuracies)
    losses = [result.metrics["train_loss"] for result in finished.results]
    assert at_each_epoch(curves, "train/epoch_loss") == close_to(losses)
    assert (tags["run"], tags["founder"], tags["worker"], tags["profile"]) == ("mine", "7", "3", "fast")


@each_logger
def test_the_logged_losses_are_those_of_the_training(logger: str, tmp_path: Path) -> None:
    needed(logger)
    job = Job(tmp_path, logger, max_batch_size=100, select_on="test")
    job.train(work(tmp_path, epochs=1))
    job.session.close()
    curves, _ = READERS[logger](tmp_path / "logs", 7)
    whole, rest = divmod(job.session.feed("train").count, 100)
    sizes = [100] * whole + [rest]
    mean = sum(loss * size for (_, loss), size in zip(curves["train/loss"], sizes, strict=True)) / sum(sizes)
    assert mean == close_to(job.results[0].metrics["train_loss"], rel=1e-5)
    assert at_each_epoch(curves, "test/accuracy") == close_to([job.results[0].metrics["accuracy"]])


def test_logging_does_not_change_the_training(tmp_path: Path) -> None:
    def trained(*loggers: str) -> dict[str, Any]:
        folder = tmp_path / (loggers or ("none",))[0]
        job = Job(folder, *loggers, deterministic=True)
        job.train(work(folder))
        job.session.close()
        return read(job.save())

    with_logger, without = trained("tensorboard"), trained()
    for name, tensor in without["model"].items():
        assert torch.equal(with_logger["model"][name], tensor), name
    assert torch.equal(with_logger["rng"]["torch"], without["rng"]["torch"])


# --- errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB. Skips the test if it can't be mounted."""
    folder = tmp_path / "logs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# On a full disk, TensorBoard's own thread fails too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@each_logger
def test_a_full_disk_turns_a_logger_off_and_the_chunk_is_trained(
    logger: str, tmp_path: Path, small_disk: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed(logger)
    monkeypatch.setattr(logging.getLogger("orch"), "propagate", True)
    (small_disk / "other").write_bytes(b"x" * 60_000)
    job = Job(tmp_path, logger, max_batch_size=2)
    assert isinstance(job.train(work(tmp_path, epochs=1)), Finished)
    job.session.close()
    if logger != "wandb":  # wandb writes in its own process, which reports no error
        assert len(warnings(caplog)) == 1
        assert warnings(caplog)[0].startswith(f"logger {logger} is off for the rest of this job: ")


def test_a_name_that_is_not_a_logger_is_refused_at_launch() -> None:
    with pytest.raises(JobSpecError, match="loggers: 'not_there:Mine': not_there can't be imported"):
        user_job.check_job(settings("not_there:Mine"), [])


# --- a user's own logger


def test_the_example_of_the_docs_is_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "logging.md").read_text()
    (code,) = re.findall(r"```python\n# my_module\.py\n(.*?)```", page, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    user_job.check_job(settings("my_module:MyLogger"), [str(tmp_path)])
    job = Job(tmp_path, "my_module:MyLogger")
    (tmp_path / "logs").mkdir()
    job.train(work(tmp_path))
    job.session.close()
    rows = [line.split(",") for line in (tmp_path / "logs" / "chunk-00000007.csv").read_text().splitlines()]
    accuracies = [(int(step), float(value)) for name, step, value in rows if name == "validation/accuracy"]
    assert accuracies == [((i + 1) * STEPS, result.metrics["accuracy"]) for i, result in enumerate(job.results)]
    assert sum(name == "train/loss" for name, _, _ in rows) == 2 * STEPS


# --- a run


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, list[str]]]:
    """A run of two workers, whose models were evaluated, and the names of its loggers."""
    from importlib.util import find_spec

    loggers = [name for name in READERS if find_spec(name)]
    runs_dir = tmp_path_factory.mktemp("launched")
    options = {
        "loggers": json.dumps(loggers), "stop_after_epochs": "24", "num_models": "3", "epochs_per_chunk": "2",
        "eon_lifetime": "60", "total_lifetime": "200", "max_batch_size": "250",
        "job_params.width": "4",
    }  # fmt: skip
    changes = [part for key, value in options.items() for part in ("--set", f"{key}={value}")]
    file = str(ROOT / "settings/digits.json")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("WANDB", "MLFLOW"))]:
            patch.delenv(name)
        launch = ("launch", file, "--executor", "local", "--wait", "--runs-dir", str(runs_dir), *changes)
        output(orch_here(runs_dir, *launch))
        output(orch_here(runs_dir, "evaluate", "digits", "--runs-dir", str(runs_dir)))
    yield Run.open(runs_dir / "digits"), loggers
    for process in processes_of(runs_dir):
        process.kill()


@each_logger
def test_the_curves_of_a_run_agree_with_its_leaderboard(logger: str, launched: tuple[Run, list[str]]) -> None:
    needed(logger)
    run, loggers = launched
    assert logger in loggers
    reader = run.leaderboard.reader
    epochs, tests = reader.rows("epoch"), {c["chunk_id"]: c["test_metrics"] for c in reader.rows("checkpoint")}
    chunks = {c["chunk_id"]: c for c in reader.rows("chunk") if c["state"] in ("promoted", "discarded")}
    logged = [line for log in (run.folder / "logs").glob("worker-*.log") for line in log.read_text().splitlines()]
    assert [line for line in logged if "is off" in line] == []
    made_by = {c["checkpoint_id"]: c["chunk_id"] for c in reader.rows("checkpoint")}
    curves = {}
    for chunk, row in chunks.items():
        curves[chunk], tags = READERS[logger](run.folder / "logs", chunk)
        mine = [epoch for epoch in epochs if epoch["chunk_id"] == chunk]
        for shown, name in (("validation/accuracy", "accuracy"), ("train/epoch_loss", "train_loss")):
            assert at_each_epoch(curves[chunk], shown) == close_to([epoch["metrics"][name] for epoch in mine])
        assert at_each_epoch(curves[chunk], "epoch") == [epoch["number"] for epoch in mine]
        assert (tags["profile"], tags["position"]) == (row["profile"], str(row["position"]))
        if tests.get(chunk) is None:
            assert "test/accuracy" not in curves[chunk]
        else:
            assert at_each_epoch(curves[chunk], "test/accuracy") == close_to([tests[chunk]["accuracy"]])
        yes, no = ("true", "false") if logger == "wandb" else ("yes", "no")
        assert tags["promoted"] == (yes if row["state"] == "promoted" else no)
        if row["parent_id"] is not None and made_by[row["parent_id"]] in curves:
            parent = curves[made_by[row["parent_id"]]]["train/loss"]
            assert curves[chunk]["train/loss"][0][0] == parent[-1][0] + 1
    assert sum(metrics is not None for metrics in tests.values()) == 3
    assert any(row["parent_id"] for row in chunks.values())


def test_a_run_leaves_at_most_two_files_for_each_chunk_and_job_and_no_process(
    launched: tuple[Run, list[str]],
) -> None:
    run, loggers = launched
    begun = len(run.leaderboard.reader.rows("chunk"))
    for part in set(loggers) & {"tensorboard", "wandb"}:
        assert len(list((run.folder / "logs" / part).rglob("*"))) <= 2 * (begun + 3 + 4), "each test and suspension too"
    assert processes_of(run.folder.parent) == []
