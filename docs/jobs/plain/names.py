"""The loop of names.py without orch."""

import torch
from torch import nn


def train(model, loader, validation, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for _ in range(epochs):
        model.train()
        for names, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(names), labels).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = torch.cat([model(names).argmax(1) == labels for names, labels in validation])
    return right.double().mean().item()
