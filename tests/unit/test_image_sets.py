"""The subset of a data set that train_images and test_images select."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import JobError
from jobs.image_sets import Limits, first_of_each_class, limited


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), count=st.integers(1, 70))
def test_the_first_of_each_class_are_taken_as_evenly_as_possible(labels: list[int], count: int) -> None:
    targets = torch.tensor(labels)
    classes = sorted(set(labels))
    if count > len(labels):
        with pytest.raises(
            JobError, match=rf"^train_images: {count} is more than the {len(labels)} available examples"
        ):
            first_of_each_class(targets, count, "train_images")
        return
    if count < min(len(classes), len(labels)):
        with pytest.raises(JobError, match=rf"^train_images: {count} is fewer than the {len(classes)} classes"):
            first_of_each_class(targets, count, "train_images")
        return
    chosen = first_of_each_class(targets, count, "train_images")
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) <= count
    for label in classes:
        of_class = torch.nonzero(targets == label)[:, 0]
        taken = [index for index in chosen.tolist() if labels[index] == label]
        assert taken == of_class[: len(taken)].tolist()
        assert len(taken) >= min(len(of_class), count // len(classes))


@pytest.mark.parametrize("count", [None, 3])
def test_no_limit_or_a_limit_as_large_as_the_data_set_takes_all(count: int | None) -> None:
    assert first_of_each_class(torch.tensor([5, 5, 1]), count, "train_images").tolist() == [0, 1, 2]


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_limit_larger_than_the_data_set_is_an_error_that_names_both_numbers(side: str) -> None:
    limits = Limits.model_validate({f"{side}_images": 4})
    message = f"^job_params: {side}_images: 4 is more than the 3 available examples; use at most 3"
    with pytest.raises(JobError, match=message):
        limited(torch.tensor([5, 5, 1]), limits, train=side == "train")
