"""The jobs in docs/jobs train as the loops in docs/jobs/plain do, resume exactly, and run from launch to export."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from jobs.data import randomness
from jobs.data.feeds import Feed
from jobs.errors import JobError
from jobs.training.opening import load_job, open_session
from jobs.training.position import order_seed
from jobs.training.session import AFTER_MODEL, Session
from jobs.training.states import weights
from jobs.verify_resume import link
from jobs.verify_resume.check import verify
from jobs.verify_resume.exactness import differences
from orchestrator.records import Finished, Work
from orchestrator.run.run import Run
from orchestrator.settings.loading import load
from orchestrator.settings.settings import Settings
from tests.support.command_line import orch_here, output
from tests.support.invariants import violations
from tests.support.real_data import mnist_root

FOLDER = Path(__file__).parents[2] / "docs" / "jobs"
SEED = 7

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Port:
    """A job of the folder, with what makes it short enough for a test."""

    name: str
    epochs: int
    params: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0  # relative, of the number that both loops reach; 0: the weights are the same, bit for bit


PORTS = {
    port.name: port
    for port in (
        Port("mnist", 2, {"examples": 400}),
        Port("chars", 4, {"letters": 40_000}, tolerance=1e-4),
        Port("unet", 5, {"examples": 200}),
        Port("vae", 3),
        Port("gan", 15),
        Port("stateful", 4, {"words": 4000}),
        Port("names", 3),
        Port("diabetes", 10),
    )
}


@pytest.fixture(params=PORTS)
def port(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Port]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield PORTS[request.param]
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def settings(port: Port, **changes: Any) -> Settings:
    """Return the settings of the folder's file, with less data and only one kind of number and layout."""
    fixed = {"job_params": port.params, "deterministic": True, "precision": "fp32", "cores_per_worker": 1}
    if port.name == "mnist":
        fixed["training_source_dir"] = str(mnist_root())
    overrides = [f"{key}={json.dumps(value)}" for key, value in (fixed | changes).items()]
    return load(FOLDER / f"{port.name}.json", overrides)[0]


class Loader:
    """What a plain loop reads: a feed's training batches, in the order that orch draws in each epoch."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._epoch = 0

    def __len__(self) -> int:
        return self._feed.batches

    def __iter__(self) -> Iterator[Any]:
        yield from self._feed.shuffled(order_seed(self._epoch), 0, self._epoch)
        self._epoch += 1


class InOrder(Loader):
    """A feed's batches in order, for evaluation."""

    def __iter__(self) -> Iterator[Any]:
        return self._feed.in_order()


def plain(port: Port, given: Settings) -> tuple[nn.Module, float]:
    """Train with the plain loop. Returns its model and its number."""
    session = open_session(given, cores=1)
    loader, validation = Loader(session.feed("train")), InOrder(session.feed("validation"))
    spec = importlib.util.spec_from_file_location("plain_loop", FOLDER / "plain" / f"{port.name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    randomness.seed_all(SEED)
    model = session.job.model()
    if isinstance(session, Session):
        randomness.seed_all(randomness.hash_seed(SEED, AFTER_MODEL))
    return model, module.train(model, loader, validation, port.epochs)


def test_a_job_trains_as_the_plain_loop_does(port: Port) -> None:
    given = settings(port, channels_last=False)
    model, number = plain(port, given)
    session = open_session(given, cores=1)
    work = Work(given.training_profiles[0], port.epochs, SEED, repeat=0, parent=None, suspended=None)
    result = session.train(work, lambda: False, lambda _epoch: None)
    assert isinstance(result, Finished)
    print(f"{port.name}: plain {number:.6f}, orch {result.score:.6f}")
    if not port.tolerance:
        assert list(differences(model.state_dict(), weights(session.state()))) == []
    assert result.score == pytest.approx(number, rel=port.tolerance or 1e-6)


def in_this_process(trial: link.Trial, root: Path, name: str, start: int, stop: int | None) -> dict[str, Any]:
    """Run a link with other random states, as a fresh process would."""
    randomness.seed_all(1000 + start)
    link.main(root, name, start, link.NO_STOP if stop is None else stop)
    result: dict[str, Any] = json.loads((root / link.RESULT).read_text())
    if "error" in result:
        raise JobError(result["error"])
    return result


def test_a_job_resumes_exactly(port: Port) -> None:
    given = settings(port, max_batch_size=8)
    batches = 4 * given.training_profiles[0].accumulate
    trial = link.Trial(given, [str(FOLDER)], 1, "cpu", 2, 2, steps_per_epoch=batches, interruptions=4)
    verdict = verify(trial, lambda _line: None, in_this_process)
    assert verdict.inexact is None
    assert len(verdict.interrupted_after) == 4
    assert verdict.steps == 16


def test_a_job_has_at_most_40_lines(port: Port) -> None:
    given = settings(port)
    lines = inspect.getsource(type(load_job(given))).splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


def test_a_job_runs_from_launch_to_export(port: Port, tmp_path: Path) -> None:
    shutil.copy(FOLDER / f"{port.name}.py", tmp_path)
    given = json.loads((FOLDER / f"{port.name}.json").read_text())
    changes: dict[str, Any] = {"job_params": port.params, "cores_per_worker": 1, "epochs_per_chunk": 1}
    changes |= {"stop_after_epochs": 3, "executor": "inline"}
    if port.name == "mnist":
        changes["training_source_dir"] = str(mnist_root())
    (tmp_path / f"{port.name}.json").write_text(json.dumps(given | changes))
    sys.modules.pop(port.name, None)
    for command in (f"launch {port.name}.json", f"evaluate {port.name}", f"export {port.name}"):
        output(orch_here(tmp_path, *command.split()))
    run = Run.open(tmp_path / "runs" / port.name)
    board = run.board()
    metric = settings(port).metric.name
    assert violations(run) == []
    assert [metric in entry["test_metrics"] for entry in board["entries"]] == [True] * len(board["entries"]) != []
    model = load_job(settings(port)).model()
    model.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
