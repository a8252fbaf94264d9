"""Data that are read in order, batches that the job collates, and weights to start from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job
from jobs.training import states
from jobs.training.session import Session
from tests.support.small_job import SGD, Small, assert_same, child, context, founder, session_of, train

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 26
INPUTS = torch.arange(COUNT * 72, dtype=torch.float32).view(COUNT, 2, 6, 6) / (COUNT * 72)
TARGETS = torch.arange(COUNT) % 3


class Stream(IterableDataset[Any]):
    """Reads its examples in an order that it draws for each epoch, with noise."""

    opened = 0

    def __init__(self, count: int = COUNT, declared: int | None = None) -> None:
        self.count, self.declared = count, declared or count

    def __len__(self) -> int:
        return self.declared

    def __iter__(self) -> Iterator[Any]:
        type(self).opened += 1
        for index in torch.randperm(self.count).tolist():
            noise = random.random() + float(np.random.rand())
            yield INPUTS[index] + noise * torch.randn(2, 6, 6), int(TARGETS[index])


class Seekable(Stream):
    """Knows where to begin, and so does not read what was trained."""

    first = 0

    def seek(self, number: int) -> None:
        self.first = number

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(self.count).tolist()
        for index in order[self.first :]:
            yield INPUTS[index], int(TARGETS[index])


class OwnLoader:
    """A loader of the job's own: batches of other sizes than orch would make."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        for chosen in torch.randperm(COUNT).split(7):
            yield INPUTS[chosen] + torch.randn(len(chosen), 2, 6, 6), TARGETS[chosen]


def reading(make: Any) -> type[Job]:
    def data(_self: Job, split: Split) -> Any:
        return make() if split == "train" else TensorDataset(INPUTS, TARGETS)

    return type("Mine", (Small,), {"own_validation": True, "data": data})


def torchs() -> DataLoader[Any]:
    return DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=6, shuffle=True)


KINDS = pytest.mark.parametrize("make", [Stream, Seekable, OwnLoader, torchs], ids=lambda make: make.__name__)


@KINDS
def test_a_stream_that_is_interrupted_at_any_step_is_trained_exactly(make: Any, tmp_path: Path) -> None:
    job = reading(make)
    whole = train(session_of(job), founder(epochs=2), tmp_path / "whole.pt")
    for steps in range(1, whole["steps"]):
        train(session_of(job), founder(epochs=2), tmp_path / "cut.pt", steps=steps)
        work = replace(founder(epochs=2), suspended=tmp_path / "cut.pt")
        assert_same(whole, train(session_of(job), work, tmp_path / "rest.pt"))


@KINDS
def test_each_epoch_of_a_stream_has_an_order_of_its_own(make: Any) -> None:
    feed = session_of(reading(make)).feed("train")
    first, again, other = ([t.tolist() for _, t in feed.shuffled(seed)] for seed in (5, 5, 6))
    assert first == again != other


@pytest.mark.parametrize("processes", [0, 1])
def test_a_stream_is_read_in_the_same_order_by_a_process_of_its_own(processes: int) -> None:
    from jobs.data.streams import stream_feed

    feed = stream_feed(Stream(), 10, torch.device("cpu"), processes)
    expected = stream_feed(Stream(), 10, torch.device("cpu"), 0)
    for (one, _), (other, _) in zip(feed.shuffled(5), expected.shuffled(5), strict=True):
        assert torch.equal(one, other)


def test_a_loader_is_told_the_number_of_the_epoch(tmp_path: Path) -> None:
    loader = OwnLoader()
    train(session_of(reading(lambda: loader)), founder(epochs=3), tmp_path / "one.pt")
    assert loader.epochs == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stream(declared=40), "the data declare 40 examples .* ended after 26"),
        (lambda: iter(()), "without a length"),
        (lambda: Stream(count=0), "no examples"),
    ],
)
def test_a_stream_that_is_not_as_it_says_is_an_error(make: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        session_of(reading(make)).train(founder(), lambda: False, lambda _epoch: None)


def test_a_stream_can_not_be_split() -> None:
    with pytest.raises(JobError, match=r'can only be read in order, so no part .* "validation": "own"'):
        session_of(reading(Stream), validation="split").feed("train")


def test_a_profiles_batch_size_does_not_fit_a_loader_of_the_jobs_own() -> None:
    with pytest.raises(JobError, match="'sgd': batch_size: the job's own loader makes the batches"):
        session_of(reading(torchs)).train(founder(replace(SGD, batch_size=3)), lambda: False, lambda _epoch: None)


# --- collate


class Words(Dataset[Any]):
    """Sequences of different lengths."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return torch.full((1 + index % 5,), index % 3), index % 3


class Padded(Job):
    def model(self) -> nn.Module:
        return nn.EmbeddingBag(4, 3, padding_idx=3)

    def data(self, split: Split) -> Any:
        return Words()

    def collate(self, examples: list[Any]) -> Any:
        words = nn.utils.rnn.pad_sequence([e[0] for e in examples], batch_first=True, padding_value=3)
        return words, torch.tensor([e[1] for e in examples])


def test_a_job_pads_its_batches_itself(tmp_path: Path) -> None:
    session = session_of(Padded)
    shapes = {tuple(words.shape) for words, _ in session.feed("train").shuffled(5)}
    assert len({width for _, width in shapes}) > 0
    train(session, founder(), tmp_path / "one.pt")


def test_data_in_memory_are_collated_by_the_job_too() -> None:
    job = type("Mine", (Small,), {"collate": lambda _self, examples: {"mine": len(examples)}})
    assert next(session_of(job).feed("train").in_order()) == {"mine": 10}


# --- what a checkpoint may hold


class NumpyWarmup(torch.optim.lr_scheduler.LRScheduler):
    """Holds NumPy values, as schedules written with np.cos do."""

    def __init__(self, optimizer: Any) -> None:
        self.table = np.cos(np.linspace(0, 1, 100))
        self.scale = np.float32(0.5)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [rate * self.table[self.last_epoch] * self.scale for rate in self.base_lrs]


class Unreadable(NumpyWarmup):
    def __init__(self, optimizer: Any) -> None:
        self.helper = {"parts": [1, object()]}
        super().__init__(optimizer)


def scheduled(kind: type) -> Any:
    return replace(SGD, schedule={"name": f"{__name__}:{kind.__name__}", "every": "step"})


def test_a_schedule_that_holds_numpy_values_is_read_back_exactly(tmp_path: Path) -> None:
    profile = scheduled(NumpyWarmup)
    whole = train(session_of(), founder(profile, 2), tmp_path / "whole.pt")
    train(session_of(), founder(profile), tmp_path / "first.pt")
    state = train(session_of(), child(tmp_path / "first.pt", profile), tmp_path / "second.pt")
    assert_same(whole, state)
    assert type(state["schedule"]["scheduler"]["table"]) is np.ndarray
    assert type(state["schedule"]["scheduler"]["scale"]) is np.float32


def test_a_state_that_can_not_be_read_back_is_not_written_and_its_key_is_named(tmp_path: Path) -> None:
    session = session_of()
    session.train(founder(scheduled(Unreadable)), lambda: False, lambda _epoch: None)
    file = tmp_path / "one.pt"
    with (
        file.open("wb") as target,
        pytest.raises(
            JobError, match=r"the training state can't be kept: schedule\.scheduler\.helper\.parts\[1\] \(object\)"
        ),
    ):
        session.save(target)
    assert file.stat().st_size == 0


# --- weights to start from


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    train(session_of(), founder(epochs=2), tmp_path / "other.pt")
    return tmp_path / "other.pt"


def starting(file: Path, optimizer: bool = False, **changes: Any) -> Session:
    start = {"file": str(file), "optimizer": optimizer}
    return Session(Small(context(start_from=start, **changes)))


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"model": w, "epoch": 3}])
def test_founders_start_from_a_file_of_weights(trained: Path, tmp_path: Path, wrap: Any) -> None:
    weights = states.weights(states.read(trained))
    torch.save(wrap(weights), tmp_path / "plain.pt")
    for file in (trained, tmp_path / "plain.pt"):
        begun = train(starting(file), founder(), tmp_path / "begun.pt", steps=0)
        assert_same(dict(weights), dict(begun["model"]))
        assert begun["epochs"] == 0
        assert all(not value["momentum_buffer"].any() for value in begun["optimizer"]["state"].values())


def test_founders_may_take_over_the_optimizers_state(trained: Path, tmp_path: Path) -> None:
    begun = train(starting(trained, optimizer=True), founder(), tmp_path / "begun.pt", steps=0)
    assert_same(states.read(trained)["optimizer"]["state"], begun["optimizer"]["state"])


def test_children_do_not_start_from_the_file_again(trained: Path, tmp_path: Path) -> None:
    session = starting(trained)
    train(session, founder(), tmp_path / "one.pt")
    begun = train(session, child(tmp_path / "one.pt"), tmp_path / "two.pt", steps=0)
    assert_same(states.read(tmp_path / "one.pt")["model"], begun["model"])


@pytest.mark.parametrize(
    ("content", "optimizer", "message"),
    [
        ({"0.weight": torch.zeros(1)}, False, "does not fit the model: it lacks 0.bias"),
        ({"other": torch.zeros(1)}, False, "it also has other"),
        ([1, 2], False, "holds no weights by name"),
        (None, True, 'has no state of an optimizer; set "optimizer": false'),
        (b"not torch's", False, "can't be read: it is damaged"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_error(
    content: Any, optimizer: bool, message: str, trained: Path, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.pt"
    weights: Any = dict(states.weights(states.read(trained))) if content is None else content
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(weights, file)
    with pytest.raises(JobError, match=message):
        starting(file, optimizer).train(founder(), lambda: False, lambda _epoch: None)


def test_a_start_file_that_changes_during_the_run_is_an_error(trained: Path, tmp_path: Path) -> None:
    given = context(start_from={"file": str(trained)})
    Session(Small(given), run_folder=tmp_path).train(founder(), lambda: True, lambda _epoch: None)
    train(session_of(), founder(replace(SGD, learning_rate=0.3)), trained)
    with pytest.raises(JobError, match="has changed since this run began"):
        Session(Small(given), run_folder=tmp_path).train(founder(), lambda: True, lambda _epoch: None)
