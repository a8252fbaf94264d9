"""The memory that a job may still take."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from jobs.training.memory import free_bytes

GB = 10**9


def group(folder: Path, limit: str, use: int, cache: int, names: tuple[str, str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{use}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture(autouse=True)
def _a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100 * GB}))


@pytest.mark.parametrize(
    ("job", "step", "free"),
    [
        ("max", "max", 100 * GB),
        (str(8 * GB), "max", 4 * GB),
        ("max", str(6 * GB), 2 * GB),
        (str(8 * GB), str(6 * GB), 2 * GB),
        (str(5 * GB), str(6 * GB), 1 * GB),
    ],
)
def test_the_tightest_limit_of_the_groups_above_counts(job: str, step: str, free: int, tmp_path: Path) -> None:
    """5 GB are in use, 1 GB of that for files that can be dropped."""
    group(tmp_path / "slurm/job_7", job, 5 * GB, GB, V2)
    group(tmp_path / "slurm/job_7/step_0", step, 5 * GB, GB, V2)
    (tmp_path / "self").write_text("0::/slurm/job_7/step_0\n")
    assert free_bytes(tmp_path, tmp_path / "self") == free


def test_control_groups_of_version_1_count_too(tmp_path: Path) -> None:
    group(tmp_path / "memory/slurm/uid_1/job_7", str(8 * GB), 5 * GB, GB, V1)
    (tmp_path / "self").write_text("5:cpuset:/x\n4:cpu,memory:/slurm/uid_1/job_7\n")
    assert free_bytes(tmp_path, tmp_path / "self") == 4 * GB


@pytest.mark.parametrize("text", [None, "", "0::/\n", "0::/not/here\n", "garbage\n"])
def test_without_limits_the_machines_free_memory_counts(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "self").write_text(text)
    assert free_bytes(tmp_path, tmp_path / "self") == 100 * GB


def test_this_process_has_some_memory() -> None:
    assert 0 < free_bytes() <= 100 * GB
