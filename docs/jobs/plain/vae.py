"""The loop of vae.py without orch."""

import torch
from vae import loss_of


def train(model, loader, validation, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=True)
    for _ in range(epochs):
        model.train()
        for (images,) in loader:
            optimizer.zero_grad()
            loss = loss_of(images, *model(images))
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = [(loss_of(images, *model(images)).item(), len(images)) for (images,) in validation]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
