"""Jobs that draw random numbers wherever a job can, and jobs with state outside their checkpoints.

Copied into a folder, this file is also a user's own module.
"""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from jobs.data.splits import Split
from jobs.digits import Digits
from jobs.digits import Params as DigitsParams
from jobs.job import Averaging

print("resume_jobs says hello")  # as a user's module may


class Params(DigitsParams):
    examples: int = 50  # of the training set
    trace: str = ""  # a file that gets the indices of each batch of training, a line each


class NoisyPictures(Dataset[Any]):
    """Each example differs each time: randomly shifted, noisy and darkened."""

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        self.pictures, self.targets = pictures, labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.pictures[index].roll(random.randint(-1, 1), dims=2)
        picture = picture + 0.1 * torch.randn(picture.shape)
        return picture * float(np.random.uniform(0.5, 1.0)), torch.stack([self.targets[index], torch.tensor(index)])


class Noisy(Digits):
    """Dropout, batch normalisation, shuffling, and draws from python, numpy and torch, in the data and in the loss."""

    Params = Params

    def model(self) -> nn.Module:
        net = super().model()
        net.insert(1, nn.BatchNorm2d(self.params.width))  # type: ignore[operator]
        return net

    def data(self, split: Split) -> Any:
        pictures, labels = super().data(split).tensors
        order = torch.argsort(labels, stable=True)
        chosen = order[:: len(labels) // self.params.examples][: self.params.examples]
        return NoisyPictures(pictures[chosen], labels[chosen])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        labels, indices = targets[:, 0], targets[:, 1]
        loss = super().loss(outputs, labels)
        if outputs.requires_grad:
            self.note(indices.tolist())
            # One each, of generators that draw two at once and keep the second: that is part of their state.
            loss = loss * (1 + 0.05 * random.gauss(0, 1) + 0.05 * float(np.random.normal()))
        return loss

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {
            "accuracy": (outputs.argmax(dim=1) == targets[:, 0]).float().mean(),
            "loss": self.loss(outputs, targets),
        }

    def note(self, indices: list[int]) -> None:
        self.__dict__.setdefault("seen", []).append(indices)
        if self.params.trace:
            with open(self.params.trace, "a", encoding="utf-8") as trace:
                trace.write(f"{indices}\n")


class RandomSubset(Noisy):
    """The examples are drawn when the data are loaded, as torch's random_split does."""

    def data(self, split: Split) -> Any:
        pictures, labels = super(Noisy, self).data(split).tensors
        some = torch.randperm(len(labels))[: self.params.examples]
        random.random(), np.random.random()
        return NoisyPictures(pictures[some], labels[some] % 2)


# --- jobs whose checkpoints are not complete


class OwnGenerator(Noisy):
    """The loss draws from a generator of the job's own."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.random = random.Random(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(outputs, targets)
        return loss * (1 + self.random.random()) if outputs.requires_grad else loss


_of_the_module = random.Random(1)


class ModuleGenerator(Noisy):
    """The loss draws from a generator of the module, which all objects share."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(outputs, targets)
        return loss * (1 + _of_the_module.random()) if outputs.requires_grad else loss


class Warming(nn.Module):
    """Scales its input by a factor that grows with every batch of training."""

    def __init__(self, in_checkpoint: bool) -> None:
        super().__init__()
        self.register_buffer("batches", torch.zeros(()), persistent=in_checkpoint)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.batches += 1
        return inputs * (1 - 0.5**self.batches)


class WarmingWithExtraState(Warming):
    def get_extra_state(self) -> dict[str, int]:
        return {"batches": int(self.batches)}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.batches.fill_(state["batches"])


class OwnCounter(Noisy):
    """The model counts its batches where state_dict() does not see it."""

    in_checkpoint = False

    def model(self) -> nn.Module:
        return nn.Sequential(Warming(self.in_checkpoint), super().model())


class BufferedCounter(OwnCounter):
    """The same, corrected."""

    in_checkpoint = True


class ExtraState(OwnCounter):
    """The same, corrected in the other way."""

    def model(self) -> nn.Module:
        return nn.Sequential(WarmingWithExtraState(in_checkpoint=False), Noisy.model(self))


class WithAdam(Noisy):
    """An optimizer that counts its steps."""

    def optimizer(self, model: nn.Module, profile: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=profile.learning_rate, weight_decay=profile.weight_decay)


class Averaged(Noisy):
    """What is evaluated is an average of the weights."""

    def averaging(self) -> Averaging:
        return Averaging(0.9, every_steps=2)


class CountingPictures(NoisyPictures):
    """Each example depends on how many were asked for before it."""

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        super().__init__(pictures, labels)
        self.count = itertools.count()

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture, target = super().__getitem__(index)
        return picture + 0.01 * next(self.count), target


class OwnAugmentation(Noisy):
    def data(self, split: Split) -> Any:
        plain = super().data(split)
        return CountingPictures(plain.pictures, plain.targets) if split == "train" else plain


class OwnMetric(Noisy):
    """The metrics depend on how often they were asked for."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.asked = getattr(self, "asked", 0) + 1
        return {**super().metrics(outputs, targets), "asked": torch.tensor(float(self.asked))}


class AnotherLength(Noisy):
    """The data are not the same in two processes."""

    made = itertools.count(1)

    def data(self, split: Split) -> Any:
        plain = super().data(split)
        count = len(plain) // next(self.made)
        return NoisyPictures(plain.pictures[:count], plain.targets[:count] % 2)


class FromTheClock(Noisy):
    """No two processes train the same."""

    def model(self) -> nn.Module:
        net = super().model()
        nn.init.normal_(net[0].weight, generator=torch.Generator().manual_seed(time.time_ns()))  # type: ignore[index]
        return net


class NoDeterministicKernel(Noisy):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        return super().loss(outputs, targets)


class Exploding(Noisy):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs, targets) * float("inf")


class Failing(Noisy):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("no loss today")
