"""How the learning rate goes under one profile, and where a lineage stands in it.

A schedule counts what a lineage has trained in an unbroken line of chunks under an equal profile. Under another
profile the next one begins at its first step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from jobs.errors import JobError
from jobs.optim import optimizers
from orchestrator.records import Metric, Profile

# Torch's that are made for a step after each batch; all others are stepped once an epoch.
EACH_STEP = ("OneCycleLR", "CyclicLR", "PiecewiseLinear")
_DERIVE = 'derive a class of your own from LRScheduler, and name it as "package.module:Class"'
_FUNCTIONS = f"it takes functions, which a settings file can't hold; PiecewiseLinear takes corners, or {_DERIVE}"
_SCHEDULES = f"it takes other schedules, which a settings file can't hold; {_DERIVE}"
# Torch's own that don't fit, and why.
UNFIT = {"LambdaLR": _FUNCTIONS, "MultiplicativeLR": _FUNCTIONS}
UNFIT |= {"SequentialLR": _SCHEDULES, "ChainedScheduler": _SCHEDULES}
# Whose "epochs" is another argument, counted in what the schedule is stepped by.
LENGTH = {"CosineAnnealingLR": "T_max", "LinearLR": "total_iters", "ConstantLR": "total_iters"}
LENGTH |= {"PolynomialLR": "total_iters"}
# Arguments that are learning rates, a value for each parameter group: a group's lr_factor counts for them too.
RATES = {"OneCycleLR": ("max_lr",), "CyclicLR": ("base_lr", "max_lr")}


class PiecewiseLinear(LRScheduler):
    """A factor of the learning rate that goes in straight lines from corner to corner, e.g. the slanted triangle of
    Page (How to train your ResNet, 2018): epochs [0, 5, 24], factors [0, 1, 0]. Before the first corner and after
    the last it is theirs.

    epochs: where the corners are, rising, counted from 0; factors: as many, 0 or more; steps_per_epoch: how often
    `step` is called in an epoch. The learning rate of step i (from 0) is that at i / steps_per_epoch epochs.
    Raises ValueError if they are not such.
    """

    def __init__(
        self, optimizer: Optimizer, epochs: Sequence[float], factors: Sequence[float], steps_per_epoch: int
    ) -> None:
        if not isinstance(epochs, list | tuple) or not isinstance(factors, list | tuple) or len(epochs) < 1:
            raise ValueError("epochs and factors must be lists of numbers, e.g. [0, 5, 24] and [0, 1, 0]")
        if len(epochs) != len(factors):
            raise ValueError(f"epochs has {len(epochs)} corners, factors {len(factors)}; each corner needs both")
        if list(epochs) != sorted(set(epochs)) or min(factors) < 0:
            raise ValueError(f"epochs must rise and factors be 0 or more; they are {list(epochs)} and {list(factors)}")
        self.epochs = list(map(float, epochs))
        self.factors = list(map(float, factors))
        self.steps_per_epoch = steps_per_epoch
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The learning rate of each parameter group at this step."""
        factor = float(np.interp(self.last_epoch / self.steps_per_epoch, self.epochs, self.factors))
        return [rate * factor for rate in self.base_lrs]


class Schedule:
    """The schedule of a profile for an optimizer: a constant learning rate if the profile has none."""

    def __init__(self, profile: Profile, optimizer: Optimizer, steps_per_epoch: int, metric: Metric) -> None:
        """steps_per_epoch: batches; metric: what ReduceLROnPlateau looks at. Raises JobError, naming what is wrong."""
        self._metric = metric.name
        self._count = 0  # of its steps
        self._last: int | None = None  # the step after which it stays as it is; None: never
        self._scheduler: LRScheduler | None = None
        self.each_step = False
        if profile.schedule is None:
            return
        given = {key: value for key, value in profile.schedule.items() if key not in ("name", "every")}
        name = profile.schedule["name"]
        what = f"profile {profile.name!r}: schedule {name}"
        found = PiecewiseLinear if name == "PiecewiseLinear" else _find(name, profile.name)
        self.each_step = profile.schedule.get("every", "step" if name in EACH_STEP else "epoch") == "step"
        a_epoch = steps_per_epoch if self.each_step else 1
        if issubclass(found, ReduceLROnPlateau):
            if given.setdefault("mode", metric.mode) != metric.mode:
                raise JobError(
                    f"{what}: mode: {given['mode']!r}, but it looks at the metric {metric.name!r}, whose mode is "
                    f'{metric.mode!r}; leave "mode" out'
                )
            if self.each_step:
                raise JobError(f'{what}: it looks at {metric.name!r}, measured once an epoch; leave out "every"')
        try:
            self._scheduler = self._made(found, name, given, optimizer, a_epoch, what)
        except JobError:
            raise
        except Exception as error:  # a wrong type is noticed where the value is used
            how_long = '; "epochs" says how many epochs it takes' if name in (*LENGTH, "OneCycleLR") else ""
            raise JobError(f"{what}: {_plain(error)}{optimizers.given(given)}{how_long}") from error

    def _made(
        self, found: Any, name: str, given: dict[str, Any], optimizer: Optimizer, a_epoch: int, what: str
    ) -> LRScheduler:
        known = optimizers.accepted(found)
        length = LENGTH.get(name)
        optimizers.check_options(
            {key: value for key, value in given.items() if key != "epochs" or not length},
            found,
            what,
            taken=("last_epoch", "verbose", "steps_per_epoch"),
        )
        options = dict(given)
        other = "total_steps" if issubclass(found, lr_scheduler.OneCycleLR) else length
        if given.get("epochs") is not None and other and given.get(other) is not None:
            raise JobError(
                f"{what}: both 'epochs' and {other!r} say how long it is; leave out {other!r}: 'epochs' holds "
                "whatever the number of batches"
            )
        if length and "epochs" in given:
            self._last = options[length] = max(1, round(options.pop("epochs") * a_epoch))
        if "steps_per_epoch" in known:
            options["steps_per_epoch"] = a_epoch
        if name in RATES and "max_lr" not in options:
            options["max_lr"] = [group["lr"] for group in optimizer.param_groups]
        for rate in set(RATES.get(name, ())) & set(options):
            options[rate] = _rates(optimizer, options[rate])
        scheduler: LRScheduler = found(optimizer, **options)
        if isinstance(scheduler, lr_scheduler.OneCycleLR):
            self._last = scheduler.total_steps - 1
        return scheduler

    def after_step(self) -> None:
        """To be called after each optimizer step."""
        if self.each_step:
            self._step()

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """To be called after each epoch, with what was measured."""
        if not self.each_step:
            self._step(metrics)

    def _step(self, metrics: Mapping[str, float] | None = None) -> None:
        if self._scheduler is None or self._count == self._last:
            return
        # The first optimizer steps in fp16 may be skipped, and torch warns that a schedule comes before them.
        with _quiet() if self._count == 0 else nullcontext():
            if isinstance(self._scheduler, ReduceLROnPlateau):
                self._scheduler.step((metrics or {})[self._metric])
            else:
                self._scheduler.step()
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, in plain values."""
        return {"count": self._count, "scheduler": self._scheduler.state_dict() if self._scheduler else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; the optimizer's own state is restored by whoever restores it."""
        self._count = state["count"]
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])


def check_schedule(profile: Profile, metric: Metric, default: str = "SGD") -> None:
    """Try the profile's optimizer and schedule on one parameter. Raises JobError, naming what is wrong."""
    optimizer = optimizers.check_optimizer(profile, default)
    schedule = Schedule(profile, optimizer, 2, metric)
    try:
        with _quiet():
            for _ in range(3):
                for parameter in optimizer.param_groups[0]["params"]:
                    parameter.grad = parameter.detach().clone()
                optimizer.step()
                schedule.after_step()
                schedule.after_epoch({metric.name: 0.0})
    except JobError:
        raise
    except Exception as error:  # a wrong type is noticed where the value is used
        named = profile.schedule["name"] if profile.schedule else profile.optimizer or default
        given = optimizers.given(profile.schedule or profile.optimizer_options)
        raise JobError(f"profile {profile.name!r}: {named}: {_plain(error)}{given}") from error
    for group in optimizer.param_groups:
        if not group["lr"] >= 0:
            raise JobError(
                f"profile {profile.name!r}: its schedule makes the learning rate {group['lr']:g}; it must stay 0 or "
                f"more{optimizers.given(profile.schedule or {})}"
            )


def as_plain(profile: Profile) -> dict[str, Any]:
    """The profile as a checkpoint keeps it."""
    found: dict[str, Any] = asdict(profile)
    return found


def _find(name: str, profile: str) -> Any:
    what = f"profile {profile!r}: schedule"
    return optimizers.find(name, what, lr_scheduler, LRScheduler, UNFIT, also=("PiecewiseLinear",))


def _rates(optimizer: Optimizer, given: Any) -> Any:
    """A learning rate for each parameter group: the one that is given, times the group's factor."""
    if isinstance(given, list | tuple):
        return list(given)
    return [given * group.get(optimizers.LR_FACTOR, 1) for group in optimizer.param_groups]


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _plain(error: Exception) -> str:
    """Without the name of a method that the user has never called."""
    return str(error).replace(".__init__()", "").replace("__init__()", "it")
