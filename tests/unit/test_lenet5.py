"""The lenet5 job: the paper's sizes, its variants, and how images are shifted."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs.data import images
from jobs.errors import JobError
from jobs.job import JobContext
from jobs.lenet5 import LeNet5
from jobs.training.opening import check_job
from orchestrator.profile import Profile
from orchestrator.settings.loading import load
from tests.support.settings import settings

ROOT = Path(__file__).parents[2]
PROFILE = {"name": "own", "learning_rate": 0.002}


@pytest.fixture(autouse=True)
def mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace MNIST by images with a black border, like MNIST's."""
    generator = torch.Generator().manual_seed(1)
    pixels = functional.pad(torch.randint(1, 256, (30, 1, 20, 20), dtype=torch.uint8, generator=generator), [4] * 4)

    def load(root: Path, train: bool, download: bool = False, command: str = "") -> tuple[Tensor, Tensor]:
        return (pixels, torch.arange(30) % 10) if train else (pixels[:10] // 4, torch.arange(10))

    monkeypatch.setattr(images, "mnist", load)


def job(folder: Path, **params: Any) -> LeNet5:
    return LeNet5(JobContext(settings(job_params=params, training_source_dir=str(folder))))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("pooling", ["max", "average"])
def test_the_network_has_the_papers_sizes_in_every_variant(activation: str, pooling: str, tmp_path: Path) -> None:
    net = job(tmp_path, activation=activation, pooling=pooling).model()
    assert sum(p.numel() for p in net.parameters()) == 61_706
    sizes: list[tuple[int, ...]] = []
    for layer in net:
        layer.register_forward_hook(lambda _, __, output: sizes.append(tuple(output.shape[1:])))
    net(torch.randn(2, 1, 28, 28))
    drawn_in_the_paper = [(6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (120,), (84,), (10,)]
    assert [size for size in dict.fromkeys(sizes) if size != (400,)] == drawn_in_the_paper
    kinds = {type(layer) for layer in net}
    assert kinds & {nn.ReLU, nn.Tanh} == {{"relu": nn.ReLU, "tanh": nn.Tanh}[activation]}
    assert kinds & {nn.MaxPool2d, nn.AvgPool2d} == {{"max": nn.MaxPool2d, "average": nn.AvgPool2d}[pooling]}


@pytest.mark.parametrize(
    ("profile", "kind"),
    [
        (Profile("own", 0.002, 0.8, 0.0), torch.optim.Adam),
        (Profile("chosen", 0.1, 0.9, 0.0, optimizer="SGD"), torch.optim.SGD),
    ],
)
def test_adam_is_the_default_optimizer(profile: Profile, kind: type, tmp_path: Path) -> None:
    source = job(tmp_path)
    optimizer = source.optimizer(source.model(), source.resolved(profile))
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert group["lr"] == profile.learning_rate
    assert group.get("momentum", group.get("betas", [0])[0]) == profile.momentum


@pytest.mark.parametrize(
    ("options", "message"),
    [({"amsgrad": True}, None), ({"nesterov": True}, "optimizer Adam: it has no option 'nesterov'")],
)
def test_a_launch_accepts_only_options_of_the_default_optimizer(
    options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    changes = {"training_source_dir": str(tmp_path), "training_profiles": [PROFILE | {"optimizer_options": options}]}
    loaded, _ = load(ROOT / "settings/lenet5_constant.json", **changes)
    with pytest.raises(JobError, match=message) if message else nullcontext():
        check_job(loaded)


@pytest.mark.parametrize("shift", [0, 2])
def test_only_training_images_are_shifted_and_at_most_by_the_given_pixels(shift: int, tmp_path: Path) -> None:
    source = job(tmp_path, shift=shift)
    moved = set()
    for split, most in (("train", shift), ("validation", 0), ("test", 0)):
        data = source.data(split)  # type: ignore[arg-type]
        seen, _ = next(data.feed(range(len(data)), len(data), torch.device("cpu"), 1).shuffled(3))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(3))
        plain = source.test_set[0] if split == "test" else source.training_set[0]
        mean, std = source.statistics
        for image, index in zip(seen, order.tolist(), strict=True):
            pixels = torch.round((image * std[0] + mean[0]) * 255).to(torch.uint8)
            rows, columns = (pixels[0] > 0).any(1).nonzero()[:, 0], (pixels[0] > 0).any(0).nonzero()[:, 0]
            first = (plain[index, 0] > 0).any(1).nonzero()[0, 0], (plain[index, 0] > 0).any(0).nonzero()[0, 0]
            down, right = int(rows[0] - first[0]), int(columns[0] - first[1])
            assert torch.equal(pixels, plain[index].roll((down, right), (1, 2)))
            assert max(abs(down), abs(right)) <= most
            if split == "train":
                moved |= {down, right}
    assert moved == set(range(-shift, shift + 1))


def test_prepare_reports_what_is_ready(tmp_path: Path) -> None:
    lines = job(tmp_path, train_images=20).prepare(download=False)
    assert lines == [f"MNIST, 20 training and 10 test images, in {tmp_path}"]


@pytest.mark.parametrize("params", [{"activation": "gelu"}, {"pooling": "min"}, {"shift": -1}, {"shifts": 2}])
def test_invalid_parameters_are_errors_that_name_them(params: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"^job_params: {next(iter(params))}"):
        job(tmp_path, **params)
