"""What a job's own methods may return, and what the training reports to an observer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job
from jobs.loggers.observer import Observer
from orchestrator.records import EpochResult, Finished, Work
from tests.support.small_job import SGD, STEPS, Small, child, founder, session_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

# --- batches that are not (inputs, targets)


class Sentences(Job):
    """Batches are dicts, and the model computes its own loss."""

    def model(self) -> nn.Module:
        return Scorer()

    def data(self, split: Split) -> Dataset[Any]:
        class Listed(Dataset[Any]):
            def __len__(self) -> int:
                return 40

            def __getitem__(self, index: int) -> dict[str, Any]:
                tokens = torch.full((4,), index % 4)
                return {"name": f"sentence {index}", "input": {"ids": tokens}, "labels": torch.tensor(index % 2)}

        return Listed()

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(**batch["input"], labels=batch["labels"])["loss"]

    def evaluation_metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return self.metrics(model(**batch["input"])["logits"], batch["labels"])


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embedding(ids).mean(dim=1))
        outputs = {"logits": logits}
        return outputs if labels is None else outputs | {"loss": nn.functional.cross_entropy(logits, labels)}


def test_a_batch_may_be_a_dict_and_the_loss_the_models_own(tmp_path: Path) -> None:
    session = session_of(Sentences, max_batch_size=8)
    rate = replace(SGD, learning_rate=0.5)
    result = session.train(founder(rate, 6), lambda: False, lambda _epoch: None)
    assert isinstance(result, Finished)
    assert result.score == 1.0
    assert result.results[0].metrics["train_loss"] > 2 * result.results[-1].metrics["train_loss"]


class Returning(Small):
    """One of its methods returns what the test sets."""

    wrong: tuple[str, Any]

    def loss(self, outputs: Any, targets: Any) -> Any:
        return self.returned("loss", super().loss(outputs, targets))

    def metrics(self, outputs: Any, targets: Any) -> Any:
        return self.returned("metrics", super().metrics(outputs, targets))

    def model(self) -> Any:
        return self.returned("model", super().model())

    def data(self, split: Any) -> Any:
        return self.returned("data", super().data(split))

    def returned(self, method: str, value: Any) -> Any:
        return self.wrong[1](value) if self.wrong[0] == method else value


class ReturningWhole(Returning):
    """Like Returning, but also for the methods that get the whole batch."""

    def training_loss(self, model: nn.Module, batch: Any) -> Any:
        return self.returned("training_loss", super().training_loss(model, batch))

    def evaluation_metrics(self, model: nn.Module, batch: Any) -> Any:
        return self.returned("evaluation_metrics", super().evaluation_metrics(model, batch))


@pytest.mark.parametrize(
    ("kind", "method", "change", "message"),
    [
        (Returning, "model", lambda model: None, r"None; allowed: a torch\.nn\.Module"),
        (Returning, "loss", lambda loss: None, r"None; allowed: a tensor of one number, the mean over the batch"),
        (
            Returning,
            "loss",
            lambda loss: loss.item(),
            r"a value of type float, \d.*; allowed: a tensor of one",
        ),
        (Returning, "loss", lambda loss: loss.expand(3), r"a tensor of shape \(3,\) \(torch.float32\); allowed: a"),
        (
            Returning,
            "loss",
            lambda loss: loss.detach(),
            r"a tensor of shape \(\) .* without a gradient; it",
        ),
        (ReturningWhole, "training_loss", lambda loss: {"loss": loss}, r"a value of type dict; allowed: a tensor of"),
        (Returning, "metrics", lambda metrics: None, r'None; allowed: a dict with one number .* \{"mse": 0.1\}'),
        (Returning, "metrics", lambda metrics: metrics["loss"], r"a tensor of shape \(\) .*; allowed: a dict"),
        (
            Returning,
            "metrics",
            lambda metrics: metrics | {"per class": None},
            r"None for 'per class'; allowed: one",
        ),
        (Returning, "metrics", lambda metrics: metrics | {3: 0.5}, r"a dict with the key 3; allowed: names"),
        (
            ReturningWhole,
            "evaluation_metrics",
            lambda metrics: metrics | {"accuracy": torch.ones(3)},
            r"a tensor of shape \(3,\) \(torch.float32\) for 'accuracy'; allowed: one number for each name",
        ),
        (
            ReturningWhole,
            "evaluation_metrics",
            lambda metrics: {"accuracy": "good"},
            r"a value of type str, 'good' for 'accu",
        ),
    ],
)
def test_a_wrong_return_value_is_an_error_that_names_the_method(
    kind: type[Returning], method: str, change: Callable[[Any], Any], message: str
) -> None:
    job = type("Mine", (kind,), {"wrong": (method, change)})
    with pytest.raises(JobError, match=rf"^Mine\.{method}\(\) returned {message}"):
        session_of(job).train(founder(), lambda: False, lambda _epoch: None)


def test_data_without_a_length_is_an_error_that_names_the_method() -> None:
    job = type("Mine", (Returning,), {"wrong": ("data", lambda data: iter(()))})
    with pytest.raises(JobError, match=r"^Mine\.data\('train'\) returned .* without a length; allowed: a"):
        session_of(job).train(founder(), lambda: False, lambda _epoch: None)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("loss", lambda loss: loss.reshape(1, 1)),
        ("metrics", lambda metrics: {name: value.item() for name, value in metrics.items()}),
        ("metrics", lambda metrics: {name: value.numpy() for name, value in metrics.items()}),
        ("metrics", lambda metrics: {name: value.reshape(1) for name, value in metrics.items()}),
    ],
    ids=["a loss of shape (1, 1)", "metrics as floats", "metrics as numpy has them", "metrics of shape (1,)"],
)
def test_one_number_may_come_in_any_shape(method: str, change: Callable[[Any], Any]) -> None:
    results = []
    for wrong in (method, change), ("none", change):
        session = session_of(type("Mine", (Returning,), {"wrong": wrong}))
        results.append(session.train(founder(), lambda: False, lambda _epoch: None))
    assert all(isinstance(result, Finished) for result in results)
    assert results[0].results[0].metrics == results[1].results[0].metrics


# --- observers


class Noting(Observer):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def chunk(self, work: Work) -> None:
        self.calls.append(("chunk", work.parent is not None))

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        assert loss.shape == ()
        self.calls.append(("step", step, round(learning_rate, 6)))

    def epoch(self, result: EpochResult) -> None:
        self.calls.append(("epoch", result.number))

    def close(self) -> None:
        self.calls.append(("close",))


def test_each_step_is_reported_to_an_observer_with_its_learning_rate(tmp_path: Path) -> None:
    profile = replace(SGD, schedule={"name": "StepLR", "step_size": 1, "gamma": 0.1})
    noting = Noting()
    session = session_of(observer=noting)
    train(session, founder(profile), tmp_path / "one.pt")
    train(session, child(tmp_path / "one.pt", profile), tmp_path / "two.pt")
    session.close()
    first = [("step", i, 0.05) for i in range(1, STEPS + 1)]
    second = [("step", i, 0.005) for i in range(STEPS + 1, 2 * STEPS + 1)]
    expected = [("chunk", False), *first, ("epoch", 1), ("chunk", True), *second, ("epoch", 2), ("close",)]
    assert noting.calls == expected
