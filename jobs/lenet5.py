"""LeNet-5 on MNIST (LeCun, Bottou, Bengio and Haffner 1998, "Gradient-Based Learning Applied to Document Recognition").

The layer sizes are the paper's: 6 and 16 feature maps, then 120, 84 and 10 units, on 28x28 pixels padded to 32x32;
61,706 parameters. Unlike in the paper, pooling has no trained coefficients, the second convolution reads all maps, and
the outputs are logits trained with cross-entropy, not Euclidean distances. job_params can select the paper's tanh and
average pooling; the defaults are ReLU and max pooling, with Adam.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torch.utils.data import Dataset

from jobs.data import augment, images
from jobs.data.images import Examples
from jobs.data.splits import Split
from jobs.image_sets import ImageSetJob, Limits

SIDE = 28  # pixels


class Params(Limits):
    activation: Literal["relu", "tanh"] = "relu"
    pooling: Literal["max", "average"] = "max"
    shift: Annotated[int, Field(ge=0, le=8)] = 0  # maximum random shift of training images, in pixels


class LeNet5(ImageSetJob):
    """training_source_dir is the root of torchvision's MNIST."""

    NAME = "MNIST"
    Params = Params
    default_optimizer = "Adam"  # the profile's momentum is Adam's first beta

    def open(self, root: str | Path, train: bool, download: bool = False) -> Examples:
        return images.mnist(root, train, download, self.context.settings.prepare_command)

    def archives(self, root: str) -> images.Archives:
        return images.mnist_archives(root)

    def model(self) -> nn.Module:
        activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[self.params.activation]
        pooling = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}[self.params.pooling]
        return nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2),
            activation(),
            pooling(2),
            nn.Conv2d(6, 16, 5),
            activation(),
            pooling(2),
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            activation(),
            nn.Linear(120, 84),
            activation(),
            nn.Linear(84, 10),
        )

    def data(self, split: Split) -> Dataset[Any]:
        normalize = augment.Normalize(*self.statistics)
        if split != "train" or not self.params.shift:
            return images.ImageTensors(*(self.test_set if split == "test" else self.training_set), [normalize])
        # PadCrop adds black pixels, which match the border of every digit.
        return images.ImageTensors(*self.training_set, [augment.PadCrop(SIDE, self.params.shift), normalize])
