"""The loop of stateful.py without orch."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def train(model, loader, validation, epochs):
    rate, best = 20.0, None
    for _ in range(epochs):
        model.train()
        hidden = None
        for tokens, targets in loader:
            model.zero_grad()
            outputs, hidden = model(tokens, hidden)
            cross_entropy(outputs, targets).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-rate)
        loss = evaluate(model, validation)
        if best is None or loss < best:
            best = loss
        else:
            rate /= 4
    return loss


@torch.no_grad()
def evaluate(model, loader):
    model.eval()
    losses, hidden = [], None
    for tokens, targets in loader:
        outputs, hidden = model(tokens, hidden)
        losses.append(cross_entropy(outputs, targets))
    return torch.stack(losses).mean().item()
