"""The learning-rate schedule of a profile, and a lineage's position in it. Successive chunks under equal profiles
continue one schedule; a chunk under another profile starts that profile's schedule at its first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from jobs.errors import JobError
from jobs.optim import optimizers
from orchestrator.profile import Metric, Profile

# Schedules that are stepped after every batch; all others are stepped once per epoch.
EACH_STEP = ("OneCycleLR", "CyclicLR", "PiecewiseLinear")
_DERIVE = 'derive your own class from LRScheduler and name it as "package.module:Class"'
_FUNCTIONS = f"it takes functions, which a settings file can't contain; use PiecewiseLinear, or {_DERIVE}"
_SCHEDULES = f"it takes other schedules, which a settings file can't contain; {_DERIVE}"
# torch's schedules that settings can't use, and why.
UNFIT = dict.fromkeys(("LambdaLR", "MultiplicativeLR"), _FUNCTIONS)
UNFIT |= dict.fromkeys(("SequentialLR", "ChainedScheduler"), _SCHEDULES)
# By class: the constructor argument, counted in steps of the schedule, that "epochs" is converted to.
LENGTH = dict.fromkeys(("LinearLR", "ConstantLR", "PolynomialLR"), "total_iters") | {"CosineAnnealingLR": "T_max"}
# Arguments that are learning rates, one per parameter group; each is multiplied by its group's lr_factor.
RATES = {"OneCycleLR": ("max_lr",), "CyclicLR": ("base_lr", "max_lr")}


class PiecewiseLinear(LRScheduler):
    """Multiplies the learning rate by a factor interpolated between corners (and constant outside them), such as Page's
    slanted triangle ("How to Train Your ResNet", 2018): epochs [0, 5, 24], factors [0, 1, 0].

    epochs: positions of the corners, ascending. factors: one per corner, 0 or more. steps_per_epoch: calls of `step`
    per epoch. Step i (from 0) uses the learning rate at i / steps_per_epoch epochs. Raises ValueError if invalid.
    """

    def __init__(
        self, optimizer: Optimizer, epochs: Sequence[float], factors: Sequence[float], steps_per_epoch: int
    ) -> None:
        if not isinstance(epochs, list | tuple) or not isinstance(factors, list | tuple) or len(epochs) < 1:
            raise ValueError("epochs and factors must be lists of numbers, e.g. [0, 5, 24] and [0, 1, 0]")
        if len(epochs) != len(factors):
            raise ValueError(f"epochs has {len(epochs)} corners, factors {len(factors)}; each corner needs both")
        if list(epochs) != sorted(set(epochs)) or min(factors) < 0:
            raise ValueError(f"epochs {list(epochs)} must be ascending, and factors {list(factors)} 0 or more")
        self.epochs = list(map(float, epochs))
        self.factors = list(map(float, factors))
        self.steps_per_epoch = steps_per_epoch
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """Return the learning rate of each parameter group at the current step."""
        factor = float(np.interp(self.last_epoch / self.steps_per_epoch, self.epochs, self.factors))
        return [rate * factor for rate in self.base_lrs]


class Schedule:
    """A profile's schedule for an optimizer; the learning rate is constant if the profile has no schedule.

    With a warm-up, the learning rate first rises linearly over its steps: step i of n (from 1) uses i / n of the rate
    with which the schedule begins. The schedule itself begins after the warm-up.
    """

    def __init__(self, profile: Profile, optimizer: Optimizer, steps_per_epoch: int, metric: Metric) -> None:
        """steps_per_epoch: batches per epoch. metric: for ReduceLROnPlateau. Raises JobError, naming the mistake."""
        self._metric = metric.name
        self._optimizer = optimizer
        self._warmed = 0  # number of warm-up steps so far
        self._warmup = warmup_steps(profile.schedule, steps_per_epoch)
        self._warming = self._warmup > 0  # did the current epoch begin in the warm-up?
        self._count = 0  # number of schedule steps so far
        self._last: int | None = None  # number of steps after which the learning rate stays constant; None: never
        self._scheduler: LRScheduler | None = None
        self.each_step = False
        self._begin(profile, steps_per_epoch, metric)
        self._rates = [group["lr"] for group in optimizer.param_groups]  # with which the schedule begins
        if self._warmup:
            self._warm()

    def _begin(self, profile: Profile, steps_per_epoch: int, metric: Metric) -> None:
        """Create torch's scheduler."""
        optimizer = self._optimizer
        if profile.schedule is None or "name" not in profile.schedule:
            return
        options = {key: value for key, value in profile.schedule.items() if key not in ("name", "every", "warmup")}
        name = profile.schedule["name"]
        what = f"profile {profile.name!r}: schedule {name}"
        kind = optimizers.find(name, what, lr_scheduler, LRScheduler, UNFIT, {"PiecewiseLinear": PiecewiseLinear})
        self.each_step = profile.schedule.get("every", "step" if name in EACH_STEP else "epoch") == "step"
        if issubclass(kind, ReduceLROnPlateau):
            if options.setdefault("mode", metric.mode) != metric.mode:
                raise JobError(
                    f"{what}: mode: {options['mode']!r}, but the metric {metric.name!r} that it follows has mode "
                    f'{metric.mode!r}; leave "mode" out'
                )
            if self.each_step:
                raise JobError(f'{what}: it follows {metric.name!r}, measured once per epoch; leave out "every"')
        try:
            per_epoch = steps_per_epoch if self.each_step else 1
            self._scheduler = self._made(kind, name, options, optimizer, per_epoch, what)
        except JobError:
            raise
        except Exception as error:  # of any class: torch notices a wrong type only when it uses the value
            hint = '; set its length in epochs with "epochs"' if name in (*LENGTH, "OneCycleLR") else ""
            raise JobError(f"{what}: {_plain(error)}{optimizers.given(options)}{hint}") from error

    def _made(
        self, kind: Any, name: str, given: dict[str, Any], optimizer: Optimizer, per_epoch: int, what: str
    ) -> LRScheduler:
        options = dict(given)
        length = LENGTH.get(name)
        names = [key for key in options if key != "epochs" or not length]
        optimizers.check_options(names, kind, what, taken=("last_epoch", "verbose", "steps_per_epoch"))
        other = "total_steps" if issubclass(kind, lr_scheduler.OneCycleLR) else length
        if options.get("epochs") is not None and other and options.get(other) is not None:
            raise JobError(
                f"{what}: both 'epochs' and {other!r} set its length; leave out {other!r}, because 'epochs' does not "
                "depend on the number of batches"
            )
        if length and "epochs" in options:
            self._last = options[length] = max(1, round(options.pop("epochs") * per_epoch))
        if "steps_per_epoch" in optimizers.accepted(kind):
            options["steps_per_epoch"] = per_epoch
        if name in RATES and "max_lr" not in options:
            options["max_lr"] = [group["lr"] for group in optimizer.param_groups]
        for rate in set(RATES.get(name, ())) & set(options):
            if not isinstance(options[rate], list):
                factors = [group.get(optimizers.LR_FACTOR, 1) for group in optimizer.param_groups]
                options[rate] = [options[rate] * factor for factor in factors]
        scheduler: LRScheduler = kind(optimizer, **options)
        if isinstance(scheduler, lr_scheduler.OneCycleLR):
            self._last = scheduler.total_steps - 1
        return scheduler

    def _warm(self) -> None:
        """Set the learning rates of the next step, if it is one of the warm-up or the first after it."""
        share = (self._warmed + 1) / self._warmup if self._warmed < self._warmup else 1.0
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share

    def after_step(self) -> None:
        """Step the schedule if it counts steps; call this after each optimizer step."""
        if self._warmed < self._warmup:
            self._warmed += 1
            self._warm()
        elif self.each_step:
            self._step()

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """Step the schedule if it counts epochs; call this after each epoch, with the epoch's metrics. An epoch in
        which the warm-up ended does not count, nor does an epoch that was not evaluated for ReduceLROnPlateau."""
        warming, self._warming = self._warming, self._warmed < self._warmup
        if not self.each_step and not warming:
            self._step(metrics)

    def _step(self, metrics: Mapping[str, float] | None = None) -> None:
        if self._scheduler is None or self._count == self._last:
            return
        # In fp16 the first optimizer steps may be skipped; torch then warns that the schedule was stepped too early.
        with warnings.catch_warnings(action="ignore", category=UserWarning) if self._count == 0 else nullcontext():
            if isinstance(self._scheduler, ReduceLROnPlateau):
                if self._metric not in (metrics or {}):
                    return
                self._scheduler.step((metrics or {})[self._metric])
            else:
                self._scheduler.step()
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule as plain values."""
        scheduler = self._scheduler.state_dict() if self._scheduler else None
        return {"count": self._count, "warmed": self._warmed, "warming": self._warming, "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the position in the schedule. The optimizer's state must be restored separately."""
        self._count = state["count"]
        self._warmed = state.get("warmed", self._warmup)  # checkpoints of versions without a warm-up lack it
        self._warming = state.get("warming", False)
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def warmup_steps(schedule: Mapping[str, Any] | None, steps_per_epoch: int) -> int:
    """Return the number of optimizer steps of a schedule's warm-up."""
    warmup = (schedule or {}).get("warmup")
    if warmup is None:
        return 0
    return int(warmup["steps"]) if isinstance(warmup, dict) else max(1, round(warmup * steps_per_epoch))


def described(schedule: Mapping[str, Any] | None) -> str:
    """Return a profile's schedule in a few words, for the plan and the log."""
    if schedule is None:
        return "a constant learning rate"
    options = [f"{key}={value}" for key, value in schedule.items() if key not in ("name", "warmup")]
    main = f"{schedule['name']}({', '.join(options)})" if "name" in schedule else "a constant learning rate"
    warmup = schedule.get("warmup")
    if warmup is None:
        return main
    length = f"{warmup['steps']} steps" if isinstance(warmup, dict) else f"{warmup:g} epochs"
    return f"{main} after a warm-up of {length}"


def check_schedule(profile: Profile, metric: Metric) -> None:
    """Test the profile's optimizer and schedule on one parameter. Raises JobError, naming the mistake."""
    optimizer = optimizers.check_optimizer(profile)
    schedule = Schedule(profile, optimizer, 2, metric)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            for _ in range(3):
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad = parameter.detach().clone()
                optimizer.step()
                schedule.after_step()
                schedule.after_epoch({metric.name: 0.0})
    except Exception as error:  # of any class: torch notices a wrong type only when it uses the value
        named = (profile.schedule or {}).get("name") or profile.optimizer or "SGD"
        given = optimizers.given(profile.schedule or profile.optimizer_options)
        raise JobError(f"profile {profile.name!r}: {named}: {_plain(error)}{given}") from error
    for group in optimizer.param_groups:
        if not group["lr"] >= 0:
            raise JobError(
                f"profile {profile.name!r}: its schedule sets the learning rate to {group['lr']:g}; it must stay 0 or "
                f"more{optimizers.given(profile.schedule or {})}"
            )


def _plain(error: Exception) -> str:
    """Return the message without `__init__`, a method that the user did not call."""
    return str(error).replace(".__init__()", "").replace("__init__()", "it")
