"""orch repair with damaged checkpoints, records or settings."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import RunError
from orchestrator.run.run import Run
from tests.support.invariants import violations
from tests.support.repairs import DAMAGE, drop, repaired, resumed
from tests.support.small_runs import board_of, lose, opened, work

# --- damaged checkpoints and records


def test_a_damaged_checkpoint_of_a_healthy_database_leaves_the_board(run: Run) -> None:
    files = run.folder / "checkpoints"
    before = board_of(run)
    damaged, missing, kept = (entry["file"] for entry in before)
    (files / damaged).write_bytes(b"x" * (files / damaged).stat().st_size)
    (files / missing).unlink()

    dry = repaired(run.folder, dry_run=True)
    assert len(dry.done) == 2
    assert board_of(run) == before
    report = repaired(run.folder)

    assert report.condition == "healthy"
    assert [word in " ".join(report.problems) for word in (damaged, missing, kept)] == [True, True, False]
    assert [entry["file"] for entry in board_of(run)] == [kept]
    assert [e["kind"] for e in run.leaderboard.reader.rows("event")][-2:] == ["condemned", "condemned"]
    work(run, [0.9, 0.8])
    assert len(board_of(run)) == 3
    assert violations(run, over=False) == []
    drop(run)


def _no_record(path: Path) -> None:
    path.unlink()


def _no_json(path: Path) -> None:
    path.write_text("{")


def _no_object(path: Path) -> None:
    path.write_text("[]")


def _without(key: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return spoil


def _with(**changes: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_no_record, id="missing"),
        pytest.param(_no_json, id="not JSON"),
        pytest.param(_no_object, id="not an object"),
        pytest.param(_without("sha256"), id="without a checksum"),
        pytest.param(_without("position"), id="without a position"),
        pytest.param(_with(score=None), id="without a score"),
        pytest.param(_with(score="high"), id="with a word for a score"),
        pytest.param(_with(generation=1), id="of another claim"),
        pytest.param(_with(sha256="0" * 64), id="with another checksum"),
    ],
)
def test_a_checkpoint_whose_record_is(sqlite_run: Run, spoil: Callable[[Path], None]) -> None:
    """A checkpoint whose record is damaged is not on the rebuilt board. It is moved to another folder, because the next
    collection would delete it."""
    folder = sqlite_run.folder
    best, *others = sorted(board_of(sqlite_run), key=lambda e: -e["score"])
    file, record = best["file"], best["file"].replace(".pt", ".json")
    content = (folder / "checkpoints" / file).read_bytes()
    spoil(folder / "checkpoints" / record)
    lose(sqlite_run)

    report = repaired(folder)

    assert any(file in problem or record in problem for problem in report.problems)
    (aside,) = folder.glob("checkpoints.damaged-*")
    assert (aside / file).read_bytes() == content
    run = resumed(opened(folder))
    assert sorted(e["file"] for e in board_of(run)) == sorted(e["file"] for e in others)
    work(run, [0.9])
    assert len(board_of(run)) == 3, "its slot is filled again"
    assert violations(run, over=False) == []


def test_a_damaged_checkpoint_and_a_lost_database_leave_the_others(sqlite_run: Run) -> None:
    folder = sqlite_run.folder
    first, *others = board_of(sqlite_run)
    os.truncate(folder / "checkpoints" / first["file"], 3)
    lose(sqlite_run)
    report = repaired(folder)
    assert any("is damaged" in problem for problem in report.problems)
    assert any("2 of 3 models are left" in line for line in report.unknown)
    assert board_of(opened(folder)) == others


def test_records_of_earlier_versions_without_ancestors_are_enough_for_a_board(sqlite_run: Run) -> None:
    folder, before = sqlite_run.folder, board_of(sqlite_run)
    for path in (folder / "checkpoints").glob("*.json"):
        for key in ("ancestors", "results", "train_seconds", "launched_at", "import_paths"):
            _without(key)(path)
    lose(sqlite_run)
    report = repaired(folder)
    assert any("is unknown: no record holds" in line for line in report.unknown)
    assert any("no record contains the run's launch time" in line for line in report.unknown)
    run = resumed(opened(folder))
    assert board_of(run) == before
    work(run, [0.9, 0.95])
    assert len(board_of(run)) == 3


def test_with_no_checkpoint_at_all_the_run_begins_anew(sqlite_run: Run) -> None:
    folder = sqlite_run.folder
    lose(sqlite_run)
    for part in ("checkpoints", "jobs", "logs"):
        shutil.rmtree(folder / part)
    report = repaired(folder)
    assert report.entries == []
    run = resumed(opened(folder))
    work(run, [0.1, 0.2, 0.3, 0.4])
    assert len(board_of(run)) == 3
    assert violations(run, over=False) == []


# --- settings


def test_lost_settings_are_written_again_from_the_database(sqlite_run: Run) -> None:
    path = sqlite_run.folder / "settings.json"
    before = path.read_text()
    for lost in (None, "{", before.replace('"num_models": 3', '"num_models": 0')):
        path.unlink() if lost is None else path.write_text(lost)
        if lost is not None:
            with pytest.raises(RunError, match=r"settings\.json: .*`orch repair run` restores settings\.json"):
                Run.open(sqlite_run.folder)
        assert repaired(sqlite_run.folder).condition == "healthy"
        assert path.read_text() == before


def test_settings_come_from_a_damaged_database_if_they_can_be_read(sqlite_run: Run) -> None:
    path, before = sqlite_run.folder / "settings.json", board_of(sqlite_run)
    settings = path.read_text()
    path.unlink()
    DAMAGE["without a table"](sqlite_run.folder / "orch.db")
    repaired(sqlite_run.folder)
    assert path.read_text() == settings
    assert board_of(opened(sqlite_run.folder)) == before


def test_without_settings_and_database_the_message_says_what_is_needed(sqlite_run: Run) -> None:
    (sqlite_run.folder / "settings.json").write_text("{")
    lose(sqlite_run)
    with pytest.raises(RunError, match=r"Put back the settings file .* as .*settings\.json"):
        repaired(sqlite_run.folder)
