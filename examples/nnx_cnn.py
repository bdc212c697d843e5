"""A small convolutional network on handwritten digits: without batch normalization, before and after the activation.

python examples/nnx_cnn.py
"""

import argparse

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from normkit.nnx import BatchNorm


class Block(nnx.Module):
    def __init__(self, inputs, outputs, place, rngs):
        self.conv, self.place = nnx.Conv(inputs, outputs, (3, 3), rngs=rngs), place
        # Flax' momentum of 0.99 would keep most of the first statistics in so short a training; debiased, nothing is.
        self.norm = BatchNorm(outputs, momentum=0.9, debiased=True, rngs=rngs) if place else None

    def __call__(self, x):
        x = self.conv(x)
        x = nnx.relu(self.norm(x) if self.place == "before" else x)
        return self.norm(x) if self.place == "after" else x


class CNN(nnx.Module):
    def __init__(self, place, rngs):
        self.blocks = nnx.List([Block(*sizes, place, rngs) for sizes in ((1, 12), (12, 12), (12, 24), (24, 24))])
        self.classifier = nnx.Linear(24 * 4 * 4, 10, rngs=rngs)  # no norm behind it

    def __call__(self, x):
        for number, block in enumerate(self.blocks):
            x = block(nnx.max_pool(x, (2, 2), (2, 2)) if number == 2 else x)
        return self.classifier(x.reshape(len(x), -1))


@nnx.jit
def step(model, optimizer, x, y):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def accuracy(model, x, y):
    return (model(x).argmax(-1) == y).mean()


def train(place, lr, epochs, data):
    x_train, x_test, y_train, y_test = data
    model = CNN(place, nnx.Rngs(0))
    # Injected, the rate is data, and another one needs no new compilation.
    sgd = optax.inject_hyperparams(optax.sgd, static_args=("momentum", "nesterov"))(learning_rate=lr, momentum=0.9)
    optimizer, rng = nnx.Optimizer(model, sgd, wrt=nnx.Param), np.random.default_rng(0)
    model.train()  # batch norm takes the statistics of the batch, and keeps a running average
    for _ in range(epochs):
        for rows in rng.permutation(len(x_train))[: len(x_train) // 32 * 32].reshape(-1, 32):
            step(model, optimizer, x_train[rows], y_train[rows])
    model.eval()  # batch norm takes the running average
    return float(accuracy(model, x_test, y_test))


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
epochs = parser.parse_args().epochs
x, y = load_digits(return_X_y=True)
data = train_test_split((x / 16).astype(np.float32).reshape(-1, 8, 8, 1), y, test_size=450, random_state=0)
rates = (0.003, 0.1)
print("test accuracy at rate     " + "".join(f"{lr:8g}" for lr in rates))
for place, name in ((None, "none"), ("before", "before the activation"), ("after", "after the activation")):
    print(f"{name:26}" + "".join(f"{train(place, lr, epochs, data):8.1%}" for lr in rates), flush=True)
