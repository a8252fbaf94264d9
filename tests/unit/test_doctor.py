"""The doctor as a whole, on a machine without Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.doctor.examine import examine
from orchestrator.doctor.findings import Finding, exit_code, worst
from tests.support.doctoring import levels, one

ORCH = Path(sys.executable).with_name("orch")


@pytest.mark.parametrize("level", ["note", "warning", "error"])
def test_a_finding_that_is_not_ok_says_what_to_do(level):
    with pytest.raises(ValueError, match="must say what to do"):
        Finding(level, "disk", "full")
    assert Finding(level, "disk", "full", "free some").do


@pytest.mark.parametrize(
    ("given", "code", "most"),
    [([], 0, "ok"), (["ok", "note"], 0, "note"), (["ok", "warning"], 0, "warning"), (["error", "ok"], 1, "error")],
)
def test_only_errors_make_the_exit_code(given, code, most):
    findings = [Finding(level, "a", "b", "c") for level in given]
    assert (exit_code(findings), worst(findings)) == (code, most)


# --- the whole command


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(ORCH.parent))


def test_without_slurm_the_rest_is_reported(no_slurm, tmp_path):
    done = subprocess.run(
        [str(ORCH), "doctor", "--json", "--runs-dir", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    said = json.loads(done.stdout)
    assert (done.returncode, said["errors"]) == (0, 0), done.stdout + done.stderr
    topics = {finding["topic"]: finding for finding in said["findings"]}
    assert topics["slurm"]["level"] == "note"
    assert {"settings", "slurm", "runs folder", "locks", "disk", "home", "python"} <= set(topics)
    assert all(finding["do"] for finding in said["findings"] if finding["level"] != "ok")
    assert list(tmp_path.iterdir()) == [], "the doctor leaves nothing behind"


def test_the_two_node_test_without_slurm_is_an_error(no_slurm, tmp_path):
    findings = examine(None, tmp_path, two_nodes=True, say=lambda _line: None)
    assert one(findings, "slurm").level == "error"
    assert exit_code(findings) == 1


def test_data_that_can_not_be_read_here_is_an_error_without_slurm_too(no_slurm, tmp_path):
    file = tmp_path / "settings.json"
    profiles = [{"name": "one", "learning_rate": 0.1}]
    where = {"training_source_dir": str(tmp_path), "testing_source_dir": str(tmp_path / "nowhere")}
    file.write_text(json.dumps({"training_profiles": profiles, "executor": "local"} | where))
    found = [f for f in examine(file, tmp_path, two_nodes=False, say=lambda _line: None) if f.topic == "data"]
    assert levels(found) == ["ok", "error"]
    assert found[1].what == f"{tmp_path / 'nowhere'}: can't be read here: No such file or directory"


def test_settings_that_are_wrong_are_a_finding_and_the_rest_is_looked_at(no_slurm, tmp_path):
    file = tmp_path / "wrong.json"
    file.write_text('{"workerz": 3}')
    findings = examine(file, tmp_path, two_nodes=False, say=lambda _line: None)
    wrong = [finding for finding in findings if finding.topic == "settings"]
    assert levels(wrong) == ["error"]
    assert "did you mean 'workers'?" in wrong[0].what
    assert "disk" in {finding.topic for finding in findings}


def test_a_runs_folder_that_can_t_be_written_is_an_error(no_slurm):
    findings = examine(None, Path("/proc/runs"), two_nodes=False, say=lambda _line: None)
    assert one(findings, "runs folder").level == "error"


def test_the_table_says_what_to_do(no_slurm, tmp_path):
    done = subprocess.run(
        [str(ORCH), "doctor", "--runs-dir", str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "->" in done.stdout
    assert "errors: 0" in done.stdout
