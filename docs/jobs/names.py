"""A GRU reads names letter by letter, as in torch's tutorial, and says what they name: a module, an exception or a
method. It shows examples of different lengths, which collate() pads, and labels(), the class of each example."""

import builtins
import sys

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

from jobs.job import Job

METHODS = {name for kind in (str, bytes, list, dict, set, int, float) for name in dir(kind) if not name.startswith("_")}
EXCEPTIONS = {name for name in dir(builtins) if name.endswith(("Error", "Warning"))}
KINDS = (sys.stdlib_module_names, EXCEPTIONS, METHODS)
NAMES = sorted((name, number) for number, names in enumerate(KINDS) for name in names)


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(128, 16), nn.GRU(16, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, inputs):
        letters, lengths = inputs
        packed = pack_padded_sequence(self.embedding(letters), lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][-1])


class Names(Job):
    default_optimizer = "Adam"

    def model(self):
        return Reader()

    def data(self, split):
        chosen = [pair for number, pair in enumerate(NAMES) if (number % 5 == 0) == (split == "test")]
        return [(torch.tensor(list(name.encode())), label) for name, label in chosen]

    def labels(self, data, split):
        return [label for _, label in data]

    def collate(self, examples):
        names, labels = zip(*examples, strict=True)
        lengths = torch.tensor([len(name) for name in names])
        return (pad_sequence(names, batch_first=True), lengths), torch.tensor(labels)
