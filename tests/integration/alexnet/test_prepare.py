"""orch prepare and the report's settings files, from an empty folder to a board."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torchvision import models

from jobs.alexnet import AlexNet
from jobs.data import download as downloads
from jobs.job import JobContext
from orchestrator.cli.main import main
from orchestrator.run.run import Run
from orchestrator.settings.loading import load
from tests.support.command_line import orch_here
from tests.support.file_server import FileServer, serving
from tests.support.sketches import ROOT, sketch_archive

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Before a launch, pictures are verified in processes that are forked while torch has threads.
    pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning"),
]

SMALL = ("--set", "job_params.image_size=63", "--set", "job_params.hidden_units=8")
WRONG = "0" * 64
CLASSES = {"airplane": range(1, 81), "ant": range(81, 161)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a fresh clone, on a machine where nothing was downloaded yet."""
    shutil.copytree(ROOT / "settings", tmp_path / "clone/settings")
    shutil.copytree(ROOT / "slurm", tmp_path / "clone/slurm")
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(downloads, "PAUSE_S", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path / "clone"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serves a small archive of sketches, and weights whose name contains their checksum as torchvision's do."""
    archive = sketch_archive(tmp_path / "archive.zip", CLASSES)
    content = io.BytesIO()
    (tmp_path / "classes/any").mkdir(parents=True)
    changes = {"training_source_dir": str(tmp_path / "classes"), "job_params": {"hidden_units": 8}}
    job = AlexNet(JobContext(load(ROOT / "settings/part1.json", **changes)[0]))
    torch.save(job.model().state_dict(), content)
    name = f"alexnet-{hashlib.sha256(content.getvalue()).hexdigest()[:8]}.pth"
    with serving(**{"sketches_png.zip": archive.read_bytes(), name: content.getvalue()}) as running:
        monkeypatch.setattr(models.AlexNet_Weights.IMAGENET1K_V1.value, "url", f"{running.url}/{name}")
        yield running


Prepare = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prepare(server: FileServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """Runs `orch prepare settings/part3.json` in this process. Returns its exit status and what it printed."""

    def run(*words: str, part: str = "part3") -> tuple[int, str, str]:
        mirror = ("--set", f"job_params.dataset_url={server.url}/sketches_png.zip")
        monkeypatch.setattr(sys, "argv", ["orch", "prepare", f"settings/{part}.json", *SMALL, *mirror, *words])
        monkeypatch.setattr(sys, "path", [*sys.path])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def weights_of(place: Path) -> list[Path]:
    return sorted((place.parent / "torch/hub/checkpoints").glob("*"))


def test_data_and_weights_are_fetched_split_and_recorded(place: Path, prepare: Prepare, server: FileServer) -> None:
    status, out, err = prepare()
    assert status == 0, err
    source = json.loads((place / "data/sketches/SOURCE.json").read_text())
    sha256 = hashlib.sha256(server.files["sketches_png.zip"]).hexdigest()
    assert (source["sha256"], source["url"]) == (sha256, f"{server.url}/sketches_png.zip")
    assert (source["classes"], source["train_images"], source["test_images"]) == (2, 120, 40)
    assert f"sketches_png.zip: SHA-256 {sha256}" in err
    assert "data: TU Berlin sketches: 2 classes, 120 training and 40 test images" in out
    assert [path.name for path in (place / "data").iterdir()] == ["sketches"]  # the archive is deleted
    (weights,) = weights_of(place)
    assert weights.read_bytes() == server.files[weights.name]


def test_interrupted_twice_and_resumed_it_gives_the_same_files(
    place: Path, prepare: Prepare, server: FileServer
) -> None:
    size = len(server.files["sketches_png.zip"])
    for cuts in ([size // 4] + [0] * 20, [size // 4] + [0] * 20):
        server.cuts = cuts
        status, _, err = prepare()
        assert (status, err.count("these files are missing")) == (2, 1)
    server.cuts = []
    assert prepare()[0] == 0
    started = [wanted for path, wanted in server.requests if path == "/sketches_png.zip"]
    assert started[-1] == f"bytes={2 * (size // 4)}-"
    source = json.loads((place / "data/sketches/SOURCE.json").read_text())
    assert source["sha256"] == hashlib.sha256(server.files["sketches_png.zip"]).hexdigest()
    assert len([*(place / "data/sketches").rglob("*.png")]) == 160


def test_a_second_prepare_fetches_nothing(place: Path, prepare: Prepare, server: FileServer) -> None:
    prepare()
    server.requests.clear()
    assert prepare()[0] == 0
    assert server.requests == []


def test_a_checksum_is_compared_with_data_that_are_there(place: Path, prepare: Prepare, server: FileServer) -> None:
    sha256 = hashlib.sha256(server.files["sketches_png.zip"]).hexdigest()
    assert prepare("--sha256", sha256[:16])[0] == 0
    assert prepare("--sha256", sha256)[0] == 0
    status, _, err = prepare("--sha256", WRONG)
    assert (status, f"was made from an archive with the SHA-256 {sha256}, not {WRONG}" in err) == (2, True)


def test_an_archive_that_is_unpacked_already_may_be_named_again(
    place: Path, prepare: Prepare, server: FileServer
) -> None:
    (place / "again.zip").write_bytes(server.files["sketches_png.zip"])
    assert prepare("--from", "again.zip")[0] == 0
    status, _, err = prepare("--from", "again.zip")
    assert (status, "data/sketches was made from this archive already" in err) == (0, True)


def test_an_archive_that_the_user_put_there_is_kept(place: Path, prepare: Prepare, server: FileServer) -> None:
    (place / "data").mkdir()
    (place / "data/sketches_png.zip").write_bytes(server.files["sketches_png.zip"])
    assert prepare()[0] == 0
    assert sorted(path.name for path in (place / "data").iterdir()) == ["sketches", "sketches_png.zip"]


def test_carried_files_need_no_network(place: Path, prepare: Prepare, server: FileServer) -> None:
    for name, content in server.files.items():
        (place.parent / name).write_bytes(content)
    server.status = 404
    carried = [word for name in server.files for word in ("--from", f"../{name}")]
    status, out, err = prepare(*carried)
    assert (status, server.requests) == (0, []), err
    assert "data: TU Berlin sketches" in out
    assert all((place.parent / name).exists() for name in server.files)


def test_without_a_network_one_message_names_the_files_and_the_command(
    place: Path, prepare: Prepare, server: FileServer
) -> None:
    server.status = 403
    status, out, err = prepare()
    assert (status, out) == (2, "")
    assert err.count("orch: ") == 1
    (weights,) = (name for name in server.files if name.endswith(".pth"))
    assert f"sketches_png.zip (about 525 MB): {server.url}/sketches_png.zip: the server answers 403" in err
    assert "  orch prepare settings/part3.json --set job_params.image_size=63" in err
    assert f"--from sketches_png.zip --from {weights}\n" in err
    assert str(place / "data") in err
    assert not (place / "data/sketches").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sha256", WRONG), rf"sketches_png\.zip in .*data has the SHA-256 \w+, but {WRONG} is expected"),
        (("--sha256", "sha256:abc"), r"--sha256 'sha256:abc': give the 64 hexadecimal digits"),
        (("--from", "half.zip"), r"half\.zip is damaged or incomplete .*Copy or download it again"),
        (("--from", "alexnet.pth"), r"alexnet\.pth in .* has the SHA-256 \w+, but \w{8} is expected"),
        (("--stand-in", "--from", "half.zip"), r"--stand-in: it needs no files; leave out --from and --sha256"),
    ],
)
def test_a_mistake_is_one_message_that_says_what_to_do(
    words: tuple[str, ...], message: str, place: Path, prepare: Prepare, server: FileServer
) -> None:
    import re

    (place / "half.zip").write_bytes(server.files["sketches_png.zip"][:5000])
    (place / "alexnet.pth").write_bytes(b"half")
    status, out, err = prepare(*words)
    assert (status, out) == (2, "")
    assert len(re.findall(rf"orch: .*{message}", err)) == 1, err
    assert not (place / "data/sketches").exists()
    assert weights_of(place) == []


def test_stand_in_and_real_data_never_replace_each_other(place: Path, prepare: Prepare) -> None:
    assert prepare("--stand-in", part="part1")[0] == 0
    status, _, err = prepare(part="part1")
    assert status == 2
    assert "contains stand-in drawings" in err
    shutil.rmtree(place / "data")
    assert prepare(part="part1")[0] == 0
    status, _, err = prepare("--stand-in", part="part1")
    assert status == 2
    assert "contains the TU Berlin sketches; stand-in data would replace them. Move it away first" in err


def test_a_job_without_files_refuses_options_that_it_can_t_use(place: Path, prepare: Prepare) -> None:
    orch_run = orch_here(place, "prepare", "settings/digits.json", "--stand-in")
    assert orch_run.returncode == 2
    assert "--stand-in: Digits does not support it" in orch_run.stderr


def test_a_launch_without_data_names_the_command_that_fetches_them(place: Path) -> None:
    for name in ("part3", "resnet18", "lenet5", "davidnet"):
        done = orch_here(place, "launch", f"settings/{name}.json", "--executor", "local")
        assert done.returncode == 2
        assert f"`orch prepare settings/{name}.json`" in done.stderr


@pytest.mark.parametrize("part", ["part1", pytest.param("part2", marks=pytest.mark.long), "part3"])
def test_a_stand_in_trains_and_every_report_says_what_it_is(
    part: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.alexnet.PRETRAINING_CLASSES", 2)
    monkeypatch.setattr("jobs.alexnet.PRETRAINING_EPOCHS", 1)
    prepared = orch_here(place, "prepare", f"settings/{part}.json", "--stand-in", *SMALL)
    assert prepared.returncode == 0, prepared.stderr
    assert "data: stand-in drawings made by `orch prepare --stand-in`" in prepared.stdout
    if part != "part1":
        assert "stand-in-weights.pth: trained by `orch prepare --stand-in` on 2 other drawn classes" in prepared.stdout
    if part != "part1":
        other = orch_here(place, "launch", f"settings/{part}.json", "--executor", "inline", *SMALL[:2], "--dry-run")
        assert "was made with job_params image_size=63, hidden_units=8, but these settings have" in other.stderr
    changes = ("--set", "num_models=1", "--set", "stop_after_epochs=1", "--set", "slurm_file=null")
    launched = orch_here(place, "launch", f"settings/{part}.json", "--executor", "inline", *SMALL, *changes)
    assert launched.returncode == 0, launched.stderr
    for command in ("leaderboard", "status"):
        shown = " ".join(orch_here(place, command, part).stdout.split())
        assert "STAND-IN DATA: stand-in drawings made by `orch prepare --stand-in`" in shown
    exported = orch_here(place, "export", part, "--out", "best.pt")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((place / "best.json").read_text())["data"]["stand_in"] is True
    assert len(Run.open(place / "runs" / part).board()["entries"]) == 1
