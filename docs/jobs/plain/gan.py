"""The loop of gan.py without orch."""

import torch
from gan import network
from torch.nn.functional import softplus


def train(generator, loader, validation, epochs):
    critic = network(2, 1)
    ours = torch.optim.Adam(generator.parameters(), lr=0.002, betas=(0.0, 0.999), fused=True)
    theirs = torch.optim.Adam(critic.parameters(), lr=0.002, betas=(0.0, 0.999), fused=True)
    for _ in range(epochs):
        for (real,) in loader:
            made = generator(torch.randn(len(real), 16))
            theirs.zero_grad()
            (softplus(-critic(real)) + softplus(critic(made.detach()))).mean().backward()
            theirs.step()
            ours.zero_grad()
            softplus(-critic(made)).mean().backward()
            ours.step()
    with torch.no_grad():
        real = torch.cat([points for (points,) in validation])
        made = generator(torch.randn(len(real), 16, generator=torch.Generator().manual_seed(0)))
        within = torch.cdist(real, real).mean() + torch.cdist(made, made).mean()
        return (2 * torch.cdist(real, made).mean() - within).item()
