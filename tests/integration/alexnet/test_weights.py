"""Pretrained weights that are missing, damaged or in another folder."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import models

from jobs.errors import JobError
from jobs.training.opening import load_job
from orchestrator.settings.loading import load
from tests.support.command_line import orch_here
from tests.support.sketches import CLASSES, job_of, settings_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.usefixtures("torch_home")
@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "DEFAULT"])
def test_missing_weights_are_never_replaced_by_untrained_ones(name: str, sketches: Path) -> None:
    job = job_of("part2", sketches, pretrained_weights=name)
    message = (
        f"pretrained_weights: {name} is not on this machine .* Run `orch prepare .*part2.json` where there is internet"
    )
    for build in (job.model, lambda: job.prepare(download=False)):
        with pytest.raises(JobError, match=message):
            build()


@pytest.mark.usefixtures("torch_home")
def test_a_part_without_pretrained_layers_needs_no_weights(sketches: Path) -> None:
    job = job_of("part1", sketches)
    lines = job.prepare(download=False)
    assert lines[0] == f"{CLASSES} classes in {sketches / 'train'}"
    assert not [line for line in lines if "weights" in line]


def test_prepare_reports_what_is_ready(sketches: Path, weights: Path) -> None:
    job = job_of("part3", sketches, pretrained_weights=str(weights))
    assert {f"8 classes in {sketches / 'train'}", f"pretrained weights: {weights}"} <= set(job.prepare(False))


def test_weights_that_were_downloaded_before_are_found(sketches: Path, weights: Path, torch_home: Path) -> None:
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
def test_unusable_weights_are_an_error_that_names_the_file(
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


def test_incomplete_weights_are_an_error_that_names_the_file(sketches: Path, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with weights.open("rb") as source:
        path.write_bytes(source.read(1_000_000))
    with pytest.raises(JobError, match=r"^pretrained_weights: .*weights\.pth"):
        job_of("part2", sketches, pretrained_weights=str(path)).prepare(download=False)


# --- the command line


def test_a_launch_without_the_weights_says_what_to_do_and_creates_nothing(
    sketches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    file = tmp_path / "mine.json"
    file.write_text(settings_of("part3", sketches, name="mine", executor="inline").model_dump_json())
    done = orch_here(tmp_path, "launch", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith("orch: pretrained_weights: IMAGENET1K_V1 is not on this machine")
    assert f"Run `orch prepare {file}` where there is internet, or carry alexnet-owt-7be5be79.pth here" in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Change the URL of torchvision's weights to a closed port of this machine."""
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
    file.write_text(settings_of("part3", sketches).model_dump_json())
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
    assert "orch: these files are missing and can't be downloaded here:" in message
    assert "alexnet-owt-7be5be79.pth (about 244 MB): http://127.0.0.1" in message
    assert f"orch prepare {file} --from alexnet-owt-7be5be79.pth" in message
    assert f"or put alexnet-owt-7be5be79.pth into {fetched}, and run" in message
    assert not fetched.exists() or list(fetched.iterdir()) == []


def test_weights_named_relative_to_the_launch_folder_are_found_from_other_folders(
    sketches: Path, weights: Path, tmp_path: Path
) -> None:
    """A job or `orch evaluate` may run in another folder. (training_source_dir and slurm_file work like this, too.)"""
    (tmp_path / "alexnet.pth").symlink_to(weights)
    file = tmp_path / "mine.json"
    file.write_text(settings_of("part3", sketches, pretrained_weights="alexnet.pth").model_dump_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        settings, _ = load(file)
    model = load_job(settings).model()
    assert torch.equal(model.features[0].weight, torch.load(weights, weights_only=True)["features.0.weight"])
