"""A GAN on points of eight clusters, with two optimizers. It shows a loop of the job's own: the batches, the state, the
interruption, and a metric of points made from fixed noise (the energy distance to the real ones)."""

import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import TensorDataset

from jobs.job import ChunkInterrupted, ChunkResult, Job
from jobs.optim import optimizers


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, outputs))


class Clusters(Job):
    def model(self):
        return network(16, 2)  # the generator

    def data(self, split):
        random = torch.Generator().manual_seed(int(split == "test"))
        angles = torch.arange(1000) % 8 * torch.pi / 4
        return TensorDataset(torch.stack([angles.cos(), angles.sin()], 1) + torch.randn(1000, 2, generator=random) / 20)

    def evaluate(self, model, batches):
        real = torch.cat([points for (points,) in batches])
        made = model(torch.randn(len(real), 16, generator=torch.Generator().manual_seed(0)).to(real.device))
        within = torch.cdist(real, real).mean() + torch.cdist(made, made).mean()
        return {"distance": 2 * torch.cdist(real, made).mean() - within}

    def train_chunk(self, context):
        generator, critic = self.model().to(context.device), network(2, 1).to(context.device)
        ours, theirs = (optimizers.make(context.profile, net.parameters()) for net in (generator, critic))
        parts = {"model": generator, "critic": critic, "ours": ours, "theirs": theirs}
        for name, part in parts.items() if context.state else ():
            part.load_state_dict(context.state[name])
        for _ in range(context.epochs):
            for (real,) in context.batches():
                made = generator(torch.randn(len(real), 16, device=real.device))
                theirs.zero_grad()
                (softplus(-critic(real)) + softplus(critic(made.detach()))).mean().backward()
                theirs.step()
                ours.zero_grad()
                loss = softplus(-critic(made)).mean()
                loss.backward()
                ours.step()
                context.step(loss, context.profile.learning_rate)
            if context.stopped():
                return ChunkInterrupted({name: part.state_dict() for name, part in parts.items()})
            context.report(context.evaluate(generator))
        return ChunkResult({name: part.state_dict() for name, part in parts.items()})
