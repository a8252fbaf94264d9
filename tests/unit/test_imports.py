"""Finding the classes that settings name by "module:Class"."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.errors import JobError
from jobs.imports import brings_own_trainer, find_class


def test_a_class_is_found_by_its_module_and_name() -> None:
    assert find_class("pathlib:Path", "job pathlib:Path") is Path


@pytest.mark.parametrize("last_line", ["raise SystemExit(2)", "1 / 0", "import nowhere_to_be_found"])
def test_whatever_a_module_raises_on_import_is_a_job_error(
    last_line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_on_import.py").write_text(f"{last_line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(JobError, match=r"^loggers: 'mine': broken_on_import can't be imported: \w+: "):
        find_class("broken_on_import:Mine", "loggers: 'mine'")


@pytest.mark.parametrize("name", ["Missing", "sep", ""])
def test_a_name_that_is_not_a_class_is_a_job_error(name: str) -> None:
    with pytest.raises(JobError, match=f"^job posixpath:{name}: posixpath has no class {name}$"):
        brings_own_trainer(f"posixpath:{name}")
