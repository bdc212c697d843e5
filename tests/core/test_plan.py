"""Names to axes to integers: right, independent of lengths, and with clear refusals."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normkit.core import catalog
from normkit.core.axes import static, tokens
from normkit.core.plan import (
    NormPlan,
    affine_shape,
    check_lengths,
    compile_plan,
    count,
    kept_shape,
    parts,
    plan,
    product,
    view_shape,
)
from normkit.errors import NormValueError


@pytest.mark.parametrize(
    ("spec", "ndim", "sizes", "expected"),
    [
        (catalog.BATCH, 2, (), NormPlan(((-1,), (-1,)), (0,), (1,), (1,), (), -1)),
        (catalog.BATCH, 4, (), NormPlan(((-1,),) * 4, (0, 2, 3), (1,), (1,), (), -1)),
        (catalog.GHOST, 3, (("n", 8),), NormPlan(((-1, 8), (-1,), (-1,)), (1, 3), (2,), (1,), (), 0)),
        (catalog.INSTANCE, 4, (), NormPlan(((-1,),) * 4, (2, 3), (1,), (1,), (), -1)),
        (catalog.GROUP, 3, (("g", 4),), NormPlan(((-1,), (4, -1), (-1,)), (2, 3), (1, 2), (1,), (), -1)),
        (
            catalog.LAYER,
            3,
            (("*c", (5, 7)),),
            NormPlan(((-1,), (5,), (7,)), (1, 2), (1, 2), (1, 2), ((1, 5), (2, 7)), -1),
        ),
        (catalog.LAYER_2D, 4, (("c", 6),), NormPlan(((-1,), (6,), (-1,), (-1,)), (1,), (1,), (1,), ((1, 6),), -1)),
        (catalog.RMS, 2, (("*c", (9,)),), NormPlan(((-1,), (9,)), (1,), (1,), (1,), ((1, 9),), -1)),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_plans(spec, ndim, sizes, expected):
    assert compile_plan(spec, ndim, sizes) == expected
    assert plan(spec, ndim, sizes) is plan(spec, ndim, sizes)


def test_a_plan_cannot_depend_on_lengths():
    assert list(inspect.signature(compile_plan).parameters) == ["spec", "ndim", "sizes"]


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (3, 6, 5, 2), (64, 6, 8, 9)])
def test_one_plan_serves_all_lengths(shape):
    p = plan(catalog.GROUP, 4, (("g", 3),))
    view = view_shape(p, shape)
    assert view == (shape[0], 3, 2, *shape[2:])
    assert affine_shape(p, view) == (1, 3, 2, 1, 1)
    assert kept_shape(p, shape) == (1, 6, 1, 1)
    assert count(p, view) == 2 * shape[2] * shape[3]


def test_an_axis_of_length_one_is_not_split():
    p = plan(catalog.GROUP, 3, (("g", 3),))
    assert view_shape(p, (4, 1, 5)) == (4, 1, 1, 5)  # a weight of positions, shared by the channels


def test_tokens():
    assert tokens(catalog.GHOST, 4) == (("m", "n"), ("c",), ("*s",), ("*s",))
    assert tokens(catalog.LAYER, 4, (("*c", (2, 3)),)) == (("*n",), ("*n",), ("*c",), ("*c",))
    assert static((("g", 3),), "g") == 3
    assert static((("g", 3),), "k") is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plan(catalog.BATCH, 1),
            "batch_norm: the input must have axes `n c *s` (2 or more); got 1 axes",
        ),
        (
            lambda: plan(catalog.LAYER, 2, (("*c", (2, 3, 4)),)),
            "layer_norm: the input must have axes `*n *c` (3 or more); got 2 axes",
        ),
        (lambda: plan(catalog.LAYER, 2), "layer_norm: one of the `*` axes in `*n *c` must have a static size"),
        (lambda: plan(catalog.GROUP, 3), "group_norm: one size of `(g k)` must be given; got sizes {}"),
        (
            lambda: plan(catalog.GROUP, 3, (("g", 2), ("k", 2))),
            "group_norm: one size of `(g k)` must be given; got sizes {'g': 2, 'k': 2}",
        ),
        (
            lambda: check_lengths(catalog.GROUP, plan(catalog.GROUP, 3, (("g", 4),)), (2, 6, 5)),
            "group_norm: the length of axis 1 must be divisible by 4; got shape (2, 6, 5)",
        ),
        (
            lambda: check_lengths(catalog.LAYER, plan(catalog.LAYER, 2, (("*c", (5,)),)), (2, 6)),
            "layer_norm: axis 1 of the input must have length 5; got shape (2, 6)",
        ),
    ],
)
def test_refusals_say_what_must_hold(call, message):
    with pytest.raises(NormValueError) as caught:
        call()
    assert str(caught.value) == message


def test_a_short_last_group_is_not_refused():
    check_lengths(catalog.GHOST, plan(catalog.GHOST, 2, (("n", 4),)), (7, 3))


@settings(max_examples=200, deadline=None)
@given(length=st.integers(0, 40), size=st.integers(2, 9), space=st.integers(1, 3))
def test_parts_cover_every_sample_once(length, size, space):
    p = plan(catalog.GHOST, 3, (("n", size),))
    found = parts(p, (length, 2, space))
    assert [i for start, stop, _ in found for i in range(start, stop)] == list(range(length))
    groups = [view[1] for _, _, view in found for _ in range(view[0])]
    assert sum(groups) == length
    assert all(n == size for n in groups[:-1])
    # Only one value in all is ever left alone; a last group of one value has joined the one before it.
    alone = [n for n in groups if n * space == 1]
    assert not alone or length == 1
    assert not groups or groups[-1] <= size + 1


def test_parts_without_groups_are_the_whole():
    p = plan(catalog.BATCH, 3)
    assert parts(p, (5, 2, 3)) == ((0, 5, (5, 2, 3)),)
    assert parts(p, (0, 2, 3)) == ((0, 0, (0, 2, 3)),)


@given(st.lists(st.integers(0, 50), max_size=5))
def test_product(lengths):
    assert product(lengths) == int(np.prod(lengths, dtype=np.int64))
