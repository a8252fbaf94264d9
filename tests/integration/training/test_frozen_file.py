"""Frozen layers are kept once for a run, in a file beside its checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.digits import Digits
from jobs.errors import JobError
from jobs.job import JobContext
from jobs.training import states
from jobs.training.frozen_file import LEAST_BYTES
from jobs.training.session import Session
from orchestrator.files.run_folder import CHECKPOINTS
from orchestrator.profile import Profile
from tests.support.short_training import FAST, FINE, child, differences, digits_settings, founder, save, train

pytestmark = pytest.mark.usefixtures("one_thread")


class FrozenBody(Digits):
    """A large frozen layer and a small one that is trained."""

    def model(self) -> nn.Module:
        body = nn.Linear(64, LEAST_BYTES // 200).requires_grad_(False)
        return nn.Sequential(nn.Flatten(), body, nn.ReLU(), nn.Linear(LEAST_BYTES // 200, 10))


class SmallFrozenBody(Digits):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32).requires_grad_(False), nn.ReLU(), nn.Linear(32, 10))


def session(folder: Path | None, job: type[Digits] = FrozenBody) -> Session:
    """folder: where the session keeps checkpoints; None: nowhere."""
    run = None if folder is None else folder.parent / f"run-of-{folder.name}"
    if run is not None and folder is not None and not run.exists():
        run.mkdir()
        (run / CHECKPOINTS).symlink_to(folder)
    return Session(job(JobContext(digits_settings(job_params={}))), run_folder=run)


def chain(folder: Path | None, files: Path, profiles: list[Profile]) -> list[Path]:
    """Train one chunk after the other, each in a new session. Returns the checkpoints."""
    written: list[Path] = []
    for number, profile in enumerate(profiles):
        one = session(folder)
        train(one, child(written[-1], profile=profile) if written else founder(profile=profile))
        written.append(save(one, files / f"{number}.pt"))
    return written


def test_checkpoints_share_the_file_of_their_frozen_layers_and_are_otherwise_the_same(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "whole").mkdir()
    shared = chain(tmp_path / "shared", tmp_path / "shared", [FAST, FINE, FAST])
    whole = chain(None, tmp_path / "whole", [FAST, FINE, FAST])
    for small, large in zip(shared, whole, strict=True):
        assert differences(states.read(small), states.read(large)) == []
        assert large.stat().st_size - small.stat().st_size > LEAST_BYTES
    (frozen,) = (tmp_path / "shared").glob("frozen-*.weights")
    assert frozen.stat().st_size > LEAST_BYTES


def test_a_chunk_in_memory_and_a_snapshot_leave_them_out_too(tmp_path: Path) -> None:
    one = session(tmp_path)
    train(one, founder())
    write = one.snapshot()
    assert write is not None
    train(one, replace(child(tmp_path / "0.pt"), in_memory=True))
    with (tmp_path / "0.pt").open("wb") as target:
        write(target)
    other = session(None)
    train(other, founder())
    assert differences(states.read(tmp_path / "0.pt"), other.state()) == []
    train(other, child(tmp_path / "0.pt"))
    assert differences(one.state(), other.state()) == []


def test_exported_weights_are_complete(tmp_path: Path) -> None:
    (checkpoint,) = chain(tmp_path, tmp_path, [FAST])
    with (tmp_path / "best.pt").open("wb") as target:
        states.export(checkpoint, target)
    model = session(None).job.model()
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))


def test_small_frozen_layers_stay_in_the_checkpoints(tmp_path: Path) -> None:
    one = session(tmp_path, SmallFrozenBody)
    train(one, founder())
    save(one, tmp_path / "0.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["0.pt"]


def test_founders_with_other_frozen_weights_have_another_file(tmp_path: Path) -> None:
    for seed in (1, 2):
        one = session(tmp_path)
        train(one, founder(seed))
        save(one, tmp_path / f"{seed}.pt")
    assert len([*tmp_path.glob("frozen-*.weights")]) == 2
    for seed in (1, 2):
        again = session(None)
        train(again, founder(seed))
        assert differences(states.read(tmp_path / f"{seed}.pt"), again.state()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), r"frozen-\w+\.weights: the frozen layers .* can't be read: .*No such file"),
        (lambda file: file.write_bytes(b"x"), r"frozen-\w+\.weights: the frozen layers .* can't be read"),
        (
            lambda file: torch.save({"1.weight": torch.zeros(2)}, file),
            r"frozen-\w+\.weights: the frozen layers .* are damaged; copy the file from a backup",
        ),
    ],
)
def test_a_lost_or_damaged_file_is_an_error_that_names_it(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (checkpoint,) = chain(tmp_path, tmp_path, [FAST])
    (file,) = tmp_path.glob("frozen-*.weights")
    damage(file)
    with pytest.raises(JobError, match=message):
        states.read(checkpoint)
