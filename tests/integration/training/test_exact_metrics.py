"""Metrics: counts are exact, an undefined number keeps a model off the board, and measuring changes nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job
from jobs.loggers.observer import Observer
from jobs.training.evaluation import Means
from jobs.training.position import LossMean
from jobs.training.ranks import ALONE
from orchestrator.records import Finished
from tests.support.small_job import SGD, STEPS, Small, assert_same, child, founder, session_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def trained(job: type[Job], **changes: Any) -> Finished:
    result = session_of(job, **changes).train(founder(), lambda: False, lambda _epoch: None)
    assert isinstance(result, Finished)
    return result


def mean_of(parts: Iterable[tuple[Any, int]]) -> float:
    means = Means(CPU)
    for value, size in parts:
        means.add({"accuracy": value}, size)
    return means.means(ALONE)["accuracy"]


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda right, size: torch.arange(size).lt(right).float().mean(), id="a mean in float32"),
        pytest.param(lambda right, size: torch.arange(size).lt(right).float().mean().item(), id="its Python number"),
        pytest.param(lambda right, size: torch.arange(size).lt(right).double().mean(), id="a mean in float64"),
        pytest.param(lambda right, size: right / size, id="a quotient"),
        pytest.param(lambda right, size: np.float32(right / size), id="a NumPy number"),
    ],
)
def test_equal_counts_give_equal_scores_however_they_fall_into_batches(kind: Callable[[int, int], Any]) -> None:
    """Otherwise 85 + 85 of 200 beats 90 + 80, and a tie is promoted."""
    assert mean_of([(kind(85, 100), 100), (kind(85, 100), 100)]) == 0.85
    assert mean_of([(kind(90, 100), 100), (kind(80, 100), 100)]) == 0.85


@hypothesis_settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 400)), min_size=1, max_size=20))
def test_a_share_is_the_exact_quotient_of_the_counts(batches: list[tuple[int, int]]) -> None:
    parts = [(min(right, size), size) for right, size in batches]
    found = mean_of((torch.arange(size).lt(right).float().mean(), size) for right, size in parts)
    assert found == sum(right for right, _ in parts) / sum(size for _, size in parts)


def test_a_metric_that_a_batch_lacks_is_the_mean_over_the_others() -> None:
    means = Means(CPU)
    means.add({"loss": 2.0, "recall": 0.5}, 10)
    means.add({"loss": 4.0}, 30)
    assert means.means(ALONE) == {"loss": 3.5, "recall": 0.5}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(
            {"metrics": lambda self, o, t: Job.metrics(self, o, t) | {"loss": torch.tensor(math.nan)}},
            "the metric 'loss' is NaN",
            id="a metric beside the score",
        ),
        pytest.param(
            {"model": lambda self: nn.Sequential(Small.model(self), Spoilt())},
            "its weights are not all finite numbers",
            id="a weight",
        ),
    ],
)
def test_an_undefined_number_keeps_a_model_off_the_board(
    body: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert math.isnan(trained(type("Mine", (Small,), body)).score)
    assert message in caplog.text


class Spoilt(nn.Module):
    """Has a weight that becomes NaN without changing the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unused", torch.tensor(0.0))

    def forward(self, inputs: Tensor) -> Tensor:
        self.unused.fill_(math.nan)
        return inputs


def test_an_infinite_loss_that_fp16_skipped_is_not_divergence() -> None:
    mean = LossMean(0.0, 0.0, skips=True, device=CPU)
    for loss in (math.inf, 2.0, 4.0):
        mean.add(torch.tensor(loss), 10)
    assert mean.mean() == 3.0
    only = LossMean(0.0, 0.0, skips=True, device=CPU)
    only.add(torch.tensor(math.nan), 10)
    assert math.isnan(only.mean())


# --- measuring


def seeding(method: str) -> type[Job]:
    def seeded(self: Job, *given: Any) -> Any:
        torch.manual_seed(0)
        np.random.seed(0)
        return getattr(Small, method)(self, *given)

    return type("Mine", (Small,), {method: seeded})


@pytest.mark.parametrize("method", ["predict", "metrics", "evaluation_metrics"])
def test_a_seed_in_the_evaluation_does_not_reach_the_training(method: str, tmp_path: Path) -> None:
    """Otherwise each epoch has the same order."""
    plain = train(session_of(), founder(epochs=3), tmp_path / "plain.pt")
    assert_same(plain, train(session_of(seeding(method)), founder(epochs=3), tmp_path / "seeding.pt"))


class Confusion(Small):
    """Its metric is one of the whole split, not a mean over batches."""

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        found = [(model(inputs).argmax(1), targets) for inputs, targets in batches]
        guesses, targets = torch.cat([g for g, _ in found]), torch.cat([t for _, t in found])
        assert not model.training
        return {"accuracy": 0.0, "f1": f1(guesses, targets)}


def f1(guesses: Tensor, targets: Tensor) -> float:
    hit = [((guesses == c) & (targets == c)).sum() for c in range(3)]
    return float(sum(2 * h / ((guesses == c).sum() + (targets == c).sum()).clamp(min=1) for c, h in enumerate(hit))) / 3


def test_a_metric_of_a_whole_split_does_not_depend_on_the_batches(tmp_path: Path) -> None:
    metric = {"name": "f1", "mode": "max"}
    session = session_of(Confusion, metric=metric)
    train(session, founder(), tmp_path / "one.pt")
    scores = {session_of(Confusion, metric=metric, max_batch_size=size).evaluate_file(tmp_path / "one.pt", "test")["f1"]
              for size in (1, 7, 60)}  # fmt: skip
    assert len(scores) == 1
    assert trained(Confusion, metric=metric).score == session.evaluate("validation")["f1"]


def test_an_evaluation_of_a_whole_split_must_return_the_metric() -> None:
    with pytest.raises(JobError, match=r"metric\.name: 'f2' is not among the metrics of the job: accuracy, f1"):
        trained(Confusion, metric={"name": "f2", "mode": "max"})


def test_gradients_are_computed_in_an_evaluation_that_asks_for_them() -> None:
    def sensitivity(_self: Job, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        inputs = batch[0].clone().requires_grad_()
        model(inputs).sum().backward()
        assert inputs.grad is not None
        return {"accuracy": inputs.grad.abs().mean()}

    job = type("Mine", (Small,), {"evaluation_gradients": True, "evaluation_metrics": sensitivity})
    assert trained(job).score > 0
    with pytest.raises(RuntimeError, match="does not require grad"):
        trained(type("Mine", (Small,), {"evaluation_metrics": sensitivity}))


class Reports(Observer):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        self.seen.append(f"step {step}")

    def metrics(self, metrics: Any) -> None:
        self.seen.append(" ".join(sorted(metrics)))

    def show(self, kind: str, name: str, values: Tensor) -> None:
        self.seen.append(f"{kind} {name} {tuple(values.shape)}")


def test_epochs_are_validated_every_few_epochs_and_at_the_end_of_a_chunk() -> None:
    result = session_of(evaluate_every=2).train(founder(epochs=5), lambda: False, lambda _epoch: None)
    assert isinstance(result, Finished)
    assert ["accuracy" in epoch.metrics for epoch in result.results] == [False, True, False, True, True]
    assert all("train_loss" in epoch.metrics for epoch in result.results)


def test_validations_between_steps_are_reported_and_change_nothing(tmp_path: Path) -> None:
    reports = Reports()
    state = train(session_of(observer=reports, evaluate_every_steps=2), founder(), tmp_path / "one.pt")
    assert reports.seen[:4] == ["step 1", "step 2", "accuracy loss", "step 3"]
    assert_same(state, train(session_of(), founder(), tmp_path / "plain.pt"))


def test_pictures_and_histograms_of_the_job_reach_the_observer() -> None:
    def shown(self: Job, model: nn.Module, batch: Any) -> Tensor:
        self.log_image("input", batch[0][0, :1])
        self.log_histogram("weights", next(model.parameters()))
        return Job.training_loss(self, model, batch)

    reports = Reports()
    session = session_of(type("Mine", (Small,), {"training_loss": shown}), observer=reports)
    session.train(founder(), lambda: False, lambda _epoch: None)
    assert reports.seen[:2] == ["image input (1, 6, 6)", "histogram weights (4, 2, 3, 3)"]


# --- models


def kept(self: Any) -> nn.Module:
    self.__dict__.setdefault("made", Small.model(self))
    return self.__dict__["made"]


def test_a_model_that_is_returned_again_is_an_error(tmp_path: Path) -> None:
    """Otherwise a founder is an heir of the last model."""
    for body in (kept, lambda self: nn.Sequential(kept(self))):
        session = session_of(type("Mine", (Small,), {"model": body}))
        train(session, founder(), tmp_path / "one.pt")
        with pytest.raises(JobError, match=r"Mine\.model\(\) returned an object that it had returned before"):
            session.train(founder(), lambda: False, lambda _epoch: None)


def test_a_seed_in_model_makes_equal_founders_which_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(seeding("model"))
    orders = []
    for seed in (1, 2):
        session.train(replace(founder(), seed=seed), lambda: False, lambda _epoch: None)
        orders.append(session.state()["rng"]["torch"])
    assert "model() returned the same weights for two founders" in caplog.text
    assert not torch.equal(*orders), "their training must differ all the same"


def test_founders_that_differ_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of()
    for seed in (1, 2):
        session.train(replace(founder(), seed=seed), lambda: False, lambda _epoch: None)
    assert "the same weights" not in caplog.text


def turned(self: Job, model: nn.Module, profile: Any) -> torch.optim.Optimizer:
    """Groups whose order changes from one call to the next, as when they come from a set of names."""
    self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
    layers = [model[0].parameters(), model[1].parameters(), model[5].parameters()]  # type: ignore[index]
    groups = [{"params": list(layer)} for layer in (layers if self.__dict__["calls"] % 2 else reversed(layers))]
    return torch.optim.SGD(groups, lr=profile.learning_rate, momentum=0.9)


def test_an_optimizer_with_its_parameters_in_another_order_is_an_error(tmp_path: Path) -> None:
    """Otherwise the momentum of one layer is used for another."""
    session = session_of(type("Mine", (Small,), {"optimizer": turned}))
    train(session, founder(), tmp_path / "one.pt")
    with pytest.raises(JobError, match=r"orders the parameters otherwise .* was 0\.weight, now 5\.weight"):
        train(session, child(tmp_path / "one.pt"), tmp_path / "two.pt")


def test_the_default_optimizer_is_used_by_an_optimizer_method_as_the_docs_show_it(tmp_path: Path) -> None:
    from jobs.optim import optimizers

    def as_documented(self: Job, model: nn.Module, profile: Any) -> torch.optim.Optimizer:
        return optimizers.make(profile, model.parameters())

    for body in ({}, {"optimizer": as_documented}):
        job = type("Mine", (Small,), {"default_optimizer": "RMSprop", **body})
        state = train(session_of(job), founder(), tmp_path / "one.pt")
        assert state["optimizer_class"].endswith(":RMSprop")
    named = replace(SGD, optimizer="AdamW")
    assert train(session_of(job), founder(named), tmp_path / "two.pt")["optimizer_class"].endswith(":AdamW")


def test_the_optimizer_and_the_schedule_of_each_profile_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "orch")
    profile = replace(SGD, schedule={"name": "StepLR", "step_size": 2, "warmup": {"steps": 3}})
    session_of().train(founder(profile), lambda: False, lambda _epoch: None)
    expected = "profile sgd: SGD(lr=0.05, momentum=0.9, dampening=0, weight_decay=0.001, nesterov=False), "
    assert f"{expected}StepLR(step_size=2) after a warm-up of 3 steps" in caplog.text


def test_a_last_batch_of_one_example_joins_the_batch_before(tmp_path: Path) -> None:
    """Batch norm can't train on one example."""
    few = type("Mine", (Small,), {"data": lambda self, split: few_examples(split)})
    batches = list(session_of(few).feed("train").shuffled(5))
    assert [len(targets) for _, targets in batches] == [10, 11]
    assert [len(t) for _, t in session_of(few, drop_last=True).feed("train").shuffled(5)] == [10, 10]
    assert [len(t) for _, t in session_of(few).feed("train").in_order()] == [10, 10, 1]
    whole = session_of(few, max_batch_size=100, drop_last=True).feed("train")
    assert [len(t) for _, t in whole.shuffled(5)] == [21], "a single batch is never dropped"
    train(session_of(few), founder(), tmp_path / "one.pt")


def few_examples(split: Split) -> TensorDataset:
    targets = torch.arange(27) % 3
    return TensorDataset(torch.randn(27, 2, 6, 6, generator=torch.Generator().manual_seed(0)), targets)


assert STEPS == 5
