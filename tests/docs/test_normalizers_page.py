"""docs/normalizers.md and its picture say what catalog, docstrings and walks say."""

from pathlib import Path
from xml.etree import ElementTree

from normkit.core.catalog import CATALOG
from normkit.teaching.pages import drawing, main, page

PAGE = Path(__file__).parents[2] / "docs" / "normalizers.md"
REMEDY = "python -m normkit.teaching.pages docs/normalizers.md"


def test_page_and_picture_are_up_to_date():
    assert PAGE.read_text() == page(), REMEDY
    assert PAGE.with_suffix(".svg").read_text() == drawing(), REMEDY


def test_every_normalizer_has_a_place_on_the_page(tmp_path):
    main([str(tmp_path / "normalizers.md")])
    text = (tmp_path / "normalizers.md").read_text()
    assert all(f'<a id="{name}"></a>' in text and f"](#{name})" in text for name in CATALOG)
    assert text.count("```") == 2 * sum(3 if spec.over_names else 2 for spec in CATALOG.values())


def test_the_picture_is_one_and_small():
    svg = PAGE.with_suffix(".svg").read_bytes()
    assert len(svg) < 50_000
    cells = [element for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("rect")]
    assert len(cells) == 1 + 4 * 32  # the paper, and two images of 2 x 2 pixels with four channels, four times
