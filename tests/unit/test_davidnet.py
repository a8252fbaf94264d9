"""The davidnet job: each of its parameters does what it says, alone and with the others."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from jobs import davidnet
from jobs.data import images
from jobs.data.augment import AlternatingFlip, Cutout, Flip
from jobs.davidnet import DavidNet, GhostBatchNorm, Pictures
from jobs.errors import JobError
from jobs.job import Averaging, JobContext
from orchestrator.profile import Profile
from tests.support.settings import settings

ROOT = Path(__file__).parents[2]
NARROW = [4, 6, 8, 10]
COUNTS = {True: 60, False: 20}
PAGE = Profile("page", learning_rate=0.4, momentum=0.9, weight_decay=5e-4)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bool, tuple[Tensor, Tensor]]:
    """Replace CIFAR-10 by other pictures; the test images are darker than the training images."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for train, top in ((True, 256), (False, 100)):
        pixels = torch.randint(top, (COUNTS[train], 32, 32, 3), dtype=torch.uint8, generator=generator)
        made[train] = (pixels.permute(0, 3, 1, 2), torch.arange(COUNTS[train]) % 10)

    def load(root: Path, train: bool, download: bool = False, command: str = "") -> tuple[Tensor, Tensor]:
        assert root == tmp_path
        return made[train]

    monkeypatch.setattr(images, "cifar10", load)
    return made


def job(folder: Path, **params: Any) -> DavidNet:
    return DavidNet(JobContext(settings(job_params={"channels": NARROW} | params, training_source_dir=str(folder))))


def batch_of(source: DavidNet, split: Any = "train", seed: int = 0) -> tuple[Tensor, Tensor]:
    """All images of a split as one batch, in order, augmented with this seed."""
    data = source.data(split)
    assert isinstance(data, images.ImageTensors)
    feed = data.feed(range(len(data)), len(data), torch.device("cpu"), 1)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    pixels, targets = next(feed.shuffled(seed))
    back = torch.argsort(order)
    return pixels[back], targets[back]


# --- the recipe without tricks


def test_the_updates_equal_pages_for_the_mean_loss(tmp_path: Path) -> None:
    """Page's update uses the sum of the loss over the batch; this job uses the mean."""
    ours = nn.Linear(5, 3)
    his = copy.deepcopy(ours)
    optimizer = job(tmp_path).optimizer(ours, PAGE)
    size = 512
    rate, decay = 0.4 / size, 5e-4 * size
    velocity = {name: torch.zeros_like(value) for name, value in his.named_parameters()}
    for _ in range(5):
        inputs, targets = torch.randn(size, 5), torch.randint(3, (size,))
        optimizer.zero_grad()
        functional.cross_entropy(ours(inputs), targets).backward()
        optimizer.step()
        his.zero_grad()
        functional.cross_entropy(his(inputs), targets, reduction="sum").backward()
        with torch.no_grad():
            for name, value in his.named_parameters():
                assert value.grad is not None
                change = -rate * (value.grad + decay * value)
                velocity[name] = 0.9 * velocity[name] + change
                value += change + 0.9 * velocity[name]
    for one, other in zip(ours.parameters(), his.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_images_that_are_not_augmented_are_normalised_by_the_training_set_only(tmp_path: Path) -> None:
    source = job(tmp_path)
    seen, _ = batch_of(source, "validation")
    torch.testing.assert_close(seen.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    tested, _ = batch_of(source, "test")
    assert tested.mean() < -0.5  # darker than the training images


def test_training_images_are_cropped_and_flipped_and_a_square_has_the_mean_colour(tmp_path: Path) -> None:
    source = job(tmp_path)
    plain, _ = batch_of(source, "validation")
    padded = functional.pad(plain, (4, 4, 4, 4), mode="reflect")
    seen, _ = batch_of(source, "train")
    for image, original in zip(seen, padded, strict=True):
        cut = (image == 0).all(0)
        assert cut.sum() == 64
        rows, columns = cut.any(1).nonzero()[:, 0], cut.any(0).nonzero()[:, 0]
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (7, 7)
        windows = [original[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        windows += [window.flip(2) for window in windows]
        assert any(torch.allclose(window[:, ~cut], image[:, ~cut], atol=1e-5) for window in windows)


@pytest.mark.parametrize(
    ("params", "kinds"),
    [
        ({}, {Flip, Cutout}),
        ({"flip": "none"}, {Cutout}),
        ({"flip": "alternating"}, {AlternatingFlip, Cutout}),
        ({"cutout": 0}, {Flip}),
    ],
)
def test_the_parameters_choose_the_augmentation(params: dict[str, Any], kinds: set[type], tmp_path: Path) -> None:
    data = job(tmp_path, **params).data("train")
    assert isinstance(data, images.ImageTensors)
    assert {type(step) for step in data.steps} & {Flip, AlternatingFlip, Cutout} == kinds


# --- the tricks


def modules(net: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, kind)]


def test_the_default_parameters_give_the_network_without_tricks(tmp_path: Path) -> None:
    net, wanted = job(tmp_path).model(), davidnet.network(NARROW)
    assert str(net) == str(wanted)


def test_celu_takes_the_place_of_relu(tmp_path: Path) -> None:
    net = job(tmp_path, celu_alpha=0.3).model()
    assert not modules(net, nn.ReLU)
    assert [layer.alpha for layer in modules(net, nn.CELU)] == [0.3] * 8


def test_ghost_batch_norm_takes_the_place_of_batch_norm(tmp_path: Path) -> None:
    net = job(tmp_path, ghost_batch=32).model()
    assert [layer.ghost_batch for layer in modules(net, nn.BatchNorm2d)] == [32] * 8
    assert len(modules(net, GhostBatchNorm)) == 8


def test_frozen_scales_leave_batch_norms_biases_to_be_trained(tmp_path: Path) -> None:
    net = job(tmp_path, batchnorm_scale=0.25).model()
    for layer in modules(net, nn.BatchNorm2d):
        assert (layer.weight == 0.25).all()
        assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)


def test_the_parameter_moves_max_pool(tmp_path: Path) -> None:
    net: Any = job(tmp_path, pool="before_norm").model()
    assert [name for name, _ in net.layer2.named_children()] == ["conv", "pool", "norm", "act"]


def test_the_classifiers_scale_is_set(tmp_path: Path) -> None:
    net: Any = job(tmp_path, classifier_scale=0.0625).model()
    assert net.classifier.scale == 0.0625


def test_whitening_filters_come_from_the_training_images(tmp_path: Path) -> None:
    source = job(tmp_path, whitening=True)
    net: Any = source.model()
    seen, _ = batch_of(source, "validation")
    torch.testing.assert_close(net.prep.whitening.weight, davidnet.whitening_filters(seen))


def test_the_size_of_the_model_is_known_without_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(images, "cifar10")
    with torch.device("meta"):
        net: Any = job(tmp_path, whitening=True).model()
    assert net.prep.whitening.weight.shape == (27, 3, 3, 3)


def test_a_checkpoints_whitening_is_kept_with_other_images(
    tmp_path: Path, cifar: dict[bool, tuple[Tensor, Tensor]]
) -> None:
    state = job(tmp_path, whitening=True).model().state_dict()
    pixels, targets = cifar[True]
    cifar[True] = (pixels // 3, targets)
    net: Any = job(tmp_path, whitening=True).model()
    assert not torch.allclose(net.prep.whitening.weight, state["prep.whitening.weight"])
    net.load_state_dict(state)
    assert torch.equal(net.prep.whitening.weight, state["prep.whitening.weight"])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_blends_in_all_classes_in_training_but_not_in_evaluation(
    smoothing: float, tmp_path: Path
) -> None:
    source = job(tmp_path, label_smoothing=smoothing)
    outputs, targets = torch.randn(7, 10), torch.arange(7)
    logs = outputs.log_softmax(1)
    plain = -logs[torch.arange(7), targets].mean()
    torch.testing.assert_close(source.loss(outputs, targets), (1 - smoothing) * plain - smoothing * logs.mean())
    metrics = source.metrics(outputs, targets)
    torch.testing.assert_close(metrics["loss"], plain)
    assert metrics["accuracy"] == (outputs.argmax(1) == targets).float().mean()


def test_biases_have_their_own_learning_rate_and_weight_decay(tmp_path: Path) -> None:
    source = job(tmp_path, bias_lr_factor=64, bias_weight_decay_factor=1 / 64, batchnorm_scale=1, whitening=True)
    net = source.model()
    weights, biases = source.optimizer(net, PAGE).param_groups
    assert {id(p) for p in biases["params"]} == {id(layer.bias) for layer in modules(net, nn.BatchNorm2d)}
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    assert {id(p) for p in weights["params"]} == trained - {id(p) for p in biases["params"]}
    assert (weights["lr"], weights["weight_decay"]) == (0.4, 5e-4)
    assert (biases["lr"], biases["weight_decay"]) == pytest.approx((0.4 * 64, 5e-4 / 64))


@pytest.mark.parametrize(
    ("profile", "kind", "nesterov"),
    [
        (PAGE, torch.optim.SGD, True),
        (Profile("still", 0.1, 0.0, 0.0), torch.optim.SGD, False),
        (Profile("plain", 0.1, 0.9, 0.0, optimizer="SGD"), torch.optim.SGD, False),
        (Profile("chosen", 0.1, 0.9, 0.0, optimizer_options={"nesterov": False}), torch.optim.SGD, False),
        (Profile("adam", 0.001, 0.9, 0.0, optimizer="AdamW"), torch.optim.AdamW, None),
    ],
)
def test_nesterovs_momentum_is_the_default_and_the_profile_can_change_it(
    profile: Profile, kind: type, nesterov: bool | None, tmp_path: Path
) -> None:
    source = job(tmp_path)
    optimizer = source.optimizer(source.model(), profile)
    assert type(optimizer) is kind
    assert [group.get("nesterov") for group in optimizer.param_groups] == [nesterov] * 2


def test_the_average_is_updated_every_few_steps_with_the_decay_of_a_step(tmp_path: Path) -> None:
    assert job(tmp_path).averaging() is None
    assert job(tmp_path, ema_decay=0.99).averaging() == Averaging(0.99**5, 5)
    assert job(tmp_path, ema_decay=0.9, ema_every=2).averaging() == Averaging(0.9**2, 2)


def test_only_test_flip_gives_an_image_and_its_mirror_image_equal_outputs(tmp_path: Path) -> None:
    inputs = torch.randn(4, 3, 32, 32)
    for flips in (False, True):
        source = job(tmp_path, test_flip=flips)
        net = source.model().eval()
        outputs, mirrored = source.predict(net, inputs), source.predict(net, inputs.flip(3))
        assert torch.allclose(outputs, mirrored, atol=1e-5) is flips
        wanted = (net(inputs) + net(inputs.flip(3))) / 2 if flips else net(inputs)
        torch.testing.assert_close(outputs, wanted)


# --- preprocessing by a loader


def test_a_loaders_images_equal_those_on_the_device(tmp_path: Path) -> None:
    source, loaded = job(tmp_path), job(tmp_path, preprocessing="loader").data("test")
    assert isinstance(loaded, Pictures)
    seen, targets = batch_of(source, "test")
    images_, classes = zip(*(loaded[i] for i in range(len(loaded))), strict=True)
    torch.testing.assert_close(torch.stack(images_), seen)
    assert list(classes) == targets.tolist()
    assert type(images_[0]) is Tensor


def test_a_loader_augments_as_the_device_does(tmp_path: Path) -> None:
    plain, _ = batch_of(job(tmp_path), "validation")
    padded = functional.pad(plain, (4, 4, 4, 4), mode="reflect")
    loaded = job(tmp_path, preprocessing="loader").data("train")
    flipped = 0
    for index, original in enumerate(padded[:40]):
        image, _ = loaded[index]
        cut = (image == 0).all(0)
        assert cut.sum() == 64
        windows = [original[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        same = [torch.allclose(window[:, ~cut], image[:, ~cut], atol=1e-5) for window in windows]
        mirrored = [torch.allclose(window.flip(2)[:, ~cut], image[:, ~cut], atol=1e-5) for window in windows]
        assert sum(same) + sum(mirrored) == 1
        flipped += sum(mirrored)
    assert 8 < flipped < 32


def test_a_loader_refuses_alternating_flips(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r'^job_params: flip "alternating" needs preprocessing "device"'):
        job(tmp_path, preprocessing="loader", flip="alternating").prepare(download=False)


# --- messages


def test_prepare_reports_what_is_ready(tmp_path: Path) -> None:
    lines = job(tmp_path, train_images=30).prepare(download=False)
    assert lines == [f"CIFAR-10, 30 training and 20 test images, in {tmp_path}"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"channels": [1, 2, 3]}, "channels"),
        ({"channels": [0, 2, 3, 4]}, "channels"),
        ({"label_smoothing": 1}, "label_smoothing: 1 is not allowed"),
        ({"pool": "first"}, 'pool: "first" is not allowed.*after_activation.*before_activation.*before_norm'),
        ({"ghost_batch": 1}, "ghost_batch: 1 is not allowed"),
        ({"cutout": 33}, "cutout: 33 is not allowed"),
        ({"ema_decay": 1.0}, "ema_decay: 1.0 is not allowed"),
        ({"whitening": "some"}, "whitening"),
        ({"celu": 0.3}, "celu.*celu_alpha"),
    ],
)
def test_invalid_parameters_are_errors_that_name_them(params: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"job_params: {message}"):
        job(tmp_path, **params)


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    for folder, message in ((tmp_path / "gone", "gone is not a folder"), ("", "training_source_dir is not set")):
        source = DavidNet(JobContext(settings(training_source_dir=str(folder))))
        with pytest.raises(JobError, match=message):
            source.prepare(download=False)


def test_importing_the_job_does_not_import_torchvision() -> None:
    """Importing torchvision takes a second, and each job of a chain would wait for it."""
    script = "import sys, jobs.davidnet, jobs.lenet5; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
