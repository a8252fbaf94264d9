"""The loop of unet.py without orch."""

import torch
from torch import nn


def train(model, loader, validation, epochs):
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.001, weight_decay=1e-8, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=1)
    for _ in range(epochs):
        model.train()
        for images, masks in loader:
            loss = nn.functional.cross_entropy(model(images), masks)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        score = mean_iou(model, validation)
        scheduler.step(score)
    return score


@torch.no_grad()
def mean_iou(model, loader):
    model.eval()
    found = torch.cat([model(images).argmax(1) for images, _ in loader])
    masks = torch.cat([masks for _, masks in loader])
    shares = [
        ((found == c) & (masks == c)).sum() / ((found == c) | (masks == c)).sum() for c in range(int(masks.max()) + 1)
    ]
    return torch.stack(shares).mean().item()
