import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets

from normkit.errors import MissingExtraError, NormValueError
from normkit.experiments.data import from_arrays, is_arrays, load, prepare, scale, split


def with_value(array, index, value):
    array = np.array(array, dtype=float)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda a: {"y_test": None}, "add y_test"),
        (lambda a: {"x_train": a["x_train"][:, 0]}, "x_train must be (N, F), (N, H, W)"),
        (lambda a: {"x_test": a["x_test"][:, :2]}, "same shape; got (3,) and (2,)"),
        (lambda a: {"y_train": a["y_train"][:-1]}, "same length; got 40 and 39"),
        (lambda a: {"y_test": a["y_test"][:-3]}, "x_test and y_test must have the same length; got 20 and 17"),
        (lambda a: {"y_train": a["y_train"].astype(float)}, "for classes convert it with .astype(int)"),
        (lambda a: {"y_train": a["y_train"].astype(str)}, "whole numbers, one per class; got dtype <U21"),
        (lambda a: {"y_train": a["y_train"] + 0.1j}, "whole numbers, one per class; got dtype complex128"),
        (lambda a: {"y_train": with_value(a["y_train"] + 0.5, 3, np.nan)}, "y_train must be finite; got nan"),
        (lambda a: {"y_train": np.ones((40, 2)) / 3, "y_test": np.ones((20, 3)) / 3}, "same shape; got (2,) and (3,)"),
        (lambda a: {"y_train": np.eye(2, dtype=int)[a["y_train"]]}, ".argmax(1)"),
        (lambda a: {"y_train": a["y_train"] - 1}, "at least 0; got -1 at 0"),
        (lambda a: {"y_test": a["y_test"] + 5}, "must appear in y_train; got 5, 6"),
        (lambda a: {"y_train": np.zeros(40, int), "y_test": np.zeros(20, int)}, "at least 2 classes; got only 0"),
        (
            lambda a: {"x_train": with_value(a["x_train"], (7, 2), np.nan)},
            "1 values that are not, the first at (7, 2) is NaN",
        ),
        (lambda a: {"x_test": with_value(a["x_test"], (3, 0), -np.inf)}, "x_test must be finite"),
        (lambda a: {"x_train": with_value(a["x_train"], (0, 1), 1e300)}, "the first at (0, 1) is 1e+300"),
        (lambda a: {"x_train": a["x_train"].astype(complex)}, "real numbers; got dtype complex128"),
        (lambda a: {"x_test": a["x_test"][:0], "y_test": a["y_test"][:0]}, "x_test must not be empty"),
        (lambda a: {"x_train": np.array([[None]] * 40)}, "Python objects"),
        (lambda a: {"x_train": a["x_train"][:6], "y_train": a["y_train"][:6]}, "at least 10 samples"),
        (lambda a: {"x_train": np.zeros((40, 8, 8, 8)), "x_test": np.zeros((20, 8, 8, 8))}, "must have a channel axis"),
    ],
)
def test_bad_content_is_refused(npz, arrays, changes, said):
    with pytest.raises(NormValueError) as error:
        load(npz(**changes(arrays)))
    assert said in str(error.value)


@pytest.mark.parametrize("name", ["data.csv", "missing.npz", "folder/mnist"])
def test_missing_data_is_refused(name, tmp_path):
    with pytest.raises(NormValueError, match="`data` must be"):
        load(str(tmp_path / name))


def test_numbers_to_predict_are_scaled_by_the_training_part(npz, arrays):
    rng = np.random.default_rng(0)
    numbers = {"y_train": 100 + 5 * rng.normal(size=(40, 2)), "y_test": 100 + 5 * rng.normal(size=(20, 2))}
    data = load(npz(**numbers))
    assert (data.classes, data.outputs) == (None, 2)
    assert str(data).endswith("rows of 3 columns, numbers to predict")
    parts = prepare(data, "none")
    assert [len(part.y) for part in parts] == [32, 8, 20]
    np.testing.assert_allclose(parts.train.y.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(parts.train.y.std(0), 1, rtol=1e-5)
    assert abs(parts.test.y.mean()) > 1e-3


def test_the_loss_decides_whether_whole_numbers_are_classes(npz, arrays):
    assert load(npz()).classes == 2
    assert load(npz(), "mse").classes is None
    with pytest.raises(NormValueError, match="y_train must hold whole numbers"):
        load(npz(y_train=arrays["y_train"] + 0.5), "cross_entropy")


def test_arrays_as_they_come(arrays):
    four = tuple(arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    forms = (arrays, four, (four[:2], four[2:]))
    assert all(map(is_arrays, forms))
    assert len({from_arrays("a", form).fingerprint for form in forms}) == 1
    for other in (four[:3], [1, 2, 3, 4], "four", {"x_train": 1}, None, ([1], [2])):
        assert not is_arrays(other)


class Bunch(dict):
    __getattr__ = dict.__getitem__


def openml(monkeypatch, bunch):
    asked = {}

    def fetch(**arguments):
        asked.update(arguments)
        if isinstance(bunch, Exception):
            raise bunch
        return bunch

    monkeypatch.setattr("sklearn.datasets.fetch_openml", fetch)
    return asked


def test_mnist_comes_from_openml_as_images(monkeypatch):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60).astype(str).astype(object)
    bunch = Bunch(data=rng.random((60, 784)), target=labels, details={"name": "mnist_784", "id": "554"})
    asked = openml(monkeypatch, bunch)
    data = load("mnist")
    assert (asked["name"], asked["as_frame"]) == ("mnist_784", False)
    assert data.shape == (1, 28, 28)
    assert (len(data.train.y), len(data.test.y), data.classes) == (45, 15, 3)
    assert str(data).startswith("mnist_784 (OpenML 554): 45 + 15 images")
    both = np.concatenate([data.train.x, data.test.x]).reshape(60, -1)
    np.testing.assert_array_equal(np.sort(both.sum(1)), np.sort(bunch.data.astype(np.float32).sum(1)))


def test_mnist_is_split_as_it_was_published(monkeypatch):
    x = np.zeros((70_000, 784), np.uint8)
    x[:, 0] = np.arange(70_000) % 251
    openml(monkeypatch, Bunch(data=x, target=(np.arange(70_000) % 10).astype(str), details={"name": "mnist_784"}))
    data = load("mnist")
    assert (len(data.train.y), len(data.test.y)) == (60_000, 10_000)
    assert data.test.x[0, 0, 0, 0] == 60_000 % 251


def test_numbers_of_openml_are_predicted_and_ids_are_ids(monkeypatch):
    rng = np.random.default_rng(0)
    asked = openml(monkeypatch, Bunch(data=rng.random((40, 3)), target=rng.random(40), details={"name": "x"}))
    assert load("531").classes is None
    assert asked["data_id"] == 531


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError("no route"), "known without a connection: digits"), (ValueError("No known data set"), "see openml.org")],
)
def test_what_openml_does_not_give_is_refused(monkeypatch, error, said):
    openml(monkeypatch, error)
    with pytest.raises(NormValueError, match=said) as raised:
        load("digitz")
    assert "`digitz` cannot be had" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x93NUMPY"])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(NormValueError, match=r"x\.npz must be an \.npz archive"):
        load(str(path))


def test_a_lone_array_is_refused(tmp_path):
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(NormValueError, match=r"x\.npz must be an \.npz archive"):
        load(str(tmp_path / "x.npz"))


def test_an_archive_cut_short_is_refused(npz):
    path = Path(npz())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(NormValueError, match=r"must be an \.npz archive"):
        load(str(path))


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        ((6, 5), (1, 6, 5)),
        ((6, 5, 3), (3, 6, 5)),
        ((6, 5, 1), (1, 6, 5)),
        ((3, 6, 5), (3, 6, 5)),
        ((1, 6, 5), (1, 6, 5)),
        ((4, 4, 1), (1, 4, 4)),
    ],
)
def test_images_become_channels_first(npz, shape, kept):
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (40, *shape), dtype=np.uint8), rng.integers(0, 256, (20, *shape), dtype=np.uint8)
    data = load(npz(x_train=train, x_test=test))
    assert data.shape == kept
    # The picture must not be cut the wrong way: the first channel is the first channel.
    first = train[0] if len(shape) == 2 else train[0, 0] if shape == kept else train[0, :, :, 0]
    np.testing.assert_array_equal(data.train.x[0, 0], first)


def test_labels_are_numbered_from_zero_and_may_be_a_column(npz, arrays):
    data = load(npz(y_train=arrays["y_train"][:, None] * 4 + 3, y_test=arrays["y_test"] * 4 + 3))
    np.testing.assert_array_equal(data.train.y, arrays["y_train"])
    assert data.classes == 2


def test_fingerprint_follows_the_content(npz, arrays):
    first = load(npz()).fingerprint
    assert load(npz()).fingerprint == first
    assert load(npz(x_test=arrays["x_test"] + 1)).fingerprint != first


def test_split_is_stratified_exact_and_repeatable():
    y = np.repeat([0, 1, 2], [50, 30, 21])
    rest, taken = split(y, 20, seed=0)
    assert len(taken) == 20
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, taken])), np.arange(101))
    np.testing.assert_array_equal(np.bincount(y[taken]), [10, 6, 4])
    np.testing.assert_array_equal(split(y, 20, seed=0)[1], taken)
    assert not np.array_equal(split(y, 20, seed=1)[1], taken)


def test_digits():
    data = load("digits")
    assert (len(data.train.y), len(data.test.y), data.shape, data.classes) == (1347, 450, (1, 8, 8), 10)
    parts = prepare(data, "standard")
    assert len(parts.train.y) + len(parts.validation.y) == 1347
    assert len(parts.validation.y) == 269
    assert np.ptp(np.bincount(parts.validation.y)) <= 2
    # One value per channel. Per pixel, as for a table, the pixels that are almost always empty blow up.
    assert max(abs(part.x).max() for part in parts) < 20
    table = data.train.x.reshape(1347, 64)
    assert abs(scale("standard", table)[0]).max() > 20


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"normkit\[lab\]"):
        load("digits")


@pytest.mark.parametrize(("source", "shape"), [("digits", (-1, 1, 8, 8)), ("wine", (-1, 13))])
def test_the_tables_of_scikit_learn_are_what_it_loads(source, shape):
    """They are read without it; a row is known by its values, wherever it is."""
    found = load(source)
    x, y = (np.concatenate([getattr(part, name) for part in (found.train, found.test)]) for name in "xy")
    bunch = getattr(sklearn.datasets, f"load_{source}")()
    theirs = bunch.data.astype(np.float32).reshape(shape)
    assert sorted(zip(map(bytes, x), y, strict=True)) == sorted(zip(map(bytes, theirs), bunch.target, strict=True))


def test_scaling_of_tables_is_per_column_and_fitted_on_training_alone():
    train = np.array([[1.0, -4.0, 7.0], [3.0, 2.0, 7.0]])
    other = np.array([[5.0, 8.0, 9.0]])
    for mode, expected, expected_other in [
        ("none", train, other),
        ("max", [[1 / 3, -1, 1], [1, 0.5, 1]], [[5 / 3, 2, 9 / 7]]),
        ("minmax", [[0, 0, 0], [1, 1, 0]], [[2, 2, 0]]),
        ("standard", [[-1, -1, 0], [1, 1, 0]], [[3, 3, 0]]),
    ]:
        scaled, scaled_other = scale(mode, train, other)
        np.testing.assert_allclose(scaled, expected, rtol=1e-6)
        np.testing.assert_allclose(scaled_other, expected_other, rtol=1e-6)
        assert scaled.dtype == np.float32


@pytest.mark.parametrize("mode", ["max", "minmax", "standard"])
def test_scaling_of_images_is_per_channel(mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 2, 3, 3)) * np.array([1, 100])[:, None, None]
    scaled = scale(mode, x)[0]
    # One factor and one shift per channel: differences keep their ratio between pixels.
    for channel in range(2):
        before, after = x[:, channel].ravel(), scaled[:, channel].ravel()
        np.testing.assert_allclose(
            np.diff(after) / np.diff(before), (after[1] - after[0]) / (before[1] - before[0]), rtol=1e-3
        )
    assert abs(abs(scaled[:, 0]).max() / abs(scaled[:, 1]).max() - 1) < 1


@pytest.mark.parametrize("mode", ["minmax", "standard"])
def test_a_constant_column_becomes_zero_even_if_it_is_no_binary_fraction(mode):
    x = np.full((1000, 1), 0.1)
    assert (scale(mode, x, x + 5)[1] == 0).all()


def test_an_empty_column_stays_zero_under_max():
    assert (scale("max", np.zeros((4, 1)), np.ones((4, 1)))[1] == 0).all()


@pytest.mark.parametrize("inputs", ["max", "minmax", "standard"])
def test_inputs_are_fitted_on_what_is_left_for_training(npz, arrays, inputs):
    """Neither the validation part nor the test part may move the scaling."""
    from normkit.experiments.data import prepare

    before = prepare(load(npz()), inputs)
    data = load(npz(x_test=arrays["x_test"] * 100.0))
    np.testing.assert_array_equal(prepare(data, inputs).train.x, before.train.x)
    fitted = before.train.x
    expected = {"max": np.abs(fitted).max(0), "minmax": fitted.max(0), "standard": fitted.std(0)}[inputs]
    # 1 up to float32's rounding of 40 values: fitted on more than the training part it would be off by percents
    np.testing.assert_allclose(expected, 1.0, atol=1e-5)
    assert np.abs(np.abs(before.validation.x).max(0) - 1.0).min() > 1e-3
