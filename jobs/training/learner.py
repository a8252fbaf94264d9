"""Everything that the next training step depends on: a model, its optimizer, its schedule, the loss scale and the
average of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from jobs.job import Averaging, Job
from jobs.optim import optimizers
from jobs.optim.schedules import Schedule
from jobs.training import reuse
from jobs.training.checked import checked_loss, checked_model
from jobs.training.precision import Speed, arrange
from jobs.training.ranks import Alone
from orchestrator.records import Metric, Profile


class Predictor:
    """A job's model on its device, for evaluation only, with the settings' memory layout and compilation."""

    def __init__(self, job: Job, speed: Speed, group: Alone, model: nn.Module | None = None) -> None:
        """model: an existing one of this job, on its device; None: create one with initial weights."""
        self.job = job
        self.speed = speed
        if model is None:
            made = checked_model(job, job.model())
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
    ) -> None:
        """state: continue from it; None: a founder. model: see Predictor."""
        super().__init__(job, speed, group, model)
        self.steps = 0  # optimizer steps of the whole lineage
        self._group = group
        self._profile = profile
        self._optimizer = job.optimizer(self.model, profile)
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
    def evaluated(self) -> tuple[nn.Module, nn.Module]:
        if self._average is not None and self._average.begun:
            return self._average.model, self._average.running
        return super().evaluated

    def step(self, batch: Any) -> Tensor:
        """Do one step. batch: this rank's part. Returns the mean loss of the whole batch, a scalar on the device."""
        self._optimizer.zero_grad(set_to_none=True)
        with self.speed.autocast():
            loss = checked_loss(self.job, self.job.training_loss(self.running, self.arranged(batch)))
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        loss = self._group.merge(loss.detach(), self.model)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.steps += 1
        self._schedule.after_step()
        if self._average is not None:
            self._average.after_step(self.model, self.steps)
        return loss

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        self._schedule.after_epoch(metrics)

    def state(self) -> dict[str, Any]:
        """Return the complete state. Its tensors are the ones in use, not copies."""
        return {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "average": self._average.state() if self._average else None,
            "optimizer": self._optimizer.state_dict(),
            "optimizer_class": optimizers.class_name(self._optimizer),
            "profile": asdict(self._profile),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. If it was saved with another profile, the schedule starts anew, and the optimizer
        takes over the saved optimizer's state (such as momentum) only if both have the same class."""
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        if self._average is not None and state["average"] is not None:
            self._average.restore(state["average"])
        if state["scaler"] and self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])
        if state["profile"] == asdict(self._profile):
            self._optimizer.load_state_dict(state["optimizer"])
            self._schedule.load_state_dict(state["schedule"])
        else:
            optimizers.take_over(self._optimizer, state["optimizer"], state["optimizer_class"])


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
