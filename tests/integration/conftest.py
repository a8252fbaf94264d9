"""Fixtures for tests of the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.main import main
from tests.support.command_line import OrchCall, orch_here, write_settings


@pytest.fixture
def orch_call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[OrchCall]:
    """Runs `orch` in this process, which has imported torch already. Returns exit code, output and error output."""

    def run(cwd: Path, *arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["orch", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capfd.readouterr())

    monkeypatch.delenv("ORCH_RUNS_DIR", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("mine", None)
    yield run
    sys.modules.pop("mine", None)


@pytest.fixture(scope="session")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A folder with a finished run, and what its launch printed. Tests that change the folder use `folder` instead."""
    cwd = tmp_path_factory.mktemp("launched")
    done = orch_here(cwd, "launch", write_settings(cwd), "--json")
    assert done.returncode == 0, done.stderr
    return cwd, done


@pytest.fixture
def folder(launched: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of the folder of `launched`."""
    shutil.copytree(launched[0], tmp_path / "copy")
    return tmp_path / "copy"
