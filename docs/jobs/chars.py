"""A small GPT on characters, as in nanoGPT: AdamW without weight decay for biases and norms, gradients accumulated over
4 batches and clipped, a warm-up and then a cosine. It shows parameter groups and metrics of a whole split."""

from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from jobs.job import Job
from jobs.optim import optimizers

TEXT = "".join(topics[name] for name in sorted(topics))
LENGTH, WIDTH = 32, 32


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.1, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, tokens):
        later = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).triu(1)
        embedded = self.tokens(tokens) + self.places.weight
        return self.head(self.block(embedded, later)).transpose(1, 2)  # (examples, classes, places)


class Chars(Job):
    own_validation = True  # the last part of the text, not a random part of the windows

    def model(self):
        return Gpt()

    def data(self, split):
        text = TEXT[: self.params.get("letters")]  # None: all
        first, end = {"train": (0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1)}[split]
        codes = torch.tensor([min(ord(letter), 127) for letter in text[int(first * len(text)) : int(end * len(text))]])
        windows = codes.unfold(0, LENGTH + 1, LENGTH)
        return TensorDataset(windows[:, :-1], windows[:, 1:])

    def optimizer(self, model, profile):
        matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        return optimizers.make(profile, [{"params": matrices}, {"params": others, "weight_decay_factor": 0}])

    def evaluate(self, model, batches):
        losses = torch.cat([cross_entropy(model(x), y, reduction="none").flatten() for x, y in batches])
        return {"loss": losses.mean(), "perplexity": losses.mean().exp()}
