"""Images on the device: batches depend only on a seed and the epoch's number, and equal the results of torchvision's
transforms for each image."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from jobs.data import feeds, splits
from jobs.data.augment import AlternatingFlip, Cutout, Flip, Normalize, PadCrop, RandomCrop, Resize, Step
from jobs.data.feeds import LoaderFeed
from jobs.data.images import ImageFeed, ImageTensors, channel_statistics, cifar10, mnist
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Job, JobContext
from jobs.training.ranks import Ranks
from jobs.training.session import Session
from orchestrator.profile import Profile
from orchestrator.records import Finished, Interrupted, Work
from tests.support.real_data import cifar10_root, mnist_root
from tests.support.settings import settings

CPU = torch.device("cpu")
COUNT, BATCH = 67, 8
INDICES = [*range(3, 40), *range(60, 90)]
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


pytestmark = pytest.mark.usefixtures("one_thread")


def drawn_images(count: int = 100, size: int = 12) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def augmented() -> list[Step]:
    return [PadCrop(12, 2, "reflect"), AlternatingFlip(), Normalize(MEAN, STD), Cutout(4)]


def feed(steps: list[Step] | None = None, batch_size: int = BATCH) -> ImageFeed:
    source = ImageTensors(drawn_images(), torch.arange(100), augmented() if steps is None else steps)
    made = feeds.make_feed(source, INDICES, batch_size, CPU, cores=1)
    assert isinstance(made, ImageFeed)
    return made


def whole(batches: Iterator[Any]) -> tuple[Tensor, Tensor]:
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def equal(left: Iterator[Any], right: Iterator[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(whole(left), whole(right), strict=True))


# --- batches


def test_an_epoch_has_each_example_once_with_its_own_target() -> None:
    images, targets = whole(feed([]).shuffled(5))
    assert sorted(targets.tolist()) == INDICES
    expected = v2.functional.to_dtype(drawn_images()[targets], torch.float32, scale=True)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-7)


def test_a_batch_is_ready_for_the_model() -> None:
    images, targets = next(feed().shuffled(5))
    assert (images.dtype, images.shape) == (torch.float32, (BATCH, 3, 12, 12))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == torch.int64


def test_evaluation_reads_in_the_order_of_the_indices_and_ranks_share_it() -> None:
    steps: list[Step] = [Normalize(MEAN, STD)]
    images, targets = whole(feed(steps).in_order())
    assert targets.tolist() == INDICES
    parts = [list(feed(steps).in_order(rank, 2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [5, 4]
    shared = [batch for pair in zip(parts[0], [*parts[1], None], strict=True) for batch in pair if batch]
    assert torch.equal(torch.cat([images for images, _ in shared]), images)


@pytest.mark.parametrize("first", [0, 1, 5, 8, 9], ids=lambda first: f"from batch {first}")
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_resumed_epoch_is_the_rest_of_the_same_epoch(first: int, epoch: int) -> None:
    batches = list(feed().shuffled(5, epoch=epoch))
    rest = list(feed().shuffled(5, first, epoch))
    assert len(rest) == len(batches) - first
    for (images, targets), (same_images, same_targets) in zip(rest, batches[first:], strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(targets, same_targets)


def test_the_augmentation_of_an_example_does_not_depend_on_the_batch_size() -> None:
    assert equal(feed(batch_size=5).shuffled(5), feed(batch_size=100).shuffled(5))


def test_an_epoch_depends_on_its_seed_and_does_not_change_the_random_state() -> None:
    made, again = feed(), feed()
    assert not equal(made.shuffled(5), made.shuffled(6))
    next(made.shuffled(7))  # start an epoch and abandon it
    random.seed(1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert equal(made.shuffled(5), again.shuffled(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_differs_from_epoch_to_epoch_and_from_example_to_example() -> None:
    source = ImageTensors(drawn_images()[:1].expand(10, -1, -1, -1), torch.zeros(10), [PadCrop(12, 4), Flip()])
    made = feeds.make_feed(source, range(10), 5, CPU, cores=1)
    shown = torch.cat([whole(made.shuffled(seed))[0] for seed in (5, 6)])
    assert len({tuple(image.flatten().tolist()) for image in shown}) > 15


@pytest.mark.parametrize("count", [2, 3])
def test_the_parts_of_all_ranks_make_up_the_batch(count: int) -> None:
    batch = next(feed().shuffled(5))
    parts: list[tuple[Tensor, Tensor]] = []
    for rank in range(count):
        ranks = object.__new__(Ranks)  # not connected to other ranks, because share() does not communicate
        ranks.rank, ranks.count = rank, count
        parts.append(ranks.share(next(feed().shuffled(5)), BATCH))
    images, targets = whole(iter(parts))
    assert torch.equal(images, batch[0])
    assert torch.equal(targets, batch[1])


def test_a_batch_equals_torchvisions_transforms_of_each_image() -> None:
    """Each image has its own random numbers."""
    images = drawn_images()
    steps: list[Step] = [Resize(16), PadCrop(12, 2, "reflect"), Flip(), Normalize(MEAN, STD)]
    made, targets = whole(feed(steps).shuffled(5))
    prepared = v2.Compose([v2.Resize(16), v2.Pad(2, padding_mode="reflect")])(images)
    final = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    for image, target in zip(made, targets, strict=True):
        padded = final(prepared[target])
        windows = padded.unfold(1, 12, 1).unfold(2, 12, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        candidates = torch.cat([windows, windows.flip(-1)])
        assert (candidates - image).abs().amax(dim=(1, 2, 3)).min() < 1e-5


@pytest.mark.parametrize("steps", [[], augmented()], ids=["without steps", "with steps"])
def test_a_feed_without_examples_has_no_batches(steps: list[Step]) -> None:
    made = feeds.make_feed(ImageTensors(drawn_images(), torch.arange(100), steps), [], 4, CPU, cores=1)
    assert (made.batches, list(made.shuffled(5)), list(made.in_order())) == (0, [], [])


# --- used as an ordinary data set


def test_a_subset_of_the_images_is_fed_by_a_loader_with_the_same_augmentation() -> None:
    source = ImageTensors(drawn_images(), torch.arange(100), [PadCrop(12, 2), Flip(), Normalize(MEAN, STD)])
    made = feeds.make_feed(Subset(source, range(40)), range(40), 10, CPU, cores=1)
    assert isinstance(made, LoaderFeed)
    one, again = whole(made.shuffled(5)), whole(made.shuffled(5))
    assert torch.equal(one[0], again[0])
    assert sorted(one[1].tolist()) == list(range(40))
    assert one[0].dtype == torch.float32
    assert not torch.equal(one[0], whole(made.shuffled(6))[0])


def test_a_single_example_can_not_have_alternating_flips() -> None:
    with pytest.raises(JobError, match=r"AlternatingFlip needs the epoch's number.*use Flip\(\)"):
        ImageTensors(drawn_images(), torch.arange(100), [AlternatingFlip()])[0]


def test_classes_are_split_by_their_targets() -> None:
    source = ImageTensors(drawn_images(), torch.arange(100) % 4)
    train, validation = splits.split(source, 0.2, seed=0)
    assert torch.bincount(source.targets[validation]).tolist() == [5] * 4
    assert len(train) == 80


@pytest.mark.parametrize(
    ("images", "count", "message"),
    [
        pytest.param(torch.zeros(4, 3, 8, 8), 4, r"images are torch\.float32 of shape \(4, 3, 8, 8\)", id="floats"),
        pytest.param(torch.zeros(4, 8, 8, dtype=torch.uint8), 4, r"must be torch\.uint8 \(n, chan", id="no channels"),
        pytest.param(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 5, "4 images and 5 targets", id="a target too many"),
    ],
)
def test_invalid_images_are_an_error(images: Tensor, count: int, message: str) -> None:
    with pytest.raises(JobError, match=message):
        ImageTensors(images, torch.zeros(count))


def test_a_step_that_does_not_fit_is_an_error_at_the_first_batch() -> None:
    with pytest.raises(JobError, match="crop of 13x13 pixels is larger than the images, 12x12"):
        next(feed([RandomCrop(13)]).shuffled(5))


# --- training


class Recorder(nn.Module):
    """Records its inputs in training."""

    def __init__(self, shown: list[Tensor]) -> None:
        super().__init__()
        self.shown = shown
        self.linear = nn.Linear(3 * 12 * 12, 2)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.shown.append(images.clone())
        return self.linear(images.flatten(1))


class Watched(Job):
    """Two classes of images, flipped in every second epoch."""

    shown: list[Tensor]

    def model(self) -> nn.Module:
        self.shown = []
        return Recorder(self.shown)

    def data(self, split: Split) -> ImageTensors:
        steps: list[Step] = [AlternatingFlip(), PadCrop(12, 1)] if split == "train" else []
        return ImageTensors(drawn_images(40), torch.arange(40) % 2, steps)


def watched() -> Watched:
    return Watched(JobContext(settings(seed=3, max_batch_size=8, validation_fraction=0.2, precision="fp32")))


def stops_at(step: int | None, asked: Iterator[int]) -> bool:
    return step is not None and next(asked) == step


PROFILE = Profile("fast", learning_rate=0.1, momentum=0.9, weight_decay=0.0)


class TestTraining:
    def test_alternating_flips_depend_on_the_epochs_number_in_the_lineage(self, tmp_path: Path) -> None:
        shown = []
        job = watched()
        job.data = lambda split: ImageTensors(  # type: ignore[method-assign]
            drawn_images(40), torch.arange(40) % 2, [AlternatingFlip()] if split == "train" else []
        )
        parent = None
        for chunk in range(2):  # each has one epoch; the second starts from the first one's checkpoint
            session = Session(job)
            done = session.train(Work(PROFILE, 1, 5, 0, parent, None), lambda: False, lambda epoch: None)
            assert isinstance(done, Finished)
            shown.append(torch.cat(job.shown))
            parent = tmp_path / f"{chunk}.pt"
            with parent.open("wb") as file:
                session.save(file)
        one, two = ({tuple(image.flatten().tolist()) for image in images} for images in shown)
        mirrored = {tuple(image.flatten().tolist()) for image in shown[1].flip(3)}
        assert not one & two
        assert one == mirrored

    def test_an_interrupted_chunk_goes_on_with_the_same_images(self, tmp_path: Path) -> None:
        job = watched()
        work = Work(PROFILE, 2, 5, 0, None, None)
        session = Session(job)
        session.train(work, lambda: False, lambda epoch: None)
        expected, weights = list(job.shown), session.state()["model"]

        seen: list[Tensor] = []
        suspended = None
        for stop in (3, 4, None):
            session = Session(job)
            asked = iter(range(100))
            again = Work(PROFILE, 2, 5, 0, None, suspended)
            ended = session.train(again, partial(stops_at, stop, asked), lambda epoch: None)
            seen += job.shown
            suspended = tmp_path / f"{stop}.pt"
            with suspended.open("wb") as file:
                session.save(file)
            assert isinstance(ended, Finished if stop is None else Interrupted)
        assert len(seen) == len(expected) == 8
        assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
        assert all(torch.equal(value, weights[name]) for name, value in session.state()["model"].items())


# --- real data sets


def test_cifar10_equals_torchvisions() -> None:
    root = cifar10_root()
    images, targets = cifar10(root, train=False)
    source = CIFAR10(str(root), train=False)
    assert (images.shape, images.dtype, targets.dtype) == ((10_000, 3, 32, 32), torch.uint8, torch.int64)
    for index in (0, 77, 9_999):
        picture, label = source[index]
        assert torch.equal(images[index], v2.functional.pil_to_tensor(picture))
        assert targets[index] == label


def test_mnist_equals_torchvisions() -> None:
    images, targets = mnist(mnist_root(), train=False)
    assert (images.shape, images.dtype, targets.dtype) == ((10_000, 1, 28, 28), torch.uint8, torch.int64)
    assert targets[:5].tolist() == [7, 2, 1, 0, 4]
    assert images[0].float().mean() > 10


def test_statistics_are_exact_on_real_images() -> None:
    images, _ = cifar10(cifar10_root(), train=False)
    mean, std = channel_statistics(images)
    values = images.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(values.mean(axis=(0, 2, 3)), rel=1e-9)
    assert std == pytest.approx(values.std(axis=(0, 2, 3)), rel=1e-9)


def test_normalisation_by_its_statistics_gives_mean_0_and_variance_1() -> None:
    images, _ = mnist(mnist_root(), train=False)
    made = Normalize(*channel_statistics(images)).apply(images, {})
    assert abs(made.mean().item()) < 1e-3
    assert abs(made.std().item() - 1) < 1e-3


@pytest.mark.parametrize(
    ("images", "message"),
    [
        pytest.param(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "n above 0", id="no image"),
        pytest.param(torch.zeros(2, 3, 4, 4), r"statistics of torch\.float32", id="floats"),
        pytest.param(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8), "the same value", id="one value everywhere"),
    ],
)
def test_images_without_statistics_are_an_error(images: Tensor, message: str) -> None:
    with pytest.raises(JobError, match=message):
        channel_statistics(images)


@pytest.mark.parametrize(("load", "name"), [(cifar10, "CIFAR-10"), (mnist, "MNIST")])
def test_a_missing_data_set_is_an_error_that_says_how_to_get_it(load: Any, name: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=rf"^{name} is not in training_source_dir .*Run `orch prepare SETTINGS`"):
        load(tmp_path, train=True)


def test_a_file_with_the_name_of_an_archive_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"of the user")
    with pytest.raises(JobError, match=r"cifar-10-python.tar.gz is another file than .* Delete it or move it away"):
        cifar10(tmp_path, train=True, download=True)
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == b"of the user"
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]
