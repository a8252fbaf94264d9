"""The report's three parts: which layers start pretrained and which are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision import models

from jobs.alexnet import LAYERS
from jobs.data import randomness
from jobs.errors import JobError
from jobs.job import Job
from jobs.training.session import Session
from orchestrator.records import Finished, Work
from tests.support.sketches import ALEX, CLASSES, SEED, job_of

pytestmark = pytest.mark.usefixtures("one_thread")


def layers(state: dict[str, Tensor]) -> dict[tuple[str, int], list[Tensor]]:
    """Return the tensors of each layer that has any."""
    by_layer: dict[tuple[str, int], list[Tensor]] = {}
    for name, value in state.items():
        part, index, _ = name.split(".")
        by_layer.setdefault((part, int(index)), []).append(value)
    return by_layer


def founder(job: Job) -> dict[str, Tensor]:
    """Return the weights that a founder's training starts from."""
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
def test_each_part_starts_from_and_trains_the_layers_in_its_settings(
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
    """Whether weights and biases are the same, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def any_same(left: list[Tensor], right: list[Tensor]) -> bool:
    return any(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("part", ["part2", "part3"])
def test_the_optimizer_has_only_trained_parameters(part: str, sketches: Path, weights: Path) -> None:
    job = job_of(part, sketches, pretrained_weights=str(weights))
    model = job.model()
    (group,) = job.optimizer(model, ALEX).param_groups
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in trained]
    assert len(trained) == {"part2": 6, "part3": 14}[part]


@pytest.mark.parametrize(("flag", "expected"), [(True, WITH_WEIGHTS), (False, {LAST})], ids=["true", "false"])
def test_one_flag_applies_to_every_layer(flag: bool, expected: set[tuple[str, int]], sketches: Path) -> None:
    last = [False] * 6 + [True]
    job = job_of("part1", sketches, trainable_features=flag, trainable_classifier=flag or last)
    trained = {tuple(name.split(".")[:2]) for name, value in job.model().named_parameters() if value.requires_grad}
    assert {(part, int(index)) for part, index in trained} == expected


# --- mistakes in the flags


@pytest.mark.parametrize("count", [0, 1, 6, 8])
@pytest.mark.parametrize("kind", ["pretrained", "trainable"])
@pytest.mark.parametrize("part", ["features", "classifier"])
def test_a_wrong_number_of_flags_is_an_error_that_names_the_right_one(
    kind: str, part: str, count: int, sketches: Path
) -> None:
    message = f"^{kind}_{part}: {count} flags; AlexNet's {part} part needs {LAYERS[part]}, one per layer$"
    with pytest.raises(JobError, match=message):
        job_of("part1", sketches, **{f"{kind}_{part}": [True] * count})


def test_a_model_without_trained_layers_is_an_error(sketches: Path) -> None:
    with pytest.raises(JobError, match="trainable_features and trainable_classifier: nothing is trainable"):
        job_of("part1", sketches, trainable_features=False, trainable_classifier=False)


def test_the_last_layer_can_not_be_pretrained_for_other_classes(sketches: Path, weights: Path) -> None:
    job = job_of("part3", sketches, pretrained_classifier=True, pretrained_weights=str(weights))
    shapes = r"classifier.6.weight has shape \(1000, 4096\) in the weights file, \(8, 4096\) here"
    with pytest.raises(JobError, match=rf"pretrained_classifier\[6\]: {shapes}"):
        job.model()


def test_the_last_layer_can_be_pretrained_for_the_same_number_of_classes(sketches: Path, tmp_path: Path) -> None:
    own = models.alexnet(num_classes=CLASSES).state_dict()
    torch.save(own, tmp_path / "own.pth")
    job = job_of("part3", sketches, pretrained_classifier=True, pretrained_weights=str(tmp_path / "own.pth"))
    assert all(torch.equal(value, own[name]) for name, value in job.model().state_dict().items())
    (tmp_path / "own.pth").unlink()


# --- frozen features


@pytest.mark.parametrize("augment", ["none", "random"])
def test_frozen_features_are_computed_once_if_pictures_are_not_augmented(
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
