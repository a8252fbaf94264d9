"""The resnet18 job: its initial weights, the layers that it trains, and its pictures."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import models

from jobs.errors import JobError
from jobs.job import JobContext
from jobs.resnet18 import BREEDS, ResNet18
from jobs.training.pretrained import IMAGENET
from orchestrator.profile import Profile
from tests.support.settings import settings

CLASSES = ("Abyssinian", "Beagle", "Persian")
EACH = {"trainval": 4, "test": 2}


@pytest.fixture(autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread, a separate cache of decoded pictures, and an empty download folder."""
    place = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr("tempfile.tempdir", str(place))
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few pictures in the layout of the data set; the test pictures are darker."""
    root = tmp_path_factory.mktemp("pets")
    folder = root / "oxford-iiit-pet"
    for part in ("images", "annotations"):
        (folder / part).mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for split, each in EACH.items():
        lines = []
        for label, breed in enumerate(CLASSES):
            for number in range(each):
                name = f"{breed}_{split}{number}"
                picture = pixels.integers(256 if split == "trainval" else 100, size=(40, 50 + label, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / "images" / f"{name}.jpg", quality=95)
                lines.append(f"{name} {label + 1} 1 1\n")
        (folder / "annotations" / f"{split}.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like the one that torchvision downloads: for ImageNet's 1,000 classes."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.resnet18(num_classes=1000).state_dict(), path)
    return path


def job(root: Path, **params: Any) -> ResNet18:
    params = {"image_size": 32} | params
    return ResNet18(JobContext(settings(job_params=params, training_source_dir=str(root), validation_fraction=0.25)))


def step(source: ResNet18, net: nn.Module, seed: int = 0) -> None:
    """One step of training."""
    net.train()
    optimizer = source.optimizer(net, Profile("big", learning_rate=0.1, momentum=0.9, weight_decay=0.0))
    inputs = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    source.loss(net(inputs), torch.arange(4)).backward()
    optimizer.step()


# --- initial weights and trained layers


def test_from_scratch_the_network_is_torchvisions_for_the_breeds(pets: Path) -> None:
    net = job(pets).model()
    wanted = models.resnet18(num_classes=BREEDS)
    assert {name: tuple(value.shape) for name, value in net.state_dict().items()} == {
        name: tuple(value.shape) for name, value in wanted.state_dict().items()
    }
    wanted.load_state_dict(net.state_dict())
    inputs = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(inputs), wanted.eval()(inputs))


@pytest.mark.parametrize("train", ["all", "head"])
def test_all_layers_but_the_last_start_from_the_weights_and_the_chosen_ones_are_trained(
    train: str, pets: Path, weights: Path
) -> None:
    source = job(pets, pretrained=str(weights), train=train)
    net = source.model()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    file = torch.load(weights, weights_only=True)
    assert {name for name in start if not torch.equal(start[name], file[name])} == {"fc.weight", "fc.bias"}
    step(source, net)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == ({"fc.weight", "fc.bias"} if train == "head" else set(start))


def test_a_file_for_the_same_number_of_classes_also_gives_its_last_layer(pets: Path, tmp_path: Path) -> None:
    own = models.resnet18(num_classes=BREEDS).state_dict()
    torch.save(own, tmp_path / "own.pt")
    net = job(pets, pretrained=str(tmp_path / "own.pt")).model()
    assert all(torch.equal(value, own[name]) for name, value in net.state_dict().items())


def test_training_only_the_head_needs_pretrained_weights(pets: Path) -> None:
    with pytest.raises(JobError, match=r'^job_params: train "head" needs pretrained weights'):
        job(pets, train="head")


def test_frozen_layers_are_offered_if_images_are_not_augmented(pets: Path, weights: Path) -> None:
    for params, offered in (
        ({"train": "head", "augment": "none"}, True),
        ({"train": "head", "augment": "random"}, False),
        ({"train": "all", "augment": "none"}, False),
    ):
        source = job(pets, pretrained=str(weights), **params)
        net: Any = source.model()
        part = source.frozen_part(net)
        assert (part is not None) is offered
        if part is not None:
            net.train()
            assert not any(layer.training for layer in part.modules() if isinstance(layer, nn.BatchNorm2d))
            inputs = torch.randn(2, 3, 32, 32)
            assert torch.equal(net.fc(part(inputs).flatten(1)), net(inputs))


# --- missing and unusable weights


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
def test_missing_weights_are_never_replaced_by_untrained_ones(name: str, pets: Path) -> None:
    source = job(pets, pretrained=name)
    message = f"^job_params: pretrained: {name} is not on this machine .* Run `orch prepare SETTINGS` where there is"
    for build in (source.model, lambda: source.prepare(download=False)):
        with pytest.raises(JobError, match=message):
            build()


def cut_file() -> bytes:
    """A truncated file of torch.save."""
    whole = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(100)}, whole)
    return whole.getvalue()[:-100]


CUT = cut_file()
DAMAGED = r"it is damaged, or torch.save did not write it \(\w+Error\); fetch it again .*`orch prepare SETTINGS`"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "is neither a file nor one of torchvision's: IMAGENET1K_V1, DEFAULT", id="no such file"),
        pytest.param(b"", f"weights.pt can't be read: {DAMAGED}", id="an empty file"),
        pytest.param(b"<!DOCTYPE html><title>Log in</title>", f"weights.pt can't be read: {DAMAGED}", id="a web page"),
        pytest.param(
            pickle.dumps({}, protocol=4), f"weights.pt can't be read: {DAMAGED}", id="another program's pickle"
        ),
        pytest.param(CUT, f"weights.pt can't be read: {DAMAGED}", id="a file without its end"),
        pytest.param([1, 2], "weights.pt holds no weights, but a list; fetch it again", id="a list"),
        pytest.param(
            {"state_dict": {"conv1.weight": torch.ones(1)}, "epoch": 3},
            "weights.pt holds no weights by name, but 'state_dict', 'epoch'; fetch it again .* torch.save",
            id="weights inside of something else",
        ),
        pytest.param(
            {"format": 2, "model": {}},
            "weights.pt is an orch checkpoint; extract its weights with `orch export`",
            id="an orch checkpoint",
        ),
        pytest.param(
            {"conv1.weight": torch.ones(1)},
            "does not contain ResNet-18 weights: mismatch in conv1.weight, ",
            id="not its",
        ),
        pytest.param({"extra": torch.ones(1)}, "does not contain ResNet-18 weights: .*", id="of another model"),
    ],
)
def test_unusable_weights_are_an_error(content: Any, message: str, pets: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(JobError, match=f"^job_params: pretrained: .*{message}") as raised:
        job(pets, pretrained=str(path)).prepare(download=False)
    assert "\n" not in str(raised.value)


def test_weights_of_a_larger_model_are_an_error(pets: Path, tmp_path: Path) -> None:
    larger = models.resnet18().state_dict() | {"layer5.weight": torch.ones(1)}
    torch.save(larger, tmp_path / "larger.pt")
    with pytest.raises(JobError, match=r"larger.pt does not contain ResNet-18 weights: mismatch in layer5.weight"):
        job(pets, pretrained=str(tmp_path / "larger.pt")).model()


def test_a_relative_path_of_a_file_is_refused(pets: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later jobs of the chain may start in another folder."""
    monkeypatch.chdir(weights.parent)
    with pytest.raises(
        JobError, match=f"^job_params: pretrained: {weights.name} must be an absolute path, .*{weights}"
    ):
        job(pets, pretrained=weights.name).model()


# --- data


def batch_of(source: ResNet18, split: Any, epoch: int = 0) -> Tensor:
    """All pictures of a split, in order."""
    pictures = source.data(split)
    feed = pictures.feed(range(len(pictures)), len(pictures), torch.device("cpu"), 1)
    pixels, targets = next(feed.shuffled(epoch))
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(epoch))
    assert targets.tolist() == [pictures.targets[i] for i in order]
    return pixels[torch.argsort(order)]


def test_training_pictures_are_cropped_at_random_and_the_others_in_the_middle(pets: Path) -> None:
    source = job(pets)
    for split, count, varies in (("train", 12, True), ("validation", 12, False), ("test", 6, False)):
        first, second = batch_of(source, split, 0), batch_of(source, split, 1)
        assert first.shape == (count, 3, 32, 32)
        assert torch.equal(first, second) is not varies
    fixed = job(pets, augment="none")
    assert torch.equal(batch_of(fixed, "train", 0), batch_of(fixed, "train", 1))


def test_pictures_are_normalised_as_the_weights_or_the_training_set_need(pets: Path, weights: Path) -> None:
    scratch, tuned = job(pets), job(pets, pretrained=str(weights))
    seen = batch_of(scratch, "validation")
    assert seen.mean().abs() < 0.1  # the middle of each picture is about as bright as the whole
    assert batch_of(scratch, "test").mean() < -0.5
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
    own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in scratch.training_statistics)
    torch.testing.assert_close(batch_of(tuned, "validation") * std + mean, seen * own_std + own_mean)


def test_prepare_reports_what_is_ready(pets: Path, weights: Path) -> None:
    lines = job(pets, pretrained=str(weights), train_images=9).prepare(download=False)
    assert lines == [f"Oxford-IIIT Pet, 9 training and 6 test images, in {pets}", f"pretrained weights: {weights}"]


def test_missing_pictures_are_an_error_that_says_what_to_do(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"^Oxford-IIIT Pet is not in training_source_dir {tmp_path}.*`orch prepare"):
        job(tmp_path).prepare(download=False)
    with pytest.raises(JobError, match="one side would have none of the classes"):
        job(pets, train_images=3).prepare(download=False)


@pytest.mark.parametrize(
    "params", [{"image_size": 31}, {"pretrained": True}, {"train": "none"}, {"augment": True}, {"pretraind": False}]
)
def test_invalid_parameters_are_errors_that_name_them(params: dict[str, Any], pets: Path) -> None:
    with pytest.raises(JobError, match=rf"^job_params: {next(iter(params))}"):
        job(pets, **params)
