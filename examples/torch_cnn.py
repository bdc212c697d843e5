"""A small convolutional network on handwritten digits: without batch normalization, before and after the activation.

python examples/torch_cnn.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from normkit.torch import BatchNorm2d


def block(inputs, outputs, place):
    norm = [BatchNorm2d(outputs)] if place else []
    before, after = (norm, []) if place == "before" else ([], norm)
    return [nn.Conv2d(inputs, outputs, 3, padding=1), *before, nn.ReLU(), *after]


def build(place):
    torch.manual_seed(0)
    stages = [*block(1, 12, place), *block(12, 12, place)], [*block(12, 24, place), *block(24, 24, place)]
    classifier = nn.Linear(24 * 4 * 4, 10)  # no norm behind it
    return nn.Sequential(*stages[0], nn.MaxPool2d(2), *stages[1], nn.Flatten(), classifier)


def train(place, lr, epochs, data):
    x_train, x_test, y_train, y_test = data
    model = build(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        model.train()  # batch norm takes the statistics of the batch, and keeps a running average
        for rows in torch.randperm(len(x_train)).split(32):
            loss = F.cross_entropy(model(x_train[rows]), y_train[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()  # batch norm takes the running average
    with torch.no_grad():
        return (model(x_test).argmax(1) == y_test).float().mean().item()


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
epochs = parser.parse_args().epochs
torch.set_num_threads(1)  # a network this small only waits for its threads
x, y = load_digits(return_X_y=True)
x = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
data = train_test_split(x, torch.tensor(y), test_size=450, random_state=0)
rates = (0.003, 0.1)
print("test accuracy at rate     " + "".join(f"{lr:8g}" for lr in rates))
for place, name in ((None, "none"), ("before", "before the activation"), ("after", "after the activation")):
    print(f"{name:26}" + "".join(f"{train(place, lr, epochs, data):8.1%}" for lr in rates), flush=True)
