"""Splits and batches depend only on a seed, and making them does not change the random state."""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from jobs.data import feeds, randomness, splits
from jobs.data.feeds import Feed, LoaderFeed, TensorFeed
from jobs.errors import JobError

CPU = torch.device("cpu")
BATCH = 8

pytestmark = [
    # These tests use two loader processes even on one core, and fork them while torch has threads.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]


# --- data sets


PIXELS, DIGITS = (torch.as_tensor(part) for part in load_digits(return_X_y=True))


def digits(counts: Sequence[int]) -> TensorDataset:
    """scikit-learn's digits in mixed order. counts: how many of each class."""
    chosen = torch.cat([torch.nonzero(DIGITS.eq(digit)).flatten()[:count] for digit, count in enumerate(counts)])
    chosen = chosen.sort().values
    return TensorDataset(PIXELS[chosen].float(), DIGITS[chosen])


class Listed(Dataset[Any]):
    """The same examples, but not as tensors, so that a loader has to fetch them."""

    def __init__(self, source: TensorDataset, **labels: Any) -> None:
        self._source = source
        self.__dict__.update(labels)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        return self._source[index]


def noisy(image: Tensor) -> Tensor:
    """Augment with random numbers of Python, NumPy and torch."""
    return image * random.uniform(0.5, 1.5) + np.random.normal() + torch.randn(image.shape)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """24 PNG files of four classes, cropped, mirrored and made noisy each time they are read."""
    folder, pixels = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(24):
        path = folder / f"class{number % 4}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    steps = [v2.RandomCrop(9), v2.RandomHorizontalFlip(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), noisy]
    return ImageFolder(str(folder), v2.Compose(steps))


# --- the split


@given(counts=st.lists(st.integers(20, 60), min_size=2, max_size=10), seed=st.integers(0, 2**31 - 1))
@settings(deadline=None, derandomize=True, max_examples=30)
def test_a_split_takes_the_same_share_of_every_class_and_loses_no_example(counts: list[int], seed: int) -> None:
    source = digits(counts)
    train, validation = splits.split(source, 0.2, seed)
    assert sorted(train + validation) == list(range(len(source)))
    for digit, count in enumerate(counts):
        kept = sum(source.tensors[1][validation] == digit)
        assert abs(kept - 0.2 * count) <= 1


def test_the_split_is_fixed_by_the_seed() -> None:
    source = digits([30] * 10)
    assert splits.split(source, 0.2, seed=7) == splits.split(source, 0.2, seed=7)
    assert splits.split(source, 0.2, seed=7) != splits.split(source, 0.2, seed=8)


def test_a_data_set_without_classes_can_be_split() -> None:
    source = TensorDataset(PIXELS[:50])
    train, validation = splits.split(source, 0.2, 0)
    assert (len(train), len(validation)) == (40, 10)
    assert sorted(train + validation) == list(range(50))


@pytest.mark.parametrize(
    ("labels", "count", "message"),
    [
        pytest.param([0] * 30 + [1], 31, r"of the classes \[1\]", id="one example of a class"),
        pytest.param([0] + [1] * 30 + [2], 32, r"of the classes \[0, 2\]", id="of two classes"),
        pytest.param(None, 1, "one side would have none", id="one example, without classes"),
        pytest.param(None, 0, "0 examples", id="no example"),
    ],
)
def test_a_class_that_is_too_small_for_both_sides_is_an_error(
    labels: list[int] | None, count: int, message: str
) -> None:
    with pytest.raises(JobError, match=message):
        splits.split_labels(labels, count, 0.5, 0)


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_a_rare_class_gives_at_least_one_example_to_each_side(fraction: float) -> None:
    source = digits([40, 2, 3])
    for side in splits.split(source, fraction, 0):
        assert set(source.tensors[1][side].tolist()) == {0, 1, 2}


@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    fraction=st.sampled_from([0.05, 0.1, 0.25, 0.5, 0.9]),
)
@example(counts=[40, 2], fraction=0.05)
@example(counts=[40, 2], fraction=0.9)
@settings(deadline=None, derandomize=True, max_examples=60)
def test_a_split_either_has_every_class_on_both_sides_or_is_refused(counts: list[int], fraction: float) -> None:
    labels = digits(counts).tensors[1]
    try:
        sides = splits.split_labels(labels.tolist(), len(labels), fraction, 0)
    except JobError:
        return
    assert [sorted(set(labels[side].tolist())) for side in sides] == [list(range(len(counts)))] * 2


@pytest.mark.parametrize(
    ("source", "labels"),
    [
        pytest.param(digits([2, 2]), [0, 1, 0, 1], id="the last tensor of several"),
        pytest.param(Listed(digits([2, 2]), targets=[0, 1, 0, 1]), [0, 1, 0, 1], id="targets as a list"),
        pytest.param(Listed(digits([2, 2]), targets=torch.tensor([0, 1, 0, 1])), [0, 1, 0, 1], id="as a tensor"),
        pytest.param(Listed(digits([2, 2]), labels=np.array([0, 1, 0, 1])), [0, 1, 0, 1], id="labels as an array"),
        pytest.param(Listed(digits([2, 2]), targets=np.array([True, False] * 2)), [1, 0, 1, 0], id="yes and no"),
        pytest.param(Subset(digits([3, 3]), [5, 0, 4, 1]), [1, 0, 0, 1], id="a part of a data set"),
        pytest.param(Listed(digits([2, 2]), targets=[0.5, 1.0, 0.0, 0.5]), None, id="targets that are no classes"),
        pytest.param(Listed(digits([2, 2]), labels=[0, 1]), None, id="names of the classes, not of the examples"),
        pytest.param(Listed(digits([200, 200]), labels=[0, 1, 0, 1]), None, id="4 labels for 400 examples"),
        pytest.param(Listed(digits([2, 2]), targets=[[0], [1, 2], [0], [1]]), None, id="lists of other lengths"),
        pytest.param(Listed(digits([2, 2]), labels=lambda: [0, 1, 0, 1]), None, id="a method"),
        pytest.param(TensorDataset(PIXELS[:4], torch.arange(4)), None, id="an identifier for each example"),
        pytest.param(TensorDataset(PIXELS[:5], torch.tensor([18, 40, 18, 40, 71])), None, id="ages, to be predicted"),
        pytest.param(TensorDataset(PIXELS[:3], PIXELS[:3]), None, id="a target of many numbers"),
        pytest.param(TensorDataset(PIXELS[:3]), None, id="no targets"),
        pytest.param(Listed(digits([2, 1])), None, id="a data set that does not tell"),
    ],
)
def test_classes_are_read_from_a_data_set_that_lists_them(source: Dataset[Any], labels: list[int] | None) -> None:
    found = splits.labels_of(source)
    assert labels == (None if found is None else found.tolist())


# --- batches

INDICES = [*range(3, 40), *range(60, 90)]  # 67: eight whole batches and three examples

Make = Callable[[int], Feed]


@pytest.fixture(params=["in memory", "without processes", "with two processes"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes a feed of the same digits with a given batch size. A test runs once for each kind of feed."""
    source = digits([20] * 10)
    if request.param == "in memory":
        return lambda size: TensorFeed(source, INDICES, size, CPU)
    processes = 2 if request.param == "with two processes" else 0
    return lambda size: LoaderFeed(Listed(source), INDICES, size, CPU, processes)


def flat(batches: Iterator[Any]) -> list[tuple[Tensor, ...]]:
    return [tuple(batch) for batch in batches]


def same(left: Iterator[Any], right: Iterator[Any]) -> bool:
    """Whether both give the same batches, bit for bit."""
    left_batches, right_batches = flat(left), flat(right)
    return [len(b) for b in left_batches] == [len(b) for b in right_batches] and all(
        torch.equal(a, b)
        for lefts, rights in zip(left_batches, right_batches, strict=True)
        for a, b in zip(lefts, rights, strict=True)
    )


def test_an_epoch_has_each_example_once_in_full_batches_and_a_smaller_last_one(make: Make) -> None:
    source, feed = digits([20] * 10), make(BATCH)
    batches = flat(feed.shuffled(seed=5))
    assert [len(targets) for _, targets in batches] == [8] * 8 + [3]
    assert feed.batches == len(batches)
    seen = sorted(pixels.tolist() for inputs, _ in batches for pixels in inputs)
    assert seen == sorted(source.tensors[0][i].tolist() for i in INDICES)


def test_the_order_depends_on_the_seed_and_not_on_earlier_reads(make: Make) -> None:
    feed, again = make(BATCH), make(BATCH)
    assert not same(feed.shuffled(seed=5), feed.shuffled(seed=6))
    next(feed.shuffled(seed=7))  # start an epoch and abandon it
    random.seed(1)
    torch.manual_seed(1)
    assert same(feed.shuffled(seed=5), again.shuffled(seed=5))


def test_evaluation_reads_in_the_order_of_the_indices(make: Make) -> None:
    targets = torch.cat([targets for _, targets in make(BATCH).in_order()])
    assert torch.equal(targets, digits([20] * 10).tensors[1][INDICES])


@pytest.mark.parametrize("first", [0, 1, 5, 8, 9], ids=lambda first: f"from batch {first}")
def test_a_resumed_epoch_is_the_rest_of_the_same_epoch(make: Make, first: int) -> None:
    whole = flat(make(BATCH).shuffled(seed=5))
    assert same(make(BATCH).shuffled(seed=5, first_batch=first), iter(whole[first:]))


def test_reading_does_not_change_the_random_state(make: Make) -> None:
    before = randomness.random_state()
    feed = make(BATCH)
    flat(feed.shuffled(seed=5))
    flat(feed.in_order())
    assert unchanged_since(before)


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("size", [1, 8, 100], ids=lambda size: f"batches of {size}")
def test_a_data_set_in_memory_gives_the_same_batches_as_a_loader(size: int, processes: int) -> None:
    source = digits([20] * 10)
    memory, loader = TensorFeed(source, INDICES, size, CPU), LoaderFeed(source, INDICES, size, CPU, processes)
    assert same(memory.shuffled(seed=5), loader.shuffled(seed=5))
    assert same(memory.in_order(), loader.in_order())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        pytest.param(digits([4, 4]), TensorFeed, id="a TensorDataset lives on the device"),
        pytest.param(Listed(digits([4, 4])), LoaderFeed, id="anything else is fetched"),
    ],
)
def test_the_kind_of_data_set_decides_how_it_is_fed(source: Dataset[Any], expected: type[Feed]) -> None:
    assert type(feeds.make_feed(source, range(8), 4, CPU, cores=1)) is expected


# --- augmentation


def feed_pictures(pictures: ImageFolder, processes: int) -> LoaderFeed:
    return LoaderFeed(pictures, range(len(pictures)), 5, CPU, processes)


def test_augmentation_is_the_same_with_any_number_of_processes(pictures: ImageFolder) -> None:
    inside, outside = feed_pictures(pictures, 0), feed_pictures(pictures, 2)
    for seed in (5, 6):  # the processes are the same in both epochs
        assert same(inside.shuffled(seed), outside.shuffled(seed))


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("first", [1, 4], ids=lambda first: f"from batch {first}")
def test_augmentation_is_the_same_in_a_resumed_epoch(pictures: ImageFolder, first: int, processes: int) -> None:
    whole = flat(feed_pictures(pictures, 0).shuffled(seed=5))
    rest = feed_pictures(pictures, processes).shuffled(seed=5, first_batch=first)
    assert same(rest, iter(whole[first:]))


def test_augmentation_differs_from_epoch_to_epoch_and_from_batch_to_batch(pictures: ImageFolder) -> None:
    feed = LoaderFeed(pictures, [3] * 10, 5, CPU, 0)  # ten times the same picture
    one, two = (torch.cat([inputs for inputs, _ in feed.shuffled(seed)]) for seed in (5, 6))
    different = {tuple(picture.flatten().tolist()) for picture in torch.cat([one, two])}
    assert len(different) == 20


@pytest.mark.parametrize("processes", [0, 2])
def test_augmentation_does_not_change_the_random_state(pictures: ImageFolder, processes: int) -> None:
    before = randomness.random_state()
    feed = feed_pictures(pictures, processes)
    flat(feed.shuffled(seed=5))
    flat(feed.shuffled(seed=6))
    flat(feed.in_order())
    assert unchanged_since(before)


class WhoReads(Dataset[Any]):
    """Each example is the id of the process that read it."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_the_processes_of_a_loader_stay_from_epoch_to_epoch() -> None:
    """Starting them again would take longer than a small epoch."""
    feed = LoaderFeed(WhoReads(), range(40), 2, CPU, processes=2)
    readers = [{pid for batch in feed.shuffled(seed) for pid in batch.tolist()} for seed in (5, 6, 7)]
    assert readers[0] == readers[1] == readers[2]
    assert len(readers[0] - {os.getpid()}) == 2


# --- random state


def draw() -> list[Any]:
    return [random.random(), random.gauss(), np.random.rand(), np.random.normal(), *torch.rand(2).tolist()]


def unchanged_since(state: dict[str, Any]) -> bool:
    now = draw()
    randomness.set_random_state(state)
    return draw() == now


@pytest.mark.parametrize("drawn", range(3), ids=lambda drawn: f"after {drawn} draws")
def test_a_random_state_is_restored_from_a_file_that_executes_no_code(drawn: int) -> None:
    randomness.seed_all(11)
    for _ in range(drawn):
        draw()  # each library stores a second normal number for the next call
    file = io.BytesIO()
    torch.save(randomness.random_state(), file)
    expected = [draw() for _ in range(3)]
    randomness.seed_all(12)
    file.seek(0)
    randomness.set_random_state(torch.load(file, weights_only=True))
    assert [draw() for _ in range(3)] == expected


def test_a_seed_fixes_all_three_libraries() -> None:
    draws = []
    for seed in (5, 5, 6):
        randomness.seed_all(seed)
        draws.append(draw())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[1], draws[2], strict=True))


def test_draws_in_a_kept_random_state_leave_no_trace_even_after_an_error() -> None:
    def fail() -> None:
        randomness.seed_all(1)
        raise ZeroDivisionError

    before = randomness.random_state()
    with pytest.raises(ZeroDivisionError), randomness.random_state_kept():
        fail()
    assert unchanged_since(before)


def test_a_derived_seed_depends_on_its_parts_and_their_order() -> None:
    seeds = {randomness.hash_seed(*parts) for parts in [(1,), (2,), (1, 2), (2, 1), (1, 2, 3), (2**62, 1), (1, 2**62)]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_derived_seed_is_the_same_in_every_version() -> None:
    assert randomness.hash_seed(3, 14) == 1117353933592787484


# --- devices


def test_every_tensor_of_a_nested_batch_is_moved() -> None:
    examples: Any = [{"pictures": [torch.ones(2), (torch.zeros(1), "a name")]}]
    moved = next(LoaderFeed(examples, [0], 1, torch.device("meta"), 0).in_order())
    assert moved["pictures"][0].is_meta
    assert moved["pictures"][1][0].is_meta
    assert moved["pictures"][1][1] == ["a name"]


def test_a_data_set_in_memory_is_moved_once_as_a_whole() -> None:
    feed = TensorFeed(digits([4, 4]), range(8), 4, torch.device("meta"))
    assert all(part.is_meta for batch in feed.shuffled(seed=5) for part in batch)


# --- loader processes that fail


class Fatal(Dataset[Any]):
    """Ends the process that reads it, once: `end` is called for the first example that is read."""

    def __init__(self, flag: Path, end: Callable[[], object]) -> None:
        self._flag, self._end = flag, end

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        with contextlib.suppress(FileNotFoundError):
            self._flag.unlink()
            self._end()
        return index


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    sys.exit("no more credits")


@pytest.mark.parametrize(("end", "message"), [(kill, "killed by|exited unexpectedly"), (leave, "SystemExit: no")])
def test_after_a_loader_process_was_ended_the_next_epoch_has_all_its_batches(
    tmp_path: Path, end: Callable[[], object], message: str
) -> None:
    (tmp_path / "flag").touch()
    feed = LoaderFeed(Fatal(tmp_path / "flag", end), range(8), 2, CPU, processes=2)
    with pytest.raises((RuntimeError, JobError), match=message):
        list(feed.in_order())
    assert torch.cat(list(feed.in_order())).tolist() == list(range(8))


def test_an_error_that_ends_python_is_reported_without_loader_processes_too(tmp_path: Path) -> None:
    (tmp_path / "flag").touch()
    feed = LoaderFeed(Fatal(tmp_path / "flag", leave), range(8), 2, CPU, processes=0)
    with pytest.raises(JobError, match="SystemExit: no more credits"):
        list(feed.in_order())


def test_a_loader_process_ends_at_sigterm_although_user_code_has_told_its_parent_to_ignore_it(tmp_path: Path) -> None:
    had = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        feed = LoaderFeed(Fatal(tmp_path / "flag", kill), range(8), 2, CPU, processes=2)
        list(feed.in_order())
        processes = feed._loader._iterator._workers
        for process in processes:
            process.terminate()
            process.join(20)
        assert not any(process.is_alive() for process in processes)
    finally:
        signal.signal(signal.SIGTERM, had)
