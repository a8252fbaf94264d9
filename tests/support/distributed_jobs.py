"""Workers with several processes, for tests: jobs, followers, and a single process for comparison.

Rank 0 is the test's own process; the followers are separate processes, connected by gloo on the CPU.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from jobs.data.splits import Split
from jobs.digits import Digits
from jobs.job import Averaging, ChunkContext, ChunkInterrupted, ChunkResult
from jobs.training.distributed import DistributedSession, Opening, dismiss, lead
from jobs.training.opening import open_session
from jobs.training.ranks import Ranks, meet
from jobs.training.session import Session
from jobs.training.states import read
from orchestrator.profile import Profile
from orchestrator.records import Finished, Interrupted, Work
from orchestrator.settings.settings import Settings
from tests.support.settings import settings as common_settings

ROOT = Path(__file__).parents[2]
FAST = Profile("fast", learning_rate=0.05, momentum=0.9, weight_decay=0.0005)
STEPS = 6  # steps in an epoch, in batches of 200
# Adding in another order changes the last bit of a float32 (6e-8 of its value), and the errors of all steps add up.
# The differences measured in these tests are 3e-8 to 2.4e-7, for weights and momentum up to 1. Wrong weights, such as
# 1/2 each for parts of 75 and 76 examples, give more than 2e-5.
CLOSE = 2e-6
AT_ONCE_S = 20.0  # a dead process is noticed immediately, since its sockets close; the time is for slow test machines


# --- jobs


class Plain(Digits):
    """The digits without dropout, whose random numbers differ between processes. Can record its batches."""

    Params: ClassVar[Any] = None

    def model(self) -> nn.Module:
        self.params = type("Width", (), {"width": 4})
        layers = super().model().children()
        return nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Dropout)))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if torch.is_grad_enabled() and "seen" in self.context.settings.job_params:
            with Path(self.context.settings.job_params["seen"], f"rank-{rank()}").open("a") as seen:
                seen.write(json.dumps(targets.tolist()) + "\n")
        return super().loss(outputs, targets)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class Noise(Dataset[Any]):
    """Digits, with noise that is drawn whenever an example is read."""

    def __init__(self, source: TensorDataset) -> None:
        self.source = source
        self.targets = source.tensors[1].numpy()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels, target = self.source[index]
        return pixels + 0.1 * torch.randn(pixels.shape), target


class Noisy(Plain):
    def data(self, split: Split) -> Any:
        return Noise(super().data(split))


class Named(Dataset[Any]):
    """Digits whose examples are dicts that contain a name and a list."""

    def __init__(self, source: TensorDataset) -> None:
        self.source = source
        self.targets = source.tensors[1].numpy()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels, target = self.source[index]
        return {"name": f"digit {index}", "views": [pixels, -pixels], "target": target}


class Dicts(Plain):
    """Uses batches that are dicts, and averages the weights."""

    def data(self, split: Split) -> Any:
        return Named(super().data(split))

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        assert len(batch["name"]) == len(batch["target"])
        assert torch.equal(batch["views"][0], -batch["views"][1])
        return self.loss(model(batch["views"][0]), batch["target"])

    def evaluation_metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return self.metrics(model(batch["views"][0]), batch["target"])

    def averaging(self) -> Averaging:
        return Averaging(0.9)


class Together(Plain):
    """Has its own training loop, in which all processes take part."""

    def train_chunk(self, context: ChunkContext) -> ChunkResult | ChunkInterrupted:
        for _ in range(context.epochs):
            if context.should_stop():
                return ChunkInterrupted({"ranks": context.ranks})
            total = torch.tensor(context.rank + 1.0)
            dist.all_reduce(total)
            context.report({"accuracy": total.item() / 10})
        return ChunkResult({"ranks": context.ranks})


class Net(nn.Module):
    """Has a layer that no batch uses, a layer that only some batches use, and a batch normalisation."""

    def __init__(self, normalise: bool) -> None:
        super().__init__()
        self.used = nn.Linear(64, 10)
        self.unused = nn.Linear(3, 3)
        self.sometimes = nn.Linear(10, 10)
        self.norm = nn.BatchNorm1d(64) if normalise else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        outputs: Tensor = self.used(self.norm(pixels.flatten(1)))
        return outputs + self.sometimes(outputs) if pixels.shape[0] == 75 else outputs


class Odd(Plain):
    def model(self) -> nn.Module:
        return Net(self.context.settings.job_params.get("normalise", False))


class Unlucky(Plain):
    """Fails in step 3, on rank 1 or on all ranks."""

    step = 0

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        self.step += torch.is_grad_enabled()
        what, who = self.context.settings.job_params["what"], self.context.settings.job_params.get("who", 1)
        if self.step == 3 and rank() in (who, 1):
            if what == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "hangs":
                time.sleep(600)
            raise ValueError(f"no luck on rank {rank()}")
        return super().loss(outputs, targets)


class Watched(Digits):
    """Records the environment and devices of each process of a worker."""

    Params: ClassVar[Any] = None

    def model(self) -> nn.Module:
        self.record()
        self.params = type("Width", (), {"width": 4})
        return super().model()

    def record(self) -> None:
        names = ("CUDA_VISIBLE_DEVICES", "SLURM_LOCALID", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID")
        seen = {name: os.environ.get(name) for name in names} | {"pid": os.getpid(), "cores": self.context.cores}
        with Path(self.context.settings.job_params["seen"], f"rank-{rank()}").open("a") as file:
            file.write(json.dumps(seen) + "\n")


class Paced(Watched):
    """Also records, but trains nothing: the processes only talk to each other, once in each epoch. A process starts
    faster without an optimizer."""

    Params: ClassVar[Any] = None

    def train_chunk(self, context: ChunkContext) -> ChunkResult | ChunkInterrupted:
        self.record()
        for _ in range(context.epochs):
            if context.should_stop():
                return ChunkInterrupted({"ranks": context.ranks})
            time.sleep(0.2)
            total = torch.tensor(context.rank + 1.0)
            dist.all_reduce(total)
            context.report({"accuracy": total.item() / 10})
        return ChunkResult({"ranks": context.ranks})


def settings(job: type[Digits] = Plain, **changes: Any) -> Settings:
    values = {"job": f"{__name__}:{job.__name__}", "seed": 3, "validation_fraction": 0.2, "max_batch_size": 200}
    return common_settings(**(values | {"deterministic": True, "precision": "fp32"} | changes))


# --- processes


FOLLOWER = """
import sys
from pathlib import Path
from jobs.training.distributed import follow
from jobs.training.ranks import meet
from orchestrator.worker.job_main import leave
rank, count, place, step_s = sys.argv[1:]
print(follow(meet(int(rank), int(count), Path(place), step_s=float(step_s))))
leave()
"""


class Team:
    """Rank 0 in this process, and its followers."""

    def __init__(self, count: int, folder: Path, step_s: float = 60.0) -> None:
        place = folder / "meeting"
        self.failed = False
        command = [sys.executable, "-c", FOLLOWER]
        self.followers = [
            subprocess.Popen(
                [*command, str(rank), str(count), str(place), str(step_s)], cwd=ROOT, stdout=subprocess.PIPE, text=True
            )
            for rank in range(1, count)
        ]
        try:
            self.ranks: Ranks = meet(0, count, place, step_s=step_s)
        except BaseException:
            self.end(0.0)
            raise
        assert not place.exists(), "the file is removed when all processes are connected"

    def open(self, given: Settings) -> DistributedSession:
        def failed() -> None:
            self.failed = True

        return lead(self.ranks, Opening(given, 1, [str(ROOT)], gpus=""), failed)

    def end(self, patience_s: float = AT_ONCE_S) -> None:
        for follower in self.followers:
            try:
                follower.communicate(timeout=patience_s)
            except subprocess.TimeoutExpired:
                follower.kill()
                follower.communicate()

    def endings(self) -> list[tuple[int, str]]:
        """Return the exit code and the output of each follower."""
        said = [follower.communicate(timeout=AT_ONCE_S)[0].strip() for follower in self.followers]
        return [(f.returncode, word) for f, word in zip(self.followers, said, strict=True)]


@contextmanager
def team_of(count: int, folder: Path, step_s: float = 60.0) -> Iterator[Team]:
    team = Team(count, folder, step_s)
    try:
        yield team
    finally:
        dismiss(team.ranks)
        team.end()


# --- training


def founder(seed: int = 1, epochs: int = 1) -> Work:
    return Work(FAST, epochs, seed, repeat=0, parent=None, suspended=None)


def never() -> bool:
    return False


def after(steps: int) -> Callable[[], bool]:
    """Return a should_stop function, which is called before each step and returns True after this many steps."""
    asked = iter(range(steps + 1))
    return lambda: next(asked) == steps


def train(session: Session | DistributedSession, work: Work) -> Finished:
    result = session.train(work, never, lambda _: None)
    assert isinstance(result, Finished)
    return result


def interrupt(session: Session | DistributedSession, work: Work, steps: int, file: Path) -> dict[str, Any]:
    result = session.train(work, after(steps), lambda _: None)
    assert isinstance(result, Interrupted)
    return saved(session, file)


def saved(session: Session | DistributedSession, file: Path) -> dict[str, Any]:
    """Save a session's state to the file and return the state as it is read again, without times."""
    with file.open("wb") as target:
        session.save(target)
    state = read(file)
    for cut in [state["cut"]] if state["cut"] else []:
        cut["seconds"] = 0.0
        for result in cut["results"]:
            result["seconds"] = 0.0
    return state


def alone(given: Settings) -> Session:
    return open_session(given, 1)


def assert_close(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Check that weights and momentum differ at most by rounding errors from the order of adding gradients."""
    torch.testing.assert_close(left["model"], right["model"], rtol=0, atol=CLOSE)
    torch.testing.assert_close(left["optimizer"]["state"], right["optimizer"]["state"], rtol=0, atol=CLOSE)
    if right["average"]:
        torch.testing.assert_close(left["average"]["model"], right["average"]["model"], rtol=0, atol=CLOSE)
    assert left["epochs"] == right["epochs"]


def metrics(result: Finished) -> list[dict[str, float]]:
    return [dict(epoch.metrics) for epoch in result.results]


def check_equal(team: Team, given: Settings, folder: Path, epochs: int = 1, profile: Profile = FAST) -> None:
    """Train the same chunk with one process and with the team, and check that the results are equal."""
    one, all_ = alone(given), team.open(given)
    work = replace(founder(epochs=epochs), profile=profile)
    expected, result = train(one, work), train(all_, work)
    assert_close(saved(all_, folder / "all.pt"), saved(one, folder / "one.pt"))
    for have, want in zip(metrics(result), metrics(expected), strict=True):
        assert have == pytest.approx(want, abs=1e-4)
    assert result.score == pytest.approx(expected.score, abs=1 / 288 + 1e-9), "one example may differ"
