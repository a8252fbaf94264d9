"""Folders of pictures: checks before a launch, the network's inputs, and training on photographs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.alexnet import AlexNet
from jobs.data import randomness
from jobs.data.augment import Normalize
from jobs.errors import JobError
from jobs.training.pretrained import IMAGENET
from jobs.training.session import Session
from orchestrator.records import Finished, Work
from orchestrator.settings.loading import OBSOLETE
from tests.support.command_line import orch_here
from tests.support.sketches import ALEX, CLASSES, ROOT, SEED, job_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Before a launch, pictures are verified in processes that are forked while torch has threads.
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]


# --- folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param("a class more to test", "test has classes that .* not have: extra. Rename", id="unknown class"),
        pytest.param("damaged", "2 of 96 pictures can't be read; .*\n.*class0/0.png .*\n.*class1/1.png", id="damaged"),
        pytest.param("an empty class", "train: .*[Ff]ound no valid file for the classes extra", id="an empty class"),
        pytest.param("no folder", "testing_source_dir: .* is not a folder", id="no folder"),
        pytest.param("not set", "testing_source_dir is not set; it must name a folder", id="not set"),
        pytest.param("too few", "one side would have none of the classes", id="too few to validate"),
    ],
)
def test_folders_that_do_not_fit_are_an_error(change: str, message: str, sketches: Path, tmp_path: Path) -> None:
    folder, changes = tmp_path / "sketches", {}
    shutil.copytree(sketches, folder)
    match change:
        case "a class more to test":
            shutil.copytree(folder / "test/class0", folder / "test/extra")
        case "damaged":
            (folder / "train/class0/0.png").write_bytes(b"")
            (folder / "test/class1/1.png").write_bytes(b"")
        case "an empty class":
            (folder / "train/extra").mkdir()
        case "no folder":
            shutil.rmtree(folder / "test")
        case "not set":
            changes["testing_source_dir"] = ""
        case "too few":
            for picture in sorted((folder / "train/class0").iterdir())[1:]:
                picture.unlink()
    with pytest.raises(JobError, match=message):
        job_of("part1", folder, **changes).prepare(download=False)


def test_test_pictures_keep_their_class_numbers_if_a_class_is_missing(sketches: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sketches"
    shutil.copytree(sketches, folder)
    shutil.rmtree(folder / "test/class3")
    for part in ("train", "test"):
        shutil.copytree(folder / part / "class0", folder / part / ".ipynb_checkpoints")
    job = job_of("part1", folder)
    lines = job.prepare(download=False)
    assert lines[0] == f"8 classes in {folder / 'train'}"
    assert "note: 1 class is missing from the test set: class3" in lines
    assert "training_source_dir, left out: 1 hidden or system entry, such as .ipynb_checkpoints" in lines
    assert job.data("test").targets == [label for label in range(8) if label != 3 for _ in range(2)]
    assert job.model().classifier[6].out_features == 8


def test_the_evaluation_refuses_a_test_class_that_training_does_not_have(sketches: Path, tmp_path: Path) -> None:
    shutil.copytree(sketches, tmp_path / "sketches")
    job = job_of("part1", tmp_path / "sketches")
    (tmp_path / "sketches/test/class0").rename(tmp_path / "sketches/test/other")
    with pytest.raises(JobError, match="test has classes that the training set does not have: other"):
        job.data("test")


def test_pictures_too_small_for_the_convolutions_are_refused(sketches: Path) -> None:
    with pytest.raises(JobError, match=r"job_params: image_size: 62 is not allowed; .*63"):
        job_of("part1", sketches, job_params={"image_size": 62})


# --- the network's inputs


def test_training_pictures_are_augmented_and_the_others_are_not(sketches: Path) -> None:
    job = job_of("part1", sketches)
    randomness.seed_all(SEED)
    for split, varies in (("train", True), ("validation", False), ("test", False)):
        source = job.data(split)
        shown = [source[0][0] for _ in range(6)]
        assert all(picture.shape == (3, 63, 63) for picture in shown)
        assert any(not torch.equal(shown[0], picture) for picture in shown) is varies


@pytest.mark.parametrize("augment", ["none", "random"])
def test_training_pictures_are_augmented_only_if_the_settings_say_so(augment: str, sketches: Path) -> None:
    job = job_of("part1", sketches, job_params={"image_size": 63, "augment": augment})
    randomness.seed_all(SEED)
    source = job.data("train")
    shown = [source[0][0] for _ in range(6)]
    assert any(not torch.equal(shown[0], picture) for picture in shown) is (augment == "random")


@pytest.mark.parametrize(("part", "own"), [("part1", True), ("part2", False)])
def test_pictures_are_normalised_for_the_weights_or_by_the_training_sets_statistics(
    part: str, own: bool, sketches: Path, weights: Path
) -> None:
    """Normalised with its own statistics, the training set has mean 0 and variance 1. The test set has no influence."""
    job = job_of(part, sketches, pretrained_weights=str(weights))
    pictures = torch.stack([job.data("validation")[index][0] for index in range(80)])
    mean, std = pictures.mean(dim=(0, 2, 3)), pictures.std(dim=(0, 2, 3))
    assert (bool((mean.abs() < 0.02).all()), bool(((std - 1).abs() < 0.05).all())) == (own, own)
    steps = [step for split in ("train", "validation", "test") for step in job.data(split).steps]
    constants = {(step.mean, step.std) for step in steps if isinstance(step, Normalize)}
    assert len(constants) == 1
    assert (constants == {IMAGENET}) is not own


# --- the report's own settings file


def test_a_settings_file_of_the_reports_system_works_unchanged(sketches: Path, tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text("#!/bin/bash\n#SBATCH --gres=gpu:1\n")
    (tmp_path / "old part.json").write_text(json.dumps(report_settings(sketches)))
    try:
        lifetimes = ["--set", "total_lifetime=200", "--set", "eon_lifetime=100", "--set", "stop_after_epochs=1"]
        done = orch_here(tmp_path, "launch", "old part.json", "--executor", "inline", "--json", *lifetimes)
        assert done.returncode == 0, done.stderr
        lines = done.stderr.splitlines()
        assert [line for line in lines if "no longer needed" in line] == [
            f"old part.json: {key} is no longer needed and ignored" for key in OBSOLETE
        ]
        result = json.loads(done.stdout)
        assert (result["run"], result["state"], result["epochs"]) == ("old-part", "finished", 1)
        assert result["chunks"]["promoted"] == 1
        (entry,) = result["board"]["entries"]
        assert (entry["rank"], entry["epochs"], entry["profile"], entry["parent"]) == (1, 1, "alex", None)
        assert (tmp_path / "runs/old-part/checkpoints" / entry["file"]).stat().st_size > 10**8
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"train.sh", "old part.json", "runs"}, "neither a lock, a state nor a log file"
    finally:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # it takes half a gigabyte


def report_settings(sketches: Path) -> dict[str, Any]:
    """Settings without a name and a job, but with names of files that orch does not need."""
    return {
        "num_models": 5,
        "pretrained_features": [False] * 13,
        "pretrained_classifier": [False] * 7,
        "trainable_features": [True] * 13,
        "trainable_classifier": [True] * 7,
        "max_batch_size": 100,
        "total_lifetime": 259200,
        "eon_lifetime": 2400,
        "lock_file": "leaderboard.lock",
        "lock_timeout": 600,
        "state_file": "leaderboard.json",
        "log_file": "training.log",
        "model_name_format": "model_{}.pth",
        "slurm_file": "train.sh",
        "training_source_dir": str(sketches / "train"),
        "testing_source_dir": str(sketches / "test"),
        "training_profiles": [
            {"name": "alex", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0005},
            {"name": "alexa", "learning_rate": 0.01, "momentum": 0.5, "weight_decay": 0.0005},
            {"name": "alex", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 0.0005},
        ],
    }


# --- photographs


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """80 photographs of eight breeds of pets: the original JPEG files, of many sizes and shapes."""
    source = ROOT.parent / "shared" / "data" / "pets" / "oxford-iiit-pet" / "images"
    if not source.is_dir():
        pytest.skip("the pictures of pets are not beside this repository, in ../shared/data/pets")
    breeds: dict[str, list[Path]] = {}
    for path in sorted(source.glob("*.jpg")):
        breeds.setdefault(path.stem.rpartition("_")[0], []).append(path)
    for breed in sorted(breeds)[:CLASSES]:
        for number, path in enumerate(breeds[breed]):
            folder = tmp_path / "pets" / ("train" if number < 7 else "test") / breed
            folder.mkdir(parents=True, exist_ok=True)
            (folder / path.name).symlink_to(path)
    return tmp_path / "pets"


def test_a_model_can_be_trained_on_photographs(photographs: Path, weights: Path) -> None:
    job = job_of("part3", photographs, pretrained_weights=str(weights))
    assert isinstance(job, AlexNet)
    assert job.prepare(download=False)[0] == f"8 classes in {photographs / 'train'}"
    session = Session(job)
    result = session.train(Work(ALEX, 1, SEED, 0, None, None), lambda: False, lambda epoch: None)
    assert isinstance(result, Finished)
    assert session.feed("train").count == 40
    assert session.evaluate("test").keys() == {"accuracy", "loss"}
