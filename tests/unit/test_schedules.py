"""Each step has the learning rate of torch's own schedule, in chunks of any length."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from jobs.errors import JobError
from jobs.optim import optimizers, schedules
from jobs.optim.schedules import PiecewiseLinear, Schedule
from orchestrator.profile import Metric, Profile

ACCURACY = Metric("accuracy", "max")
STEPS = 3  # steps in an epoch
EPOCHS = 6
RATE = 0.1


class Halving(lr_scheduler.LRScheduler):
    """A user's own schedule."""

    def get_lr(self) -> list[Any]:
        return [rate * 0.5**self.last_epoch for rate in self.base_lrs]


class NoSchedule:
    pass


def profile(schedule: Mapping[str, Any] | None = None, optimizer: str = "SGD", **changes: Any) -> Profile:
    return Profile(**{"name": "one", "learning_rate": RATE, "momentum": 0.9, "weight_decay": 0.0} | changes,
                   optimizer=optimizer, schedule=schedule)  # fmt: skip


def new_optimizer(given: Profile) -> Optimizer:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(3))], "lr_factor": 0.5}]
    return optimizers.make(given, groups)


def numbers(optimizer: Optimizer) -> list[tuple[Any, ...]]:
    """Return the hyperparameters that the next step uses for each parameter group."""
    return [(g["lr"], g.get("momentum"), g.get("betas")) for g in optimizer.param_groups]


def measured(epoch: int) -> dict[str, float]:
    return {"accuracy": [0.1, 0.5, 0.4, 0.3, 0.6, 0.2][epoch % 6]}


def one_step(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def in_chunks(given: Profile, chunks: list[int], cut_at: int | None = None) -> list[Any]:
    """Return the hyperparameters of each step. chunks: the number of epochs of each chunk; each chunk starts from the
    previous one's file. cut_at: the step before which the training is saved and opened again."""
    steps: list[Any] = []
    saved: bytes | None = None
    epoch = 0

    def opened() -> tuple[Optimizer, Schedule]:
        optimizer = new_optimizer(given)
        schedule = Schedule(given, optimizer, STEPS, ACCURACY)
        if saved is not None:
            state = torch.load(io.BytesIO(saved), weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        return optimizer, schedule

    def written(optimizer: Optimizer, schedule: Schedule) -> bytes:
        file = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
        return file.getvalue()

    for epochs in chunks:
        optimizer, schedule = opened()
        for _ in range(epochs):
            for _ in range(STEPS):
                if len(steps) == cut_at:
                    saved = written(optimizer, schedule)
                    optimizer, schedule = opened()
                steps.append(numbers(optimizer))
                one_step(optimizer)
                schedule.after_step()
            schedule.after_epoch(measured(epoch))
            epoch += 1
        saved = written(optimizer, schedule)
    return steps


def plainly(given: Profile, make: Callable[[Optimizer], Any], each_step: bool, length: int | None = None) -> list[Any]:
    """The same with torch's scheduler in a plain loop. length: how often the scheduler is stepped (None: always)."""
    optimizer = new_optimizer(given)
    scheduler = make(optimizer)
    steps = []
    done = 0

    def step(*measurements: float) -> None:
        nonlocal done
        if length is None or done < length:
            scheduler.step(*measurements)
            done += 1

    for epoch in range(EPOCHS):
        for _ in range(STEPS):
            steps.append(numbers(optimizer))
            one_step(optimizer)
            if each_step:
                step()
        if not each_step:
            step(*([measured(epoch)["accuracy"]] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return steps


L = lr_scheduler
RATES = [RATE, RATE * 0.5]
TOTAL = EPOCHS * STEPS
# A schedule in the settings, torch's equivalent, whether it is stepped after each batch, and how often (None: always).
CASES: list[tuple[dict[str, Any], Callable[[Optimizer], Any], bool, int | None]] = [
    ({"name": "StepLR", "step_size": 2, "gamma": 0.5}, lambda o: L.StepLR(o, 2, 0.5), False, None),
    ({"name": "StepLR", "step_size": 4, "every": "step"}, lambda o: L.StepLR(o, 4), True, None),
    ({"name": "MultiStepLR", "milestones": [1, 3], "gamma": 0.2}, lambda o: L.MultiStepLR(o, [1, 3], 0.2), False, None),
    ({"name": "ExponentialLR", "gamma": 0.8}, lambda o: L.ExponentialLR(o, 0.8), False, None),
    ({"name": "ConstantLR", "factor": 0.5, "epochs": 2}, lambda o: L.ConstantLR(o, 0.5, 2), False, None),
    ({"name": "LinearLR", "epochs": 4}, lambda o: L.LinearLR(o, total_iters=4), False, None),
    ({"name": "LinearLR", "epochs": 2, "every": "step"}, lambda o: L.LinearLR(o, total_iters=6), True, None),
    ({"name": "PolynomialLR", "total_iters": 5}, lambda o: L.PolynomialLR(o, 5), False, None),
    ({"name": "CosineAnnealingLR", "T_max": 4}, lambda o: L.CosineAnnealingLR(o, 4), False, None),
    ({"name": "CosineAnnealingLR", "epochs": 4}, lambda o: L.CosineAnnealingLR(o, 4), False, 4),
    (
        {"name": "CosineAnnealingLR", "epochs": 4, "every": "step", "eta_min": 0.01},
        lambda o: L.CosineAnnealingLR(o, 12, 0.01),
        True,
        12,
    ),
    ({"name": "CosineAnnealingWarmRestarts", "T_0": 2}, lambda o: L.CosineAnnealingWarmRestarts(o, 2), False, None),
    ({"name": "OneCycleLR", "epochs": EPOCHS}, lambda o: L.OneCycleLR(o, RATES, TOTAL), True, TOTAL - 1),
    ({"name": "OneCycleLR", "epochs": 4}, lambda o: L.OneCycleLR(o, RATES, 4 * STEPS), True, 4 * STEPS - 1),
    (
        {"name": "OneCycleLR", "total_steps": 10, "max_lr": 1.0, "anneal_strategy": "linear"},
        lambda o: L.OneCycleLR(o, [1.0, 0.5], 10, anneal_strategy="linear"),
        True,
        9,
    ),
    (
        {"name": "CyclicLR", "base_lr": 0.01, "step_size_up": 4},
        lambda o: L.CyclicLR(o, [0.01, 0.005], RATES, 4),
        True,
        None,
    ),
    (
        {"name": "ReduceLROnPlateau", "patience": 0, "factor": 0.5},
        lambda o: L.ReduceLROnPlateau(o, "max", 0.5, 0),
        False,
        None,
    ),
    (
        {"name": "PiecewiseLinear", "epochs": [0, 2, 5], "factors": [0, 1, 0]},
        lambda o: L.LambdaLR(o, lambda i: min(i / 6, 1) if i <= 6 else max(1 - (i - 6) / 9, 0)),
        True,
        None,
    ),
    ({"name": f"{__name__}:Halving"}, Halving, False, None),
]
each_case = pytest.mark.parametrize(
    ("schedule", "make", "each_step", "length"),
    CASES,
    ids=[" ".join(f"{k}={v}" if k != "name" else str(v) for k, v in case[0].items()) for case in CASES],
)


@each_case
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_chunks_of_any_length_give_the_rates_of_a_plain_loop_of_torch(
    schedule: dict[str, Any], make: Callable[[Optimizer], Any], each_step: bool, length: int | None, optimizer: str
) -> None:
    given = profile(schedule, optimizer)
    whole = in_chunks(given, [EPOCHS])
    assert in_chunks(given, [1] * EPOCHS) == whole
    assert in_chunks(given, [2, 1, EPOCHS - 3]) == whole
    expected = plainly(given, make, each_step, length)
    if schedule["name"] == "PiecewiseLinear":  # torch has no such schedule; LambdaLR rounds differently
        torch.testing.assert_close(
            [[g[0] for g in step] for step in whole], [[g[0] for g in step] for step in expected]
        )
    else:
        assert whole == expected
    assert len({step[0][0] for step in whole}) > 1  # the learning rate changes


@each_case
@pytest.mark.parametrize("cut_at", [1, STEPS - 1, STEPS, 2 * STEPS + 1])
def test_a_schedule_goes_on_where_an_epoch_was_interrupted(
    schedule: dict[str, Any], make: Callable[[Optimizer], Any], each_step: bool, length: int | None, cut_at: int
) -> None:
    assert in_chunks(profile(schedule), [EPOCHS], cut_at) == in_chunks(profile(schedule), [EPOCHS])


def test_without_a_schedule_the_learning_rate_is_constant() -> None:
    assert {str(step) for step in in_chunks(profile(None), [1, 1])} == {str([(RATE, 0.9, None), (RATE / 2, 0.9, None)])}


@pytest.mark.parametrize("schedule", [case[0] for case in CASES], ids=lambda s: str(s["name"]))
def test_a_finished_schedule_does_not_raise(schedule: dict[str, Any]) -> None:
    whole = in_chunks(profile(schedule), [40])
    assert all(rate >= 0 for step in whole for rate, _, _ in step)
    if "epochs" in schedule:
        assert whole[-1] == whole[-2]


@given(
    st.lists(st.floats(0.1, 5), min_size=1, max_size=5).flatmap(
        lambda gaps: st.tuples(st.just(gaps), st.lists(st.floats(0, 2), min_size=len(gaps), max_size=len(gaps)))
    ),
    st.integers(1, 7),
)
def test_piecewise_linear_is_between_its_neighbouring_corners(
    corners: tuple[list[float], list[float]], steps_per_epoch: int
) -> None:
    gaps, factors = corners
    epochs = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=RATE)
    scheduler = PiecewiseLinear(optimizer, epochs, factors, steps_per_epoch)
    for step in range(int(epochs[-1] * steps_per_epoch) + 3):
        at, rate = step / steps_per_epoch, optimizer.param_groups[0]["lr"] / RATE
        before = [f for e, f in zip(epochs, factors, strict=True) if e <= at][-1:] or factors[:1]
        after = [f for e, f in zip(epochs, factors, strict=True) if e >= at][:1] or factors[-1:]
        assert min(before + after) - 1e-9 <= rate <= max(before + after) + 1e-9
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "StepLr"}, r"profile 'one': schedule StepLr: torch has no .*did you mean 'StepLR'"),
        ({"name": "Xyz"}, r"schedule Xyz: torch has no .*allowed: .*OneCycleLR.*PiecewiseLinear"),
        (
            {"name": "LambdaLR"},
            r"schedule LambdaLR: it takes functions, which a settings file can't contain; use Piece",
        ),
        ({"name": "MultiplicativeLR"}, r"schedule MultiplicativeLR: it takes functions, .* derive your own class"),
        ({"name": "SequentialLR"}, r"schedule SequentialLR: it takes other schedules, which .* derive your own"),
        ({"name": "ChainedScheduler"}, r"schedule ChainedScheduler: it takes other schedules, which a settings file"),
        ({"name": "StepLR"}, r"schedule StepLR: .*missing 1 required positional argument: 'step_size'"),
        (
            {"name": "StepLR", "stepsize": 5},
            r"schedule StepLR: it has no option 'stepsize'; did you mean 'step_size'",
        ),
        ({"name": "StepLR", "step_size": "5"}, r"profile 'one': StepLR: .*str"),
        ({"name": "StepLR", "step_size": 2, "epochs": 5}, r"schedule StepLR: it has no option 'epochs'"),
        ({"name": "StepLR", "step_size": 0}, r"profile 'one': .*\"step_size\": 0"),
        ({"name": "CosineAnnealingLR"}, r"CosineAnnealingLR: .*T_max.*set its length in epochs with \"epochs\""),
        ({"name": "ExponentialLR", "gamma": -1}, r"sets the learning rate to -.*must stay 0 or more"),
        ({"name": "ExponentialLR", "gamma": None}, r"profile 'one': ExponentialLR: "),
        ({"name": "OneCycleLR"}, r"schedule OneCycleLR: .*total_steps"),
        ({"name": "OneCycleLR", "epochs": 2.5}, r"schedule OneCycleLR: Expected positive integer epochs"),
        ({"name": "OneCycleLR", "epochs": 2, "steps_per_epoch": 9}, r"it has no option 'steps_per_epoch'"),
        ({"name": "OneCycleLR", "epochs": 2, "max_lr": [1, 2]}, r"schedule OneCycleLR: .*max_lr"),
        ({"name": "CosineAnnealingLR", "epochs": 2, "T_max": 4}, r"both 'epochs' and 'T_max' set its length"),
        (
            {"name": "OneCycleLR", "epochs": 2, "total_steps": 9},
            r"schedule OneCycleLR: both 'epochs' and 'total_steps' set its length; leave out 'total_steps'",
        ),
        (
            {"name": "ReduceLROnPlateau", "mode": "min"},
            r"schedule ReduceLROnPlateau: mode: 'min', but the metric 'accuracy' that it follows has mode 'max'",
        ),
        ({"name": "ReduceLROnPlateau", "every": "step"}, r"it follows 'accuracy', measured once per epoch"),
        ({"name": "PiecewiseLinear", "epochs": [0, 1]}, r"schedule PiecewiseLinear: .*factors"),
        ({"name": "PiecewiseLinear", "epochs": [0, 1], "factors": [1]}, r"epochs has 2 corners, factors 1"),
        ({"name": "PiecewiseLinear", "epochs": [1, 0], "factors": [1, 0]}, r"epochs \[1, 0\] must be ascending"),
        ({"name": "PiecewiseLinear", "epochs": 3, "factors": [1, 0]}, r"epochs and factors must be lists"),
        ({"name": f"{__name__}:NoSchedule"}, r"no class NoSchedule that is derived from torch's LRScheduler"),
    ],
    ids=str,
)
def test_a_mistake_is_one_clear_error(schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message) as raised:
        schedules.check_schedule(profile(schedule), ACCURACY)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("schedule", [None, *(case[0] for case in CASES)], ids=str)
def test_a_valid_schedule_passes_the_check(schedule: dict[str, Any] | None) -> None:
    schedules.check_schedule(profile(schedule), ACCURACY)


def test_a_plateau_can_repeat_the_metrics_mode() -> None:
    schedules.check_schedule(profile({"name": "ReduceLROnPlateau", "mode": "min"}), Metric("loss", "min"))


class LambdaLR(Halving):
    """A user's own class with the name of a torch class that is refused."""


def test_a_users_own_class_can_have_the_name_of_a_refused_torch_class() -> None:
    schedules.check_schedule(profile({"name": f"{__name__}:LambdaLR"}), ACCURACY)


def test_one_cycle_needs_an_optimizer_with_momentum() -> None:
    with pytest.raises(JobError, match="schedule OneCycleLR: optimizer must support momentum"):
        schedules.check_schedule(profile({"name": "OneCycleLR", "epochs": 3}, "Adagrad"), ACCURACY)
