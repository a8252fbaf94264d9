"""Each example goes through the frozen layers only once, and the results are the same as without `frozen_part`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.data import randomness
from jobs.data.augment import Flip, Normalize, Step
from jobs.data.images import ImageTensors
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Averaging, Job, JobContext
from jobs.training import frozen
from jobs.training.session import Session
from jobs.verify_resume.link import Recorded, RecordedFeed
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Finished, Interrupted, Work
from tests.support.settings import settings

PROFILE = Profile("fast", learning_rate=0.05, momentum=0.9, weight_decay=0.001)
TRAIN, VALIDATION = 80, 20  # examples
BATCH = 12


pytestmark = pytest.mark.usefixtures("one_thread")


class Counted(nn.Conv2d):
    """Counts the examples that went through it."""

    seen = 0

    def forward(self, inputs: Tensor) -> Tensor:
        type(self).seen += len(inputs)
        return super().forward(inputs)


class Net(nn.Module):
    """A frozen convolution with a frozen batch norm, then the layers that are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(Counted(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Flatten(), nn.Linear(8 * 3 * 3, 4))
        self.features.requires_grad_(False)

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Frozen(Job):
    """Its founders have different frozen weights."""

    def model(self) -> nn.Module:
        return Net()

    def data(self, split: Split) -> Any:
        images = torch.randint(0, 256, (100, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        return ImageTensors(images, torch.arange(100) % 4, self.steps(split))

    def steps(self, split: Split) -> list[Step]:
        return [Normalize((0.5,) * 3, (0.3,) * 3)]

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        return model.get_submodule("features")


class NotKept(Frozen):
    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        return None


class Averaged(Frozen):
    def averaging(self) -> Averaging | None:
        return Averaging(decay=0.9, every_steps=1)


class AveragedNotKept(NotKept, Averaged):
    pass


def session(job: type[Job], **changes: Any) -> Session:
    values = {"seed": 3, "max_batch_size": BATCH, "validation_fraction": 0.2, "precision": "fp32"}
    return Session(job(JobContext(settings(**values | changes))))


def never() -> bool:
    return False


def train(
    running: Session, epochs: int = 2, seed: int = 5, parent: Path | None = None, stop: Callable[[], bool] = never
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    results: list[EpochResult] = []
    running.train(Work(PROFILE, epochs, seed, 0, parent, None), stop, results.append)
    return [dict(result.metrics) for result in results], running.state()["model"]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    Counted.seen = 0


# --- the results stay the same


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("jobs", [(Frozen, NotKept), (Averaged, AveragedNotKept)], ids=["weights", "averaged weights"])
def test_losses_metrics_and_weights_are_bit_for_bit_the_same(
    jobs: tuple[type[Job], type[Job]], channels_last: bool
) -> None:
    (metrics, weights), (expected, expected_weights) = (
        train(session(job, channels_last=channels_last), epochs=3) for job in jobs
    )
    assert metrics == expected
    assert same(weights, expected_weights)


def test_each_example_goes_through_the_frozen_layers_once() -> None:
    running = session(Frozen)
    train(running, epochs=3)
    compared = 2 * BATCH  # `_compare` computes the first batch of each split again, with the whole model
    assert Counted.seen == TRAIN + VALIDATION + compared
    expected = session(NotKept)
    Counted.seen = 0
    train(expected, epochs=3)
    assert Counted.seen == 3 * (TRAIN + VALIDATION)


def test_half_precision_is_kept_as_it_is() -> None:
    metrics, weights = train(session(Frozen, precision="bf16"))
    expected, expected_weights = train(session(NotKept, precision="bf16"))
    assert metrics == expected
    assert same(weights, expected_weights)


def test_an_interrupted_chunk_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    _, expected = train(session(NotKept), epochs=2)
    running, asked = session(Frozen), iter(range(100))
    cut = running.train(Work(PROFILE, 2, 5, 0, None, None), lambda: next(asked) == 9, lambda epoch: None)
    assert isinstance(cut, Interrupted)
    path = tmp_path / "cut.pt"
    with path.open("wb") as file:
        running.save(file)
    again = session(Frozen)
    assert isinstance(again.train(Work(PROFILE, 2, 5, 0, None, path), never, lambda epoch: None), Finished)
    assert same(again.state()["model"], expected)


def test_verify_resume_records_the_batches_that_are_trained_on() -> None:
    running, recorded = session(Frozen), Recorded()
    running.examples._feeds["train"] = RecordedFeed(running.feed("train"), recorded)
    assert train(running)[0] == train(session(NotKept))[0]
    assert len("".join(recorded.between(-1, 0))) == 64 * 2 * -(-TRAIN // BATCH)


def test_other_frozen_weights_have_their_own_outputs(tmp_path: Path) -> None:
    """A job trains several models, one after the other."""
    running, alone = session(Frozen), session(NotKept)
    parent = tmp_path / "parent.pt"
    _, first = train(running, seed=5)
    with parent.open("wb") as file:
        running.save(file)
    seen = Counted.seen
    train(running, epochs=1, parent=parent)  # the same frozen weights
    assert Counted.seen == seen
    for seed in (6, 5):
        metrics, weights = train(running, seed=seed)
        assert (metrics, same(weights, first)) == (train(alone, seed=seed)[0], seed == 5)


def test_a_checkpoint_is_evaluated_with_its_own_frozen_weights(tmp_path: Path) -> None:
    running, alone = session(Frozen), session(NotKept)
    paths = [tmp_path / "5.pt", tmp_path / "6.pt"]
    for seed, path in zip((5, 6), paths, strict=True):
        train(running, epochs=1, seed=seed)
        with path.open("wb") as file:
            running.save(file)
    for path in paths:
        assert running.evaluate_file(path, "test") == alone.evaluate_file(path, "test")


def test_kept_outputs_do_not_change_the_checkpoint(tmp_path: Path) -> None:
    running = session(Frozen)
    train(running)
    assert running.state()["model"].keys() == Net().state_dict().keys()


class Slice(Frozen):
    """The frozen part is the first layers of a Sequential; its last layer is trained."""

    def model(self) -> nn.Module:
        net = Net()
        return nn.Sequential(*net.features, *net.head).requires_grad_(False).append(nn.Linear(4, 4))

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        assert isinstance(model, nn.Sequential)
        model[1].eval()
        return model[:1]


class SliceNotKept(Slice):
    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        return None


def test_the_first_layers_of_a_sequential_may_be_frozen() -> None:
    assert train(session(Slice))[0] == train(session(SliceNotKept))[0]
    assert Counted.seen < 4 * (TRAIN + VALIDATION)


# --- when outputs are not kept


def test_outputs_that_take_too_much_memory_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frozen, "resident_bytes", lambda device: 30 * 8 * 3 * 3 * 4)  # enough for validation
    with caplog.at_level(logging.INFO, logger="orch"):
        metrics, weights = train(session(Frozen))
    assert "the frozen layers' outputs are not kept" in caplog.text
    expected, expected_weights = train(session(NotKept))
    assert metrics == expected
    assert same(weights, expected_weights)


class Mixed(Frozen):
    """Changes the images before it passes them to the model."""

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        images, targets = batch
        return self.loss(model((images + images.flip(0)) / 2), targets)

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        return model(inputs) + model(inputs.flip(3))


class MixedNotKept(Mixed):
    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        return None


def test_a_job_that_changes_the_images_itself_gets_the_images() -> None:
    assert train(session(Mixed))[0] == train(session(MixedNotKept))[0]


# --- parts that are not frozen


class Trained(Frozen):
    def model(self) -> nn.Module:
        net = Net()
        net.features[0].requires_grad_(True)
        return net


class Flipped(Frozen):
    def steps(self, split: Split) -> list[Step]:
        return [*([Flip()] if split == "train" else []), *super().steps(split)]


class WithDropout(Frozen):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(192, 4))

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        return model.get_submodule("0")


class WithStatistics(Frozen):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten(), nn.Linear(192, 4))

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        return model.get_submodule("0")


class NotFirst(Frozen):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(192, 4))

    def frozen_part(self, model: nn.Module) -> nn.Module | None:
        return model.get_submodule("1")


class NoPairs(Frozen):
    def data(self, split: Split) -> Any:
        return [{"image": torch.zeros(3), "target": number % 2} for number in range(100)]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Trained, r"0\.weight, 0\.bias are trained; call requires_grad_\(False\)"),
        (Flipped, "the training images are augmented"),
        (WithDropout, "is a dropout layer, whose output is random"),
        (WithStatistics, "uses batch statistics in training; keep it in eval mode"),
        (NotFirst, "the part must be the first thing the model does"),
        (NoPairs, r"batches must be \(inputs, targets\), two tensors"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_part_that_is_not_frozen_is_an_error(job: type[Job], message: str) -> None:
    with randomness.random_state_kept(), pytest.raises(JobError, match=f"^frozen_part: .*{message}"):
        train(session(job))
