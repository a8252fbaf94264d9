"""A chunk starts from a complete state and ends with one. If it is interrupted and resumed, the result is the same."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.digits import Digits
from jobs.training.states import read
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Work
from tests.support.short_training import (
    FAST,
    FINE,
    PLAIN,
    STEPS,
    Fresh,
    child,
    differences,
    digits_session,
    founder,
    interrupt,
    measured,
    momentum,
    save,
    save_trained,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")

EPOCHS = 2


# --- chunks


def test_chunks_in_separate_jobs_equal_one_uninterrupted_training(fresh: Fresh, tmp_path: Path) -> None:
    whole = fresh()
    expected = train(whole, founder(epochs=3))

    files = [tmp_path / f"{number}.pt" for number in range(3)]
    results = []
    for number, file in enumerate(files):
        session = fresh()
        results.append(train(session, child(files[number - 1]) if number else founder()))
        save(session, file)

    assert differences(read(files[-1]), whole.state()) == []
    assert [line for result in results for line in measured(result)] == measured(expected)
    assert [number for number, _ in measured(expected)] == [1, 2, 3]
    assert results[-1].epochs == expected.epochs == 3


def test_the_compared_state_is_complete_and_changes_in_each_epoch(tmp_path: Path) -> None:
    """The other tests rely on this: a file contains momentum, weights and random state, and each epoch changes them."""
    session = digits_session()
    train(session, founder())
    before = read(save(session, tmp_path / "one.pt"))
    train(session, child(tmp_path / "one.pt"))
    changed = {line.partition(":")[0] for line in differences(before, session.state())}
    assert len(momentum(before)) == 6
    assert {"state.epochs", "state.rng.torch", "state.model.0.weight"} <= changed
    assert {f"state.optimizer.state.{i}.momentum_buffer" for i in range(6)} <= changed


def test_a_repeat_of_a_profile_trains_another_child(tmp_path: Path) -> None:
    parent_session = digits_session()
    train(parent_session, founder())
    parent = save(parent_session, tmp_path / "parent.pt")
    children = []
    for repeat in (0, 0, 1, 1, 2):
        session = digits_session()
        train(session, child(parent, repeat=repeat))
        children.append(session.state())
    first, first_again, second, second_again, third = children
    assert differences(first, first_again) == []
    assert differences(second, second_again) == []
    assert all(
        "state.model.0.weight" in differences(*pair) for pair in [(first, second), (second, third), (first, third)]
    )


def test_founders_of_different_seeds_differ_from_the_start(tmp_path: Path) -> None:
    founders = []
    for seed in (1, 1, 2):
        session = digits_session()
        interrupt(session, founder(seed=seed), 0, tmp_path / "start.pt")
        start = read(tmp_path / "start.pt")
        train(session, founder(seed=seed))
        founders.append((start, session.state()))
    (one_start, one), (again_start, again), (two_start, two) = founders
    assert differences(one_start["model"], again_start["model"]) == []
    assert differences(one, again) == []
    assert len(differences(one_start["model"], two_start["model"])) == 6
    assert len(differences(one["model"], two["model"])) == 6


def test_earlier_work_of_a_session_makes_no_difference(tmp_path: Path) -> None:
    """A job of a chain trains many chunks in one process."""
    parent = save_trained(digits_session(), founder(), tmp_path / "parent.pt")
    used = digits_session()
    train(used, founder(seed=9, profile=PLAIN))
    interrupt(used, child(parent), 3, tmp_path / "cut.pt")
    for work in (child(parent, FINE), founder()):
        new = digits_session()
        assert measured(train(used, work)) == measured(train(new, work))
        assert differences(used.state(), new.state()) == []


class Watched(Digits):
    """Records the classes of the examples in the order of training."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if outputs.requires_grad:
            self.__dict__.setdefault("seen", []).extend(targets.tolist())
        return super().loss(outputs, targets)


def test_every_epoch_and_every_founder_has_its_own_order_of_examples() -> None:
    orders = set()
    for seed in (1, 2):
        session = digits_session(Watched)
        train(session, founder(seed=seed, epochs=2))
        seen = session.job.__dict__["seen"]
        count = session.feed("train").count
        assert sorted(seen[:count]) == sorted(seen[count:])
        orders |= {tuple(seen[:count]), tuple(seen[count:])}
    assert len(orders) == 4


# --- interruptions


class Reference:
    """A chunk that was trained without interruption, and everything needed to train it again."""

    def __init__(self, fresh: Fresh, work: Work) -> None:
        self.fresh, self.work, self.session = fresh, work, fresh()
        self.seen: list[EpochResult] = []
        self.result = train(self.session, work, seen=self.seen)


@pytest.fixture(scope="module", params=["a founder", "a child under another profile", "a repeat"])
def uninterrupted(request: pytest.FixtureRequest, fresh: Fresh, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    if request.param == "a founder":
        return Reference(fresh, founder(epochs=EPOCHS))
    parent = save_trained(fresh(), founder(seed=5, epochs=1), tmp_path_factory.mktemp("parent") / "parent.pt")
    return Reference(fresh, child(parent, FINE, EPOCHS, repeat=int(request.param == "a repeat")))


@pytest.mark.parametrize("steps", range(EPOCHS * STEPS), ids=lambda steps: f"after {steps} steps")
def test_an_interrupted_chunk_equals_the_uninterrupted_one(
    uninterrupted: Reference, steps: int, tmp_path: Path
) -> None:
    seen: list[EpochResult] = []
    cut = interrupt(uninterrupted.fresh(), uninterrupted.work, steps, tmp_path / "cut.pt", seen)
    assert cut.steps == steps % STEPS
    assert len(seen) == steps // STEPS

    later = uninterrupted.fresh()
    result = train(later, replace(uninterrupted.work, suspended=tmp_path / "cut.pt"), seen=seen)

    assert differences(later.state(), uninterrupted.session.state()) == []
    assert measured(result) == measured(uninterrupted.result)
    assert (result.score, result.epochs) == (uninterrupted.result.score, uninterrupted.result.epochs)
    assert [epoch.number for epoch in seen] == [epoch.number for epoch in uninterrupted.seen]


def test_a_chunk_with_one_step_in_each_job_equals_the_uninterrupted_one(
    uninterrupted: Reference, tmp_path: Path
) -> None:
    work, seen = uninterrupted.work, []
    for done in range(1, EPOCHS * STEPS):
        interrupt(uninterrupted.fresh(), work, 1, tmp_path / f"{done}.pt", seen)
        work = replace(work, suspended=tmp_path / f"{done}.pt")
    last = uninterrupted.fresh()
    result = train(last, work, seen=seen)

    assert differences(last.state(), uninterrupted.session.state()) == []
    assert measured(result) == measured(uninterrupted.result)
    assert [epoch.number for epoch in seen] == [epoch.number for epoch in uninterrupted.seen]


def test_should_stop_is_called_before_each_step(fresh: Fresh) -> None:
    asked = []
    train(fresh(), founder(epochs=EPOCHS), stop=lambda: bool(asked.append(None)))
    assert len(asked) == EPOCHS * STEPS


def test_the_time_of_an_interrupted_epoch_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    interrupt(digits_session(SlowDigits), founder(), STEPS - 1, tmp_path / "cut.pt")
    result = train(digits_session(SlowDigits), replace(founder(), suspended=tmp_path / "cut.pt"))
    assert result.train_seconds >= STEPS * SlowDigits.STEP_S


class SlowDigits(Digits):
    STEP_S = 0.02

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        time.sleep(self.STEP_S)
        return super().loss(outputs, targets)


# --- profiles


@pytest.mark.parametrize("profile", [FAST, PLAIN, FINE], ids=lambda profile: f"to {profile.name}")
def test_a_new_profile_changes_the_numbers_and_keeps_the_momentum(profile: Profile, tmp_path: Path) -> None:
    parent = save_trained(digits_session(), founder(), tmp_path / "parent.pt")
    session = digits_session()
    interrupt(session, child(parent, profile), 0, tmp_path / "start.pt")
    start = read(tmp_path / "start.pt")

    assert differences(momentum(start), momentum(read(parent))) == []
    assert all(buffer.abs().sum() > 0 for buffer in momentum(start))
    groups = [(group["lr"], group["momentum"], group["weight_decay"]) for group in start["optimizer"]["param_groups"]]
    assert groups == [(profile.learning_rate, profile.momentum, profile.weight_decay)]


def test_the_kept_momentum_moves_the_weights(tmp_path: Path) -> None:
    """In a step with zero gradients, only the parent's momentum moves the weights, under the new hyperparameters."""
    parent = save_trained(digits_session(), founder(), tmp_path / "parent.pt")
    session = digits_session(FlatDigits)
    interrupt(session, child(parent, replace(FINE, weight_decay=0.0)), 1, tmp_path / "cut.pt")
    before, after_step = read(parent), read(tmp_path / "cut.pt")
    for name, buffer in zip(before["model"], momentum(before), strict=True):
        expected = before["model"][name] - FINE.learning_rate * FINE.momentum * buffer
        torch.testing.assert_close(after_step["model"][name], expected)


class FlatDigits(Digits):
    """Every gradient is zero."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return outputs.sum() * 0.0


def test_a_founder_trains_under_the_profile_that_it_starts_with(tmp_path: Path) -> None:
    session = digits_session()
    train(session, founder(profile=FINE))
    (group,) = session.state()["optimizer"]["param_groups"]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.002, 0.5, 0.01)
