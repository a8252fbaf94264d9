"""Jobs that draw random numbers wherever a job can, and jobs whose checkpoints lack some of their state.

Tests also copy this file into a folder, where it is a user's own module.
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

print("resume_jobs says hello")  # as a user's own module might


class Params(DigitsParams):
    examples: int = 50  # size of the training set
    trace: str = ""  # a file for the indices of each training batch, one batch per line


class NoisyPictures(Dataset[Any]):
    """Pictures that are randomly shifted, darkened and made noisy each time they are read."""

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        self.pictures, self.targets = pictures, labels

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        picture = self.pictures[index].roll(random.randint(-1, 1), dims=2)
        picture = picture + 0.1 * torch.randn(picture.shape)
        return picture * float(np.random.uniform(0.5, 1.0)), torch.stack([self.targets[index], torch.tensor(index)])


class Noisy(Digits):
    """Uses dropout, batch norm, shuffling, and random numbers of python, numpy and torch in the data and the loss."""

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
            # Both generators draw two normal numbers at a time and keep the second one as part of their state.
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
    """Selects random examples when the data are loaded, like torch's random_split."""

    def data(self, split: Split) -> Any:
        pictures, labels = super(Noisy, self).data(split).tensors
        some = torch.randperm(len(labels))[: self.params.examples]
        random.random(), np.random.random()
        return NoisyPictures(pictures[some], labels[some] % 2)


# --- jobs whose checkpoints are not complete


class OwnGenerator(Noisy):
    """Draws random numbers for the loss from a generator of the job."""

    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.random = random.Random(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(outputs, targets)
        return loss * (1 + self.random.random()) if outputs.requires_grad else loss


_of_the_module = random.Random(1)


class ModuleGenerator(Noisy):
    """Draws random numbers for the loss from a generator of the Python module, shared by all objects."""

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
    """Its model counts batches in an attribute that is not in state_dict()."""

    in_checkpoint = False

    def model(self) -> nn.Module:
        return nn.Sequential(Warming(self.in_checkpoint), super().model())


class BufferedCounter(OwnCounter):
    """Like OwnCounter, but corrected: the count is in a buffer."""

    in_checkpoint = True


class ExtraState(OwnCounter):
    """Like OwnCounter, but corrected: the count is in the module's extra state."""

    def model(self) -> nn.Module:
        return nn.Sequential(WarmingWithExtraState(in_checkpoint=False), Noisy.model(self))


class WithAdam(Noisy):
    """Uses an optimizer that counts its steps."""

    def optimizer(self, model: nn.Module, profile: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=profile.learning_rate, weight_decay=profile.weight_decay)


class Averaged(Noisy):
    """Evaluates an average of the weights."""

    def averaging(self) -> Averaging:
        return Averaging(0.9, every_steps=2)


class CountingPictures(NoisyPictures):
    """Pictures that depend on the number of pictures read before."""

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
    """Its metrics depend on the number of earlier calls."""

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        self.asked = getattr(self, "asked", 0) + 1
        return {**super().metrics(outputs, targets), "asked": torch.tensor(float(self.asked))}


class AnotherLength(Noisy):
    """Its data set has a different length in another process."""

    made = itertools.count(1)

    def data(self, split: Split) -> Any:
        plain = super().data(split)
        self.__dict__.setdefault("number", next(self.made))
        count = len(plain) // self.__dict__["number"]
        return NoisyPictures(plain.pictures[:count], plain.targets[:count] % 2)


class FromTheClock(Noisy):
    """Initializes a layer from the clock, so no two processes get the same result."""

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
