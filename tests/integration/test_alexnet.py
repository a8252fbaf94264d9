"""The report's three parts: which layers start pretrained, which are trained, and what is checked first."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import models

from jobs.alexnet import LAYERS, AlexNet
from jobs.data import randomness
from jobs.data.augment import Normalize
from jobs.errors import JobError
from jobs.job import Job
from jobs.training.opening import load_job
from jobs.training.pretrained import IMAGENET
from jobs.training.session import Session
from orchestrator.records import Finished, Profile, Work
from orchestrator.settings.loading import OBSOLETE, load

ROOT = Path(__file__).parents[2]
ORCH = Path(sys.executable).with_name("orch")
CLASSES = 8
SEED = 5  # of the founder in these tests
ALEX = Profile("alex", learning_rate=0.01, momentum=0.9, weight_decay=0.0005)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def _node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A disk of its own for decoded pictures."""
    with pytest.MonkeyPatch.context() as there:
        there.setenv("SLURM_TMPDIR", str(tmp_path_factory.mktemp("node")))
        yield


@pytest.fixture(scope="module")
def sketches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes of PNG files in train and test: each class has a colour, each picture its own noise."""
    folder = tmp_path_factory.mktemp("sketches")
    draw(folder / "train", each=10, seed=0)
    draw(folder / "test", each=2, seed=1)
    return folder


def draw(folder: Path, each: int, seed: int, classes: int = CLASSES) -> None:
    pixels = np.random.default_rng(seed)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        colour = [80 + 120 * (label >> bit & 1) for bit in range(3)]
        for number in range(each):
            picture = (np.array(colour) + pixels.integers(-50, 50, (90, 100, 3))).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"class{label}" / f"{number}.png")


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
    """A machine to which nothing was ever downloaded."""
    home = tmp_path / "torch"
    monkeypatch.setenv("TORCH_HOME", str(home))
    return home


def settings_of(part: str, sketches: Path, **changes: Any) -> dict[str, Any]:
    """The shipped settings file, with small pictures in small batches and these folders."""
    small = {
        "training_source_dir": str(sketches / "train"),
        "testing_source_dir": str(sketches / "test"),
        "job_params": {"image_size": 63},
        "max_batch_size": 12,
        "validation_fraction": 0.25,
    }
    settings, _ = load(ROOT / "settings" / f"{part}.json", **(small | changes))
    return settings.model_dump(mode="json")


def job_of(part: str, sketches: Path, **changes: Any) -> Job:
    return load_job(settings_of(part, sketches, **changes))


def layers(state: dict[str, Tensor]) -> dict[tuple[str, int], list[Tensor]]:
    """The tensors of each layer that has any."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    for name, value in state.items():
        part, index, _ = name.split(".")
        found.setdefault((part, int(index)), []).append(value)
    return found


def founder(job: Job) -> dict[str, Tensor]:
    """The weights that training starts from."""
    randomness.seed_all(SEED)
    return {name: value.clone() for name, value in job.model().state_dict().items()}


# --- the three parts

WITH_WEIGHTS = {("features", i) for i in (0, 3, 6, 8, 10)} | {("classifier", i) for i in (1, 4, 6)}
LAST = ("classifier", 6)
FEATURES = {layer for layer in WITH_WEIGHTS if layer[0] == "features"}
PARTS = [
    pytest.param("part1", set(), set(), id="part 1: everything from scratch"),
    pytest.param("part2", FEATURES, FEATURES, id="part 2: frozen pretrained features"),
    pytest.param("part3", WITH_WEIGHTS - {LAST}, {("features", 0)}, id="part 3: all but the first convolution tuned"),
]


@pytest.mark.parametrize(("part", "pretrained", "frozen"), PARTS)
def test_a_part_starts_from_and_trains_what_its_settings_say(
    part: str, pretrained: set[tuple[str, int]], frozen: set[tuple[str, int]], sketches: Path, weights: Path
) -> None:
    job = job_of(part, sketches, pretrained_weights=str(weights))
    start = layers(founder(job))
    file = layers(torch.load(weights, weights_only=True))
    assert set(start) == WITH_WEIGHTS
    assert {layer for layer in start if same(start[layer], file[layer])} == pretrained
    assert {layer for layer in start if any_same(start[layer], file[layer])} == pretrained
    assert [len(tensor) for tensor in start[LAST]] == [CLASSES, CLASSES]

    session = Session(job)
    result = session.train(Work(ALEX, 1, SEED, 0, None, None), lambda: False, lambda epoch: None)
    assert isinstance(result, Finished)
    end = layers(session.state()["model"])
    assert {layer for layer in end if same(start[layer], end[layer])} == frozen
    assert {layer for layer in end if any_same(start[layer], end[layer])} == frozen
    assert 0 <= result.score <= 1
    assert np.isfinite(result.results[0].metrics["train_loss"])


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Weight and bias, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def any_same(left: list[Tensor], right: list[Tensor]) -> bool:
    return any(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("part", ["part2", "part3"])
def test_only_what_is_trained_has_an_optimizer_state(part: str, sketches: Path, weights: Path) -> None:
    job = job_of(part, sketches, pretrained_weights=str(weights))
    model = job.model()
    (group,) = job.optimizer(model, ALEX).param_groups
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in trained]
    assert len(trained) == {"part2": 6, "part3": 14}[part]


@pytest.mark.parametrize(("flag", "expected"), [(True, WITH_WEIGHTS), (False, {LAST})], ids=["true", "false"])
def test_one_flag_stands_for_every_layer(flag: bool, expected: set[tuple[str, int]], sketches: Path) -> None:
    last = [False] * 6 + [True]
    job = job_of("part1", sketches, trainable_features=flag, trainable_classifier=flag or last)
    trained = {tuple(name.split(".")[:2]) for name, value in job.model().named_parameters() if value.requires_grad}
    assert {(part, int(index)) for part, index in trained} == expected


# --- mistakes in the flags


@pytest.mark.parametrize("count", [0, 1, 6, 8])
@pytest.mark.parametrize("kind", ["pretrained", "trainable"])
@pytest.mark.parametrize("part", ["features", "classifier"])
def test_a_flag_too_many_or_too_few_is_an_error_that_says_how_many(
    kind: str, part: str, count: int, sketches: Path
) -> None:
    message = f"^{kind}_{part}: {count} flags; AlexNet's {part} have {LAYERS[part]} layers, a flag each$"
    with pytest.raises(JobError, match=message):
        job_of("part1", sketches, **{f"{kind}_{part}": [True] * count})


def test_a_model_of_which_nothing_is_trained_is_an_error(sketches: Path) -> None:
    with pytest.raises(JobError, match="trainable_features and trainable_classifier: nothing is trainable"):
        job_of("part1", sketches, trainable_features=False, trainable_classifier=False)


def test_the_last_layer_can_not_be_pretrained_for_other_classes(sketches: Path, weights: Path) -> None:
    job = job_of("part3", sketches, pretrained_classifier=True, pretrained_weights=str(weights))
    shapes = r"classifier.6.weight has shape \(1000, 4096\), this model's \(8, 4096\)"
    with pytest.raises(JobError, match=rf"pretrained_classifier\[6\]: the weights' {shapes}"):
        job.model()


def test_the_last_layer_is_pretrained_for_as_many_classes(sketches: Path, tmp_path: Path) -> None:
    own = models.alexnet(num_classes=CLASSES).state_dict()
    torch.save(own, tmp_path / "own.pth")
    job = job_of("part3", sketches, pretrained_classifier=True, pretrained_weights=str(tmp_path / "own.pth"))
    assert all(torch.equal(value, own[name]) for name, value in job.model().state_dict().items())
    (tmp_path / "own.pth").unlink()


# --- weights that are not there


@pytest.mark.usefixtures("torch_home")
@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
def test_weights_that_were_not_fetched_are_never_replaced_by_untrained_ones(name: str, sketches: Path) -> None:
    job = job_of("part2", sketches, pretrained_weights=name)
    message = (
        f"pretrained_weights: {name} is not on this machine .* Run `orch prepare SETTINGS` where there is internet"
    )
    for build in (job.model, lambda: job.prepare(download=False)):
        with pytest.raises(JobError, match=message):
            build()


@pytest.mark.usefixtures("torch_home")
def test_a_part_without_pretrained_layers_needs_no_weights(sketches: Path) -> None:
    job = job_of("part1", sketches)
    assert job.prepare(download=False) == [f"{CLASSES} classes in {sketches / 'train'}"]


def test_what_is_ready_is_told(sketches: Path, weights: Path) -> None:
    job = job_of("part3", sketches, pretrained_weights=str(weights))
    assert job.prepare(False) == [f"8 classes in {sketches / 'train'}", f"pretrained weights: {weights}"]


def test_weights_that_were_fetched_before_are_found(sketches: Path, weights: Path, torch_home: Path) -> None:
    fetched = torch_home / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    fetched.parent.mkdir(parents=True)
    fetched.symlink_to(weights)
    model = job_of("part2", sketches, pretrained_weights="IMAGENET1K_V1").model()
    assert torch.equal(model.features[0].weight, torch.load(weights, weights_only=True)["features.0.weight"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "is neither a file nor one of torchvision's: IMAGENET1K_V1", id="no such file"),
        pytest.param(b"", "weights.pth", id="an empty file"),
        pytest.param(b"<!DOCTYPE html><title>Please log in</title>", "weights.pth", id="a page instead of the file"),
        pytest.param([1, 2], "weights.pth holds no weights", id="a file of something else"),
        pytest.param({"fc.bias": torch.ones(1)}, r"features.0.weight has shape none", id="weights of another model"),
    ],
)
def test_weights_that_can_not_be_used_are_an_error_that_names_the_file(
    content: Any, message: str, sketches: Path, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    job = job_of("part2", sketches, pretrained_weights=str(path))
    with pytest.raises(JobError, match=rf"^pretrained.*{message}"):
        job.prepare(download=False)


def test_weights_that_came_only_in_part_are_an_error_that_names_the_file(
    sketches: Path, weights: Path, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    with weights.open("rb") as source:
        path.write_bytes(source.read(1_000_000))
    with pytest.raises(JobError, match=r"^pretrained_weights: .*weights\.pth"):
        job_of("part2", sketches, pretrained_weights=str(path)).prepare(download=False)


# --- folders


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param("a class more to train", "have different classes: extra$", id="a class more to train"),
        pytest.param("a class less to test", "have different classes: class3$", id="a class less to test"),
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
        case "a class more to train":
            shutil.copytree(folder / "train/class0", folder / "train/extra")
        case "a class less to test":
            shutil.rmtree(folder / "test/class3")
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


def test_pictures_too_small_for_the_convolutions_are_refused(sketches: Path) -> None:
    with pytest.raises(JobError, match=r"job_params: image_size: 62 is not allowed; .*63"):
        job_of("part1", sketches, job_params={"image_size": 62})


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
def test_pictures_are_normalised_as_the_weights_expect_or_by_the_training_sets_statistics(
    part: str, own: bool, sketches: Path, weights: Path
) -> None:
    """With statistics of its own the training set has mean 0 and variance 1, and the test set is not asked."""
    job = job_of(part, sketches, pretrained_weights=str(weights))
    pictures = torch.stack([job.data("validation")[index][0] for index in range(80)])
    mean, std = pictures.mean(dim=(0, 2, 3)), pictures.std(dim=(0, 2, 3))
    assert (bool((mean.abs() < 0.02).all()), bool(((std - 1).abs() < 0.05).all())) == (own, own)
    steps = [step for split in ("train", "validation", "test") for step in job.data(split).steps]
    constants = {(step.mean, step.std) for step in steps if isinstance(step, Normalize)}
    assert len(constants) == 1
    assert (constants == {IMAGENET}) is not own


@pytest.mark.parametrize("augment", ["none", "random"])
def test_frozen_features_are_computed_once_where_no_picture_changes(
    augment: str, sketches: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"image_size": 63, "augment": augment}
    changes = {"pretrained_weights": str(weights), "job_params": params, "precision": "fp32"}
    seen: list[int] = []

    def watch(session: Session) -> Any:
        made = session.job.model

        def model() -> Any:
            net = made()
            net.features[0].register_forward_hook(lambda layer, given, outputs: seen.append(given[0].shape[1]))
            return net

        monkeypatch.setattr(session.job, "model", model)
        result = session.train(Work(ALEX, 2, SEED, 0, None, None), lambda: False, lambda epoch: None)
        assert isinstance(result, Finished)
        return [epoch.metrics for epoch in result.results], seen.count(3)

    session = Session(job_of("part2", sketches, **changes))
    kept, passes = watch(session)
    seen.clear()
    plain = Session(job_of("part2", sketches, **changes))
    monkeypatch.setattr(plain.job, "frozen_part", lambda model: None)
    expected, all_passes = watch(plain)
    assert kept == expected
    if augment == "none":
        assert passes < all_passes
    else:
        assert passes == all_passes


# --- the command line


def orch(cwd: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("ORCH_RUNS_DIR", "TORCH_HOME")}
    command = [str(ORCH), *arguments]
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=240)


def test_a_launch_without_the_weights_says_what_to_do_and_makes_nothing(sketches: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(settings_of("part3", sketches) | {"name": "mine", "executor": "inline"}))
    done = orch(tmp_path, "launch", str(file), TORCH_HOME=str(tmp_path / "torch"))
    assert done.returncode == 2
    assert done.stderr.startswith("orch: pretrained_weights: IMAGENET1K_V1 is not on this machine")
    assert "Run `orch prepare SETTINGS` where there is internet" in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """torchvision's weights are where nobody listens: a port of this machine that stays closed."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/alexnet-owt-7be5be79.pth"
        monkeypatch.setattr(models.AlexNet_Weights.IMAGENET1K_V1.value, "url", url)
        yield url


@pytest.mark.usefixtures("unreachable")
def test_preparing_without_internet_says_what_to_do(
    sketches: Path,
    torch_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from orchestrator.cli.main import main

    file = tmp_path / "mine.json"
    file.write_text(json.dumps(settings_of("part3", sketches)))
    monkeypatch.setattr(sys, "argv", ["orch", "prepare", str(file)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    with pytest.raises(SystemExit) as left:
        main()

    message = capsys.readouterr().err
    fetched = torch_home / "hub" / "checkpoints"
    assert left.value.code == 2
    assert "orch: pretrained_weights: IMAGENET1K_V1 can't be downloaded: <urlopen error" in message
    assert "On a machine with internet, run `orch prepare`" in message
    assert f"copy alexnet-owt-7be5be79.pth to {fetched}, or name a file in pretrained_weights" in message
    assert not fetched.exists() or list(fetched.iterdir()) == []


def test_a_settings_file_of_the_reports_own_system_trains_as_it_is(sketches: Path, tmp_path: Path) -> None:
    (tmp_path / "train.sh").write_text("#!/bin/bash\n#SBATCH --gres=gpu:1\n")
    (tmp_path / "old part.json").write_text(json.dumps(report_settings(sketches)))
    try:
        lifetimes = ["--set", "total_lifetime=200", "--set", "eon_lifetime=100", "--set", "stop_after_epochs=1"]
        done = orch(tmp_path, "launch", "old part.json", "--executor", "inline", "--json", *lifetimes)
        assert done.returncode == 0, done.stderr
        told = done.stderr.splitlines()
        assert [line for line in told if "no longer needed" in line] == [
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
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # half a gigabyte


def report_settings(sketches: Path) -> dict[str, Any]:
    """Neither a name nor a job; files for what the database and the run's folder do now."""
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


def test_weights_that_are_named_from_the_launching_folder_are_found_from_every_other(
    sketches: Path, weights: Path, tmp_path: Path
) -> None:
    """As training_source_dir and slurm_file are: a job, or `orch evaluate`, may run elsewhere."""
    (tmp_path / "alexnet.pth").symlink_to(weights)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(settings_of("part3", sketches, pretrained_weights="alexnet.pth")))
    with pytest.MonkeyPatch.context() as there:
        there.chdir(tmp_path)
        settings, _ = load(file)
    model = load_job(settings.model_dump(mode="json")).model()
    assert torch.equal(model.features[0].weight, torch.load(weights, weights_only=True)["features.0.weight"])


# --- photographs


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """80 photographs of eight breeds of pets, as they came: JPEG, of many sizes and shapes."""
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


def test_photographs_are_learned(photographs: Path, weights: Path) -> None:
    job = job_of("part3", photographs, pretrained_weights=str(weights))
    assert isinstance(job, AlexNet)
    assert job.prepare(download=False)[0] == f"8 classes in {photographs / 'train'}"
    session = Session(job)
    result = session.train(Work(ALEX, 1, SEED, 0, None, None), lambda: False, lambda epoch: None)
    assert isinstance(result, Finished)
    assert session.feed("train").count == 40
    assert session.evaluate("test").keys() == {"accuracy", "loss"}
