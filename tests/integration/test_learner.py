"""A checkpoint contains everything that a step depends on: schedules, averages, loss scales, optimizer states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.data import randomness
from jobs.errors import JobError
from jobs.job import Averaging, Job
from jobs.training.position import order_seed
from jobs.training.precision import Speed, choose_precision
from jobs.training.session import AFTER_MODEL
from jobs.training.states import export
from orchestrator.profile import Profile
from tests.support.small_job import (
    SGD,
    STEPS,
    Averaged,
    Small,
    assert_same,
    child,
    context,
    founder,
    rates,
    session_of,
    train,
)

CPU = torch.device("cpu")
CYCLE = {"name": "OneCycleLR", "epochs": 3}
EPOCHS = 3

pytestmark = pytest.mark.usefixtures("one_thread")

# --- the schedule

SCHEDULES = [
    None,
    {"name": "StepLR", "step_size": 1, "gamma": 0.5},
    {"name": "MultiStepLR", "milestones": [1, 2]},
    {"name": "ExponentialLR", "gamma": 0.7},
    CYCLE,
    {"name": "CosineAnnealingLR", "epochs": 3, "every": "step"},
    {"name": "PiecewiseLinear", "epochs": [0, 1, 3], "factors": [0.1, 1, 0]},
]
TORCHS: list[Callable[[torch.optim.Optimizer], Any] | None] = [
    None,
    lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 2]),
    lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.7),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, 15),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 15),
    None,
]


def plain_loop(scheduler: Callable[[torch.optim.Optimizer], Any] | None, each_step: bool) -> nn.Module:
    """Train with a loop as in torch's tutorials; only the order of the examples comes from orch."""
    session = session_of()
    feed = session.feed("train")
    randomness.seed_all(founder().seed)
    model = session.job.model()
    randomness.seed_all(randomness.hash_seed(founder().seed, AFTER_MODEL))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.001, fused=True)
    made = scheduler(optimizer) if scheduler else None
    for epoch in range(EPOCHS):
        model.train()
        order = order_seed(epoch)
        for inputs, targets in feed.shuffled(order, 0, epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if made and each_step and made.last_epoch < 14:
                made.step()
        if made and not each_step:
            made.step()
    return model


@pytest.mark.parametrize(
    ("schedule", "plain"), list(zip(SCHEDULES, TORCHS, strict=True)), ids=[str(s and s["name"]) for s in SCHEDULES]
)
def test_chunks_of_one_epoch_equal_one_long_chunk_and_a_plain_loop(
    schedule: dict[str, Any] | None, plain: Any, tmp_path: Path
) -> None:
    profile = replace(SGD, schedule=schedule)
    whole = train(session_of(channels_last=False), founder(profile, EPOCHS), tmp_path / "whole.pt")
    state = train(session_of(channels_last=False), founder(profile), tmp_path / "0.pt")
    for number in range(1, EPOCHS):
        work = child(tmp_path / f"{number - 1}.pt", profile)
        state = train(session_of(channels_last=False), work, tmp_path / f"{number}.pt")
    assert_same(whole, state)
    if plain or schedule is None:
        each_step = bool(schedule) and (schedule["name"] == "OneCycleLR" or "every" in schedule)
        assert_same(plain_loop(plain, each_step).state_dict(), whole["model"])


def test_under_another_profile_the_schedule_begins_and_the_momentum_stays(tmp_path: Path) -> None:
    cycle, other = replace(SGD, schedule=CYCLE), replace(SGD, name="other", schedule=CYCLE)
    before = train(session_of(), founder(cycle, 2), tmp_path / "parent.pt")
    start = train(session_of(), child(tmp_path / "parent.pt", other), tmp_path / "start.pt", steps=0)
    fresh = train(session_of(), founder(cycle), tmp_path / "fresh.pt", steps=0)
    assert rates(start) == rates(fresh) != rates(before)
    assert_same(fresh["schedule"], start["schedule"])
    assert_same(before["optimizer"]["state"], start["optimizer"]["state"])
    back = train(session_of(), child(tmp_path / "start.pt", cycle), tmp_path / "back.pt", steps=0)
    assert rates(back) == rates(fresh)  # a chunk under another profile came between, so the schedule starts again


def test_an_equal_profile_continues_its_schedule(tmp_path: Path) -> None:
    cycle = replace(SGD, schedule=CYCLE)
    before = train(session_of(), founder(cycle), tmp_path / "parent.pt")
    start = train(session_of(), child(tmp_path / "parent.pt", cycle), tmp_path / "start.pt", steps=0)
    assert rates(start) == rates(before)
    assert start["schedule"]["count"] == STEPS


@pytest.mark.parametrize("change", [{"learning_rate": 0.01}, {"momentum": 0.5}, {"schedule": CYCLE | {"epochs": 4}}])
def test_profiles_are_equal_if_all_of_their_fields_are(change: dict[str, Any], tmp_path: Path) -> None:
    train(session_of(), founder(replace(SGD, schedule=CYCLE)), tmp_path / "parent.pt")
    amended = replace(SGD, **{"schedule": CYCLE} | change)
    start = train(session_of(), child(tmp_path / "parent.pt", amended), tmp_path / "start.pt", steps=0)
    assert start["schedule"]["count"] == 0


def test_another_optimizer_starts_without_state_and_the_same_one_keeps_it(tmp_path: Path) -> None:
    adam = Profile("adam", 0.001, 0.9, 0.0, "Adam")
    before = train(session_of(), founder(), tmp_path / "sgd.pt")
    states = {}
    for name, profile in (("adam", adam), ("sgd", replace(SGD, name="again", learning_rate=0.001))):
        states[name] = train(session_of(), child(tmp_path / "sgd.pt", profile), tmp_path / "x.pt", steps=0)
        assert rates(states[name]) == [0.001]
    assert states["adam"]["optimizer"]["state"] == {}
    assert states["adam"]["optimizer_class"] == "torch.optim.adam:Adam"
    assert_same(before["optimizer"]["state"], states["sgd"]["optimizer"]["state"])


# --- exact resume for everything that has a state

FEATURES: dict[str, tuple[type[Job], dict[str, Any], Profile]] = {
    "bf16": (Small, {"precision": "bf16"}, SGD),
    "fp16 and its scale": (Small, {"precision": "fp16"}, SGD),
    "channels_last": (Small, {"channels_last": True}, SGD),
    "an average": (Averaged, {}, SGD),
    "AdamW and one cycle": (Small, {}, replace(SGD, optimizer="AdamW", schedule=CYCLE)),
    "all of it": (Averaged, {"precision": "fp16"}, replace(SGD, optimizer="AdamW", schedule=CYCLE)),
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS, STEPS + 2])
def test_an_interrupted_chunk_equals_the_uninterrupted_one(feature: str, steps: int, tmp_path: Path) -> None:
    job, changes, profile = FEATURES[feature]
    train(session_of(job, **changes), founder(profile), tmp_path / "parent.pt")
    work = child(tmp_path / "parent.pt", profile, epochs=2)
    whole = train(session_of(job, **changes), work, tmp_path / "whole.pt")
    train(session_of(job, **changes), work, tmp_path / "cut.pt", steps=steps)
    again = train(session_of(job, **changes), replace(work, suspended=tmp_path / "cut.pt"), tmp_path / "again.pt")
    assert_same(whole, again)


class Exploding(Small):
    """Gradients overflow in fp16 until the loss scale is small enough."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return super().loss(outputs, targets) * 4096


def test_the_scale_of_fp16_comes_down_with_overflows_and_stays_there_in_the_next_chunk(tmp_path: Path) -> None:
    first = train(session_of(Exploding, precision="fp16"), founder(), tmp_path / "parent.pt")
    start = train(
        session_of(Exploding, precision="fp16"), child(tmp_path / "parent.pt"), tmp_path / "start.pt", steps=0
    )
    assert first["scaler"]["scale"] < 2.0**16
    assert start["scaler"] == first["scaler"]
    assert train(session_of(precision="bf16"), founder(), tmp_path / "bf16.pt")["scaler"] == {}


# --- the average


def test_the_average_is_the_exponential_average_of_the_weights(tmp_path: Path) -> None:
    weights = []
    for steps in range(STEPS):
        weights.append(train(session_of(), founder(), tmp_path / "x.pt", steps=steps)["model"]["5.weight"])
    weights.append(train(session_of(), founder(), tmp_path / "x.pt")["model"]["5.weight"])
    state = train(session_of(Averaged), founder(), tmp_path / "averaged.pt")
    expected = weights[2] + (1 - 0.9) * (weights[4] - weights[2])  # after steps 2 and 4
    torch.testing.assert_close(state["average"]["model"]["5.weight"], expected)
    assert torch.equal(state["model"]["5.weight"], weights[5])
    assert state["average"]["updates"] == 2


def test_the_average_is_what_is_evaluated_and_exported(tmp_path: Path) -> None:
    session = session_of(Averaged)
    state = train(session, founder(), tmp_path / "averaged.pt")
    with (tmp_path / "weights.pt").open("wb") as target:
        export(tmp_path / "averaged.pt", target)
    exported = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_same(state["average"]["model"], exported)
    in_training = session.evaluate("validation")
    assert session_of(Averaged).evaluate_file(tmp_path / "averaged.pt", "validation") == in_training
    model = session.job.model()
    model.load_state_dict(exported)
    model.eval()
    batches = list(session.feed("validation").in_order())
    with torch.inference_mode():
        sums = sum(session.job.metrics(model(x), y)["loss"].double() * len(y) for x, y in batches)
    assert in_training["loss"] == pytest.approx(float(sums) / session.feed("validation").count, rel=1e-5)


def test_before_the_first_average_the_weights_are_evaluated(tmp_path: Path) -> None:
    class Rarely(Small):
        def averaging(self) -> Averaging:
            return Averaging(0.9, every_steps=1000)

    plain, rare = session_of(), session_of(Rarely)
    train(plain, founder(), tmp_path / "plain.pt")
    train(rare, founder(), tmp_path / "rare.pt")
    assert plain.evaluate("validation") == rare.evaluate("validation")
    assert rare.evaluate_file(tmp_path / "rare.pt", "test") == plain.evaluate_file(tmp_path / "plain.pt", "test")


@pytest.mark.parametrize(("decay", "every"), [(1.0, 1), (-0.1, 1), (0.9, 0)])
def test_an_average_with_impossible_values_is_an_error(decay: float, every: int) -> None:
    with pytest.raises(JobError, match="decay must be from 0 to below 1, every_steps 1 or more"):
        Averaging(decay, every)


# --- precision and layout


@pytest.mark.parametrize(
    ("wanted", "has_bf16", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("fp32", True, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("fp16", True, torch.float16),
    ],
)
def test_auto_is_bf16_where_the_cpu_computes_it(
    wanted: str, has_bf16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.training.precision._cpu_computes_bf16", lambda: has_bf16)
    assert choose_precision(wanted, CPU) is expected


@pytest.mark.parametrize(
    ("wanted", "native", "emulated", "expected"),
    [
        ("auto", True, True, torch.bfloat16),
        ("auto", False, True, torch.float16),
        ("bf16", False, True, torch.bfloat16),
        ("bf16", False, False, None),
    ],
)
def test_auto_is_fp16_on_gpus_without_bf16(
    wanted: str, native: bool, emulated: bool, expected: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: native or (including_emulation and emulated)
    )
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _device: "an old one")
    if expected is None:
        with pytest.raises(JobError, match=r'precision: an old one has no "bf16"; allowed here are "auto", "fp16"'):
            choose_precision(wanted, torch.device("cuda"))
    else:
        assert choose_precision(wanted, torch.device("cuda")) is expected


class Looking(Small):
    """Records the model's inputs and outputs in training and in evaluation."""

    seen: list[tuple[bool, torch.dtype, bool, torch.dtype]]

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        self.note(batch[0], outputs, True)
        return self.loss(outputs, batch[1])

    def predict(self, model: nn.Module, inputs: Any) -> Any:
        outputs = model(inputs)
        self.note(inputs, outputs, False)
        return outputs

    def note(self, inputs: Tensor, outputs: Tensor, training: bool) -> None:
        laid_out = inputs.is_contiguous(memory_format=torch.channels_last)
        self.__dict__.setdefault("seen", set()).add((training, laid_out, outputs.dtype))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize(("channels_last", "laid_out"), [("auto", True), (True, True), (False, False)])
def test_the_settings_reach_every_batch_and_the_weights_stay_in_fp32(
    precision: str, dtype: torch.dtype, channels_last: Any, laid_out: bool, tmp_path: Path
) -> None:
    session = session_of(Looking, precision=precision, channels_last=channels_last)
    state = train(session, founder(), tmp_path / "x.pt")
    assert session.job.__dict__["seen"] == {(True, laid_out, dtype), (False, laid_out, dtype)}
    assert {value.dtype for value in state["model"].values()} == {torch.float32, torch.int64}
    assert state["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last) == laid_out


def test_a_model_without_convolutions_is_not_laid_out() -> None:
    assert not Speed(context().settings, CPU).lay_out(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch has deprecated
def test_interrupted_compiled_chunks_equal_the_uninterrupted_one(tmp_path: Path) -> None:
    class Tiny(Small):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(72, 3))

    changes = {"compile": True, "max_batch_size": 20}  # the last batch is smaller
    work = founder(epochs=2)
    whole = train(session_of(Tiny, **changes), work, tmp_path / "whole.pt")
    torch._dynamo.reset()  # as in a fresh process, whose first batch is the smaller one
    train(session_of(Tiny, **changes), work, tmp_path / "cut.pt", steps=2)
    torch._dynamo.reset()
    again = train(session_of(Tiny, **changes), replace(work, suspended=tmp_path / "cut.pt"), tmp_path / "again.pt")
    assert_same(whole, again)
    assert list(whole["model"]) == ["1.weight", "1.bias"]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    train(session_of(Tiny, **changes), child(tmp_path / "again.pt"), tmp_path / "next.pt")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before  # another model, the same kernels
