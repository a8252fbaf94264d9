"""Everything that a step depends on goes through the file: schedules, averages, half precision, another optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from jobs.data import randomness
from jobs.data.splits import Split
from jobs.errors import JobError
from jobs.job import Averaging, Job, JobContext
from jobs.training.precision import Speed, choose_precision
from jobs.training.session import Session
from jobs.training.states import export, read
from jobs.verify_resume.exactness import first_difference
from orchestrator.records import EpochResult, Finished, Interrupted, Profile, Work
from orchestrator.settings.settings import Settings

CPU = torch.device("cpu")
SGD = Profile("sgd", learning_rate=0.05, momentum=0.9, weight_decay=0.001)
CYCLE = {"name": "OneCycleLR", "epochs": 3}
STEPS = 5  # of an epoch
EPOCHS = 3


pytestmark = pytest.mark.usefixtures("one_thread")


class Small(Job):
    """Noise of three kinds, which a net with everything that has a state learns to tell apart."""

    def model(self) -> nn.Module:
        layers = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 3))
        return nn.Sequential(*layers)

    def data(self, split: Split) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(int(split == "test"))
        targets = torch.arange(60) % 3
        images = torch.randn(60, 2, 6, 6, generator=generator) + targets.view(-1, 1, 1, 1)
        return TensorDataset(images, targets)


class Averaged(Small):
    def averaging(self) -> Averaging:
        return Averaging(0.9, every_steps=2)


def context(**changes: Any) -> JobContext:
    profile = {"name": "sgd", "learning_rate": 0.05}
    given = {"name": "run", "job": "any:Job", "training_profiles": [profile], "deterministic": True}
    given |= {"validation_fraction": 0.2, "max_batch_size": 10, "precision": "fp32"}
    return JobContext(Settings.model_validate(given | changes).model_dump(mode="json"))


def session(job: type[Job] = Small, observer: Any = None, **changes: Any) -> Session:
    return Session(job(context(**changes)), observer=observer)


def founder(profile: Profile = SGD, epochs: int = 1) -> Work:
    return Work(profile, epochs, seed=7, repeat=0, parent=None, suspended=None)


def child(parent: Path, profile: Profile = SGD, epochs: int = 1) -> Work:
    return Work(profile, epochs, seed=0, repeat=0, parent=parent, suspended=None)


_processes = itertools.count(5000)


def train(one: Session, work: Work, file: Path, steps: int | None = None) -> dict[str, Any]:
    """The state after the chunk, or after so many steps of it, as it is in its file. By a process of its own."""
    randomness.seed_all(next(_processes))
    asked = itertools.count()
    result = one.train(work, lambda: steps is not None and next(asked) >= steps, lambda _epoch: None)
    assert isinstance(result, Finished if steps is None else Interrupted)
    with file.open("wb") as target:
        one.save(target)
    return read(file)


def rates(state: dict[str, Any]) -> list[float]:
    return [group["lr"] for group in state["optimizer"]["param_groups"]]


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
    """What a reader of torch's tutorials would write; only the order of the examples is the project's."""
    one = session()
    feed = one.feed("train")
    randomness.seed_all(founder().seed)
    model = one.job.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.001, fused=True)
    made = scheduler(optimizer) if scheduler else None
    for epoch in range(EPOCHS):
        model.train()
        order = int(torch.randint(2**62, ()))
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
def test_chunks_of_one_epoch_are_one_chunk_of_all_and_both_are_a_plain_loop(
    schedule: dict[str, Any] | None, plain: Any, tmp_path: Path
) -> None:
    profile = replace(SGD, schedule=schedule)
    whole = train(session(channels_last=False), founder(profile, EPOCHS), tmp_path / "whole.pt")
    state = train(session(channels_last=False), founder(profile), tmp_path / "0.pt")
    for number in range(1, EPOCHS):
        work = child(tmp_path / f"{number - 1}.pt", profile)
        state = train(session(channels_last=False), work, tmp_path / f"{number}.pt")
    assert first_difference(whole, state) is None
    if plain or schedule is None:
        each_step = bool(schedule) and (schedule["name"] == "OneCycleLR" or "every" in schedule)
        assert first_difference(plain_loop(plain, each_step).state_dict(), whole["model"]) is None


def test_under_another_profile_the_schedule_begins_and_the_momentum_stays(tmp_path: Path) -> None:
    cycle, other = replace(SGD, schedule=CYCLE), replace(SGD, name="other", schedule=CYCLE)
    before = train(session(), founder(cycle, 2), tmp_path / "parent.pt")
    start = train(session(), child(tmp_path / "parent.pt", other), tmp_path / "start.pt", steps=0)
    fresh = train(session(), founder(cycle), tmp_path / "fresh.pt", steps=0)
    assert rates(start) == rates(fresh) != rates(before)
    assert first_difference(fresh["schedule"], start["schedule"]) is None
    assert first_difference(before["optimizer"]["state"], start["optimizer"]["state"]) is None
    back = train(session(), child(tmp_path / "start.pt", cycle), tmp_path / "back.pt", steps=0)
    assert rates(back) == rates(fresh)  # it was away: its line is broken


def test_a_profile_that_only_repeats_goes_on_with_its_schedule(tmp_path: Path) -> None:
    cycle = replace(SGD, schedule=CYCLE)
    before = train(session(), founder(cycle), tmp_path / "parent.pt")
    start = train(session(), child(tmp_path / "parent.pt", cycle), tmp_path / "start.pt", steps=0)
    assert rates(start) == rates(before)
    assert start["schedule"]["count"] == STEPS


@pytest.mark.parametrize("change", [{"learning_rate": 0.01}, {"momentum": 0.5}, {"schedule": CYCLE | {"epochs": 4}}])
def test_profiles_are_equal_if_all_of_their_fields_are(change: dict[str, Any], tmp_path: Path) -> None:
    train(session(), founder(replace(SGD, schedule=CYCLE)), tmp_path / "parent.pt")
    amended = replace(SGD, **{"schedule": CYCLE} | change)
    start = train(session(), child(tmp_path / "parent.pt", amended), tmp_path / "start.pt", steps=0)
    assert start["schedule"]["count"] == 0


def test_another_optimizer_begins_afresh_and_the_same_one_keeps_its_state(tmp_path: Path) -> None:
    adam = Profile("adam", 0.001, 0.9, 0.0, "Adam")
    before = train(session(), founder(), tmp_path / "sgd.pt")
    states = {}
    for name, profile in (("adam", adam), ("sgd", replace(SGD, name="again", learning_rate=0.001))):
        states[name] = train(session(), child(tmp_path / "sgd.pt", profile), tmp_path / "x.pt", steps=0)
        assert rates(states[name]) == [0.001]
    assert states["adam"]["optimizer"]["state"] == {}
    assert states["adam"]["optimizer_class"] == "torch.optim.adam:Adam"
    assert first_difference(before["optimizer"]["state"], states["sgd"]["optimizer"]["state"]) is None


# --- exactness of everything that has a state

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
def test_a_chunk_that_was_cut_is_the_uninterrupted_one(feature: str, steps: int, tmp_path: Path) -> None:
    job, changes, profile = FEATURES[feature]
    train(session(job, **changes), founder(profile), tmp_path / "parent.pt")
    work = child(tmp_path / "parent.pt", profile, epochs=2)
    whole = train(session(job, **changes), work, tmp_path / "whole.pt")
    train(session(job, **changes), work, tmp_path / "cut.pt", steps=steps)
    again = train(session(job, **changes), replace(work, suspended=tmp_path / "cut.pt"), tmp_path / "again.pt")
    assert first_difference(whole, again) is None


class Exploding(Small):
    """Whose gradients overflow in fp16 until its scale has come down."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return super().loss(outputs, targets) * 4096


def test_the_scale_of_fp16_comes_down_with_overflows_and_stays_there_in_the_next_chunk(tmp_path: Path) -> None:
    first = train(session(Exploding, precision="fp16"), founder(), tmp_path / "parent.pt")
    start = train(session(Exploding, precision="fp16"), child(tmp_path / "parent.pt"), tmp_path / "start.pt", steps=0)
    assert first["scaler"]["scale"] < 2.0**16
    assert start["scaler"] == first["scaler"]
    assert train(session(precision="bf16"), founder(), tmp_path / "bf16.pt")["scaler"] == {}


# --- the average


def test_the_average_is_the_exponential_one_of_the_weights(tmp_path: Path) -> None:
    weights = []
    for steps in range(STEPS):
        weights.append(train(session(), founder(), tmp_path / "x.pt", steps=steps)["model"]["5.weight"])
    weights.append(train(session(), founder(), tmp_path / "x.pt")["model"]["5.weight"])
    state = train(session(Averaged), founder(), tmp_path / "averaged.pt")
    expected = weights[2] + (1 - 0.9) * (weights[4] - weights[2])  # after steps 2 and 4
    torch.testing.assert_close(state["average"]["model"]["5.weight"], expected)
    assert torch.equal(state["model"]["5.weight"], weights[5])
    assert state["average"]["updates"] == 2


def test_the_average_is_what_is_evaluated_and_exported(tmp_path: Path) -> None:
    one = session(Averaged)
    state = train(one, founder(), tmp_path / "averaged.pt")
    with (tmp_path / "weights.pt").open("wb") as target:
        export(tmp_path / "averaged.pt", target)
    exported = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert first_difference(state["average"]["model"], exported) is None
    in_training = one.evaluate("validation")
    assert session(Averaged).evaluate_file(tmp_path / "averaged.pt", "validation") == in_training
    model = one.job.model()
    model.load_state_dict(exported)
    model.eval()
    batches = list(one.feed("validation").in_order())
    with torch.inference_mode():
        sums = sum(one.job.metrics(model(x), y)["loss"].double() * len(y) for x, y in batches)
    assert in_training["loss"] == pytest.approx(float(sums) / one.feed("validation").count, rel=1e-5)


def test_before_the_first_average_the_weights_are_evaluated(tmp_path: Path) -> None:
    class Rarely(Small):
        def averaging(self) -> Averaging:
            return Averaging(0.9, every_steps=1000)

    plain, rare = session(), session(Rarely)
    train(plain, founder(), tmp_path / "plain.pt")
    train(rare, founder(), tmp_path / "rare.pt")
    assert plain.evaluate("validation") == rare.evaluate("validation")
    assert rare.evaluate_file(tmp_path / "rare.pt", "test") == plain.evaluate_file(tmp_path / "plain.pt", "test")


@pytest.mark.parametrize(("decay", "every"), [(1.0, 1), (-0.1, 1), (0.9, 0)])
def test_an_average_that_is_none_is_an_error(decay: float, every: int) -> None:
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
    """Notes what the model gets and gives, in training and in evaluation."""

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
    one = session(Looking, precision=precision, channels_last=channels_last)
    state = train(one, founder(), tmp_path / "x.pt")
    assert one.job.__dict__["seen"] == {(True, laid_out, dtype), (False, laid_out, dtype)}
    assert {value.dtype for value in state["model"].values()} == {torch.float32, torch.int64}
    assert state["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last) == laid_out


def test_a_model_without_convolutions_is_not_laid_out() -> None:
    assert not Speed(context().settings, CPU).lay_out(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses what torch has deprecated
def test_compiled_chunks_that_were_cut_are_the_uninterrupted_one(tmp_path: Path) -> None:
    class Tiny(Small):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(72, 3))

    changes = {"compile": True, "max_batch_size": 20}  # the last batch is smaller
    work = founder(epochs=2)
    whole = train(session(Tiny, **changes), work, tmp_path / "whole.pt")
    torch._dynamo.reset()  # as in a process of its own, whose first batch is the smaller one
    train(session(Tiny, **changes), work, tmp_path / "cut.pt", steps=2)
    torch._dynamo.reset()
    again = train(session(Tiny, **changes), replace(work, suspended=tmp_path / "cut.pt"), tmp_path / "again.pt")
    assert first_difference(whole, again) is None
    assert list(whole["model"]) == ["1.weight", "1.bias"]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert before > 0
    train(session(Tiny, **changes), child(tmp_path / "again.pt"), tmp_path / "next.pt")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before  # another model, the same kernels


# --- batches of another structure


class Sentences(Job):
    """Batches are dicts, and the model gives its loss."""

    def model(self) -> nn.Module:
        return Scorer()

    def data(self, split: Split) -> Dataset[Any]:
        class Listed(Dataset[Any]):
            def __len__(self) -> int:
                return 40

            def __getitem__(self, index: int) -> dict[str, Any]:
                tokens = torch.full((4,), index % 4)
                return {"name": f"sentence {index}", "input": {"ids": tokens}, "labels": torch.tensor(index % 2)}

        return Listed()

    def training_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(**batch["input"], labels=batch["labels"])["loss"]

    def evaluation_metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return self.metrics(model(**batch["input"])["logits"], batch["labels"])


class Scorer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 2)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.embedding(ids).mean(dim=1))
        found = {"logits": logits}
        return found if labels is None else found | {"loss": nn.functional.cross_entropy(logits, labels)}


def test_a_batch_may_be_a_dict_and_the_loss_the_models_own(tmp_path: Path) -> None:
    one = session(Sentences, max_batch_size=8)
    rate = replace(SGD, learning_rate=0.5)
    result = one.train(founder(rate, 6), lambda: False, lambda _epoch: None)
    assert isinstance(result, Finished)
    assert result.score == 1.0
    assert result.results[0].metrics["train_loss"] > 2 * result.results[-1].metrics["train_loss"]


class Returning(Small):
    """Its own losses and metrics are what the test says."""

    wrong: tuple[str, Any]

    def loss(self, outputs: Any, targets: Any) -> Any:
        return self.returned("loss", super().loss(outputs, targets))

    def metrics(self, outputs: Any, targets: Any) -> Any:
        return self.returned("metrics", super().metrics(outputs, targets))

    def model(self) -> Any:
        return self.returned("model", super().model())

    def data(self, split: Any) -> Any:
        return self.returned("data", super().data(split))

    def returned(self, method: str, value: Any) -> Any:
        return self.wrong[1](value) if self.wrong[0] == method else value


class ReturningWhole(Returning):
    """The same of the methods that get the whole batch."""

    def training_loss(self, model: nn.Module, batch: Any) -> Any:
        return self.returned("training_loss", super().training_loss(model, batch))

    def evaluation_metrics(self, model: nn.Module, batch: Any) -> Any:
        return self.returned("evaluation_metrics", super().evaluation_metrics(model, batch))


@pytest.mark.parametrize(
    ("kind", "method", "change", "message"),
    [
        (Returning, "model", lambda model: None, r"None; allowed is a torch\.nn\.Module"),
        (Returning, "loss", lambda loss: None, r"None; allowed is a tensor of one number, the mean over the batch"),
        (
            Returning,
            "loss",
            lambda loss: loss.item(),
            r"a value of type float, \d.*; allowed is a tensor of one",
        ),
        (Returning, "loss", lambda loss: loss.expand(3), r"a tensor of shape \(3,\) \(torch.float32\); allowed is a"),
        (
            Returning,
            "loss",
            lambda loss: loss.detach(),
            r"a tensor of shape \(\) .* that no gradient flows from; it",
        ),
        (ReturningWhole, "training_loss", lambda loss: {"loss": loss}, r"a value of type dict; allowed is a tensor of"),
        (Returning, "metrics", lambda metrics: None, r'None; allowed is a dict with one number .* \{"mse": 0.1\}'),
        (Returning, "metrics", lambda metrics: metrics["loss"], r"a tensor of shape \(\) .*; allowed is a dict"),
        (
            Returning,
            "metrics",
            lambda metrics: metrics | {"per class": None},
            r"None for 'per class'; allowed is one",
        ),
        (Returning, "metrics", lambda metrics: metrics | {3: 0.5}, r"a dict with the key 3; allowed are names"),
        (
            ReturningWhole,
            "evaluation_metrics",
            lambda metrics: metrics | {"accuracy": torch.ones(3)},
            r"a tensor of shape \(3,\) \(torch.float32\) for 'accuracy'; allowed is one number for each name",
        ),
        (
            ReturningWhole,
            "evaluation_metrics",
            lambda metrics: {"accuracy": "good"},
            r"a value of type str, 'good' for 'accu",
        ),
    ],
)
def test_what_a_method_may_not_return_is_one_error_that_names_it(
    kind: type[Returning], method: str, change: Callable[[Any], Any], message: str
) -> None:
    job = type("Mine", (kind,), {"wrong": (method, change)})
    with pytest.raises(JobError, match=rf"^Mine\.{method}\(\) returned {message}"):
        session(job).train(founder(), lambda: False, lambda _epoch: None)


def test_data_that_has_no_length_is_one_error_that_names_its_method() -> None:
    job = type("Mine", (Returning,), {"wrong": ("data", lambda data: iter(()))})
    with pytest.raises(JobError, match=r"^Mine\.data\('train'\) returned a value of type tuple_iterator; allowed is a"):
        session(job).train(founder(), lambda: False, lambda _epoch: None)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("loss", lambda loss: loss.reshape(1, 1)),
        ("metrics", lambda metrics: {name: value.item() for name, value in metrics.items()}),
        ("metrics", lambda metrics: {name: value.numpy() for name, value in metrics.items()}),
        ("metrics", lambda metrics: {name: value.reshape(1) for name, value in metrics.items()}),
    ],
    ids=["a loss of shape (1, 1)", "metrics as floats", "metrics as numpy has them", "metrics of shape (1,)"],
)
def test_one_number_may_come_in_any_shape(method: str, change: Callable[[Any], Any]) -> None:
    results = []
    for wrong in (method, change), ("none", change):
        one = session(type("Mine", (Returning,), {"wrong": wrong}))
        results.append(one.train(founder(), lambda: False, lambda _epoch: None))
    assert all(isinstance(result, Finished) for result in results)
    assert results[0].results[0].metrics == results[1].results[0].metrics


# --- observers


class Noting:
    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def chunk(self, work: Work) -> None:
        self.said.append(("chunk", work.parent is not None))

    def step(self, step: int, loss: Tensor, learning_rate: float) -> None:
        assert loss.shape == ()
        self.said.append(("step", step, round(learning_rate, 6)))

    def epoch(self, result: EpochResult) -> None:
        self.said.append(("epoch", result.number))

    def close(self) -> None:
        self.said.append(("close",))


def test_an_observer_is_told_each_step_with_the_rate_that_it_was_done_with(tmp_path: Path) -> None:
    profile = replace(SGD, schedule={"name": "StepLR", "step_size": 1, "gamma": 0.1})
    noting = Noting()
    one = session(observer=noting)
    train(one, founder(profile), tmp_path / "one.pt")
    train(one, child(tmp_path / "one.pt", profile), tmp_path / "two.pt")
    one.close()
    first = [("step", i, 0.05) for i in range(1, STEPS + 1)]
    second = [("step", i, 0.005) for i in range(STEPS + 1, 2 * STEPS + 1)]
    expected = [("chunk", False), *first, ("epoch", 1), ("chunk", True), *second, ("epoch", 2), ("close",)]
    assert noting.said == expected
