"""A variational autoencoder on scikit-learn's digits. It shows a loss that needs more than (outputs, targets), with
random numbers from torch's generator, which the checkpoint contains."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import TensorDataset

from jobs.job import Job


class Vae(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 2 * 8))
        self.decoder = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 64))

    def forward(self, images):
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance


def loss_of(images, outputs, mean, log_variance):
    reconstruction = binary_cross_entropy_with_logits(outputs, images, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum()
    return (reconstruction + divergence) / len(images)


class Digits(Job):
    default_optimizer = "Adam"

    def model(self):
        return Vae()

    def data(self, split):
        images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
        return TensorDataset(images[1500:] if split == "test" else images[:1500])

    def training_loss(self, model, batch):
        return loss_of(*batch, *model(*batch))

    def evaluation_metrics(self, model, batch):
        return {"loss": loss_of(*batch, *model(*batch))}
