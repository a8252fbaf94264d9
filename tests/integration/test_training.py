"""A chunk is trained from a whole state to a whole state: cut anywhere and gone on with elsewhere, it is the same."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from jobs.data import randomness
from jobs.data.splits import Split
from jobs.digits import Digits
from jobs.errors import JobError
from jobs.job import Job, JobContext
from jobs.training.opening import load_job, open_session
from jobs.training.session import Session
from jobs.training.states import export, read
from orchestrator.records import EpochResult, Finished, Interrupted, Profile, Work
from orchestrator.settings.settings import Settings

FAST = Profile("fast", learning_rate=0.05, momentum=0.9, weight_decay=0.0005)
PLAIN = Profile("plain", learning_rate=0.01, momentum=0.0, weight_decay=0.0)
FINE = Profile("fine", learning_rate=0.002, momentum=0.5, weight_decay=0.01)

EPOCHS = 2
STEPS = 6  # of an epoch of either job below, with the settings below


pytestmark = pytest.mark.usefixtures("one_thread")


# --- jobs


class PicturesParams(BaseModel):
    folder: str


class Pictures(Job):
    """PNG files that are read, cropped and mirrored in each epoch anew."""

    Params = PicturesParams

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(4 * 6 * 6, 4),
        )

    def data(self, split: Split) -> Dataset[Any]:
        crop = [v2.RandomCrop(8), v2.RandomHorizontalFlip()] if split == "train" else [v2.CenterCrop(8)]
        steps = v2.Compose([*crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        return ImageFolder(str(Path(self.params.folder) / ("test" if split == "test" else "train")), steps)


def draw_pictures(folder: Path, classes: int, each: int, seed: int) -> None:
    """PNG files of 10x10 pixels: each class has a colour, each picture its own noise."""
    pixels = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            colour = np.array([60 * label, 200 - 60 * label, 30 * label])
            picture = np.clip(colour + pixels.integers(0, 60, (10, 10, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"class{label}" / f"{number}.png")


def settings(**changes: Any) -> dict[str, Any]:
    """What a job is given of a settings file: everything, defaults spelled out."""
    profile = {"name": "fast", "learning_rate": 0.05}
    given = {"name": "run", "job": "jobs.digits:Digits", "training_profiles": [profile], "seed": 3} | changes
    return Settings.model_validate(given).model_dump(mode="json")


def digits_settings(**changes: Any) -> dict[str, Any]:
    return settings(**({"job_params": {"width": 4}, "validation_fraction": 0.2, "max_batch_size": 200} | changes))


def digits_session(job: type[Job] = Digits, **changes: Any) -> Session:
    return Session(job(JobContext(digits_settings(**changes))))


Fresh = Callable[[], Session]


@pytest.fixture(scope="module", params=["digits in memory", "pictures from files"])
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    """Makes Sessions that know nothing of each other, as the jobs of a chain are."""
    if request.param == "digits in memory":
        return digits_session
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder / "train", classes=4, each=15, seed=0)
    draw_pictures(folder / "test", classes=4, each=5, seed=1)
    given = settings(job_params={"folder": str(folder)}, validation_fraction=0.2, max_batch_size=8)
    return lambda: Session(Pictures(JobContext(given)))


# --- helpers

_processes = itertools.count(1000)


def in_a_new_process() -> None:
    """As little as there is left of the random state of another process."""
    randomness.seed_all(next(_processes))


def never() -> bool:
    return False


def after(steps: int) -> Callable[[], bool]:
    """Asked before each step: says stop when so many are done."""
    asked = iter(range(steps + 1))
    return lambda: next(asked) == steps


def train(
    session: Session, work: Work, stop: Callable[[], bool] = never, seen: list[EpochResult] | None = None
) -> Finished:
    in_a_new_process()
    result = session.train(work, stop, [].append if seen is None else seen.append)
    assert isinstance(result, Finished)
    return result


def interrupt(
    session: Session, work: Work, steps: int, file: Path, seen: list[EpochResult] | None = None
) -> Interrupted:
    in_a_new_process()
    result = session.train(work, after(steps), [].append if seen is None else seen.append)
    assert isinstance(result, Interrupted)
    return save(session, file) and result


def save(session: Session, file: Path) -> Path:
    with file.open("wb") as target:
        session.save(target)
    return file


def differences(left: Any, right: Any, place: str = "state") -> list[str]:
    """Where two states are not bit for bit the same."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [place]
    if isinstance(left, dict) and isinstance(right, dict):
        if list(left) != list(right):
            return [f"{place}: {list(left)}, {list(right)}"]
        return [line for key in left for line in differences(left[key], right[key], f"{place}.{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        return [
            line
            for i, (a, b) in enumerate(zip(left, right, strict=True))
            for line in differences(a, b, f"{place}[{i}]")
        ]
    return [] if left == right else [f"{place}: {left}, {right}"]


def measured(result: Finished) -> list[tuple[int, dict[str, float]]]:
    return [(epoch.number, dict(epoch.metrics)) for epoch in result.results]


def found(seed: int = 1, epochs: int = 1, profile: Profile = FAST) -> Work:
    return Work(profile, epochs, seed, repeat=0, parent=None, suspended=None)


def go_on(parent: Path, profile: Profile = FAST, epochs: int = 1, repeat: int = 0) -> Work:
    return Work(profile, epochs, seed=0, repeat=repeat, parent=parent, suspended=None)


def momentum(state: dict[str, Any]) -> list[Tensor]:
    return [moved["momentum_buffer"] for moved in state["optimizer"]["state"].values()]


# --- chunks


def test_chunks_in_jobs_of_their_own_are_the_uninterrupted_training(fresh: Fresh, tmp_path: Path) -> None:
    whole = fresh()
    expected = train(whole, found(epochs=3))

    files = [tmp_path / f"{number}.pt" for number in range(3)]
    results = []
    for number, file in enumerate(files):
        session = fresh()
        results.append(train(session, go_on(files[number - 1]) if number else found()))
        save(session, file)

    assert differences(read(files[-1]), whole.state()) == []
    assert [line for result in results for line in measured(result)] == measured(expected)
    assert [number for number, _ in measured(expected)] == [1, 2, 3]
    assert results[-1].epochs == expected.epochs == 3


def test_the_whole_state_is_compared_and_it_moves(tmp_path: Path) -> None:
    """The other tests count on it: momentum, weights and random state are in the file, each epoch changes them."""
    session = digits_session()
    train(session, found())
    before = read(save(session, tmp_path / "one.pt"))
    train(session, go_on(tmp_path / "one.pt"))
    changed = {line.partition(":")[0] for line in differences(before, session.state())}
    assert len(momentum(before)) == 6
    assert {"state.epochs", "state.rng.torch", "state.model.0.weight"} <= changed
    assert {f"state.optimizer.state.{i}.momentum_buffer" for i in range(6)} <= changed


def test_a_repeat_of_a_profile_trains_another_child(tmp_path: Path) -> None:
    founder = digits_session()
    train(founder, found())
    parent = save(founder, tmp_path / "parent.pt")
    children = []
    for repeat in (0, 0, 1, 1, 2):
        child = digits_session()
        train(child, go_on(parent, repeat=repeat))
        children.append(child.state())
    first, first_again, second, second_again, third = children
    assert differences(first, first_again) == []
    assert differences(second, second_again) == []
    assert all(
        "state.model.0.weight" in differences(*pair) for pair in [(first, second), (second, third), (first, third)]
    )


def test_founders_of_different_seeds_differ_from_the_start(tmp_path: Path) -> None:
    founders = []
    for seed in (1, 1, 2):
        session = digits_session()
        interrupt(session, found(seed=seed), 0, tmp_path / "start.pt")
        start = read(tmp_path / "start.pt")
        train(session, found(seed=seed))
        founders.append((start, session.state()))
    (one_start, one), (again_start, again), (two_start, two) = founders
    assert differences(one_start["model"], again_start["model"]) == []
    assert differences(one, again) == []
    assert len(differences(one_start["model"], two_start["model"])) == 6
    assert len(differences(one["model"], two["model"])) == 6


def test_what_a_session_did_before_makes_no_difference(tmp_path: Path) -> None:
    """A job of a chain trains many chunks in one process."""
    parent = save_trained(digits_session(), found(), tmp_path / "parent.pt")
    used = digits_session()
    train(used, found(seed=9, profile=PLAIN))
    interrupt(used, go_on(parent), 3, tmp_path / "cut.pt")
    for work in (go_on(parent, FINE), found()):
        new = digits_session()
        assert measured(train(used, work)) == measured(train(new, work))
        assert differences(used.state(), new.state()) == []


def save_trained(session: Session, work: Work, file: Path) -> Path:
    train(session, work)
    return save(session, file)


class Watched(Digits):
    """Notes the classes of the examples in the order in which they are trained on."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if outputs.requires_grad:
            self.__dict__.setdefault("seen", []).extend(targets.tolist())
        return super().loss(outputs, targets)


def test_every_epoch_and_every_founder_has_an_order_of_its_own() -> None:
    orders = set()
    for seed in (1, 2):
        session = digits_session(Watched)
        train(session, found(seed=seed, epochs=2))
        seen = session.job.__dict__["seen"]
        count = session.feed("train").count
        assert sorted(seen[:count]) == sorted(seen[count:])
        orders |= {tuple(seen[:count]), tuple(seen[count:])}
    assert len(orders) == 4


# --- interruptions


class Reference:
    """A chunk that was never interrupted, as a founder or on a parent, and how to do it again."""

    def __init__(self, fresh: Fresh, work: Work) -> None:
        self.fresh, self.work, self.session = fresh, work, fresh()
        self.seen: list[EpochResult] = []
        self.result = train(self.session, work, seen=self.seen)


@pytest.fixture(scope="module", params=["a founder", "a child under another profile", "a repeat"])
def uninterrupted(request: pytest.FixtureRequest, fresh: Fresh, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    if request.param == "a founder":
        return Reference(fresh, found(epochs=EPOCHS))
    parent = save_trained(fresh(), found(seed=5, epochs=1), tmp_path_factory.mktemp("parent") / "parent.pt")
    return Reference(fresh, go_on(parent, FINE, EPOCHS, repeat=int(request.param == "a repeat")))


@pytest.mark.parametrize("steps", range(EPOCHS * STEPS), ids=lambda steps: f"after {steps} steps")
def test_a_chunk_that_is_interrupted_is_the_uninterrupted_one(
    uninterrupted: Reference, steps: int, tmp_path: Path
) -> None:
    seen: list[EpochResult] = []
    cut = interrupt(uninterrupted.fresh(), uninterrupted.work, steps, tmp_path / "cut.pt", seen)
    assert cut.steps == steps % STEPS
    assert len(seen) == steps // STEPS

    later = uninterrupted.fresh()
    result = train(later, replace(uninterrupted.work, suspended=tmp_path / "cut.pt"), seen=seen)

    assert differences(later.state(), uninterrupted.session.state()) == []
    assert measured(result) == measured(uninterrupted.result)
    assert (result.score, result.epochs) == (uninterrupted.result.score, uninterrupted.result.epochs)
    assert [epoch.number for epoch in seen] == [epoch.number for epoch in uninterrupted.seen]


def test_a_chunk_that_gets_one_step_a_job_is_the_uninterrupted_one(uninterrupted: Reference, tmp_path: Path) -> None:
    work, seen = uninterrupted.work, []
    for done in range(1, EPOCHS * STEPS):
        interrupt(uninterrupted.fresh(), work, 1, tmp_path / f"{done}.pt", seen)
        work = replace(work, suspended=tmp_path / f"{done}.pt")
    last = uninterrupted.fresh()
    result = train(last, work, seen=seen)

    assert differences(last.state(), uninterrupted.session.state()) == []
    assert measured(result) == measured(uninterrupted.result)
    assert [epoch.number for epoch in seen] == [epoch.number for epoch in uninterrupted.seen]


def test_stopping_is_asked_before_each_step(fresh: Fresh) -> None:
    asked = []
    train(fresh(), found(epochs=EPOCHS), stop=lambda: bool(asked.append(None)))
    assert len(asked) == EPOCHS * STEPS


def test_an_interrupted_epoch_takes_as_long_as_its_parts(tmp_path: Path) -> None:
    interrupt(digits_session(SlowDigits), found(), STEPS - 1, tmp_path / "cut.pt")
    result = train(digits_session(SlowDigits), replace(found(), suspended=tmp_path / "cut.pt"))
    assert result.train_seconds >= STEPS * SlowDigits.STEP_S


class SlowDigits(Digits):
    STEP_S = 0.02

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        time.sleep(self.STEP_S)
        return super().loss(outputs, targets)


# --- profiles


@pytest.mark.parametrize("profile", [FAST, PLAIN, FINE], ids=lambda profile: f"to {profile.name}")
def test_a_profile_brings_its_own_numbers_and_keeps_the_momentum(profile: Profile, tmp_path: Path) -> None:
    parent = save_trained(digits_session(), found(), tmp_path / "parent.pt")
    child = digits_session()
    interrupt(child, go_on(parent, profile), 0, tmp_path / "start.pt")
    start = read(tmp_path / "start.pt")

    assert differences(momentum(start), momentum(read(parent))) == []
    assert all(buffer.abs().sum() > 0 for buffer in momentum(start))
    groups = [(group["lr"], group["momentum"], group["weight_decay"]) for group in start["optimizer"]["param_groups"]]
    assert groups == [(profile.learning_rate, profile.momentum, profile.weight_decay)]


def test_the_kept_momentum_moves_the_weights(tmp_path: Path) -> None:
    """One step without any gradient: what moves the weights is the parent's momentum, by the new profile."""
    parent = save_trained(digits_session(), found(), tmp_path / "parent.pt")
    child = digits_session(FlatDigits)
    interrupt(child, go_on(parent, replace(FINE, weight_decay=0.0)), 1, tmp_path / "cut.pt")
    before, after_step = read(parent), read(tmp_path / "cut.pt")
    for name, buffer in zip(before["model"], momentum(before), strict=True):
        expected = before["model"][name] - FINE.learning_rate * FINE.momentum * buffer
        torch.testing.assert_close(after_step["model"][name], expected)


class FlatDigits(Digits):
    """Every gradient is zero."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return outputs.sum() * 0.0


def test_a_founder_trains_under_the_profile_that_it_starts_with(tmp_path: Path) -> None:
    session = digits_session()
    train(session, found(profile=FINE))
    (group,) = session.state()["optimizer"]["param_groups"]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.002, 0.5, 0.01)


# --- scores


def test_training_learns_and_the_score_is_the_metric_of_the_last_epoch() -> None:
    result = train(digits_session(), found(epochs=8))
    accuracies = [epoch.metrics["accuracy"] for epoch in result.results]
    assert result.score == accuracies[-1]
    assert accuracies[0] < 0.8 < accuracies[-1] <= 1
    assert result.results[-1].metrics["train_loss"] < result.results[0].metrics["train_loss"]


def test_metrics_are_means_over_examples_whatever_the_batches(tmp_path: Path) -> None:
    file = save_trained(digits_session(), found(), tmp_path / "one.pt")
    whole, small = (digits_session(max_batch_size=size).evaluate_file(file, "validation") for size in (10_000, 7))
    assert whole == pytest.approx(small)
    session = digits_session()
    session.evaluate_file(file, "test")
    assert whole != session.evaluate_file(file, "test")


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(replace(FAST, learning_rate=1e30), id="the weights explode"),
        pytest.param(replace(FAST, learning_rate=1e10), id="the loss is infinite or no number"),
    ],
)
def test_a_loss_that_is_no_number_ends_the_chunk_with_a_score_that_never_enters(profile: Profile) -> None:
    result = train(digits_session(), found(epochs=5, profile=profile))
    assert not math.isfinite(result.results[-1].metrics["train_loss"])
    assert math.isnan(result.score)
    assert [epoch.number for epoch in result.results] == [1]
    assert result.epochs == 1


@pytest.mark.parametrize("name", ["mean_iou", "Accuracy", "train_loss"])
def test_a_metric_that_the_job_lacks_is_an_error_that_names_those_there_are(name: str) -> None:
    session = digits_session(metric={"name": name})
    with pytest.raises(
        JobError, match=rf"^metric\.name: '{name}' is not among the metrics of the job: accuracy, loss$"
    ):
        train(session, found())


def test_a_metric_of_which_less_is_better_is_the_score_as_it_is() -> None:
    result = train(digits_session(metric={"name": "loss", "mode": "min"}), found())
    assert result.score == result.results[0].metrics["loss"] > 0


# --- the process


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_process_trains_with_the_cores_and_the_determinism_that_the_settings_ask_for(
    deterministic: bool,
) -> None:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)  # as it is in a process that begins
    session = open_session(digits_settings(deterministic=deterministic), cores=2)
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic
    assert session.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert train(session, found()).epochs == 1


# --- which examples


class ClosedTest(Digits):
    """Reading the test set is an accident."""

    def data(self, split: Split) -> TensorDataset:
        if split == "test":
            raise PermissionError("the test set is for the end")
        return super().data(split)


class OnlyTrainAndTest(Digits):
    def data(self, split: Split) -> TensorDataset:
        if split == "validation":
            raise PermissionError("nothing was kept for validation")
        return super().data(split)


def test_selection_on_validation_never_reads_the_test_set(tmp_path: Path) -> None:
    session = digits_session(ClosedTest)
    parent = save_trained(session, found(epochs=2), tmp_path / "parent.pt")
    train(session, go_on(parent))
    with pytest.raises(PermissionError):  # it would have said so
        session.evaluate_file(parent, "test")


def test_selection_on_validation_trains_on_the_rest_of_the_training_set() -> None:
    session = digits_session(validation_fraction=0.2)
    kept = {split: pixels_of(session, split) for split in ("train", "validation", "test")}
    assert {split: len(pixels) for split, pixels in kept.items()} == {"train": 1151, "validation": 287, "test": 359}
    assert sorted(kept["train"] + kept["validation"]) == sorted(pixels_in(Digits(session.job.context).data("train")))


def test_selection_on_the_test_set_trains_on_the_whole_training_set_and_scores_on_the_test_set(tmp_path: Path) -> None:
    session = digits_session(OnlyTrainAndTest, select_on="test")
    result = train(session, found())
    file = save(session, tmp_path / "one.pt")

    assert sorted(pixels_of(session, "train")) == sorted(pixels_in(session.job.data("train")))
    on_test = {name: value for name, value in result.results[0].metrics.items() if name != "train_loss"}
    assert on_test == digits_session().evaluate_file(file, "test")
    assert on_test != digits_session().evaluate_file(file, "validation")


def test_the_kept_examples_depend_on_the_seed_of_the_run_alone() -> None:
    one, again, other = (digits_session(seed=seed) for seed in (3, 3, 4))
    train(again, found(seed=8))
    assert pixels_of(one, "validation") == pixels_of(again, "validation")
    assert sorted(pixels_of(one, "validation")) != sorted(pixels_of(other, "validation"))


def pixels_of(session: Session, split: Split) -> list[list[float]]:
    return [image.flatten().tolist() for inputs, _ in session.feed(split).in_order() for image in inputs]


def pixels_in(source: Any) -> list[list[float]]:
    return [image.flatten().tolist() for image, _ in source]


# --- evaluation


@pytest.mark.parametrize("what", ["the model in training", "a file"])
def test_evaluation_draws_nothing_from_the_random_state(fresh: Fresh, what: str, tmp_path: Path) -> None:
    session = fresh()
    file = save_trained(session, found(), tmp_path / "one.pt")
    before = session.state()
    for split in ("validation", "test"):
        if what == "a file":
            session.evaluate_file(file, split)
        else:
            session.evaluate(split)
    assert differences(before["rng"], session.state()["rng"]) == []


def test_evaluation_gives_the_same_metrics_again_in_another_session(fresh: Fresh, tmp_path: Path) -> None:
    session = fresh()
    result = train(session, found())
    file = save(session, tmp_path / "one.pt")
    again = fresh().evaluate_file(file, "validation")
    assert again == {name: value for name, value in result.results[0].metrics.items() if name != "train_loss"}


# --- files


def test_an_export_is_the_weights_alone(fresh: Fresh, tmp_path: Path) -> None:
    session = fresh()
    file = save_trained(session, found(), tmp_path / "one.pt")
    with (tmp_path / "weights.pt").open("wb") as target:
        export(file, target)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    session.job.model().load_state_dict(weights)
    assert differences(weights, session.state()["model"]) == []


class RunsCode:
    """Unpickled in the ordinary way, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickle_alone(content: Any, target: IO[bytes]) -> None:
    pickle.dump(content, target, protocol=2)  # the one that torch.load goes into


@pytest.mark.parametrize("write", [torch.save, pickle_alone], ids=["as torch saves", "as pickle alone writes"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(write: Callable[..., None], tmp_path: Path) -> None:
    with (tmp_path / "bad.pt").open("wb") as target:
        write({"format": 2, "model": RunsCode(tmp_path / "it ran")}, target)
    with pytest.raises(JobError, match=r"bad\.pt: not a checkpoint of format 2: .*nothing of that is executed"):
        read(tmp_path / "bad.pt")
    assert not (tmp_path / "it ran").exists()
    if write is pickle_alone:
        pickle.loads((tmp_path / "bad.pt").read_bytes())
        assert (tmp_path / "it ran").exists()  # so it would have


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a pickle of another protocol than torch's
@hypothesis_settings(deadline=None)
@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda rest: b"\x80\x02" + rest))
def test_arbitrary_bytes_are_an_error_that_names_the_file(content: bytes, tmp_path_factory: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "noise.pt"
    file.write_bytes(content)
    with pytest.raises(JobError, match=r"noise\.pt: not a checkpoint of format 2: "):
        read(file)


def test_a_file_that_lacks_its_end_is_an_error_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = save_trained(digits_session(), found(), tmp_path / "whole.pt").read_bytes()
    for size in [0, 1, 4, 30, *range(100, len(whole), len(whole) // 50), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        with pytest.raises(JobError, match=r"cut\.pt: not a checkpoint of format 2: it is damaged"):
            read(tmp_path / "cut.pt")


def test_a_file_that_is_not_there_is_the_systems_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        read(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param({"model": {}}, "it names no format", id="no format"),
        pytest.param({"format": 3, "model": {}}, "it says 3", id="a later format"),
        pytest.param([1], "it names no format", id="no state"),
    ],
)
def test_a_file_of_another_format_is_an_error_that_names_it(content: Any, found: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(JobError, match=rf"other\.pt: not a checkpoint of format 2: {found}$"):
        read(tmp_path / "other.pt")


def test_tensors_are_read_to_the_cpu_and_each_goes_to_its_place_from_there(tmp_path: Path) -> None:
    """An optimizer's step count and the random states belong on the CPU whatever the model is trained on."""
    state = read(save_trained(digits_session(), found(), tmp_path / "one.pt"))
    tensors = [*state["model"].values(), *momentum(state), state["rng"]["torch"]]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


# --- jobs that lack something


class OnlyData(Job):
    def data(self, split: Split) -> Dataset[Any]:
        return TensorDataset(torch.zeros(20, 2), torch.arange(20) % 2)


class OnlyModel(Job):
    def model(self) -> nn.Module:
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        pytest.param(OnlyData, r"OnlyData has no model\(\); it must return a torch.nn.Module", id="no model"),
        pytest.param(OnlyModel, r"OnlyModel has no data\(split\); it must return a torch Dataset", id="no data"),
    ],
)
def test_a_job_that_lacks_a_method_is_told_which(job: type[Job], message: str) -> None:
    with pytest.raises(JobError, match=message):
        train(digits_session(job, job_params={}), found())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"job": "jobs.nowhere:Job"}, "No module named 'jobs.nowhere'", id="no such module"),
        pytest.param({"job": "jobs.digits:Digit"}, "jobs.digits has no class Digit", id="no such class"),
        pytest.param(
            {"job": "jobs.digits:TensorDataset"},
            "job jobs.digits:TensorDataset: .* derived from jobs.job.Job",
            id="not a job",
        ),
        pytest.param({"job_params": {"with": 4}}, "job_params: with: unknown key; did you mean 'width'", id="a typo"),
        pytest.param({"job_params": {"width": 0}}, "job_params: width: 0 is not allowed", id="a value out of bounds"),
    ],
)
def test_a_job_that_can_not_be_made_is_an_error_that_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_job(settings(**changes))
