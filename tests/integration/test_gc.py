"""orch gc, and runs whose disk is full: which files stay, which are deleted, and what happens to the work."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import LeaderboardError
from orchestrator.files import disk_budget
from orchestrator.rules import collecting
from orchestrator.run import gc
from orchestrator.run.launch import launch
from orchestrator.run.run import Run
from orchestrator.settings.loading import load
from tests.integration.test_local_chains import processes_of
from tests.support.invariants import violations
from tests.support.settings_files import write_quick
from tests.support.small_runs import CUT, ROOT, board_of, make_run, work
from tests.support.storage import Storage

ORCH = Path(sys.executable).with_name("orch")
OLD_S, YOUNG_S = gc.ORPHANED_S + 60, gc.ORPHANED_S - 60
SCRIPT = [0.3, 0.5, 0.4, 0.6, 0.1, 0.2, 0.7]


def collect(run: Run, dry_run: bool = False) -> gc.CollectionReport:
    return gc.collect(run, dry_run, time.time())


def put(path: Path, age_s: float = 0.0, size_bytes: int = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size_bytes)
    at = time.time() - age_s
    for touched in (path, path.parent):
        os.utime(touched, (at, at))
    return path


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


# --- rules


def tokens(*chains: str) -> list[tuple[int, str, bool]]:
    """Make jobs from a string for each chain, with a letter for each job; a capital letter is an open job."""
    return [(n, token(letter), letter.isupper()) for n, chain in enumerate(chains) for letter in chain]


def token(letter: str, index: int = 0) -> str:
    return f"{ord(letter.lower()):016x}-{index}"


@pytest.mark.parametrize(
    ("chains", "old"),
    [
        pytest.param([""], "", id="nothing"),
        pytest.param(["abc"], "", id="the last three of a chain stay"),
        pytest.param(["abcde"], "ab", id="those before them go"),
        pytest.param(["aBcdef"], "ac", id="an open one stays wherever it is"),
        pytest.param(["abcdE", "vwxyZ"], "abvw", id="of each chain"),
    ],
)
def test_folders_of_old_jobs(chains: list[str], old: str) -> None:
    jobs = tokens(*chains)
    ages = {t: 0.0 for _, t, _ in jobs}
    assert collecting.old_job_folders(ages, jobs, 100.0) == sorted(token(letter) for letter in old)


def test_a_folder_that_jobs_share_stays_while_one_of_them_is_needed() -> None:
    """On Slurm, the jobs of one submission have one folder."""
    shared, new = f"{1:016x}", [f"{n:016x}" for n in range(2, 6)]
    jobs = [(0, f"{shared}-0", False), *((0, f"{n}-0", False) for n in new), (1, f"{shared}-1", False)]
    ages = dict.fromkeys((shared, *new), 0.0)
    assert collecting.old_job_folders(ages, jobs, 100.0) == [new[0]]
    jobs += [(1, f"{9 + n:016x}-0", False) for n in range(3)]
    assert collecting.old_job_folders(ages, jobs, 100.0) == [shared, new[0]]


@pytest.mark.parametrize(
    ("name", "age_s", "goes"),
    [(f"{7:016x}", 101.0, True), (f"{7:016x}-0", 101.0, True), (f"{7:016x}", 99.0, False), ("notes", 1e9, False)],
    ids=["unknown and old", "of the local executor", "unknown and young", "not ours"],
)
def test_a_folder_that_the_database_does_not_know(name: str, age_s: float, goes: bool) -> None:
    assert collecting.old_job_folders({name: age_s}, tokens("ab"), 100.0) == ([name] if goes else [])


@pytest.mark.parametrize(
    ("name", "age_s", "goes"),
    [
        ("chunk-00000001", 101.0, True),
        ("chunk-00000001", 99.0, False),
        ("chunk-00000002", 101.0, False),
        ("chunk-123456789", 101.0, True),
        ("chunk-00000001-mine", 101.0, False),
        ("offline-run-20300102_030405-0a1b2c3d-c00000001", 101.0, True),
        ("offline-run-20300102_030405-0a1b2c3d-c00000001-1", 101.0, True),
        ("run-20300102_030405-0a1b2c3d-c00000001", 101.0, True),
        ("offline-run-20300102_030405-0a1b2c3d-c00000002", 101.0, False),
        ("offline-run-20300102_030405-abcdefgh", 101.0, False),
    ],
)
def test_curves_of_a_chunk_that_led_to_nothing_are_old_after_a_while(name: str, age_s: float, goes: bool) -> None:
    assert collecting.old_series({name: age_s}, {2, 3}, 100.0) == ([name] if goes else [])


# --- the command


@pytest.fixture
def run(storage: Storage, tmp_path: Path) -> Iterator[Run]:
    made = make_run(storage, tmp_path / "run")
    work(made, SCRIPT)
    yield made
    storage.remove(made.leaderboard)


def test_what_nothing_refers_to_goes_and_everything_else_stays(run: Run) -> None:
    work(run, [CUT])  # a suspended chunk: its file and its parent's stay
    folder, runs_dir = run.folder, run.folder.parent
    kept = {path for path in folder.rglob("*") if path.is_file()}
    files = folder / "checkpoints"
    links = [j["token"] for j in run.leaderboard.reader.rows("job")]
    for link in links:
        kept.add(put(folder / "jobs" / link / "1_submitted.pkl", OLD_S))
    pid = dead_pid()
    kept |= {
        put(files / "mine.pt", OLD_S),
        put(files / ".tmp-other-1", YOUNG_S),
        put(folder / ".tmp-settings.json-1", YOUNG_S),
        put(folder / "orch.db.damaged-20300101T000000Z", OLD_S),
        put(folder / "jobs" / f"{7:016x}" / "1_submitted.pkl", YOUNG_S),
        put(folder / "logs" / "worker-9.log", OLD_S),
        put(folder / "logs" / "tensorboard" / "mine" / "events", gc.CURVES_KEPT_S + 60),
        put(folder / "logs" / "tensorboard" / "chunk-00000099" / "events", gc.CURVES_KEPT_S - 60),
        put(runs_dir / f".run-{os.getpid()}" / "settings.json", OLD_S),
        put(runs_dir / f".run-{pid}" / "thesis.tex", OLD_S),
        put(runs_dir / f".run-5-{pid}" / "settings.json", OLD_S),
    }
    garbage = {
        "checkpoints": [put(files / f"g00000099-c00000099.{s}", size_bytes=1000) for s in ("json", "pt")],
        "temporary files": [
            put(files / ".tmp-g00000098-c00000098.pt-77", size_bytes=2000),
            put(folder / ".tmp-settings.json-2", OLD_S),
        ],
        "job folders": [put(folder / "jobs" / f"{8:016x}-0" / "1_result.pkl", OLD_S, 3000)],
        "curves": [put(folder / "logs" / "tensorboard" / "chunk-00000098" / "events", gc.CURVES_KEPT_S + 60, 5000)],
        "dead launches": [put(runs_dir / f".run-{dead_pid()}" / "settings.json", OLD_S, 4000)],
    }

    dry = collect(run, dry_run=True)
    assert all(path.exists() for paths in garbage.values() for path in paths)
    report = collect(run)

    assert report.freed_bytes == dry.freed_bytes
    assert report.freed_bytes == {
        "checkpoints": 2000, "temporary files": 2010, "job folders": 3000, "curves": 5000, "dead launches": 4000,
    }  # fmt: skip
    assert {kind: len(names) for kind, names in report.files.items()} == {k: len(v) for k, v in garbage.items()}
    assert not any(path.exists() for paths in garbage.values() for path in paths)
    assert [path for path in kept if not path.exists() and "-journal" not in path.name] == []
    assert sum(collect(run).freed_bytes.values()) == 0, "a second time there is nothing to do"
    work(run, [0.9])
    assert violations_but_for_files_put_there(run) == []


def violations_but_for_files_put_there(run: Run) -> list[str]:
    for name in ("mine.pt", ".tmp-other-1"):
        (run.folder / "checkpoints" / name).unlink()
    return violations(run, over=False)


def test_the_curves_of_every_chunk_in_the_lineage_of_the_board_or_of_a_chunk_in_training_stay(run: Run) -> None:
    work(run, [0.8, 0.05, CUT])
    reader = run.leaderboard.reader
    parents = {c["checkpoint_id"]: (c["chunk_id"], c["parent_id"]) for c in reader.rows("checkpoint")}
    tips = [e["checkpoint_id"] for e in reader.rows("entry") if e["on_board"]]
    in_training = [c for c in reader.rows("chunk") if c["state"] == "suspended"]
    lines = {c["chunk_id"] for c in in_training}
    for tip in (*tips, *(c["parent_id"] for c in in_training)):
        while tip is not None:
            chunk, tip = parents[tip]
            lines.add(chunk)
    chunks = {c["chunk_id"] for c in reader.rows("chunk")}
    assert len(lines) < len(chunks)
    assert len(lines) > len(tips) + len(in_training), "an ancestor has left the board"
    for chunk in chunks:
        put(run.folder / "logs" / "tensorboard" / f"chunk-{chunk:08d}" / "events", gc.CURVES_KEPT_S + 60)

    report = collect(run)

    assert report.trouble == []
    assert set(report.files["curves"]) == {f"chunk-{chunk:08d}" for chunk in chunks - lines}


def test_without_the_record_of_an_entry_no_curves_are_deleted(tmp_path: Path) -> None:
    run = make_run(Storage(None), tmp_path / "run")
    work(run, SCRIPT)
    curves = put(run.folder / "logs" / "tensorboard" / "chunk-00000099" / "events", gc.CURVES_KEPT_S + 60)
    next((run.folder / "checkpoints").glob("*.json")).unlink()
    report = collect(run)
    assert curves.exists()
    assert len(report.trouble) == 1
    assert "curves are not collected" in report.trouble[0]


def test_without_its_database_nothing_is_deleted(tmp_path: Path) -> None:
    run = make_run(Storage(None), tmp_path / "run")
    work(run, SCRIPT)
    files = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    (run.folder / "orch.db").unlink()
    with pytest.raises(LeaderboardError, match="`orch repair run`"):
        collect(run)
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == files


def test_deleted_folders_cause_no_error(tmp_path: Path) -> None:
    run = make_run(Storage(None), tmp_path / "run")
    for part in ("checkpoints", "jobs", "logs"):
        (run.folder / part).rmdir()
    assert sum(collect(run).freed_bytes.values()) == 0


@pytest.fixture
def runs_dir(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "runs"
    for process in processes_of(tmp_path):
        process.kill()


def quick(folder: Path, **changes: Any) -> Path:
    return write_quick(folder, seconds=0.05, eon_lifetime=0.5, **changes)


def test_a_collection_is_safe_while_two_workers_train(tmp_path: Path, runs_dir: Path) -> None:
    command = [str(ORCH), "launch", str(quick(tmp_path)), "--runs-dir", str(runs_dir)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    run = Run.open(runs_dir / "quick")
    seen = set()
    collections = 0
    end = time.monotonic() + 120
    while run.status()["state"] == "active" or processes_of(runs_dir):
        assert time.monotonic() < end, "waited 120 s for the end of the run"
        time.sleep(0.05)
        report = collect(run)
        assert report.trouble == []
        collections += 1
        seen |= set(report.files["job folders"])
        assert [
            p for p in run.leaderboard.reader.references()[0] if not (run.folder / "checkpoints" / p).exists()
        ] == []
    assert collections > 5
    assert seen, "each worker had more than three jobs"
    assert run.status()["state"] == "finished"
    assert violations(run) == []
    assert [j for j in run.leaderboard.reader.rows("job") if j["outcome"] and "rror" in j["outcome"]] == []
    collect(run)
    assert sum(collect(run).freed_bytes.values()) == 0


# --- runs without disk space


def test_a_run_beyond_its_budget_gives_chunks_back_and_goes_on_when_it_may_take_more(tmp_path: Path) -> None:
    run = make_run(Storage(None), tmp_path / "run", executor="inline", max_disk_gb=1.0)
    work(run, [0.1, 0.2], size_bytes=300_000)
    allowed = (disk_budget.used_bytes(run.folder) + 200_000) / 1e9
    run.amend([f"max_disk_gb={allowed}"], time.time())
    before = board_of(run)

    ending = work(run, [0.3], size_bytes=300_000)

    assert ending is not None
    assert ending.error
    assert f"max_disk_gb is {allowed:g}: the run takes" in ending.outcome
    assert board_of(run) == before
    chunk = run.leaderboard.reader.rows("chunk")[-1]
    assert chunk["state"] == "expired"
    assert run.leaderboard.chains.workers()[0].failures == 1
    assert violations(run, over=False) == []
    run.amend(["max_disk_gb=1"], time.time())
    work(run, [0.3, 0.4], size_bytes=300_000)
    assert [e["score"] for e in board_of(run)] == [0.2, 0.3, 0.4]
    assert violations(run, over=False) == []


def test_a_run_that_never_has_room_ends_with_the_reason(tmp_path: Path) -> None:
    file = quick(tmp_path, executor="inline", workers=1, max_failures=3, max_disk_gb=1e-6)
    settings, _ = load(file)
    run = launch(settings, tmp_path / "runs", [str(ROOT)])
    started = time.monotonic()
    run.work_inline()
    assert time.monotonic() - started < 30
    status = run.status()
    assert status["state"] == "failed"
    assert "3 failures in a row; the last: NoSpaceError: max_disk_gb is 1e-06" in status["reason"]
    assert "orch amend quick --set max_disk_gb=" in status["reason"]
    assert status["chunks"]["claimed"] == 3
    assert list((run.folder / "checkpoints").iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "run" / "checkpoints"
    yield folder
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def test_a_full_disk_costs_a_chunk_and_nothing_else(tmp_path: Path, small_disk: Path) -> None:
    run = make_run(Storage(None), tmp_path / "run", executor="inline")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small_disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted by root only")
    work(run, [0.1, 0.2], size_bytes=400_000)
    before = board_of(run)
    assert len(before) == 2

    ending = work(run, [0.3], size_bytes=400_000)

    assert ending is not None
    assert ending.error
    assert "No space left on device" in ending.outcome
    assert board_of(run) == before
    assert len(list(small_disk.iterdir())) == 4, "nothing of it is left"
    assert run.leaderboard.reader.rows("chunk")[-1]["state"] == "expired"
    assert run.leaderboard.chains.workers()[0].failures == 1
    subprocess.run([*mount[:4], "remount,size=4m", *mount[5:]], check=True)
    work(run, [0.3], size_bytes=400_000)
    assert [e["score"] for e in board_of(run)] == [0.1, 0.2, 0.3]
    assert violations(run, over=False) == []
