"""The loop of chars.py without orch."""

import math
from itertools import islice

import torch
from torch.nn.functional import cross_entropy

RATE, DECAY, ACCUMULATE = 3e-3, 0.1, 4


def rate_at(step, warmup, steps):
    """The learning rate of a step, from 0: a linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return RATE * (step + 1) / warmup
    share = (step - warmup) / (steps - warmup)
    return 0.1 * RATE + 0.9 * RATE * 0.5 * (1 + math.cos(math.pi * share))


def train(model, loader, validation, epochs):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    per_epoch = math.ceil(len(loader) / ACCUMULATE)
    step = 0
    for _ in range(epochs):
        model.train()
        batches = iter(loader)
        while group := list(islice(batches, ACCUMULATE)):
            for settings in optimizer.param_groups:
                settings["lr"] = rate_at(step, round(per_epoch / 4), epochs * per_epoch)
            optimizer.zero_grad()
            for tokens, targets in group:
                (cross_entropy(model(tokens), targets) / len(group)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        losses = torch.cat([cross_entropy(model(x), y, reduction="none").flatten() for x, y in validation])
    return losses.mean().item()
