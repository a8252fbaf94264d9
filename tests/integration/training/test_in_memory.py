"""A chunk that continues the last one in memory gives bit for bit what it gives from the checkpoint's file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.digits import Digits
from jobs.job import Averaging
from jobs.loggers.observer import Observer
from jobs.training.reuse import description
from jobs.training.session import Session
from jobs.training.states import Copies, read
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Work
from tests.support.short_training import (
    FAST,
    FINE,
    PLAIN,
    Fresh,
    child,
    differences,
    digits_session,
    founder,
    measured,
    save,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ADAM = Profile("adam", learning_rate=1e-3, optimizer="AdamW")
STEPPED = Profile("stepped", learning_rate=0.05, schedule={"name": "StepLR", "step_size": 3})


def snapshot(session: Session, file: Path) -> Callable[[], Path]:
    """Snapshot the session's state; the returned function writes it."""
    write = session.snapshot()
    assert write is not None

    def written() -> Path:
        with file.open("wb") as target:
            write(target)
        return file

    return written


@dataclass
class Chain:
    results: list[Any]  # the measurements of each chunk
    state: dict[str, Any]  # of the last file


def continued(fresh: Fresh, profiles: list[Profile], folder: Path, in_memory: bool) -> Chain:
    """Train one chunk after the other, in one session in memory, or each in a new session from the last one's file."""
    session, work, results = fresh(), founder(profile=profiles[0]), []
    for number, following in enumerate([*profiles[1:], FAST]):
        results.append(measured(train(session, work)))
        file = folder / f"{in_memory}-{number}.pt"
        write = snapshot(session, file)
        if not in_memory or number + 1 == len(profiles):
            write()
        if not in_memory:
            session = fresh()
        work = replace(child(file, profile=following), in_memory=in_memory)
    return Chain(results, read(file))


class Averaged(Digits):
    def averaging(self) -> Averaging:
        return Averaging(0.9, 2)


class Hidden(Digits):
    """Counts its calls in an attribute that no checkpoint contains, and computes with it."""

    def model(self) -> nn.Module:
        class Counting(nn.Sequential):
            calls = 0

            def forward(self, inputs: Tensor) -> Tensor:
                self.calls = self.calls + self.training
                return super().forward(inputs) * (1 + 0.01 * self.calls)

        return Counting(*super().model().children())


class FreezesByProfile(Digits):
    """The optimizer decides which parameters are trained, and never undoes it."""

    def optimizer(self, model: nn.Module, profile: Profile) -> torch.optim.Optimizer:
        if profile.name == "fine":
            next(model.parameters()).requires_grad_(False)
        return super().optimizer(model, profile)


SESSIONS = {
    "plain": digits_session,
    "averaged weights": partial(digits_session, Averaged),
    "hidden state": partial(digits_session, Hidden),
    "freezes by profile": partial(digits_session, FreezesByProfile),
    "channels_last": partial(digits_session, channels_last=True),
    "bf16": partial(digits_session, precision="bf16"),
}


@pytest.mark.parametrize("profiles", [[FAST, FAST, FAST], [FAST, FINE, PLAIN, FAST], [ADAM, FAST, ADAM], [STEPPED] * 3])
@pytest.mark.parametrize("kind", SESSIONS)
def test_going_on_in_memory_equals_going_on_from_the_file(kind: str, profiles: list[Profile], tmp_path: Path) -> None:
    in_memory = continued(SESSIONS[kind], profiles, tmp_path, in_memory=True)
    from_files = continued(SESSIONS[kind], profiles, tmp_path, in_memory=False)
    assert in_memory.results == from_files.results
    assert differences(in_memory.state, from_files.state) == []


def test_pictures_from_files_go_on_in_memory_too(fresh: Fresh, tmp_path: Path) -> None:
    in_memory, from_files = (continued(fresh, [FAST, FINE, FAST], tmp_path, memory) for memory in (True, False))
    assert in_memory.results == from_files.results
    assert differences(in_memory.state, from_files.state) == []


def test_a_snapshot_is_not_changed_by_the_training_that_follows(tmp_path: Path) -> None:
    session = digits_session()
    train(session, founder())
    expected = read(save(session, tmp_path / "at once.pt"))
    write = snapshot(session, tmp_path / "later.pt")
    train(session, replace(child(tmp_path / "later.pt"), in_memory=True))
    assert differences(read(write()), expected) == []


def test_a_state_that_was_trained_on_is_read_from_its_file(tmp_path: Path) -> None:
    """The training ahead was thrown away: the next chunk has the same parent, and another profile."""
    session = digits_session()
    train(session, founder())
    file = snapshot(session, tmp_path / "parent.pt")()
    train(session, replace(child(file), in_memory=True, tentative=True))
    train(session, child(file, profile=FINE))
    other = digits_session()
    train(other, child(file, profile=FINE))
    assert differences(session.state(), other.state()) == []


# --- which model objects may go on


class WithList(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.seen: list[int] = []


class WithObject(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.helper = object()


def with_hook() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: None)
    return model


def with_hidden_buffer() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("cache", torch.zeros(1), persistent=False)
    return model


@pytest.mark.parametrize("make", [WithObject, with_hook, with_hidden_buffer, lambda: nn.LSTM(2, 2)])
def test_a_model_with_state_that_cannot_be_compared_is_not_reused(make: Callable[[], nn.Module]) -> None:
    assert description(make()) is None


def test_a_change_of_a_plain_attribute_changes_the_description() -> None:
    model = nn.Sequential(WithList(), nn.BatchNorm1d(2), nn.Dropout(0.5))
    before = description(model)
    model.train()(torch.ones(3, 2))
    model.eval()
    assert description(model) == before  # parameters, buffers and the mode do not count
    model[0].seen.append(1)
    assert description(model) != before


def test_the_copy_reuses_its_memory_and_keeps_shared_tensors_shared() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    copies = Copies()
    first = copies.copy({"a": weight, "b": [weight, 1], "c": weight.t()})
    assert first["a"] is first["b"][0]
    assert torch.equal(first["c"], weight.t())
    weight += 1
    second = copies.copy({"a": weight, "b": [weight, 1], "c": weight.t()})
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert torch.equal(second["a"], weight)


# --- loggers


class Kept(Observer):
    def __init__(self) -> None:
        self.reports: list[str] = []

    def chunk(self, work: Work) -> None:
        self.reports.append(f"chunk {work.chunk_id}")

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        self.reports.append(f"step {step}")

    def epoch(self, result: EpochResult) -> None:
        self.reports.append(f"epoch {result.number}")

    def judged(self, promoted: bool) -> None:
        self.reports.append(f"promoted {promoted}")


def observed() -> tuple[Session, Kept]:
    session, kept = digits_session(), Kept()
    session._observer = session._reports = kept
    train(session, founder())
    kept.reports.clear()
    session.snapshot()
    return session, kept


def test_loggers_hear_nothing_of_a_tentative_chunk_before_it_is_claimed(tmp_path: Path) -> None:
    session, kept = observed()
    work = replace(child(tmp_path / "any.pt"), in_memory=True, tentative=True)
    claimed = replace(work, chunk_id=9, tentative=False)

    def claim_at_step_three() -> bool:
        steps.append(len(steps))
        if len(steps) == 4:
            assert kept.reports == []
            session.judged(True)
            session.confirmed(claimed)
        return False

    steps: list[int] = []
    train(session, work, claim_at_step_three)
    assert kept.reports == ["promoted True", "chunk 9", *(f"step {number}" for number in range(7, 13)), "epoch 2"]


def test_loggers_never_hear_of_a_tentative_chunk_that_is_thrown_away(tmp_path: Path) -> None:
    session, kept = observed()
    file = save(session, tmp_path / "parent.pt")
    train(session, replace(child(file), in_memory=True, tentative=True, chunk_id=5))
    session.judged(True)
    train(session, replace(child(file), chunk_id=6))
    assert kept.reports[:3] == ["promoted True", "chunk 6", "step 7"]


def test_without_memory_for_a_copy_there_is_no_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    session = digits_session()
    train(session, founder())
    monkeypatch.setattr("jobs.training.memory.free_bytes", lambda: 1000)
    assert session.snapshot() is None
