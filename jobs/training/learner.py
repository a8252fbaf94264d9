"""Everything that the next training step depends on: a model, its optimizer, its schedule, the loss scale and the
average of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from jobs.errors import JobError
from jobs.job import Averaging, Job
from jobs.optim import optimizers, schedules
from jobs.optim.schedules import Schedule
from jobs.training import reuse
from jobs.training.checked import checked_loss, checked_model
from jobs.training.precision import Speed, arrange
from jobs.training.ranks import Alone
from orchestrator.profile import Metric, Profile

MakeModel = Callable[[], nn.Module]


class Predictor:
    """A job's model on its device, for evaluation only, with the settings' memory layout and compilation."""

    def __init__(
        self, job: Job, speed: Speed, group: Alone, model: nn.Module | None = None, make: MakeModel | None = None
    ) -> None:
        """model: an existing one of this job, on its device; None: create one. make: how, with initial weights; None:
        call the job's model()."""
        self.job = job
        self.speed = speed
        if model is None:
            made = make() if make else checked_model(job, job.model())
            self._made = reuse.description(made)
            model = group.adopt(made.to(speed.device))
        else:
            self._made = reuse.description(model)
        self.model = model
        self._channels_last = speed.lay_out(self.model)
        self.running = speed.compiled(self.model)  # the module to call; it shares the model's weights

    @property
    def reusable(self) -> bool:
        """Whether the model object may train another chunk, starting with the weights that it has now."""
        return self._made is not None and self._made == reuse.description(self.model)

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        """Two modules with the weights to evaluate: the model as the job created it, and the module to call."""
        return self.model, self.running

    def arranged(self, batch: Any) -> Any:
        """Return a batch in the model's memory layout."""
        return arrange(batch) if self._channels_last else batch


class Learner(Predictor):
    """A model in training. `state` returns its complete state, from which another Learner can continue."""

    def __init__(
        self,
        job: Job,
        profile: Profile,
        speed: Speed,
        group: Alone,
        steps_per_epoch: int,
        metric: Metric,
        state: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
        make: MakeModel | None = None,
    ) -> None:
        """profile: one that names its optimizer (Job.profile). state: continue from it; None: a founder. model, make:
        see Predictor."""
        super().__init__(job, speed, group, model, make)
        self.steps = 0  # optimizer steps of the whole lineage
        self._group = group
        self.profile = profile
        self._optimizer = job.optimizer(self.model, profile)
        self._names = optimizers.parameter_names(self._optimizer, self.model)
        self.description = _described(self._optimizer, profile)
        self._schedule = Schedule(profile, self._optimizer, steps_per_epoch, metric)
        self._scaler = speed.scaler()
        averaging = job.averaging()
        self._average = Average(self.model, averaging, speed) if averaging else None
        if state is not None:
            self._restore(state)
        optimizers.complete(self._optimizer)

    @property
    def learning_rate(self) -> float:
        """The first parameter group's learning rate for the next step."""
        rate: float = self._optimizer.param_groups[0]["lr"]
        return rate

    @property
    def scales_loss(self) -> bool:
        """Whether a step with an infinite loss is skipped, since the loss scale was too high (fp16)."""
        return self._scaler.is_enabled()

    @property
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        if self._average is not None and self._average.begun:
            return self._average.model, self._average.running
        return super().evaluated

    def step(self, batches: Sequence[Any]) -> tuple[Tensor, int]:
        """Do one optimizer step on the mean loss of all examples of these batches (whole ones; this rank uses its
        part). Returns the mean loss, a scalar on the device, and the number of examples."""
        self._optimizer.zero_grad(set_to_none=True)
        sizes = [self.job.batch_size(batch) for batch in batches]
        losses: list[Tensor] = []
        for batch, size in zip(batches, sizes, strict=True):
            share = self._group.share(batch, size)
            with self.speed.autocast():
                loss = checked_loss(self.job, self.job.training_loss(self.running, self.arranged(share)))
            weight = size / sum(sizes) * self._group.weight
            weighted = loss if weight == 1 else loss * weight
            self._scaler.scale(weighted).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            losses.append(weighted.detach())
        total = self._group.merge(losses[0] if len(losses) == 1 else torch.stack(losses).sum(), self.model)
        self._clip()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.steps += 1
        self._schedule.after_step()
        if self._average is not None:
            self._average.after_step(self.model, self.steps)
        return total, sum(sizes)

    def _clip(self) -> None:
        """Limit the gradients. They must be those of the loss, not of the scaled loss."""
        clip = self.profile.gradient_clip
        if clip is None:
            return
        self._scaler.unscale_(self._optimizer)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        if clip.norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip.norm)
        elif clip.value is not None:
            nn.utils.clip_grad_value_(parameters, clip.value)

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        self._schedule.after_epoch(metrics)

    def untrained(self) -> list[str]:
        """Return the names of the parameters that require a gradient, but got none in the last step or are not in the
        optimizer."""
        optimized = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        named = self.model.named_parameters()
        return [name for name, p in named if p.requires_grad and (p.grad is None or id(p) not in optimized)]

    def finite(self) -> bool:
        """Return whether all weights to be evaluated are finite numbers."""
        values = [t for t in self.evaluated[0].state_dict().values() if isinstance(t, Tensor) and t.is_floating_point()]
        return not values or bool(torch.stack([torch.isfinite(t).all() for t in values]).all())

    def state(self) -> dict[str, Any]:
        """Return the complete state. Its tensors are the ones in use, not copies."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "average": self._average.state() if self._average else None,
            "optimizer": self._optimizer.state_dict(),
            "optimizer_class": optimizers.class_name(self._optimizer),
            "optimizer_parameters": self._names,
            "profile": asdict(self.profile),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. If it was saved with another profile, the schedule starts anew, and the optimizer
        takes over the saved optimizer's state (such as momentum) only if both have the same class and parameters.
        Raises JobError if the profile is the same, but the optimizer has its parameters in another order."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        if self._average is not None and state["average"] is not None:
            self._average.restore(state["average"])
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        named = state.get("optimizer_parameters", self._names)  # checkpoints of earlier versions lack the names
        if self.job.same_profile(state["profile"], self.profile):
            if named != self._names:
                raise JobError(_other_order(self.job, named, self._names))
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
        elif named == self._names:
            optimizers.take_over(self._optimizer, state["optimizer"], state["optimizer_class"])

    def take_optimizer(self, state: Mapping[str, Any]) -> None:
        """Take over the optimizer's state of another run's checkpoint. Raises JobError if it does not fit."""
        fits = state.get("optimizer_parameters", self._names) == self._names
        if not fits or not optimizers.take_over(self._optimizer, state["optimizer"], state["optimizer_class"]):
            raise JobError(
                f"start_from: the optimizer's state is of {state['optimizer_class']} and its parameters, and does not "
                f'fit {optimizers.class_name(self._optimizer)} here; set "optimizer": false to begin without it'
            )


def described(job: Job, model: nn.Module, profile: Profile) -> str:
    """Return the optimizer and the schedule that a profile gets for a model, in one line."""
    return _described(job.optimizer(model, profile), profile)


def _described(optimizer: Optimizer, profile: Profile) -> str:
    return f"{optimizers.described(optimizer)}, {schedules.described(profile.schedule)}"


def _other_order(job: Job, saved: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str:
    """Describe how the optimizer's parameters differ from those of the checkpoint."""
    place = next(
        (f"parameter {i} of group {g} was {a}, now {b}"
         for g, (one, other) in enumerate(zip(saved, now, strict=False))
         for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        f"there were {[len(group) for group in saved]} parameters in its groups, now {[len(group) for group in now]}",
    )  # fmt: skip
    return (
        f"{type(job).__name__}.optimizer() orders the parameters otherwise than in the checkpoint, whose state (such "
        f"as momentum) is by position: {place}. Order them the same in each process, for example as "
        "model.named_parameters() does"
    )


class Average:
    """The exponential moving average of a model's weights (torch.optim.swa_utils.AveragedModel)."""

    def __init__(self, model: nn.Module, averaging: Averaging, speed: Speed) -> None:
        self._every = averaging.every_steps
        update = get_ema_multi_avg_fn(averaging.decay)  # type: ignore[no-untyped-call]  # torch has no types for it
        # Without a device argument the update count stays on the CPU, where reading it does not wait for the GPU.
        self._average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
        self.model: nn.Module = self._average.module
        self.running = speed.compiled(self.model)

    @property
    def begun(self) -> bool:
        return bool(self._average.n_averaged > 0)

    def after_step(self, model: nn.Module, steps: int) -> None:
        if steps % self._every == 0:
            self._average.update_parameters(model)

    def state(self) -> dict[str, Any]:
        return {"updates": int(self._average.n_averaged), "model": self.model.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._average.n_averaged.fill_(state["updates"])
        self.model.load_state_dict(state["model"])
