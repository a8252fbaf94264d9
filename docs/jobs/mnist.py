"""torch's MNIST example: a small convolutional network, Adadelta, and a learning rate that falls by 30% per epoch.
It shows the short form of a job: a model and data. training_source_dir is the root of torchvision's MNIST."""

from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from jobs.job import Job


class Mnist(Job):
    default_optimizer = "Adadelta"

    def model(self):
        return nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * 12 * 12, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )

    def data(self, split):
        mnist = MNIST(self.context.settings.training_source_dir, train=split != "test")
        count = self.params.get("examples")  # None: all
        images = (mnist.data[:count].unsqueeze(1) / 255 - 0.1307) / 0.3081
        return TensorDataset(images, mnist.targets[:count])
