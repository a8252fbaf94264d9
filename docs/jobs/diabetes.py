"""Regression on a table: scikit-learn's diabetes data. It shows another loss and metric, and a number of the profile's
params, which the job reads: each profile of the cycle has its own dropout."""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset

from jobs.job import Job


class Diabetes(Job):
    default_optimizer = "Adam"

    def model(self):
        dropout = nn.Dropout(self.profile.params["dropout"])
        return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), dropout, nn.Linear(64, 1), nn.Flatten(0))

    def data(self, split):
        table, progress = (torch.tensor(values, dtype=torch.float32) for values in load_diabetes(return_X_y=True))
        test = torch.arange(len(table)) % 5 == 0
        mean, std = progress[~test].mean(), progress[~test].std()
        chosen = test if split == "test" else ~test
        return TensorDataset(20 * table[chosen], (progress[chosen] - mean) / std)

    def loss(self, outputs, targets):
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self, outputs, targets):
        return {"mse": self.loss(outputs, targets)}
