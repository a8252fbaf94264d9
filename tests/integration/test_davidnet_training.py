"""The davidnet job in the training loop: it learns real pictures, and all its tricks resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.data import images
from jobs.training.opening import load_job
from jobs.training.session import Session
from jobs.training.states import read
from orchestrator.profile import Profile
from orchestrator.records import Finished, Interrupted, Work
from orchestrator.settings.loading import load
from orchestrator.settings.settings import Settings
from tests.support import real_data

ROOT = Path(__file__).parents[2]
SEED = 5  # the founder's seed


pytestmark = pytest.mark.usefixtures("one_thread")


def settings_of(name: str, **changes: Any) -> Settings:
    """Load a settings file, changed to use a narrow network and other parameters."""
    params = changes.pop("job_params")
    options = [f"job_params.{key}={value}".replace("'", '"') for key, value in params.items()]
    settings, _ = load(ROOT / "settings" / f"{name}.json", options, **changes)
    return settings


def test_a_narrow_network_learns_real_pictures_within_two_epochs() -> None:
    settings = settings_of(
        "davidnet",
        job_params={"channels": [16, 32, 64, 64], "train_images": 2000, "test_images": 10},
        training_source_dir=str(real_data.cifar10_root()),
        max_batch_size=50,
        validation_fraction=0.2,
    )
    steady = Profile("steady", learning_rate=0.05, momentum=0.9, weight_decay=5e-4)
    session = Session(load_job(settings))
    result = session.train(Work(steady, 2, SEED, 0, None, None), lambda: False, lambda epoch: None)
    assert isinstance(result, Finished)
    first, second = (epoch.metrics for epoch in result.results)
    assert second["train_loss"] < first["train_loss"] < 2.3
    assert result.score > 0.25  # guessing scores 0.1


# --- the checkpoint contains the state of every trick


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace CIFAR-10 by noise; these tests do not depend on what is learned."""

    def load_noise(root: Path, train: bool, download: bool = False, command: str = "") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(int(train))
        return torch.randint(256, (120, 3, 32, 32), dtype=torch.uint8, generator=generator), torch.arange(120) % 10

    monkeypatch.setattr(images, "cifar10", load_noise)


def tricky(tmp_path: Path, **changes: Any) -> Session:
    params = {"channels": [4, 6, 8, 8], "ghost_batch": 4, "ema_every": 2, "flip": "'alternating'"}
    small = {"training_source_dir": str(tmp_path), "max_batch_size": 18, "validation_fraction": 0.1}
    return Session(load_job(settings_of("davidnet_tricks", job_params=params, deterministic=True, **(small | changes))))


def page(settings: Settings) -> Profile:
    return settings.training_profiles[0]


def same(left: Any, right: Any) -> bool:
    """Whether values and types are equal, tensors bit for bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_tricks_together_resume_bit_for_bit(precision: str, tmp_path: Path) -> None:
    """A chunk of two epochs equals two chunks of one epoch, the second interrupted, in three separate sessions."""
    whole = tricky(tmp_path, precision=precision)
    profile = page(whole.settings)
    whole.train(Work(profile, 2, SEED, 0, None, None), lambda: False, lambda epoch: None)

    saved, cut = tmp_path / "parent.pt", tmp_path / "cut.pt"
    first = tricky(tmp_path, precision=precision)
    first.train(Work(profile, 1, SEED, 0, None, None), lambda: False, lambda epoch: None)
    with saved.open("wb") as file:
        first.save(file)
    second = tricky(tmp_path, precision=precision)
    stops = iter([False, False, False, True])
    outcome = second.train(Work(profile, 1, SEED, 0, saved, None), lambda: next(stops), lambda epoch: None)
    assert isinstance(outcome, Interrupted)
    with cut.open("wb") as file:
        second.save(file)
    third = tricky(tmp_path, precision=precision)
    third.train(Work(profile, 1, SEED, 0, saved, cut), lambda: False, lambda epoch: None)

    ended, wanted = third.state(), whole.state()
    for part in wanted:
        assert same(ended[part], wanted[part]), part
    assert wanted["average"]["updates"] > 0
    assert not same(wanted["average"]["model"], wanted["model"])


@pytest.mark.usefixtures("pictures")
def test_a_lineage_keeps_the_whitening_of_its_founder(tmp_path: Path) -> None:
    """The filters come from the checkpoint, even if the training pictures have changed."""
    session = tricky(tmp_path)
    session.train(Work(page(session.settings), 1, SEED, 0, None, None), lambda: False, lambda epoch: None)
    with (tmp_path / "parent.pt").open("wb") as file:
        session.save(file)
    key = "prep.whitening.weight"
    began = read(tmp_path / "parent.pt")["model"][key]
    fewer = tricky(tmp_path, validation_fraction=0.2)
    fewer.job.params = fewer.job.params.model_copy(update={"train_images": 60})
    fewer.train(Work(page(fewer.settings), 1, SEED, 0, tmp_path / "parent.pt", None), lambda: False, lambda epoch: None)
    assert torch.equal(fewer.state()["model"][key], began)
    assert torch.equal(fewer.state()["average"]["model"][key], began)
    assert not torch.allclose(fewer.job.model().state_dict()[key], began)
