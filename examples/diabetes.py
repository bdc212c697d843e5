"""Predict how far diabetes has progressed after a year, with a model and a loop of one's own.

normkit compare examples/diabetes.py:train
"""

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.nn import functional as F


def train(trial):  # was: def train():
    norm, lr = trial.norm, trial.lr  # was: norm, lr = nn.BatchNorm1d, 0.01
    x, y = (torch.tensor(array, dtype=torch.float32) for array in load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    test, rest = order[:110], order[110:]
    model = nn.Sequential(
        nn.Linear(10, 64), norm(64), nn.ReLU(),
        nn.Linear(64, 64), norm(64), nn.ReLU(),
        nn.Linear(64, 1),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.01)
    for epoch in range(1, 21):
        model.train()
        for rows in rest[torch.randperm(len(rest))].split(30):
            loss = F.mse_loss(model(x[rows])[:, 0], y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            loss = F.mse_loss(model(x[test])[:, 0], y[test])
        trial.report(epoch, loss=loss)  # was: print(epoch, loss.item())
