"""Segmentation with a small U-Net, RMSprop, and a learning rate that falls when the mean IoU does not improve. It
shows the job's own default optimizer and a metric that is not a mean over examples."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from jobs.job import Job

CLASSES = 3  # background, disc, square


def block(before, after):
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = block(1, 8), nn.Sequential(nn.MaxPool2d(2), block(8, 16), block(16, 16))
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Sequential(block(16, 8), nn.Conv2d(8, CLASSES, 1))

    def forward(self, images):
        fine = self.fine(images)
        return self.out(torch.cat([fine, self.up(self.coarse(fine))], dim=1))


class Shapes(Job):
    default_optimizer = "RMSprop"

    def model(self):
        return UNet()

    def data(self, split):
        count = self.params.get("examples", 1000)
        random = torch.Generator().manual_seed(int(split == "test"))
        centers = torch.randint(6, 26, (count, 2, 2, 1, 1), generator=random)
        away = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")) - centers
        disc, square = away[:, 0].square().sum(1) < 36, away[:, 1].abs().amax(1) < 5
        masks = torch.where(square, 2, disc.long())
        images = (masks > 0) + 0.3 * torch.randn(count, 32, 32, generator=random)
        return TensorDataset(images.unsqueeze(1), masks)

    def evaluate(self, model, batches):
        pairs = sum(
            torch.bincount((CLASSES * y + model(x).argmax(1)).flatten(), minlength=CLASSES**2) for x, y in batches
        ).view(CLASSES, CLASSES)
        both = pairs.diagonal()
        return {"mean_iou": (both / (pairs.sum(0) + pairs.sum(1) - both)).mean()}
