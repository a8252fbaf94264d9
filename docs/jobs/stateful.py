"""A word language model as in torch's examples: the LSTM's hidden state passes from batch to batch (truncated
backpropagation through time), and the learning rate is divided by 4 after an epoch without progress. It shows batches
in order, and a state that an interrupted epoch needs: the hidden state, the learning rate, the best loss."""

from pydoc_data.topics import topics

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from jobs.job import ChunkInterrupted, ChunkResult, Job

WORDS = "".join(topics[name] for name in sorted(topics)).split()
NUMBERS = {word: number for number, word in enumerate(sorted(set(WORDS)))}


class Text:
    """Batches of a text in order: row i of a batch continues row i of the batch before."""

    def __init__(self, words, rows, length):
        self.tokens = torch.tensor([NUMBERS[word] for word in words[: len(words) // rows * rows]]).view(rows, -1)
        self.length, self.first = length, 0

    def __len__(self):
        return (self.tokens.shape[1] - 1) // self.length

    def seek(self, number):  # without it, an interrupted epoch would be read again from its beginning
        self.first = number

    def __iter__(self):
        for start in range(self.first * self.length, len(self) * self.length, self.length):
            window = self.tokens[:, start : start + self.length + 1]
            yield window[:, :-1], window[:, 1:]


class Lstm(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(len(NUMBERS), width), nn.Dropout(0.2)
        self.lstm, self.head = nn.LSTM(width, width, batch_first=True), nn.Linear(width, len(NUMBERS))

    def forward(self, tokens, hidden):
        outputs, hidden = self.lstm(self.dropout(self.embedding(tokens)), hidden)
        return self.head(self.dropout(outputs)).transpose(1, 2), tuple(part.detach() for part in hidden)


class Topics(Job):
    own_validation = True

    def model(self):
        return Lstm()

    def data(self, split):
        words = WORDS[: self.params.get("words")]
        first, end = {"train": (0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1)}[split]
        return Text(words[int(first * len(words)) : int(end * len(words))], rows=8, length=20)

    def evaluate(self, model, batches):
        losses, hidden = [], None
        for tokens, targets in batches:
            outputs, hidden = model(tokens, hidden)
            losses.append(cross_entropy(outputs, targets))
        return {"loss": torch.stack(losses).mean()}

    def train_chunk(self, context):
        model, hidden, rate, best = self.model().to(context.device), None, context.profile.learning_rate, None
        if context.state:
            model.load_state_dict(context.state["model"])
            hidden, rate, best = (context.state[name] for name in ("hidden", "rate", "best"))
        for _ in range(context.epochs):
            model.train()
            for tokens, targets in context.batches():
                model.zero_grad()
                outputs, hidden = model(tokens, hidden)
                loss = cross_entropy(outputs, targets)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.25)
                for parameter in model.parameters():
                    parameter.data.add_(parameter.grad, alpha=-rate)
                context.step(loss, rate)
            if context.stopped():
                return ChunkInterrupted(dict(model=model.state_dict(), hidden=hidden, rate=rate, best=best))
            metrics, hidden = context.evaluate(model), None
            context.report(metrics)
            rate, best = (rate, metrics["loss"]) if best is None or metrics["loss"] < best else (rate / 4, best)
        return ChunkResult(dict(model=model.state_dict(), hidden=hidden, rate=rate, best=best))
