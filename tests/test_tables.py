import json
import math
from dataclasses import dataclass

import pytest

from normkit.errors import NormRuntimeError, NormValueError
from normkit.tables import Result, Table, number, plain


@dataclass(frozen=True)
class Found(Result):
    shift: float

    def table(self):
        return Table(
            ("layer", "kind", "shift"), [("0", "a<b", number(self.shift)), ("10.norm", "c", "-")], 2, "Two layers"
        )

    def to_dict(self):
        return plain({"shift": self.shift})


def test_words_stand_left_and_numbers_right():
    assert str(Found(0.25)).splitlines() == [
        "Two layers",
        "layer    kind  shift",
        "0        a<b    0.25",
        "10.norm  c         -",
    ]


def test_a_notebook_shows_text_as_it_is():
    shown = Found(0.25)._repr_html_()
    assert "<td>a&lt;b</td>" in shown
    assert shown.startswith("<p>Two layers</p><table>")
    assert shown.count("<tr>") == 3


def test_saved_values_are_json_whatever_they_are(tmp_path):
    path = Found(math.nan).save(tmp_path / "found.json")
    assert json.loads(path.read_text()) == {"shift": None}
    assert Found(1.0).save(str(tmp_path / "found.html")).read_text() == Found(1.0)._repr_html_()


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(NormValueError, match=r"must end in .txt, .json or .html; got 'found.csv'"):
        Found(1.0).save("found.csv")
    with pytest.raises(NormRuntimeError, match="must be one that can be written"):
        Found(1.0).save(tmp_path / "missing" / "found.json")
