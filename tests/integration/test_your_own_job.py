"""The examples in docs/your-own-job.md are read from the page and run."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from jobs.data import randomness
from jobs.errors import JobError
from jobs.job import ChunkContext, ChunkInterrupted, ChunkResult, Job, JobContext
from jobs.loggers.observer import Observer
from jobs.training.opening import check_job, has_own_loop, load_job, open_session
from jobs.training.own_loop import OwnLoop
from jobs.training.session import Session
from jobs.training.states import export, read
from jobs.training.trying import try_job
from jobs.verify_resume import link
from jobs.verify_resume.check import verify
from jobs.verify_resume.exactness import differences
from orchestrator.profile import Profile
from orchestrator.records import EpochResult, Finished, Interrupted, Work
from orchestrator.run.run import Run
from orchestrator.settings.settings import Settings
from tests.support.command_line import orch_here, output
from tests.support.invariants import violations
from tests.support.settings import settings as common_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "your-own-job.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
MOONS, MOONS_JSON, COMMANDS = (body for _, body in BLOCKS[:3])
PYTHON, JSON, CONSOLE = ([body for kind, body in BLOCKS if kind == wanted] for wanted in ("python", "json", "console"))
JOBS = {
    name: body for body in PYTHON for name in re.findall(r"^class (\w+)\((?:Job|Moons)\)", body, flags=re.MULTILINE)
}
RUN_ELSEWHERE = ["orch verify-resume moons.json --set deterministic=true"]  # in test_exact_resume.py


def block_with(word: str) -> str:
    (block,) = [body for body in PYTHON if word in body]
    return block


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the user's modules, which are unloaded afterwards."""
    (tmp_path / "moons.py").write_text(MOONS)
    (tmp_path / "moons.json").write_text(MOONS_JSON)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def settings(job: str, **changes: Any) -> Settings:
    return common_settings(**{"job": job, "max_batch_size": 8, "precision": "fp32"} | changes)


def orch(folder: Path, command: str) -> str:
    """Run the command: a launch in a process of its own, all others in this process, which has imported torch."""
    program, *arguments = command.split()
    assert program == "orch"
    if arguments[0] != "launch":
        return output(orch_here(folder, *arguments))
    environment = os.environ | {"PYTHONPATH": "", "NO_COLOR": "1"}
    run = [str(Path(sys.executable).with_name("orch")), *arguments]
    return output(subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True, timeout=240))


# --- the example


def test_the_complete_example_has_at_most_30_lines() -> None:
    assert len(f"{MOONS}{MOONS_JSON}{COMMANDS}".splitlines()) <= 30


def test_the_complete_example_runs_unchanged(folder: Path) -> None:
    for command in COMMANDS.splitlines():
        orch(folder, command)
    run = Run.open(folder / "runs" / "moons")
    board = run.board()
    assert len(board["entries"]) == 2
    assert board["entries"][0]["score"] > 0.95
    assert board["entries"][0]["test_metrics"]["accuracy"] > 0.95
    assert violations(run) == []
    model = load_job(settings("moons:Moons")).model()
    model.load_state_dict(torch.load(folder / "best.pt", weights_only=True))


def test_every_block_of_the_page_is_python_json_or_console() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "json", "console"}
    assert TEXT.count("```") == 2 * len(BLOCKS)
    assert set(JOBS.values()) == set(PYTHON)  # so the tests below run each of them


@pytest.mark.parametrize("body", JSON, ids=lambda body: " ".join(body.split())[:40])
def test_every_settings_block_is_valid(body: str, folder: Path) -> None:
    given = json.loads(body)
    if "learning_rate" in given:
        check_job(settings("moons:Moons", training_profiles=[given]))
    else:
        checked = settings(**{"job": "moons:Moons"} | given)
        assert set(given) <= set(type(checked).model_fields)


def test_every_command_prints_what_the_page_shows(folder: Path) -> None:
    for body in CONSOLE[1:]:
        command, *shown = body.splitlines()
        command = command.removeprefix("$ ")
        if command not in RUN_ELSEWHERE:
            assert set(shown) <= set(output(orch_here(folder, *command.split()[1:])).splitlines())


def test_every_link_of_the_page_leads_to_a_file() -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", TEXT)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    places = re.findall(r"\]\(#([^)]*)\)", TEXT)
    headings = [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)", TEXT, re.M)]
    assert set(places) <= set(headings)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_of_the_page_can_be_launched_and_resumes_exactly(name: str, folder: Path) -> None:
    for module, text in {**THEIR_MODULES, "page": JOBS[name]}.items():
        (folder / f"{module}.py").write_text(text)
    given = settings(f"page:{name}", deterministic=True)
    assert check_job(given) == []
    assert [line for line in try_job(given).lines if not line.startswith("data: ")] == []
    trial = link.Trial(given, [str(folder)], 1, "cpu", chunks=1, epochs_per_chunk=2, steps_per_epoch=3, interruptions=2)
    assert verify(trial, lambda _line: None, in_this_process).inexact is None


def in_this_process(trial: link.Trial, root: Path, name: str, start: int, stop: int | None) -> dict[str, Any]:
    """Run a link with other random states, as a fresh process would."""
    randomness.seed_all(next(_processes))
    link.main(root, name, start, link.NO_STOP if stop is None else stop)
    result: dict[str, Any] = json.loads((root / link.RESULT).read_text())
    assert "error" not in result, result["error"]
    return result


# --- other libraries, which are replaced by modules with the same names, because they may not be installed

TRANSFORMERS = """
import torch
from types import SimpleNamespace

class AutoTokenizer:
    @classmethod
    def from_pretrained(cls, name):
        return cls()

    def __call__(self, texts, truncation):
        assert truncation
        ids = [[ord(letter) for letter in text] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(text) for text in texts]}

    def pad(self, examples, return_tensors):
        assert return_tensors == "pt"
        most = max(len(example["input_ids"]) for example in examples)
        padded = {key: [example[key] + [0] * (most - len(example[key])) for example in examples]
                  for key in ("input_ids", "attention_mask")}
        return {key: torch.tensor(rows) for key, rows in padded.items()} | {
            "labels": torch.tensor([example["labels"] for example in examples])}

class AutoModelForSequenceClassification(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, name, num_labels):
        return cls(num_labels)

    def __init__(self, num_labels):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(128, 8), torch.nn.Linear(8, num_labels)

    def forward(self, input_ids, attention_mask, labels=None):
        logits = self.head((self.embedding(input_ids) * attention_mask.unsqueeze(-1)).mean(dim=1))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)
"""
DATASETS = """
def load_dataset(name, split):
    return Rows([{"text": "good" if i % 2 else "bad", "label": i % 2} for i in range(64)])

class Rows:
    def __init__(self, rows):
        self.rows = rows

    def rename_column(self, old, new):
        return Rows([{new if key == old else key: value for key, value in row.items()} for row in self.rows])

    def map(self, function, batched, remove_columns):
        found = function({key: [row[key] for row in self.rows] for key in self.rows[0]})
        new = [{key: values[i] for key, values in found.items()} for i in range(len(self.rows))]
        kept = [{key: v for key, v in row.items() if key not in remove_columns} for row in self.rows]
        return Rows([old | added for old, added in zip(kept, new, strict=True)])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return [row[index] for row in self.rows] if isinstance(index, str) else self.rows[index]
"""
MY_PROJECT = '''
import torch
from torch.utils.data import TensorDataset

class LitClassifier(torch.nn.Module):
    """Has the parts of a LightningModule that orch needs."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(3, 2)

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self(inputs), targets)

def training_set():
    targets = torch.arange(80) % 2
    noise = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(noise + 3 * targets.unsqueeze(1), targets)

test_set = training_set
'''
THEIR_MODULES = {"transformers": TRANSFORMERS, "datasets": DATASETS, "my_project": MY_PROJECT}


@pytest.mark.parametrize(
    ("word", "job", "modules", "optimizer"),
    [
        ("transformers", "Reviews", {"transformers": TRANSFORMERS, "datasets": DATASETS}, "AdamW"),
        ("my_project", "Lit", {"my_project": MY_PROJECT}, None),
    ],
    ids=["Hugging Face", "Lightning"],
)
def test_the_pages_jobs_for_other_libraries_train(
    word: str, job: str, modules: Mapping[str, str], optimizer: str | None, folder: Path
) -> None:
    for name, text in (modules | {"theirs": block_with(word)}).items():
        (folder / f"{name}.py").write_text(text)
    rate = {"name": "one", "learning_rate": 0.05, "optimizer": optimizer}
    given = settings(f"theirs:{job}", training_profiles=[rate])
    assert check_job(given) == []
    one = open_session(given, cores=1)
    work = Work(given.training_profiles[0], 8, seed=1, repeat=0, parent=None, suspended=None)
    result = one.train(work, lambda: False, lambda _epoch: None)
    assert isinstance(result, Finished)
    assert result.score > 0.9
    assert one.state()["optimizer_class"] == f"torch.optim.{'adamw:AdamW' if optimizer else 'adam:Adam'}"
    with (folder / "one.pt").open("wb") as target:
        one.save(target)
    assert one.evaluate_file(folder / "one.pt", "test")["accuracy"] > 0.9


# --- profiles, and other processes


def test_a_profile_has_its_own_number_of_epochs(folder: Path) -> None:
    cycle = [{"name": "long", "learning_rate": 0.1, "epochs": 3}, {"name": "short", "learning_rate": 0.1}]
    given = json.loads(MOONS_JSON) | {"training_profiles": cycle, "stop_after_epochs": 4, "num_models": 1}
    (folder / "moons.json").write_text(json.dumps(given))
    output(orch_here(folder, "launch", "moons.json", "--executor", "inline"))
    chunks = Run.open(folder / "runs" / "moons").leaderboard.reader.rows("chunk")
    assert [(chunk["profile"], chunk["epochs"]) for chunk in chunks] == [("long", 3), ("short", 2)]


class Deep(Job):
    """A loop of its own whose model depends on the profile."""

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(2, self.profile.params["width"])

    def data(self, split: Any) -> Any:
        return TensorDataset(torch.eye(2).repeat(20, 1), torch.arange(40) % 2)

    def train_chunk(self, context: ChunkContext) -> ChunkResult:
        model = self.model()
        context.report(context.evaluate(model))
        return ChunkResult({"model": model.state_dict()})


def test_a_model_of_an_own_loop_is_evaluated_under_its_profile(tmp_path: Path) -> None:
    cycle = [{"name": str(width), "learning_rate": 0.1, "params": {"width": width}} for width in (2, 3)]
    given = settings("any:Job", training_profiles=cycle)
    one = OwnLoop(Deep(JobContext(given)))
    result = train(one, Work(given.training_profiles[1], 1, 5, 0, None, None), tmp_path / "x.pt")
    assert isinstance(result, Finished)
    assert OwnLoop(Deep(JobContext(given))).evaluate_file(tmp_path / "x.pt", "test")["accuracy"] >= 0


def test_a_loaders_process_gets_a_job_that_shows_nothing() -> None:
    one = OwnLoop(Walk(JobContext(settings("any:Job", job_params={"a": 1}))))
    assert one.job.show != Job(one.job.context).show
    copied = pickle.loads(pickle.dumps(one.job.collate)).__self__
    assert (type(copied), copied.params) == (Walk, {"a": 1})
    copied.log_histogram("x", torch.zeros(1))


# --- a loop of the job's own


def test_the_pages_own_loop_runs_with_orch_launch(folder: Path) -> None:
    (folder / "closure.py").write_text(block_with("LBFGS"))
    given = {"job": "closure:Closure", "num_models": 2, "max_batch_size": 900, "stop_after_epochs": 5}
    given["training_profiles"] = [{"name": "one", "learning_rate": 0.5}]
    (folder / "closure.json").write_text(json.dumps(given))
    output(orch_here(folder, "launch", "closure.json", "--executor", "inline"))
    orch(folder, "orch evaluate closure")
    orch(folder, "orch export closure")
    run = Run.open(folder / "runs" / "closure")
    board = run.board()
    assert board["entries"][0]["score"] > 0.9
    assert board["entries"][0]["test_metrics"]["accuracy"] > 0.9
    assert violations(run) == []
    assert set(torch.load(folder / "best.pt", weights_only=True)) == {"0.weight", "0.bias", "2.weight", "2.bias"}


ONE = Profile("one", 0.1, 0.9, 0.0)


class Walk(Job):
    """A random walk, whose state is its current position."""

    STEPS = 4  # steps in an epoch

    def train_chunk(self, context: ChunkContext) -> ChunkResult | ChunkInterrupted:
        state = dict(context.state or {"at": torch.randn(3), "step": 0})
        for _ in range(context.epochs):
            while state["step"] < self.STEPS:
                if context.should_stop():
                    return ChunkInterrupted(state, state["step"])
                state = {"at": state["at"] + torch.randn(3), "step": state["step"] + 1}
            state["step"] = 0
            context.report({"accuracy": float(state["at"].sum())})
        return ChunkResult(state)


def walk(job: type[Job] = Walk) -> OwnLoop:
    return OwnLoop(job(JobContext(settings("any:Job"))))


def founder(epochs: int = 3) -> Work:
    return Work(ONE, epochs, seed=5, repeat=0, parent=None, suspended=None)


def child(parent: Path, repeat: int = 0) -> Work:
    return Work(ONE, 3, seed=0, repeat=repeat, parent=parent, suspended=None)


_processes = itertools.count(9000)


def train(one: OwnLoop, work: Work, file: Path, steps: int | None = None) -> Finished | Interrupted:
    randomness.seed_all(next(_processes))
    asked = itertools.count()
    result = one.train(work, lambda: steps is not None and next(asked) >= steps, lambda _epoch: None)
    with file.open("wb") as target:
        one.save(target)
    return result


@pytest.mark.parametrize("start", ["a founder", "a child"])
@pytest.mark.parametrize("steps", range(3 * Walk.STEPS))
def test_an_interrupted_chunk_of_an_own_loop_equals_the_uninterrupted_one(
    steps: int, start: str, tmp_path: Path
) -> None:
    train(walk(), founder(), tmp_path / "parent.pt")
    work = founder() if start == "a founder" else child(tmp_path / "parent.pt")
    whole = train(walk(), work, tmp_path / "whole.pt")
    cut = train(walk(), work, tmp_path / "cut.pt", steps)
    assert cut == Interrupted(steps % Walk.STEPS)
    again = train(walk(), Work(ONE, 3, 0, 0, work.parent, tmp_path / "cut.pt"), tmp_path / "again.pt")
    assert not list(differences(read(tmp_path / "whole.pt"), read(tmp_path / "again.pt")))
    assert isinstance(whole, Finished)
    assert isinstance(again, Finished)
    assert [(r.number, r.metrics) for r in again.results] == [(r.number, r.metrics) for r in whole.results]
    assert (again.score, again.epochs) == (whole.score, whole.epochs)


def test_repeated_children_of_one_parent_differ(tmp_path: Path) -> None:
    train(walk(), founder(), tmp_path / "parent.pt")
    ends = [train(walk(), child(tmp_path / "parent.pt", repeat), tmp_path / "x.pt") for repeat in (0, 0, 1)]
    scores = [end.score for end in ends if isinstance(end, Finished)]
    assert scores[0] == scores[1] != scores[2]


class Lazy(Walk):
    def train_chunk(self, context: ChunkContext) -> Any:
        context.report({"accuracy": 0.5})
        return ChunkResult({})


class Silent(Walk):
    def train_chunk(self, context: ChunkContext) -> Any:
        context.report({"loss": 0.5})


class Forgetful(Walk):
    def train_chunk(self, context: ChunkContext) -> Any:
        return {"at": 1}


class Hasty(Walk):
    def train_chunk(self, context: ChunkContext) -> Any:
        return ChunkInterrupted({"at": 1})


class Whole(Walk):
    def train_chunk(self, context: ChunkContext) -> Any:
        return ChunkResult({"at": 1, "model": torch.nn.Linear(1, 1)})


class Bare(Walk):
    def train_chunk(self, context: ChunkContext) -> Any:
        return ChunkResult("at 1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Hasty, r"returned ChunkInterrupted, but context.should_stop\(\) had not returned True"),
        (
            Whole,
            r"state returned by train_chunk can't be kept: model \(Linear\): .*; allowed: dicts, lists, tensors",
        ),
        (Bare, r"a state that is a str; allowed: a dict"),
        (Lazy, r"reported 1 of 3 epochs; call context.report"),
        (Silent, r"metric.name: 'accuracy' is not among the metrics that were reported: loss"),
        (Forgetful, r"train_chunk returned dict; allowed: ChunkResult and ChunkInterrupted"),
    ],
)
def test_a_loop_that_breaks_a_rule_is_an_error_that_names_the_rule(
    job: type[Job], message: str, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=message):
        train(walk(job), founder(), tmp_path / "x.pt")


def test_a_loop_may_end_early_with_a_score_of_nan(tmp_path: Path) -> None:
    class GivesUp(Walk):
        def train_chunk(self, context: ChunkContext) -> ChunkResult:
            context.report({"accuracy": float("nan")})
            return ChunkResult({})

    result = train(walk(GivesUp), founder(), tmp_path / "x.pt")
    assert isinstance(result, Finished)
    assert result.score != result.score
    assert result.epochs == 1


def test_a_state_without_a_model_cannot_be_exported(tmp_path: Path) -> None:
    train(walk(), founder(), tmp_path / "x.pt")
    with (tmp_path / "out.pt").open("wb") as target, pytest.raises(JobError, match='by train_chunk has no "model"'):
        export(tmp_path / "x.pt", target)


def test_an_own_loop_refuses_a_checkpoint_of_orchs_loop(tmp_path: Path) -> None:
    torch.save({"format": 2, "epochs": 1, "model": {}}, tmp_path / "x.pt")
    with pytest.raises(JobError, match=r"x\.pt: it was not made by the job's own loop"):
        train(walk(), child(tmp_path / "x.pt"), tmp_path / "y.pt")


def test_an_own_loop_reports_epochs_to_an_observer(tmp_path: Path) -> None:
    calls: list[Any] = []

    class Noting(Observer):
        def chunk(self, work: Work) -> None:
            calls.append("chunk")

        def epoch(self, result: EpochResult) -> None:
            calls.append(result.number)

        def close(self) -> None:
            calls.append("close")

    one = OwnLoop(Walk(JobContext(settings("any:Job"))), observer=Noting())
    train(one, founder(), tmp_path / "x.pt")
    one.close()
    assert calls == ["chunk", 1, 2, 3, "close"]


def test_a_job_has_an_own_loop_if_it_overrides_train_chunk() -> None:
    context = JobContext(settings("any:Job"))
    assert has_own_loop(Walk(context))
    assert not has_own_loop(Job(context))
    assert isinstance(open_session(settings("jobs.digits:Digits"), cores=1), Session)
