"""Any arguments of `orch` give exit code 0, 1 or 2 and a message. There is no traceback, and no file outside runs/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.main import main
from tests.support.fuzzing import SECRET, examples

LOOKING = ("status", "leaderboard", "runs")
COMMANDS = (
    *LOOKING,
    "pause",
    "resume",
    "drain",
    "cancel",
    "amend",
    "repair",
    "gc",
    "export",
    "launch",
    "keep",
    "nonsense",
)
NAMES = (
    "run", "", ".", "..", "../..", "a/b", "/", "/etc", "x" * 300, "x" * 5000, "é日本", "a b", "a\nb", "-x", "--",
    "--help", "\udcff", "~", "*", "%s", "{0}", "null", "-1", "nothing.json", "broken.json", "nowhere.json",
)  # fmt: skip
OPTIONS = (
    "--json", "--dry-run", "--now", "--force", "--rank=0", "--rank=-1", "--rank=99999999999999999999", "--rank=x",
    "--every=0", "--every=nan", "--workers=0", "--workers=-1", "--workers=1e9", "--workers=" + "9" * 400,
    "--executor=pbs", "--executor=", "--set", "--set=", "--set==", "--set=a", "--set=workers", "--set=workers=0",
    "--set=name=../x", "--set=slurm.setup=[1]", "--set=@", "--set=x=@/", "--set=\udcff=1",
    f"--set=database=postgresql+psycopg://me:{SECRET}@host/db", "--out=", "--out=/", "--unknown", "--version", "-h",
)  # fmt: skip
BARE = {"name": "nowhere", "job": "nowhere_at_all:Job", "training_profiles": [{"name": "a", "learning_rate": 0.1}]}


@pytest.fixture
def work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has some settings files, and folders that are not runs."""
    (tmp_path / "nowhere.json").write_text(json.dumps(BARE))
    (tmp_path / "broken.json").write_text("{")
    for name, content in (("odd", b"\xff\x00"), ("run", b"{}"), ("deep", b"[" * 99_999)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "settings.json").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ORCH_RUNS_DIR", raising=False)
    return tmp_path


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_relative_to(folder / "runs")}


arguments = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(OPTIONS),
    st.sampled_from(["runs", "/", "/dev/null", "x" * 5000, "", "nowhere.json"]).map(
        lambda value: f"--runs-dir={value}"
    ),
)


@examples(150)
@given(command=st.sampled_from(COMMANDS), more=st.lists(arguments, max_size=4))
def test_any_command_line_ends_with_a_message(
    work_folder: Path, capsys: pytest.CaptureFixture[str], command: str, more: list[str]
) -> None:
    before = everything(work_folder)
    safe = ["--dry-run"] if command in ("launch", "repair", "gc") else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["orch", command, *safe, *more])
        with pytest.raises(SystemExit) as ended:
            main()
    out, error = capsys.readouterr()
    code = ended.value.code or 0
    assert code in (0, 1, 2)
    assert SECRET not in error
    if code:
        assert error.startswith(("orch: ", "Usage: ")) or out, error
    assert everything(work_folder) == before


@pytest.mark.parametrize(
    ("locale", "arguments"),
    [
        ("C.UTF-8", [b"status", b"\xff\xfe"]),
        ("C", [b"runs", b"--runs-dir", b"\xff\xfe"]),
        ("C.UTF-8", [b"launch", b"--dry-run", b"nowhere.json", b"--set", b"name=\xff"]),
        ("C", [b"runs", b"--runs-dir", b"x" * 5000]),
    ],
    ids=["a run", "a folder", "a value", "a long folder"],
)
def test_arguments_that_are_not_text_give_no_traceback(work_folder: Path, arguments: list[bytes], locale: str) -> None:
    code = "from orchestrator.cli.main import main; main()"
    environment = os.environ | {"LC_ALL": locale, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=work_folder, env=environment, capture_output=True
    )
    assert done.returncode in (0, 2)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0 or done.stderr.startswith(b"orch: ")
    assert done.stdout or done.stderr
