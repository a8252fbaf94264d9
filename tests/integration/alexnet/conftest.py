"""Pictures, pretrained weights and an empty download folder for the tests of the alexnet job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchvision import models

from jobs.data import randomness
from tests.support.sketches import draw


@pytest.fixture(scope="module", autouse=True)
def _node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a separate folder for decoded pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_TMPDIR", str(tmp_path_factory.mktemp("node")))
        yield


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes of PNG files in train and test: each class has a colour, each picture its own noise."""
    folder = tmp_path_factory.mktemp("sketches")
    draw(folder / "train", each=10, seed=0)
    draw(folder / "test", each=2, seed=1)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file like the one that torchvision downloads: AlexNet for 1,000 classes."""
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    with randomness.random_state_kept():
        torch.manual_seed(77)
        torch.save(models.alexnet(num_classes=1000).state_dict(), path)
    yield path
    path.unlink()  # a quarter of a gigabyte


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty download folder, as on a machine where nothing was downloaded yet."""
    home = tmp_path / "torch"
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home
