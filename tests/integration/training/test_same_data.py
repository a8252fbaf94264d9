"""Each process of a run trains on the same data, on the examples that are meant, or stops and says what differs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job
from jobs.training.session import Session
from tests.support.small_job import SGD, Small, context, founder

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 60
TARGETS = torch.arange(COUNT) % 3
IMAGES = torch.randn(COUNT, 2, 6, 6, generator=torch.Generator().manual_seed(0)) + TARGETS.view(-1, 1, 1, 1)


class Listed(Dataset[Any]):
    """A data set that is not kept in memory by orch, with attributes as torchvision's have them."""

    def __init__(self, images: Tensor, numbers: Tensor, **attributes: Any) -> None:
        self.images, self.numbers = images, numbers
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], int(self.numbers[index])


Data = Callable[[Split], Any]


def job_with(data: Data) -> type[Job]:
    return type("Mine", (Small,), {"data": lambda _self, split: data(split)})


def session(data: Data, run: Path | None = None, **changes: Any) -> Session:
    return Session(job_with(data)(context(**changes)), run_folder=run)


def begin(data: Data, run: Path | None = None, **changes: Any) -> Session:
    """Open the data as each process of a run does before it trains."""
    opened = session(data, run, **changes)
    opened.train(founder(), lambda: True, lambda _epoch: None)
    return opened


def usual(split: Split) -> Any:
    return TensorDataset(IMAGES, TARGETS)


def named(*names: str) -> Data:
    return lambda split: Listed(IMAGES, TARGETS, targets=TARGETS, classes=list(names))


def test_equal_data_in_another_process_are_accepted(tmp_path: Path) -> None:
    for _ in range(2):
        begin(usual, tmp_path)
    assert sorted(path.name for path in (tmp_path / "fingerprints").iterdir()) == ["train.json", "validation.json"]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        pytest.param(
            usual,
            lambda split: TensorDataset(IMAGES.repeat(2, 1, 1, 1), TARGETS.repeat(2)),
            "it had 60 examples, and now has 120",
            id="rows were appended",
        ),
        pytest.param(
            usual, lambda split: TensorDataset(IMAGES, (TARGETS + 1) % 3), "its labels differ", id="other labels"
        ),
        pytest.param(
            named("cat", "dog", "fox"),
            named("dog", "cat", "fox"),
            "its classes are numbered in another order: 'dog' was 1, now 0",
            id="classes numbered from a set()",
        ),
        pytest.param(
            named("cat", "dog", "fox"),
            named("cat", "dog", "owl"),
            "its classes are different: it lacks 'fox' and also has 'owl'",
            id="another class",
        ),
        pytest.param(
            lambda split: Subset(Listed(IMAGES, TARGETS, targets=TARGETS), range(0, 30)),
            lambda split: Subset(Listed(IMAGES, TARGETS, targets=TARGETS), range(1, 31)),
            "its labels differ",
            id="a subset that is drawn anew",
        ),
        pytest.param(
            lambda split: TensorDataset(IMAGES), lambda split: TensorDataset(IMAGES.flip(0)), "its examples differ",
            id="files in another order, without labels",
        ),
        pytest.param(
            lambda split: TensorDataset(IMAGES[:, :1]), lambda split: TensorDataset(IMAGES[:, :1] * 2),
            "its examples differ", id="another normalisation",
        ),
    ],
)  # fmt: skip
def test_other_data_are_an_error_that_says_what_differs(
    before: Data, after: Data, message: str, tmp_path: Path
) -> None:
    """Rows that are appended move the split: examples that were trained on would be validated on."""
    changes: dict[str, Any] = {"job_params": {}}
    session(before, tmp_path, **changes).feed("train")
    with pytest.raises(JobError, match=f"not the same as when this run began: {message}"):
        session(after, tmp_path, **changes).feed("train")


def test_data_that_round_otherwise_on_another_machine_are_the_same_data(tmp_path: Path) -> None:
    session(usual, tmp_path).feed("train")
    session(lambda split: TensorDataset(IMAGES * (1 + 1e-5), TARGETS), tmp_path).feed("train")


def test_the_evaluation_compares_the_test_set_and_its_classes(tmp_path: Path) -> None:
    """With one class missing, the test set would number its own classes, and each prediction would be wrong."""
    train, test = named("ant", "bee", "cow"), named("bee", "cow")

    def data(split: Split) -> Any:
        return test(split) if split == "test" else train(split)

    begin(data, tmp_path)
    with pytest.raises(
        JobError, match=r"data\(\"test\"\) does not number its classes as data\(\"train\"\).*lacks 'ant'"
    ):
        session(data, tmp_path).feed("test")
    session(train, tmp_path).feed("test")
    other = Listed(IMAGES + 1, TARGETS, targets=TARGETS, classes=["ant", "bee", "cow"])
    with pytest.raises(JobError, match=r"data\('test'\) is not the same as when this run began"):
        session(lambda split: other, tmp_path).feed("test")


def test_the_first_process_decides_when_several_start_at_once(tmp_path: Path) -> None:
    """A fingerprint that is there is never replaced."""
    session(usual, tmp_path).feed("train")
    kept = (tmp_path / "fingerprints/train.json").read_text()
    with pytest.raises(JobError):
        session(lambda split: TensorDataset(IMAGES[:30], TARGETS[:30]), tmp_path).feed("train")
    assert (tmp_path / "fingerprints/train.json").read_text() == kept


# --- which examples are validated on


def own(validation: Any) -> Data:
    return lambda split: validation if split == "validation" else TensorDataset(IMAGES, TARGETS)


HELD_OUT = TensorDataset(torch.flip(IMAGES[:20], [3]), TARGETS[:20])


@pytest.mark.parametrize("by", ["settings", "job"])
def test_a_validation_set_of_the_users_own_is_used_whole_and_so_is_the_training_set(by: str) -> None:
    changes = {"validation": "own"} if by == "settings" else {}
    made = Session(
        type("Mine", (job_with(own(HELD_OUT)),), {"own_validation": by == "job"})(context(**changes)),
    )
    assert (made.feed("train").count, made.feed("validation").count) == (60, 20)


@pytest.mark.parametrize(
    "validation",
    [
        pytest.param(HELD_OUT, id="of another length"),
        pytest.param(TensorDataset(IMAGES, TARGETS.flip(0)), id="of the same length"),
    ],
)
def test_a_validation_set_that_is_not_the_training_set_is_an_error_that_names_the_setting(validation: Any) -> None:
    with pytest.raises(JobError, match=r'must list the same examples .* "validation": "own"'):
        begin(own(validation))


def test_the_training_set_as_validation_set_is_an_error() -> None:
    with pytest.raises(JobError, match=r'"validation" is "own", but .* returned the training examples'):
        begin(usual, validation="own")


@pytest.mark.parametrize(
    ("labels", "stratify", "expected"),
    [
        pytest.param([0] * 30 + [1] * 30, True, {0: 3, 1: 3}, id="each class by itself"),
        pytest.param(None, True, None, id="unknown"),
        pytest.param([0] * 30 + [1] * 30, False, None, id="not stratified"),
    ],
)
def test_the_job_says_what_the_classes_are(labels: Any, stratify: bool, expected: dict[int, int] | None) -> None:
    kind = type("Mine", (job_with(lambda _split: TensorDataset(IMAGES)),), {"labels": lambda *_: labels})
    made = Session(kind(context(stratify=stratify, validation_fraction=0.1)))
    indices = made.examples.open("validation").indices
    assert indices is not None
    assert len(indices) == 6
    if expected is not None:
        assert dict(zip(*np.unique(np.asarray(labels)[indices], return_counts=True), strict=True)) == expected


def test_labels_that_do_not_fit_the_data_are_an_error() -> None:
    kind = type("Mine", (Small,), {"labels": lambda *_: [0, 1]})
    with pytest.raises(JobError, match=r"Mine\.labels\(data, 'train'\) returned .*; allowed: a whole number for each"):
        Session(kind(context())).feed("train")


def test_the_fingerprint_has_only_plain_values() -> None:
    text = json.dumps(begin(usual).examples.fingerprints())
    assert '"examples": 60' in text


class Scaled(Small):
    """Data that depend on the profile's params."""

    def data(self, split: Split) -> Any:
        params = self.profile.params
        count = params.get("count", COUNT)
        return TensorDataset(IMAGES[:count] * params["scale"], TARGETS[:count])


def scaled(run: Path, validation: str = "split", **params: Any) -> None:
    opened = Session(Scaled(context(validation=validation)), run_folder=run)
    opened.train(replace(founder(), profile=replace(SGD, params=params)), lambda: True, lambda _epoch: None)


def test_data_may_depend_on_the_profile(tmp_path: Path) -> None:
    for scale in (1, 2, 1):
        scaled(tmp_path, scale=scale)


def test_data_that_depend_on_the_profile_must_stay_the_same_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(tmp_path, scale=1)
    scaled(tmp_path, scale=2)
    monkeypatch.setattr(sys.modules[__name__], "IMAGES", IMAGES.flip(0))
    with pytest.raises(JobError, match=r"data\('train'\) is not the same .*: its examples differ"):
        scaled(tmp_path, scale=2)


def test_a_profile_cannot_change_which_examples_are_split(tmp_path: Path) -> None:
    scaled(tmp_path, scale=1)
    with pytest.raises(JobError, match="it had 60 examples, and now has 30"):
        scaled(tmp_path, scale=1, count=30)


def test_the_params_of_the_chunk_decide_which_data_are_used(tmp_path: Path) -> None:
    opened = Session(Scaled(context()), run_folder=tmp_path)
    opened.job.profile = replace(SGD, params={"scale": 1})
    opened.examples.open("train")  # as the try before a launch does
    opened.job.profile = replace(SGD, params={"scale": 2})
    (doubled, _), *_ = opened.feed("train").in_order()
    assert float(doubled.abs().max()) > float(IMAGES.abs().max())
