"""A launch trains a few steps first: mistakes in a job are one clear error, before anything is queued."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import ORCH, OrchCall

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


SILENT: list[tuple[str, str, str | None, str]] = [  # body, code after it, is it only noted, message
    ("def loss(self, o, t): return torch.tensor(float(o.detach().sum()), requires_grad=True)", "", None,
     "no parameter of the model is trained"),
    ("def optimizer(self, model, profile): return torch.optim.SGD(model[1:2].parameters(), lr=0.1)\n"
     "def model(self): return nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 2))", "", "noted",
     "not trained, without a gradient or not in the optimizer: 2.weight, 2.bias"),
    ("def model(self): return Net()",
     "class Net(nn.Module):\n"
     "    def __init__(self):\n        super().__init__()\n"
     "        self.layers, self.head = [nn.Linear(12, 8)], nn.Linear(8, 2)\n"
     "    def forward(self, x): return self.head(self.layers[0](x.flatten(1)))\n", None,
     "a model that was restored from its checkpoint has another"),
    ("def model(self): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2))\n"
     "def predict(self, model, inputs):\n    model.train()\n    return model(inputs)", "", None,
     "an evaluation changes the model's weights or buffers"),
    ("def collate(self, examples):\n"
     "    return torch.stack([e[0] for e in examples], 1), torch.stack([e[1] for e in examples])\n"
     "def training_loss(self, m, b): return self.loss(m(b[0].transpose(0, 1)), b[1])\n"
     "def evaluation_metrics(self, m, b): return self.metrics(m(b[0].transpose(0, 1)), b[1])", "", None,
     "Mine.batch_size(batch) gives"),
    ("def __init__(self, context):\n    super().__init__(context)\n    import random\n"
     "    self.chosen = random.SystemRandom().sample(range(40), 30)\n"
     "def data(self, split): return torch.utils.data.Subset(Base.data(self, split), self.chosen)", "", None,
     "differs when it is loaded again: its labels differ"),
    ("def data(self, split):\n"
     "    whole = torch.arange(40.)\n    values = whole.flip(0) if split == 'train' else whole\n"
     "    return TensorDataset(torch.zeros(40, 3, 2, 2), values)\n"
     "def loss(self, o, t): return (o.mean(1) - t).square().mean()\n"
     "def metrics(self, o, t): return {'accuracy': self.loss(o, t)}", "", None, "have different targets"),
    ("def data(self, split):\n    order = torch.arange(40).flip(0) if split == 'train' else torch.arange(40)\n"
     "    torch.manual_seed(0)\n    return TensorDataset(torch.randn(40, 3, 2, 2)[order])\n"
     "def training_loss(self, m, b): return m(b[0]).square().mean()\n"
     "def evaluation_metrics(self, m, b): return {'accuracy': m(b[0]).mean()}", "", "noted", "have different inputs"),
    ("def metrics(self, o, t):\n    self.log_image('a', torch.zeros(4, 4, 3))\n    return Base.metrics(self, o, t)",
     "", None,
     "log_image('a'): the shape is (4, 4, 3)"),
    ("def train_chunk(self, context):\n    from jobs.job import ChunkResult\n"
     "    for batch in context.batches(): pass\n    return ChunkResult({})", "", None, "reported 0 of 1 epoch"),
    ("def loss(self, o, t):\n    assert self.profile.name != 'b', 'not under b'\n    return Base.loss(self, o, t)",
     "", None,
     "not under b"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "after", "noted", "message"), SILENT, ids=[message[:40] for *_, message in SILENT])
def test_what_would_be_silently_wrong_is_found_at_launch(
    body: str, after: str, noted: str | None, message: str, tmp_path: Path, orch_call: OrchCall
) -> None:
    profiles = [{"name": "a", "learning_rate": 0.1}, {"name": "b", "learning_rate": 0.01}]
    code, _, said = orch_call(tmp_path, "launch", write(tmp_path, body, after, training_profiles=profiles), "--dry-run")
    assert message in said
    assert code == (0 if noted else 2), said


def test_the_launch_its_jobs_and_the_evaluation_see_sets_in_the_same_order(tmp_path: Path) -> None:
    body = (
        "def data(self, split):\n"
        "    names = [f'word{i % 2}' for i in range(40)]\n    numbers = {n: i for i, n in enumerate(set(names))}\n"
        "    targets = torch.tensor([numbers[n] for n in names])\n"
        "    return TensorDataset(torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(0)), targets)"
    )
    file = write(tmp_path, body, executor="local")
    for seed, command in (("1", ["launch", file, "--wait"]), ("2", ["evaluate"])):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([ORCH, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_a_model_that_is_too_large_for_this_machine_is_not_tried(tmp_path: Path, orch_call: OrchCall) -> None:
    body = "def model(self): return nn.Sequential(nn.Flatten(), nn.Linear(12, 10**11), nn.Linear(10**11, 2))"
    code, _, said = orch_call(tmp_path, "launch", write(tmp_path, body), "--dry-run")
    assert code == 0, said
    assert "not tried here: training the model takes about 48000.0 GB" in said
