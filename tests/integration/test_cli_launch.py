"""`orch launch`: what it refuses, what it creates, and how it continues an existing run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.errors import JobSpecError
from orchestrator.run.run import Run
from orchestrator.settings.loading import load
from orchestrator.worker.user_job import check_job
from tests.support.command_line import (
    OrchCall,
    events,
    job_with,
    names_in,
    orch,
    orch_here,
    output,
    write_job,
    write_settings,
)
from tests.support.invariants import violations
from tests.support.small_runs import make_run
from tests.support.storage import Storage

# --- mistakes


def test_three_mistakes_are_three_lines_and_nothing_is_made(tmp_path: Path) -> None:
    file = write_settings(tmp_path, num_modles=3, workers=0, training_profiles=[{"name": "fast"}])
    done = orch(tmp_path, "launch", file)
    assert done.returncode == 2
    assert done.stdout == ""
    assert sorted(done.stderr.removeprefix("orch: ").splitlines()) == [
        "settings.json: num_modles: unknown key; did you mean 'num_models'?",
        "settings.json: training_profiles[0].learning_rate: is missing and has no default",
        "settings.json: workers: 0 is not allowed; input should be greater than or equal to 1",
    ]
    assert names_in(tmp_path) == {"settings.json"}


@pytest.mark.usefixtures("orch_call")
def test_problems_of_the_metric_and_of_each_profile_are_reported_together(tmp_path: Path) -> None:
    profiles = [
        {"name": "one", "learning_rate": 0.1, "optimizer": "Adamm"},
        {"name": "two", "learning_rate": 0.1},
        {"name": "three", "learning_rate": 0.1, "schedule": {"name": "StepLR", "stepsize": 2}},
    ]
    metric = {"name": "acuracy", "mode": "max"}
    settings, _ = load(tmp_path / write_settings(tmp_path, training_profiles=profiles, metric=metric))
    with pytest.raises(JobSpecError) as caught:
        check_job(settings, [str(tmp_path)])
    about_the_metric, first, second = str(caught.value).splitlines()
    assert about_the_metric == "metric.name: 'acuracy' is not among the metrics of Digits: accuracy, loss"
    assert "Adamm" in first
    assert "stepsize" in second


@pytest.mark.usefixtures("orch_call")
def test_a_class_without_a_model_or_data_is_refused(tmp_path: Path) -> None:
    write_job(tmp_path, "from jobs.job import Job\nclass Mine(Job):\n    pass\n")
    settings, _ = load(tmp_path / write_settings(tmp_path, job="mine:Mine", job_params={}))
    with pytest.raises(JobSpecError, match=r"^Mine has no model; .*\nMine has no data; "):
        check_job(settings, [str(tmp_path)])


def test_a_model_that_can_not_be_made_here_is_reported_with_its_error(tmp_path: Path, orch_call: OrchCall) -> None:
    write_job(tmp_path, job_with("def model(self): raise ValueError('no such backbone')"))
    file = write_settings(tmp_path, job="mine:Mine", job_params={})
    code, _, said = orch_call(tmp_path, "launch", file, "--dry-run")
    assert code == 2
    assert "job mine:Mine: ValueError: no such backbone (" in said
    assert "mine.py, line " in said
    assert "--no-try launches without this" in said
    code, _, said = orch_call(tmp_path, "launch", file, "--dry-run", "--no-try")
    assert code == 0, "it may be there on a node with a GPU"
    assert "disk: unknown, because the model can't be created here: ValueError: no such backbone" in said


def test_a_dry_run_reports_that_the_run_is_over(tmp_path: Path, orch_call: OrchCall) -> None:
    make_run(Storage(None), tmp_path / "runs" / "quick", total_lifetime=0.001, job="jobs.digits:Digits")
    code, out, said = orch_call(tmp_path, "launch", "runs/quick/settings.json", "--dry-run")
    assert (code, out) == (2, "")
    assert "quick is over: its total_lifetime ended at " in said


def test_errors_tell_how_to_restore_a_folder_without_settings_and_database(tmp_path: Path, orch_call: OrchCall) -> None:
    run = make_run(Storage(None), tmp_path / "runs" / "quick")
    (run.folder / "checkpoints" / "g00000001-c00000001.pt").write_bytes(b"weights")
    for name in ("orch.db", "settings.json"):
        (run.folder / name).unlink()
    file = write_settings(tmp_path)
    for command in (("launch", file), ("status", "quick"), ("repair", "quick")):
        code, _, said = orch_call(tmp_path, *command)
        assert code == 2
        assert "runs/quick is not a run: it has neither settings.json nor orch.db, but it has checkpoints." in said
        assert "`orch repair quick`" in said


@pytest.mark.parametrize(
    ("code", "job", "message"),
    [
        pytest.param(None, "mine:Mine", "No module named 'mine'", id="no such module"),
        pytest.param("def broken(:\n", "mine:Mine", "SyntaxError", id="a typing mistake"),
        pytest.param("import nowhere_to_be_found\n", "mine:Mine", "nowhere_to_be_found", id="a missing package"),
        pytest.param("sys.exit('usage: mine')\n", "mine:Mine", "usage: mine", id="a script that ends when imported"),
        pytest.param(job_with("pass"), "mine:Yours", "mine has no class Yours", id="no such class"),
        pytest.param("class Mine: pass\n", "mine:Mine", "job mine:Mine: .* derived from jobs.job.Job", id="not a job"),
        pytest.param(
            job_with("def __init__(self, context): raise RuntimeError('the licence has expired')"),
            "mine:Mine",
            "RuntimeError: the licence has expired",
            id="a job that can not be made",
        ),
        pytest.param(
            job_with("def prepare(self, download): raise OSError('the archive is offline')"),
            "mine:Mine",
            "OSError: the archive is offline",
            id="a job whose own check fails",
        ),
    ],
)
@pytest.mark.usefixtures("orch_call")
def test_a_job_that_can_not_be_used_is_an_error_with_the_reason(
    code: str | None, job: str, message: str, tmp_path: Path
) -> None:
    if code is not None:
        write_job(tmp_path, code)
    settings, _ = load(tmp_path / write_settings(tmp_path, job=job, job_params={}))
    with pytest.raises(JobSpecError, match=message):
        check_job(settings, [str(tmp_path)])


def test_a_job_that_can_not_be_imported_leaves_nothing_behind(tmp_path: Path) -> None:
    write_job(tmp_path, "import nowhere_to_be_found\n")
    done = orch(tmp_path, "launch", write_settings(tmp_path, job="mine:Mine"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "orch: job mine:Mine: mine can't be imported: ModuleNotFoundError: No module named 'nowhere_to_be_found'\n"
    )
    assert names_in(tmp_path) == {"settings.json", "mine.py"}


def test_a_dry_run_prints_the_plan_and_makes_nothing(tmp_path: Path, orch_call: OrchCall) -> None:
    options = ["--dry-run", "--executor", "local", "--workers", "3", "--json"]
    code, out, _ = orch_call(tmp_path, "launch", write_settings(tmp_path), *options)
    plan = json.loads(out)
    assert code == 0
    assert (plan["run"], plan["resumes"], plan["workers"]) == ("quick", False, 3)
    assert plan["cycle"] == ["fast", "fine"]
    assert plan["first_claims"] == ["founder 1: fast", "founder 2: fast", "founder 3: fast"]
    assert names_in(tmp_path) == {"settings.json"}


# --- launch again


def test_other_settings_under_the_same_name_are_refused_with_what_differs(folder: Path) -> None:
    before = (folder / "runs/quick/settings.json").read_text()
    done = orch(folder, "launch", write_settings(folder, num_models=3, max_batch_size=100))
    assert done.returncode == 2
    assert done.stderr.startswith("orch: quick already exists with other settings.")
    assert done.stderr.splitlines()[1:] == ["  num_models: 2 -> 3", "  max_batch_size: 200 -> 100"]
    assert (folder / "runs/quick/settings.json").read_text() == before
    assert events(folder / "runs/quick", "state") == 1  # the run had finished


def test_a_run_that_is_over_is_not_resumed(folder: Path, orch_call: OrchCall) -> None:
    code, out, error = orch_call(folder, "launch", "settings.json")
    assert (code, out) == (2, "")
    assert error.startswith("orch: quick is ")
    assert "6 epochs were trained, of 6 allowed" in error
    assert Run.open(folder / "runs/quick").status()["chunks"]["claimed"] == 6


DIES_ONCE = """
from jobs.digits import Digits
class Mine(Digits):
    steps = 0
    def loss(self, outputs, targets):
        Mine.steps += 1
        if Mine.steps == 20 and not Path("it died").exists():  # in the fourth epoch of six steps each
            Path("it died").touch()
            os.kill(os.getpid(), 9)
        return super().loss(outputs, targets)
"""


def test_a_second_launch_continues_a_killed_run(tmp_path: Path, orch_call: OrchCall) -> None:
    write_job(tmp_path, DIES_ONCE)
    file = write_settings(tmp_path, job="mine:Mine")
    assert orch(tmp_path, "launch", file, "--no-try", "--json").returncode == -9
    assert (tmp_path / "it died").exists()

    code, out, _ = orch_call(tmp_path, "launch", file, "--json")
    result = json.loads(out)
    assert (code, result["state"], result["epochs"]) == (0, "finished", 6)
    assert result["chunks"]["expired"] == 1
    assert result["chunks"]["promoted"] + result["chunks"]["discarded"] == 6
    assert violations(Run.open(tmp_path / "runs/quick")) == []


# --- a job of the user's own


OWN = """
import torch
from jobs.job import Job
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

class Mine(Job):
    def model(self):
        return torch.nn.Linear(64, 10)

    def data(self, split):
        images, labels = load_digits(return_X_y=True)
        some = slice(1400, None) if split == "test" else slice(1400)
        return TensorDataset(torch.tensor(images[some] / 16, dtype=torch.float32), torch.tensor(labels[some]))
"""


def test_a_job_in_the_users_folder_trains_and_is_evaluated_from_any_other(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    write_job(tmp_path / "work", OWN)
    file = write_settings(tmp_path / "work", job="mine:Mine", job_params={}, executor=None, name="own")
    result = json.loads(output(orch(tmp_path / "work", "launch", file, "--executor", "inline", "--json")))
    assert (result["state"], result["epochs"], result["executor"]) == ("finished", 6, "inline")
    assert result["best"] > 0.5

    board = json.loads(output(orch_here(tmp_path, "evaluate", "work/runs/own", "--json")))
    assert all(entry["test_metrics"]["accuracy"] > 0.4 for entry in board["entries"])


RAISES = """
from jobs.digits import Digits
class Mine(Digits):
    def loss(self, outputs, targets):
        if not Path("mended").exists():
            raise ValueError("the camera is unplugged")
        return super().loss(outputs, targets)
"""


@pytest.mark.parametrize(
    ("error", "max_failures", "workers", "failures"),
    [
        pytest.param("ValueError", 1, 1, 1, id="one failure allowed"),
        pytest.param("ValueError", 2, 1, 2, id="two allowed"),
        pytest.param("ValueError", 5, 1, 2, id="five allowed, but the second is the same as the first"),
        pytest.param("OSError", 3, 1, 3, id="three allowed, which another node may not have"),
        pytest.param("ValueError", 2, 2, 2, id="two allowed, settings for two workers"),
    ],
)
def test_a_job_that_fails_each_time_fails_the_run_and_says_why(
    error: str, max_failures: int, workers: int, failures: int, tmp_path: Path, orch_call: OrchCall
) -> None:
    write_job(tmp_path, RAISES.replace("ValueError", error))
    file = write_settings(tmp_path, job="mine:Mine", max_failures=max_failures, workers=workers)
    code, out, _ = orch_call(tmp_path, "launch", file, "--no-try", "--json")
    result = json.loads(out)
    assert (code, result["state"]) == (1, "failed")
    assert f"{error}: the camera is unplugged" in result["reason"]
    assert result["chunks"]["failed"] == failures
    assert (result["epochs"], result["board"]["entries"]) == (0, [])


def test_a_failed_run_shows_why_and_continues_when_its_job_is_corrected(tmp_path: Path, orch_call: OrchCall) -> None:
    write_job(tmp_path, RAISES)
    file = write_settings(tmp_path, job="mine:Mine", max_failures=2)
    for command, expected in (["launch", file, "--no-try"], 1), (["status"], 0), (["runs"], 0):
        code, out, _ = orch_call(tmp_path, *command)
        assert code == expected
        assert "failed" in out
        assert "camera is unplugged" in " ".join(out.split())
    (tmp_path / "mended").touch()
    code, out, _ = orch_call(tmp_path, "launch", file, "--json")
    result = json.loads(out)
    assert (code, result["state"], result["epochs"], result["chunks"]["failed"]) == (0, "finished", 6, 2)


def test_an_inline_run_with_settings_for_two_workers_ends(tmp_path: Path, orch_call: OrchCall) -> None:
    code, out, _ = orch_call(tmp_path, "launch", write_settings(tmp_path, workers=2), "--json")
    result = json.loads(out)
    assert (code, result["state"]) == (0, "finished")
    assert {worker["state"] for worker in result["workers"]} == {"ended"}
