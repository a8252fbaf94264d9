"""A chunk whose training or validation raises an error goes on from its last kept state, and gives bit for bit what it
gives without the error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.digits import Digits
from jobs.training import memory
from jobs.training.session import Session
from jobs.training.states import EpochCopy, read
from orchestrator.records import EpochResult, Work
from orchestrator.run.run import Run
from tests.support.command_line import orch_here, output, write_job, write_settings
from tests.support.invariants import violations
from tests.support.short_training import (
    STEPS,
    Fresh,
    child,
    differences,
    digits_session,
    founder,
    in_a_new_process,
    interrupt,
    measured,
    never,
    save_trained,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 3


def fails(session: Session, method: str, calls: int) -> None:
    """Let a method of the session's job raise an error after this many calls. Metrics are computed with random numbers,
    so that a validation that failed has drawn some."""
    own, left = getattr(session.job, method), iter(range(calls))

    def call(*arguments: Any) -> Any:
        result = own(*arguments)
        if next(left, None) is None:
            raise RuntimeError("the user's code fails")
        return result

    setattr(session.job, method, call)


def kept_by(session: Session, work: Work, folder: Path) -> list[Path]:
    """Train a chunk that fails. Return the files of the states that are left, the latest first."""
    in_a_new_process()
    with pytest.raises(RuntimeError, match="the user's code fails"):
        session.train(work, never, lambda _result: None)
    files = []
    for number, kept in enumerate(session.kept()):
        files.append(folder / f"kept-{number}.pt")
        with files[-1].open("wb") as target:
            kept.save(target)
    return files


@pytest.fixture(autouse=True)
def every_epoch_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.rules.failing.COPY_EVERY", 0.0)


@pytest.mark.parametrize("start", ["a founder", "a child"])
@pytest.mark.parametrize(
    ("method", "calls", "epochs"),
    [
        pytest.param("training_loss", STEPS, 1, id="first step of the second epoch"),
        pytest.param("training_loss", 3 * STEPS - 1, 2, id="last step"),
        pytest.param("evaluation_metrics", 0, 0, id="validation of the first epoch"),
        pytest.param("evaluation_metrics", 2, 2, id="validation of the last epoch"),
    ],
)
def test_a_chunk_that_goes_on_from_its_kept_state_equals_one_that_did_not_fail(
    method: str, calls: int, epochs: int, start: str, fresh: Fresh, tmp_path: Path
) -> None:
    work = founder(epochs=EPOCHS)
    if start == "a child":
        work = child(save_trained(fresh(), founder(), tmp_path / "parent.pt"), epochs=EPOCHS)
    whole = fresh()
    validations = len(list(whole.feed("validation").in_order()))
    expected = train(whole, work)

    failing = fresh()
    fails(failing, method, calls if method == "training_loss" else calls * validations)
    kept = kept_by(failing, work, tmp_path)
    assert len(kept) == (1 if epochs == 0 or method == "training_loss" else 2)
    for file in kept:
        seen: list[EpochResult] = []
        again = fresh()
        result = train(again, replace(work, parent=None, suspended=file), seen=seen)
        assert differences(again.state(), whole.state()) == []
        assert measured(result) == measured(expected)
        assert len(seen) == EPOCHS - epochs, "only the epochs that were not kept are trained again"


def test_the_copy_of_an_epoch_is_the_state_of_an_interruption_at_its_end(fresh: Fresh, tmp_path: Path) -> None:
    failing, stopped = fresh(), fresh()
    fails(failing, "training_loss", STEPS)
    (kept,) = kept_by(failing, founder(epochs=EPOCHS), tmp_path)
    interrupt(stopped, founder(epochs=EPOCHS), STEPS, tmp_path / "cut.pt")
    resumed = [fresh(), fresh()]
    for session, file in zip(resumed, (kept, tmp_path / "cut.pt"), strict=True):
        train(session, replace(founder(epochs=EPOCHS), suspended=file))
    assert differences(resumed[0].state(), resumed[1].state()) == []


def test_an_error_in_the_first_epoch_leaves_no_state_and_one_chunk_does_not_leave_its_state_to_the_next() -> None:
    session = digits_session()
    fails(session, "training_loss", 2 * STEPS)
    in_a_new_process()
    with pytest.raises(RuntimeError):
        session.train(founder(epochs=EPOCHS), never, lambda _result: None)
    assert [kept.steps for kept in session.kept()] == [0]
    with pytest.raises(RuntimeError):
        session.train(founder(epochs=EPOCHS), never, lambda _result: None)
    assert session.kept() == []


def test_an_epoch_is_not_copied_if_the_memory_does_not_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    session = digits_session()
    fails(session, "training_loss", 2 * STEPS)
    assert kept_by(session, founder(epochs=EPOCHS), tmp_path) == []


def test_a_copy_that_can_not_be_made_does_not_fail_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(self: Any, state: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("jobs.training.states.Copies.copy", no_memory)
    assert train(digits_session(), founder(epochs=2)).epochs == 2


def test_copies_take_a_hundredth_of_the_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.rules.failing.COPY_EVERY", 100.0)
    now = iter(range(100))
    monkeypatch.setattr("jobs.training.states.time.monotonic", lambda: float(next(now)))  # each copy takes a second
    copy, copied = EpochCopy(), []
    for epoch in range(10):
        copy.copy(lambda epoch=epoch: {"epoch": epoch}, 40.0)
        copied.append(copy.state["epoch"] if copy.state else None)
    assert copied == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]


def test_the_last_epoch_of_a_chunk_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise AssertionError("a chunk of one epoch needs no copy")

    monkeypatch.setattr(EpochCopy, "copy", refuse)
    train(digits_session(), founder(epochs=1))


class Draws(Digits):
    """Draws random numbers in its validation."""

    def evaluation_metrics(self, model: Any, batch: Any) -> Any:
        import torch

        return super().evaluation_metrics(model, batch) | {"noise": torch.rand(())}


def test_a_validation_that_draws_random_numbers_is_repeated_with_the_same_ones(tmp_path: Path) -> None:
    whole, failing, again = (digits_session(Draws) for _ in range(3))
    expected = train(whole, founder(epochs=2))
    batches = len(list(whole.feed("validation").in_order()))
    fails(failing, "evaluation_metrics", batches - 1)
    file = kept_by(failing, founder(epochs=2), tmp_path)[0]
    result = train(again, replace(founder(epochs=2), suspended=file))
    assert measured(result) == measured(expected)
    assert differences(again.state(), whole.state()) == []


# --- a whole run

FAILS_ONCE = """
from jobs.digits import Digits

class Mine(Digits):
    steps = 0

    def training_loss(self, model, batch):
        Mine.steps += 1
        flag = Path(__file__).with_name("flag")
        if flag.exists() and Mine.steps == FAILS_AT:
            flag.unlink()
            sys.exit("no more credits")
        return super().training_loss(model, batch)
"""


def finished(folder: Path, fails_at: int) -> Run:
    """Run two chunks of 3 epochs of 6 steps, in this process."""
    folder.mkdir()
    (folder / "flag").touch()
    write_job(folder, FAILS_ONCE.replace("FAILS_AT", str(fails_at)))
    changes = {"job": "mine:Mine", "epochs_per_chunk": 3, "deterministic": True}
    output(orch_here(folder, "launch", write_settings(folder, **changes)))
    return Run.open(folder / "runs/quick")


def test_a_run_whose_code_fails_once_gives_the_models_of_a_run_without_a_failure(tmp_path: Path) -> None:
    never_fails, fails = finished(tmp_path / "one", fails_at=0), finished(tmp_path / "other", fails_at=14)
    (expected, found) = ([*run.leaderboard.reader.rows("chunk")] for run in (never_fails, fails))
    assert [chunk["failures"] for chunk in found] == [1, 0]
    assert [chunk["score"] for chunk in found] == [chunk["score"] for chunk in expected]
    assert fails.status()["last_error"] == "SystemExit: no more credits"
    assert violations(fails) == []
    for one, other in zip(never_fails.board()["entries"], fails.board()["entries"], strict=True):
        files = [run.folder / "checkpoints" / entry["file"] for run, entry in ((never_fails, one), (fails, other))]
        assert differences(*map(read, files)) == []
