"""The loop of diabetes.py without orch."""

import torch
from torch.nn.functional import mse_loss


def train(model, loader, validation, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3, fused=True)
    for _ in range(epochs):
        model.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            mse_loss(model(inputs), targets).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        errors = torch.cat([(model(inputs) - targets).square() for inputs, targets in validation])
    return errors.double().mean().item()
