import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from normkit.errors import NormError
from normkit.experiments.data import Dataset, Part
from normkit.experiments.feeds import ArrayFeed, DatasetFeed, LoaderFeed, feed_for


def table(samples=60, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, 3)).astype(np.float32), np.arange(samples) % 3


def dataset(samples=60):
    x, y = table(samples)
    return TensorDataset(torch.from_numpy(x), torch.from_numpy(y))


def made(value, batch_sizes=None, loss=None):
    return feed_for("mine.py:data", value, loss, batch_sizes)


def xs(batches):
    return np.concatenate([np.asarray(x) for x, _ in batches])


def test_arrays_are_seen_once_an_epoch_in_full_batches():
    x, y = table(54)
    feed = ArrayFeed(Dataset("made", Part(x, y), Part(x, y), classes=3))
    epochs = [xs(feed.batches("none", 8, 0, epoch)) for epoch in range(2)]
    assert feed.steps(8) == 5
    assert [len(epoch) for epoch in epochs] == [40, 40]
    assert all(len(np.unique(epoch[:, 0])) == 40 for epoch in epochs)
    assert not np.array_equal(*epochs)
    np.testing.assert_array_equal(epochs[1], xs(feed.batches("none", 8, 0, 1)))
    assert not np.array_equal(epochs[0], xs(feed.batches("none", 8, 1, 0)))


def test_what_a_name_may_give():
    x, y = table()
    loader = DataLoader(dataset(), 8)
    assert isinstance(made((x, y, x, y)), ArrayFeed)
    assert isinstance(made(((x, y), (x, y))), ArrayFeed)
    assert isinstance(made(lambda: ((x, y), (x, y))), ArrayFeed)
    assert isinstance(made({"x_train": x, "y_train": y, "x_test": x, "y_test": y}), ArrayFeed)
    assert isinstance(made(dataset()), DatasetFeed)
    assert isinstance(made((dataset(), dataset(20))), DatasetFeed)
    assert isinstance(made((loader, loader)), LoaderFeed)
    assert isinstance(made({"train": loader, "validation": loader, "test": loader}), LoaderFeed)
    assert isinstance(made(lambda batch_size: (DataLoader(dataset(), batch_size),) * 2), LoaderFeed)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            3,
            "arrays (x_train, y_train, x_test, y_test), data sets or loaders (train, validation, test); got int",
        ),
        ((), "got nothing"),
        ({"training": []}, "got the names training"),
        (DataLoader(dataset(), 8), "at least a training and a validation loader; got one loader"),
        ((DataLoader([], 8),) * 2, "training loader of mine.py:data must give batches; got none"),
        ((TensorDataset(torch.zeros(0, 3), torch.zeros(0)),) * 2, "must hold samples; got an empty data set"),
        ((DataLoader([1.0, 2.0], 2),) * 2, "must give pairs (x, y); got Tensor. hint: write a training loop"),
        (([(1, 2, 3)], [(1, 2, 3)]), "must give pairs (x, y); got 3 values"),
        (([(np.zeros(3), 1)] * 9,) * 2, "a target for each of its samples; got a single one. hint: lists are taken"),
        ((DataLoader([(np.zeros(2), -1)], 1),) * 2, "labels must be at least 0; got -1"),
    ],
)
def test_what_cannot_be_fed(value, said):
    with pytest.raises(NormError) as error:
        made(value)
    assert said in str(error.value)


def test_what_a_function_raises_is_named():
    def broken():
        raise KeyError("x")

    with pytest.raises(NormError, match=r"mine\.py:data raised KeyError"):
        made(broken)


def test_a_data_set_sets_a_fifth_apart():
    feed = made((dataset(60), dataset(15)))
    assert (feed.samples, feed.classes, feed.shape, feed.held_out, feed.tested) == (48, 3, (3,), True, True)
    assert len(xs(feed.validation("none"))) == 12
    assert len(xs(feed.test("none"))) == 15
    trained = xs(feed.batches("none", 8, 0, 0))
    assert feed.steps(8) == 6
    assert len({*map(tuple, trained)} | {*map(tuple, xs(feed.validation("none")))}) == 60
    np.testing.assert_array_equal(trained, xs(feed.batches("none", 8, 0, 0)))
    assert not np.array_equal(trained, xs(feed.batches("none", 8, 1, 0)))


def test_a_data_set_alone_has_no_test_part():
    feed = made(dataset())
    assert not feed.tested
    np.testing.assert_array_equal(xs(feed.test("none")), xs(feed.validation("none")))


def test_a_data_set_with_all_three_parts():
    feed = made((dataset(60), dataset(20), dataset(10)))
    assert not feed.held_out
    assert [feed.samples, *(len(xs(part)) for part in (feed.validation("none"), feed.test("none")))] == [60, 20, 10]


def test_loaders_keep_their_batch_size():
    feed = made((DataLoader(dataset(50), 8), DataLoader(dataset(20), 8)))
    assert (feed.own_batches, feed.steps(8), feed.samples, feed.classes) == (8, 7, 50, 3)
    assert not feed.tested
    assert len(xs(feed.validation("none"))) == len(xs(feed.test("none"))) == 20
    with pytest.raises(NormError, match=r"`batch_sizes` must be left to the loaders of mine.py:data; got 4, 8"):
        made((DataLoader(dataset(50), 8),) * 2, batch_sizes=(4, 8))


def test_a_function_of_the_batch_size_makes_loaders():
    feed = made(lambda batch_size: (DataLoader(dataset(50), batch_size), DataLoader(dataset(20), 50)), (5, 10))
    assert [feed.steps(size) for size in (5, 10)] == [10, 5]
    assert [len(x) for x, _ in feed.batches("none", 10, 0, 0)] == [10] * 5


class Shrinking:
    """A loader that loses a batch with every pass."""

    def __init__(self):
        self.left = 5

    def __iter__(self):
        self.left -= 1
        return iter([(torch.zeros(2, 3), torch.tensor([0, 1]))] * self.left)


def test_a_loader_that_changes_its_length_is_refused():
    feed = made((Shrinking(), [(torch.zeros(2, 3), torch.tensor([0, 1]))] * 2))
    with pytest.raises(NormError, match="same number of batches in every epoch; got 4, then 3"):
        list(feed.batches("none", 2, 0, 0))


def test_an_exhausted_generator_is_refused():
    batches = [(torch.zeros(2, 3), torch.tensor([0, 1]))] * 4
    feed = made(((b for b in batches), batches))
    with pytest.raises(NormError, match="got 4, then 0"):
        list(feed.batches("none", 2, 0, 0))


def test_an_empty_validation_loader_is_refused():
    batches = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
    feed = made((batches, []))
    with pytest.raises(NormError, match=r"the validation loader of .* must give batches; got none"):
        list(feed.validation("none"))


def test_numbers_to_predict_have_a_spread():
    rng = np.random.default_rng(0)
    y = rng.normal(3, 2, (40, 2)).astype(np.float32)
    feed = made(TensorDataset(torch.zeros(40, 3), torch.from_numpy(y)))
    assert (feed.classes, feed.outputs) == (None, 2)
    assert feed.spread[0] == pytest.approx(4, rel=0.4)


def test_samples_of_different_shapes_are_refused():
    with pytest.raises(NormError, match=r"samples of mine.py:data must have the same shape"):
        list(made(Ragged()).batches("none", 8, 0, 0))


class Ragged:
    def __len__(self):
        return 20

    def __getitem__(self, number):
        return np.zeros(number % 2 + 1), 0
