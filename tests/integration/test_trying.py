"""A launch trains a few steps first: mistakes in a job are one clear error, before anything is queued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import OrchCall

HEAD = """\
import enum, math, pathlib
import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset
from jobs.job import ChunkResult, Job

class Base(Job):
    def model(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    def data(self, split):
        targets = torch.arange(40) % 2
        return TensorDataset(torch.randn(40, 3, 2, 2) + targets.view(-1, 1, 1, 1), targets)

class Mine(Base):
"""
CONV = "def model(self): return Net()\nclass Net(nn.Module):\n"


def write(folder: Path, body: str, after: str = "", **changes: Any) -> str:
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (folder / "mine.py").write_text(HEAD + lines + after)
    settings = {
        "name": "mine", "job": "mine:Mine", "executor": "inline", "num_models": 1, "max_batch_size": 10,
        "cores_per_worker": 1, "loggers": [], "total_lifetime": 100, "eon_lifetime": 50, "stop_after_epochs": 1,
        "training_profiles": [{"name": "only", "learning_rate": 0.1}],
    }  # fmt: skip
    (folder / "mine.json").write_text(json.dumps(settings | changes))
    return "mine.json"


@pytest.fixture(autouse=True)
def _own_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)


WRONG = [
    ("def model(self): return nn.Sequential(nn.Flatten(), nn.Linear(13, 2))", "mat1 and mat2 shapes", {}),
    ("def loss(self, o, t): return (o - o.mean()).abs()", r"Mine.loss() returned a tensor of shape", {}),
    ("def loss(self, o, t): return o.sum() * math.nan", "the training loss is nan in the first steps under", {}),
    ("def metrics(self, o, t): return {'accuracy': [1, 2]}", "Mine.metrics() returned a value of type list", {}),
    ("def data(self, split): return torch.load('missing.pt')", "missing.pt", {}),
    ("def data(self, split): return open('missing.csv')", "No such file or directory: 'missing.csv'", {}),
    ("def model(self): return nn.Sequential(nn.Flatten(), nn.Linear(12, 2), nn.Dropout(2))", "dropout probability", {}),
    ("", "optimizer Muon: Muon only supports 2D parameters",
     {"training_profiles": [{"name": "m", "learning_rate": 0.1, "optimizer": "Muon"}]}),
    ("def model(self):\n    self.kept = getattr(self, 'kept', None) or Base.model(self)\n    return self.kept",
     "Mine.model() returned an object that it had returned before", {}),
    ("def data(self, split): return iter([])", "without a length", {}),
    ("def train_chunk(self, context): return 5", "train_chunk returned int; allowed: ChunkResult", {}),
    ("def train_chunk(self, context):\n    assert not context.profile.params, 'the second profile'\n"
     "    context.report({'accuracy': 1})\n    return ChunkResult({'model': {}})", "the second profile",
     {"training_profiles": [{"name": "a", "learning_rate": 1}, {"name": "b", "learning_rate": 1, "params": {"x": 1}}]}),
    ("def train_chunk(self, context):\n    context.state and context.state['weights']\n"
     "    context.report({'accuracy': 1})\n    return ChunkResult({'model': {}})", "KeyError: 'weights'", {}),
    ("def loss(self, o, t): raise SystemExit('no more credits')", "SystemExit: no more credits", {}),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message", "changes"), WRONG, ids=[message[:40] for _, message, _ in WRONG])
@pytest.mark.parametrize("dry", [("--dry-run",), ()], ids=["dry run", "launch"])
def test_a_mistake_is_found_before_anything_is_queued(
    body: str, message: str, changes: dict[str, Any], dry: tuple[str, ...], tmp_path: Path, orch_call: OrchCall
) -> None:
    code, out, said = orch_call(tmp_path, "launch", write(tmp_path, body or "pass", **changes), *dry)
    assert code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs" / "mine").exists()
    assert out == ""


def test_a_schedule_that_can_not_be_kept_is_found_and_its_key_is_named(tmp_path: Path, orch_call: OrchCall) -> None:
    schedule = (
        "class Own(torch.optim.lr_scheduler.LRScheduler):\n"
        "    def __init__(self, optimizer):\n        self.helper = object()\n        super().__init__(optimizer)\n"
        "    def get_lr(self): return self.base_lrs\n"
    )
    profiles = [{"name": "a", "learning_rate": 0.1, "schedule": {"name": "mine:Own"}}]
    file = write(tmp_path, "pass", schedule, training_profiles=profiles)
    code, _, said = orch_call(tmp_path, "launch", file, "--dry-run")
    assert (code, "schedule.scheduler.helper (object)" in said) == (2, True)


def test_the_message_names_the_place_in_the_users_file(tmp_path: Path, orch_call: OrchCall) -> None:
    body = "def loss(self, o, t):\n    return o.undefined()"
    _, _, said = orch_call(tmp_path, "launch", write(tmp_path, body), "--dry-run")
    assert f"({tmp_path / 'mine.py'}, line {HEAD.count(chr(10)) + 2}, in loss)" in said


def test_a_launch_without_the_try_finds_the_mistake_only_in_the_job(tmp_path: Path, orch_call: OrchCall) -> None:
    file = write(tmp_path, WRONG[0][0], max_failures=2)
    code, _, said = orch_call(tmp_path, "launch", file, "--no-try")
    assert code == 1
    assert "failed" in said


def test_a_dry_run_says_what_was_tried(tmp_path: Path, orch_call: OrchCall) -> None:
    profiles = [
        {"name": "a", "learning_rate": 0.1, "schedule": {"name": "StepLR", "step_size": 3, "warmup": 1}},
        {"name": "b", "learning_rate": 0.01, "optimizer": "AdamW"},
    ]
    file = write(tmp_path, "default_optimizer = 'RMSprop'", training_profiles=profiles, job_params={"widht": 3})
    code, out, said = orch_call(tmp_path, "launch", file, "--dry-run")
    assert code == 0
    assert "profile a: RMSprop(lr=0.1, " in out
    assert "StepLR(step_size=3) after a warm-up of 1 epochs" in out
    assert "profile b: AdamW(lr=0.01, betas=(0.9, 0.999), eps=1e-08, weight_decay=0" in out
    assert "data: 36 training and 4 validation examples, split within each of 2 classes" in said
    assert "job_params: nothing has read 'widht'; is the name right?" in said


def test_equal_founders_are_noted(tmp_path: Path, orch_call: OrchCall) -> None:
    body = "def model(self):\n    torch.manual_seed(0)\n    return Base.model(self)"
    code, _, said = orch_call(tmp_path, "launch", write(tmp_path, body), "--dry-run")
    assert (code, "model() returned the same weights for two founders" in said) == (0, True)


VIEW = (
    "class Net(nn.Module):\n"
    "    def __init__(self):\n        super().__init__()\n"
    "        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(16, 2)\n"
    "    def forward(self, x):\n        out = self.conv(x)\n        return self.fc(out.view(out.size(0), -1))\n"
)


def test_a_model_that_does_not_bear_channels_last_is_trained_without(tmp_path: Path, orch_call: OrchCall) -> None:
    file = write(tmp_path, "def model(self): return Net()", VIEW)
    code, _, said = orch_call(tmp_path, "launch", file)
    assert code == 0, said
    assert 'so this run sets "channels_last": false; with reshape() instead of view()' in said
    assert json.loads((tmp_path / "runs/mine/settings.json").read_text())["channels_last"] is False
    code, _, said = orch_call(tmp_path, "launch", file, "--set", "stop_after_epochs=1")
    assert "already exists with other settings" not in said


def test_the_try_changes_nothing_of_the_training(tmp_path: Path, orch_call: OrchCall) -> None:
    scores = []
    for name, options in (("tried", ()), ("not", ("--no-try",))):
        file = write(tmp_path, "pass", deterministic=True)
        code, out, _ = orch_call(tmp_path, "launch", file, "--json", "--set", f"name={name}", *options)
        assert code == 0
        scores.append([entry["metrics"] for entry in json.loads(out)["board"]["entries"]])
    assert scores[0] == scores[1]


def test_the_launch_keeps_the_fingerprint_that_jobs_compare_with(tmp_path: Path, orch_call: OrchCall) -> None:
    file = write(tmp_path, "pass")
    assert orch_call(tmp_path, "launch", file)[0] == 0
    kept = json.loads((tmp_path / "runs/mine/fingerprints/train.json").read_text())
    assert kept["examples"] == 40


def test_a_job_that_needs_a_gpu_is_launched_with_a_note(tmp_path: Path, orch_call: OrchCall) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    body = "def model(self): return Base.model(self).cuda()"
    code, _, said = orch_call(tmp_path, "launch", write(tmp_path, body), "--dry-run")
    assert (code, "not tried here: the job needs a GPU" in said) == (0, True)
