"""A user's own job on picture files: checked before a launch, and trained on what the files show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from jobs.data.picture_folders import class_names, list_pictures
from jobs.errors import JobError
from jobs.job import JobContext, local_path
from jobs.pictures import Files, PictureJob, PictureParams
from tests.support.settings import settings

CLASSES = ("dark", "light")


class Mine(PictureJob):
    Params = PictureParams
    uses_pretrained = False

    def files(self, train: bool) -> Files:
        root = local_path(self.context.settings, "training_source_dir")
        folder = root if train else local_path(self.context.settings, "testing_source_dir")
        pictures = list_pictures(folder, None if train else class_names(root))
        return pictures.files, pictures.targets

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(CLASSES)))


@pytest.fixture(autouse=True)
def _node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "node").mkdir()
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "node"))


def draw(folder: Path, each: int, deep: bool = False) -> Path:
    """Write grey pictures of 8 or 16 bits: of each class with another brightness."""
    pixels = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            values = pixels.integers(100 * number, 100 * number + 100, (40, 40)).astype(np.uint8)
            picture = Image.fromarray(values.astype(np.uint16) * 257 if deep else values)
            picture.save(folder / name / f"{index}.png")
    return folder


def job(train: Path, test: Path) -> Mine:
    changes = {"training_source_dir": str(train), "testing_source_dir": str(test), "job_params": {"image_size": 32}}
    return Mine(JobContext(settings(**changes, validation_fraction=0.25)))


def test_pictures_of_16_bits_give_the_batches_of_their_copies_of_8_bits(tmp_path: Path) -> None:
    both: list[Any] = []
    for deep in (False, True):
        source = job(draw(tmp_path / f"{deep}", 4, deep), draw(tmp_path / f"{deep} test", 1, deep)).data("validation")
        feed = source.feed(range(8), 8, torch.device("cpu"), 1)
        both.append(next(feed.in_order()))
    for one, other in zip(*both, strict=True):
        assert torch.equal(one, other)


def test_every_picture_is_read_before_a_launch(tmp_path: Path) -> None:
    mine = job(draw(tmp_path / "train", 4), draw(tmp_path / "test", 1))
    assert mine.prepare(download=False) == ["8 training pictures of 2 classes"]
    for name in ("train/light/2.png", "test/dark/0.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
    message = "^2 of 10 pictures can't be read; repair or remove them:\n.*train/light/2.png .*\n.*test/dark/0.png "
    with pytest.raises(JobError, match=message):
        mine.prepare(download=False)


def test_missing_test_pictures_are_a_note_because_only_the_evaluation_needs_them(tmp_path: Path) -> None:
    mine = job(draw(tmp_path / "train", 4), tmp_path / "test")
    _, note = mine.prepare(download=False)
    assert note.startswith("note: the test pictures are not checked: testing_source_dir: ")
    with pytest.raises(JobError, match=r"testing_source_dir: .* is not a folder"):
        mine.data("test")
