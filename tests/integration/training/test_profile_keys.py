"""What a profile can say besides the optimizer: clipping, accumulation, batch size, warm-up, params and epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from jobs.data import randomness
from jobs.data.splits import Split
from jobs.job import Job
from jobs.training.position import order_seed
from jobs.training.session import AFTER_MODEL
from orchestrator.profile import GradientClip, Metric, Profile
from orchestrator.records import Finished
from tests.support.short_training import after
from tests.support.small_job import SGD, STEPS, Small, assert_same, child, founder, rates, session_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = replace(SGD, momentum=0.0, weight_decay=0.0)


class NoNorm(Small):
    """Its loss of a batch is the mean over examples that do not depend on each other."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(72, 3))


def plain_loop(profile: Profile, session: Any, clip: Any = None, size: int = 10) -> dict[str, Tensor]:
    """Train an epoch as torch's tutorials do it; only the order of the examples comes from orch."""
    work = founder(profile)
    feed = session.feed("train")
    feed.batch_size = size
    randomness.seed_all(work.seed)
    model = session.job.model()
    randomness.seed_all(randomness.hash_seed(work.seed, AFTER_MODEL))
    optimizer = torch.optim.SGD(model.parameters(), lr=profile.learning_rate, momentum=profile.momentum, fused=True)
    for inputs, targets in feed.shuffled(order_seed(0)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        if clip is not None:
            clip(model.parameters())
        optimizer.step()
    weights: dict[str, Tensor] = model.state_dict()
    return weights


@pytest.mark.parametrize(
    ("limit", "clip"),
    [
        ({"norm": 0.1}, lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.1)),
        ({"value": 0.01}, lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01)),
    ],
    ids=["norm", "value"],
)
def test_gradients_are_clipped_as_in_a_plain_loop(limit: dict[str, float], clip: Any, tmp_path: Path) -> None:
    profile = replace(PLAIN, gradient_clip=GradientClip(**limit))
    state = train(session_of(NoNorm), founder(profile), tmp_path / "one.pt")
    assert_same(plain_loop(profile, session_of(NoNorm), clip), state["model"])
    unclipped = train(session_of(NoNorm), founder(PLAIN), tmp_path / "two.pt")
    assert not torch.equal(state["model"]["1.weight"], unclipped["model"]["1.weight"])


def test_gradients_are_clipped_without_the_loss_scale_of_fp16(tmp_path: Path) -> None:
    profile = replace(PLAIN, gradient_clip=GradientClip(norm=0.1))
    before = train(session_of(NoNorm, precision="fp16"), founder(profile), tmp_path / "0.pt", steps=0)["model"]
    # The first steps may be skipped until the loss scale fits.
    after_ = train(session_of(NoNorm, precision="fp16"), founder(profile), tmp_path / "1.pt")["model"]
    moved = torch.cat([(after_[name] - before[name]).flatten() for name in before]).norm()
    assert 0 < moved <= STEPS * 0.1 * profile.learning_rate * 1.001


@pytest.mark.parametrize("clip", [1.0, 2])
def test_a_number_limits_the_norm(clip: float) -> None:
    made = TypeAdapter(Profile).validate_python({"name": "a", "learning_rate": 0.1, "gradient_clip": clip})
    assert made.gradient_clip == GradientClip(norm=clip)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gradient_clip": {}}, {"gradient_clip": {"norm": 1, "value": 1}}, {"gradient_clip": {"norm": 0}},
        {"gradient_clip": True}, {"gradient_clip": {"nrom": 1}}, {"accumulate": 0}, {"accumulate": True},
        {"batch_size": 0}, {"batch_size": 1.5}, {"epochs": 0}, {"params": [1]},
        {"schedule": {}}, {"schedule": {"warmup": 0}}, {"schedule": {"warmup": True}},
        {"schedule": {"warmup": {"steps": 1.5}}}, {"schedule": {"warmup": {"epochs": 1}}},
        {"schedule": {"warmup": -1, "name": "StepLR", "step_size": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_can_not_be_meant_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Profile).validate_python({"name": "a", "learning_rate": 0.1} | wrong)


@pytest.mark.parametrize(
    ("given", "mode"), [({}, "max"), ({"name": "loss"}, "min"), ({"name": "f1", "mode": "max"}, "max")], ids=str
)
def test_a_metric_has_a_mode(given: dict[str, str], mode: str) -> None:
    assert TypeAdapter(Metric).validate_python(given).mode == mode


@pytest.mark.parametrize("name", ["mse", "f1", "Accuracy", "val_loss", "perplexity"])
def test_a_metric_other_than_accuracy_and_loss_needs_a_mode(name: str) -> None:
    """A loss with the mode max kept the worst models."""
    with pytest.raises(ValidationError, match=f'the metric "{name}" has no "mode"; add "mode": "min" if'):
        TypeAdapter(Metric).validate_python({"name": name})


@pytest.mark.parametrize("accumulate", [2, 3, 4, 10])
def test_accumulated_batches_train_as_one_large_batch(accumulate: int, tmp_path: Path) -> None:
    """An epoch has 48 examples: the last batch, and with 3 also the last group of batches, are smaller."""
    few, many = replace(PLAIN, accumulate=accumulate), replace(PLAIN, batch_size=10 * accumulate)
    one = train(session_of(NoNorm), founder(few, 2), tmp_path / "few.pt")
    other = train(session_of(NoNorm), founder(many, 2), tmp_path / "many.pt")
    assert one["steps"] == other["steps"] == 2 * -(-48 // (10 * accumulate))
    torch.testing.assert_close(one["model"], other["model"])


def test_the_loss_and_the_curve_of_accumulated_batches_are_means(tmp_path: Path) -> None:
    results = []
    for profile in (replace(PLAIN, learning_rate=1e-9, accumulate=3), replace(PLAIN, learning_rate=1e-9)):
        result = session_of(NoNorm).train(founder(profile), lambda: False, lambda _epoch: None)
        assert isinstance(result, Finished)
        results.append(result.results[0].metrics["train_loss"])
    assert results[0] == pytest.approx(results[1])


def test_a_schedule_counts_optimizer_steps(tmp_path: Path) -> None:
    schedule = {"name": "OneCycleLR", "epochs": 2}
    profile = replace(SGD, accumulate=2, schedule=schedule)
    state = train(session_of(), founder(profile, 2), tmp_path / "one.pt")
    assert state["steps"] == 6
    assert state["schedule"]["scheduler"]["total_steps"] == 6


@pytest.mark.parametrize("steps", range(1, 6))
def test_an_interruption_between_accumulated_steps_is_exact(steps: int, tmp_path: Path) -> None:
    schedule = {"name": "CosineAnnealingLR", "epochs": 2, "every": "step", "warmup": {"steps": 2}}
    profile = replace(SGD, accumulate=2, gradient_clip=GradientClip(norm=0.5), schedule=schedule)
    whole = train(session_of(), founder(profile, 2), tmp_path / "whole.pt")
    train(session_of(), founder(profile, 2), tmp_path / "cut.pt", steps=steps)
    work = replace(founder(profile, 2), suspended=tmp_path / "cut.pt")
    assert_same(whole, train(session_of(), work, tmp_path / "rest.pt"))


def test_each_profile_has_its_batch_size(tmp_path: Path) -> None:
    session = session_of()
    train(session, founder(), tmp_path / "one.pt")
    state = train(session, child(tmp_path / "one.pt", replace(SGD, name="large", batch_size=24)), tmp_path / "two.pt")
    assert state["steps"] == STEPS + 2
    assert session.feed("validation").batch_size == 10
    assert train(session, child(tmp_path / "two.pt"), tmp_path / "three.pt")["steps"] == STEPS + 2 + STEPS


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"warmup": {"steps": 4}}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"warmup": 0.4}, [0.5, 1, 1, 1, 1, 1]),
        ({"name": "StepLR", "step_size": 2, "gamma": 0.1, "every": "step", "warmup": {"steps": 2}},
         [0.5, 1, 1, 1, 0.1, 0.1, 0.01]),
        ({"name": "CosineAnnealingLR", "T_max": 4, "every": "step", "warmup": {"steps": 1}},
         [1, 1, 0.853553, 0.5, 0.146447, 0]),
        ({"name": "PiecewiseLinear", "epochs": [0, 1], "factors": [0.5, 0], "warmup": {"steps": 2}},
         [0.25, 0.5, 0.5, 0.4, 0.3, 0.2]),
    ],
    ids=str,
)  # fmt: skip
def test_a_warm_up_rises_to_the_rate_with_which_the_schedule_begins(
    schedule: dict[str, Any], expected: Sequence[float], tmp_path: Path
) -> None:
    profile = replace(SGD, learning_rate=1.0, schedule=schedule)
    session = session_of()
    seen: list[float] = []

    def note() -> bool:
        assert session._learner is not None
        seen.append(session._learner.learning_rate)
        return len(seen) == len(expected)

    session.train(founder(profile, 2), note, lambda _epoch: None)
    assert seen == pytest.approx(expected, abs=1e-6)


def test_a_schedule_of_epochs_begins_with_the_epoch_after_the_warm_up(tmp_path: Path) -> None:
    profile = replace(SGD, learning_rate=1.0, schedule={"name": "ExponentialLR", "gamma": 0.5, "warmup": 1})
    found = [rates(train(session_of(), founder(profile, n), tmp_path / "one.pt"))[0] for n in (1, 2, 3)]
    assert found == [1.0, 0.5, 0.25]


class ByProfile(Small):
    """Its dropout and its data depend on the profile."""

    calls = 0

    def model(self) -> nn.Module:
        model = super().model()
        model[4].p = self.profile.params.get("dropout", 0.2)  # type: ignore[index, union-attr, assignment]
        return model

    def data(self, split: Split) -> Any:
        type(self).calls += 1
        noise = self.profile.params.get("noise", 0.0) if split == "train" else 0.0
        images, targets = super().data(split).tensors  # type: ignore[attr-defined]
        return TensorDataset(images + noise, targets)


def test_a_profiles_params_reach_the_model_and_the_data(tmp_path: Path) -> None:
    ByProfile.calls = 0
    session = session_of(ByProfile)
    noisy = replace(SGD, name="noisy", params={"dropout": 0.5, "noise": 3.0})
    seen = []
    for work in (founder(), founder(noisy), founder(noisy)):
        train(session, work, tmp_path / "one.pt")
        assert session._learner is not None
        model, inputs = session._learner.model, next(session.feed("train").in_order())[0]
        seen.append((model[4].p, round(float(inputs.mean()) - BASE)))  # type: ignore[index, union-attr]
    assert seen == [(0.2, 0), (0.5, 3), (0.5, 3)]
    assert ByProfile.calls == 3, "validation once, training once for each kind of params"


BASE = 1.0  # the mean of the pictures


def test_data_that_do_not_depend_on_the_profile_are_loaded_once(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(self: Job, split: Split) -> Any:
        calls.append(split)
        return Small.data(self, split)  # type: ignore[arg-type]

    session = session_of(type("Mine", (Small,), {"data": counted}))
    for number, params in enumerate(({"a": 1}, {"a": 2})):
        train(session, founder(replace(SGD, name=str(number), params=params)), tmp_path / "one.pt")
    assert sorted(calls) == ["train", "validation"]


def test_a_chunk_in_memory_gets_a_new_model_for_other_params(tmp_path: Path) -> None:
    noisy = replace(SGD, name="noisy", params={"dropout": 0.5})
    session = session_of(ByProfile)
    train(session, founder(), tmp_path / "one.pt")
    assert session.snapshot() is not None
    session.train(replace(child(tmp_path / "one.pt", noisy), in_memory=True), after(1), lambda _epoch: None)
    assert session._learner is not None
    assert session._learner.model[4].p == 0.5  # type: ignore[index, union-attr]
