"""Batch normalization in the classic Keras CNN: with and without, before and after the activation, and one known trap.

python examples/keras_mnist_cnn.py                     # handwritten digits of scikit-learn, a minute
python examples/keras_mnist_cnn.py --data mnist        # downloads once; or the path of Keras' mnist.npz
KERAS_BACKEND=jax python examples/keras_mnist_cnn.py   # or torch; TensorFlow where nothing is said
"""

import argparse
import os
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import normkit
from normkit.keras import BatchNormalization

BATCH = 64
keras.config.set_image_data_format("channels_last")  # whatever keras.json says


def cnn(shape, norm=None, after=False):
    """Batch normalization after every convolution and hidden dense layer, none after the classifier."""

    def block(layer):
        if norm is None:
            return [layer, layers.ReLU()]
        return [layer, layers.ReLU(), norm()] if after else [layer, norm(), layers.ReLU()]

    return keras.Sequential([
        keras.Input(shape),
        *block(layers.Conv2D(32, 3, padding="same")),
        *block(layers.Conv2D(64, 3, padding="same")),
        layers.MaxPooling2D(),
        layers.Flatten(),
        *block(layers.Dense(128)),
        layers.Dense(10, activation="softmax"),
    ])  # fmt: skip


VARIANTS = {
    "no batch normalization": {},
    "BatchNormalization()": {"norm": layers.BatchNormalization},  # Keras' own; normkit's does the same here
    "BatchNormalization(momentum=None)": {"norm": lambda: BatchNormalization(momentum=None)},
    "BatchNormalization(debiased=True)": {"norm": lambda: BatchNormalization(debiased=True)},
    "the same, after the activation": {"norm": lambda: BatchNormalization(debiased=True), "after": True},
}
TRAP = "BatchNormalization()"
MENDED = "the same model, normkit.recalibrate(model, x)"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, mnist, or the path of Keras' mnist.npz")
    parser.add_argument("--epochs", type=int, help="passes over the data [default: 8 of digits, 1 of others]")
    parser.add_argument("--out", type=Path, default=Path("keras_mnist_cnn.png"), help="the picture")
    options = parser.parse_args()
    if options.epochs is not None and options.epochs < 1:
        parser.error(f"--epochs must be at least 1; got {options.epochs}")
    if options.out.suffix not in (".png", ".svg", ".pdf") or not options.out.absolute().parent.is_dir():
        parser.error(f"--out must end in .png, .svg or .pdf, in a folder that exists; got {options.out}")
    try:
        x, y, x_test, y_test = load(options.data)
    except ValueError as error:
        parser.error(str(error))
    epochs = options.epochs or (8 if options.data == "digits" else 1)
    steps = epochs * -(-len(x) // BATCH)
    print(f"{options.data}: {len(x)} images for training, {len(x_test)} for validation; {steps} steps of {BATCH}, Adam")
    print(f"Keras {keras.__version__} on {keras.config.backend()}; accuracy:")
    print(f"{'':48}training  validation")
    curves = {}
    for name, changes in VARIANTS.items():
        keras.utils.set_random_seed(0)  # the same first weights and order of the images for all
        model = cnn(x.shape[1:], **changes)
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        seen = model.fit(x, y, BATCH, epochs, verbose=0, validation_data=(x_test, y_test)).history
        curves[name] = seen["val_accuracy"]
        print(f"{name:48}{seen['accuracy'][-1]:8.2f}{seen['val_accuracy'][-1]:12.2f}", flush=True)
        if name == TRAP:
            first = next(layer for layer in model.layers if isinstance(layer, layers.BatchNormalization))
            kept = keras.ops.convert_to_numpy(first.moving_variance)
            told = normkit.check(model, (x, y)).sentence
            normkit.recalibrate(model, x)
            wrong = np.median(kept / keras.ops.convert_to_numpy(first.moving_variance))
            mended = model.evaluate(x_test, y_test, verbose=0)[1]
            print(f"{MENDED:48}{'':8}{mended:12.2f}", flush=True)
    print(f"""
In training a batch is normalized by its own statistics, in validation by moving averages. Those begin at mean 0 and
variance 1. With Keras' momentum of 0.99 that beginning weighs 0.99^{steps} = {0.99**steps:.2g} after {steps} steps.""")
    if 0.99**steps > 0.01:
        print(f"""\
Small variances drown in it: that of the first layer is kept {wrong:.3g} times too large, and the layers behind it see
values they were never trained on. Against it: recalibrate the trained model; take the beginning out (debiased=True);
average all batches equally (momentum=None); train longer.""")
    print(f"\nnormkit.check(model, (x, y)) of {TRAP}:\n{told}")
    draw(curves, mended, options.out)
    print(f"picture: {options.out}")


def load(data):
    """Images (N, H, W, 1) from 0 to 1 and labels, for training and for validation."""
    if data == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        parts = train_test_split(digits.images, digits.target, test_size=450, stratify=digits.target, random_state=0)
        x, x_test, y, y_test = parts
    elif data == "mnist":
        try:
            (x, y), (x_test, y_test) = keras.datasets.mnist.load_data()
        except Exception as error:
            hint = "offline take --data path/to/mnist.npz, or leave --data out for digits"
            raise ValueError(f"mnist must be downloaded once ({error}). hint: {hint}") from error
    else:
        names = ("x_train", "y_train", "x_test", "y_test")
        try:
            with Path(data).open("rb") as file, np.load(file) as arrays:
                x, y, x_test, y_test = (arrays[name] for name in names)
        except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            must = f"--data must be digits, mnist or an .npz file that holds {', '.join(names)}"
            raise ValueError(f"{must}; got {data} ({error})") from error
    return [array for xs, ys in ((x, y), (x_test, y_test)) for array in (xs[..., None] / x.max(), ys)]


def draw(curves, mended, path):
    """Validation accuracy over the epochs. The file is whole or not there."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for name, values in curves.items():
        (line,) = axes.plot(range(1, len(values) + 1), values, marker=".", label=name)
        if name == TRAP:
            axes.plot(len(values), mended, "*", color=line.get_color(), markersize=12, label=MENDED)
    axes.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0, 1.02))
    axes.legend(frameon=False, loc="center right", fontsize="small")
    with tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        drawn = Path(folder) / path.name
        figure.savefig(drawn, dpi=150)
        drawn.replace(path)


if __name__ == "__main__":
    main()
