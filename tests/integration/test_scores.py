"""How a chunk is scored: its metrics, the examples that they are measured on, and the methods that a job needs."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from jobs.data.splits import Split
from jobs.digits import Digits
from jobs.errors import JobError
from jobs.job import Job
from jobs.training.opening import load_job, open_session
from jobs.training.session import Session
from orchestrator.profile import Profile
from tests.support.short_training import (
    FAST,
    child,
    digits_session,
    digits_settings,
    founder,
    save,
    save_trained,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_training_learns_and_the_score_is_the_last_epochs_metric() -> None:
    result = train(digits_session(), founder(epochs=8))
    accuracies = [epoch.metrics["accuracy"] for epoch in result.results]
    assert result.score == accuracies[-1]
    assert accuracies[0] < 0.8 < accuracies[-1] <= 1
    assert result.results[-1].metrics["train_loss"] < result.results[0].metrics["train_loss"]


def test_metrics_are_means_over_examples_for_any_batch_size(tmp_path: Path) -> None:
    file = save_trained(digits_session(), founder(), tmp_path / "one.pt")
    whole, small = (digits_session(max_batch_size=size).evaluate_file(file, "validation") for size in (10_000, 7))
    assert whole == pytest.approx(small)
    session = digits_session()
    session.evaluate_file(file, "test")
    assert whole != session.evaluate_file(file, "test")


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(replace(FAST, learning_rate=1e30), id="the weights explode"),
        pytest.param(replace(FAST, learning_rate=1e10), id="the loss is infinite or NaN"),
    ],
)
def test_a_loss_of_nan_or_infinity_ends_the_chunk_with_a_score_of_nan(profile: Profile) -> None:
    result = train(digits_session(), founder(epochs=5, profile=profile))
    assert not math.isfinite(result.results[-1].metrics["train_loss"])
    assert math.isnan(result.score)
    assert [epoch.number for epoch in result.results] == [1]
    assert result.epochs == 1


@pytest.mark.parametrize("name", ["mean_iou", "Accuracy", "train_loss"])
def test_a_metric_that_the_job_lacks_is_an_error_that_names_the_known_ones(name: str) -> None:
    session = digits_session(metric={"name": name, "mode": "max"})
    with pytest.raises(
        JobError, match=rf"^metric\.name: '{name}' is not among the metrics of the job: accuracy, loss$"
    ):
        train(session, founder())


def test_a_metric_to_minimise_is_the_score_without_a_change_of_sign() -> None:
    result = train(digits_session(metric={"name": "loss", "mode": "min"}), founder())
    assert result.score == result.results[0].metrics["loss"] > 0


# --- threads and deterministic mode


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_process_has_the_cores_and_the_determinism_of_the_settings(
    deterministic: bool,
) -> None:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)  # as in a fresh process
    session = open_session(digits_settings(deterministic=deterministic), cores=2)
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    assert session.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert train(session, founder()).epochs == 1


# --- the examples of each split


class ClosedTest(Digits):
    """Fails if the test set is read."""

    def data(self, split: Split) -> TensorDataset:
        if split == "test":
            raise PermissionError("the test set is for the end")
        return super().data(split)


class OnlyTrainAndTest(Digits):
    def data(self, split: Split) -> TensorDataset:
        if split == "validation":
            raise PermissionError("nothing was kept for validation")
        return super().data(split)


def test_selection_on_validation_never_reads_the_test_set(tmp_path: Path) -> None:
    session = digits_session(ClosedTest)
    parent = save_trained(session, founder(epochs=2), tmp_path / "parent.pt")
    train(session, child(parent))
    with pytest.raises(PermissionError):  # so the test set can't have been read before
        session.evaluate_file(parent, "test")


def test_selection_on_validation_trains_on_the_rest_of_the_training_set() -> None:
    session = digits_session(validation_fraction=0.2)
    kept = {split: pixels_of(session, split) for split in ("train", "validation", "test")}
    assert {split: len(pixels) for split, pixels in kept.items()} == {"train": 1151, "validation": 287, "test": 359}
    assert sorted(kept["train"] + kept["validation"]) == sorted(pixels_in(Digits(session.job.context).data("train")))


def test_selection_on_the_test_set_trains_on_the_whole_training_set_and_scores_on_the_test_set(tmp_path: Path) -> None:
    session = digits_session(OnlyTrainAndTest, select_on="test")
    result = train(session, founder())
    file = save(session, tmp_path / "one.pt")

    assert sorted(pixels_of(session, "train")) == sorted(pixels_in(session.job.data("train")))
    on_test = {name: value for name, value in result.results[0].metrics.items() if name != "train_loss"}
    assert on_test == digits_session().evaluate_file(file, "test")
    assert on_test != digits_session().evaluate_file(file, "validation")


def test_the_validation_examples_depend_only_on_the_runs_seed() -> None:
    one, again, other = (digits_session(seed=seed) for seed in (3, 3, 4))
    train(again, founder(seed=8))
    assert pixels_of(one, "validation") == pixels_of(again, "validation")
    assert sorted(pixels_of(one, "validation")) != sorted(pixels_of(other, "validation"))


def pixels_of(session: Session, split: Split) -> list[list[float]]:
    return [image.flatten().tolist() for inputs, _ in session.feed(split).in_order() for image in inputs]


def pixels_in(source: Any) -> list[list[float]]:
    return [image.flatten().tolist() for image, _ in source]


# --- incomplete jobs


class OnlyData(Job):
    def data(self, split: Split) -> Dataset[Any]:
        return TensorDataset(torch.zeros(20, 2), torch.arange(20) % 2)


class OnlyModel(Job):
    def model(self) -> nn.Module:
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        pytest.param(OnlyData, r"OnlyData has no model\(\); it must return a torch.nn.Module", id="no model"),
        pytest.param(OnlyModel, r"OnlyModel has no data\(split\); it must return a torch Dataset", id="no data"),
    ],
)
def test_a_job_without_a_needed_method_is_an_error_that_names_the_method(job: type[Job], message: str) -> None:
    with pytest.raises(JobError, match=message):
        train(digits_session(job, job_params={}), founder())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"job": "jobs.nowhere:Job"}, "No module named 'jobs.nowhere'", id="no such module"),
        pytest.param({"job": "jobs.digits:Digit"}, "jobs.digits has no class Digit", id="no such class"),
        pytest.param(
            {"job": "jobs.digits:TensorDataset"},
            "job jobs.digits:TensorDataset: .* derived from jobs.job.Job",
            id="not a job",
        ),
        pytest.param({"job_params": {"with": 4}}, "job_params: with: unknown key; did you mean 'width'", id="a typo"),
        pytest.param({"job_params": {"width": 0}}, "job_params: width: 0 is not allowed", id="a value out of bounds"),
    ],
)
def test_a_job_that_cannot_be_made_is_an_error_that_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_job(digits_settings(**changes))
