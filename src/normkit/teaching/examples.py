"""Small data to follow with a pencil: a table for statistics over samples, another for those over features, images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from normkit.core.spec import NormSpec
from normkit.teaching.cells import Labels
from normkit.teaching.forms import FORMS

__all__ = ["CAMPAIGNS", "HOUSEHOLDS", "IMAGES", "Example", "example"]


@dataclass(frozen=True, eq=False)
class Example:
    """Values with a story.

    Attributes:
        words: what they are, in a sentence.
        x: the values.
        labels: names of the places on their axes.
        reading: what normalizing them means, in sentences.
    """

    words: str
    x: np.ndarray[Any, Any]
    labels: Labels
    reading: str


CAMPAIGNS = Example(
    "four campaigns: units sold, in thousands, and the price",
    np.array([[1.0, 200.0], [2.0, 220.0], [3.0, 180.0], [6.0, 200.0]]),
    (("campaign 1", "campaign 2", "campaign 3", "campaign 4"), ("units", "price")),
    "Each column is normalized by itself: did a campaign sell more than the others, measured by how much they differ? "
    "Thousands and hundreds become comparable, and a campaign's values depend on which others are in the batch.",
)
# The second household has half of everything, the third spends the same sum in another way.
HOUSEHOLDS = Example(
    "three households: what a month costs them, in hundreds",
    np.array([[2.0, 4.0, 6.0, 12.0], [1.0, 2.0, 3.0, 6.0], [6.0, 6.0, 6.0, 6.0]]),
    (("household 1", "household 2", "household 3"), ("travel", "clothes", "food", "rent")),
    "Each row is normalized by itself: what a household spends on something, relative to its own income. A household "
    "with half the income and the same habits gets the same numbers, whoever else is in the batch.",
)
_FIRST, _SECOND = [[1.0, 2.0], [3.0, 6.0]], [[4.0, 4.0], [8.0, 8.0]]
_THIRD, _FOURTH = [[-1.0, 1.0], [1.0, -1.0]], [[5.0, 5.0], [-1.0, -1.0]]
# The second image is the first one, exposed twice as long.
IMAGES = Example(
    "two images of 2 x 2 pixels, as four channels of a convolution; the second is the first, exposed twice as long",
    np.array([[_FIRST, _SECOND, _THIRD, _FOURTH]]) * np.array([1.0, 2.0]).reshape(2, 1, 1, 1),
    (("image 1", "image 2"), ("channel 1", "channel 2", "channel 3", "channel 4")),
    "Each image is normalized by itself: how long it was exposed leaves no trace in the output.",
)


def example(spec: NormSpec) -> Example:
    """The data that shows what a normalizer does."""
    over = set(spec.over_names)
    form = FORMS.get(spec.formula)
    found = IMAGES
    if spec.axes[0] == ("*n",):
        found = HOUSEHOLDS
    elif form is None and "n" in over:
        found = CAMPAIGNS
    return found if form is None or form.normalized else replace(found, reading="")
