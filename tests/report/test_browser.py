"""The page in headless Chromium: drawn, silent, dark and light, on a phone, with values under the pointer."""

import html
import json
import os
import re
import shutil
import subprocess
import tempfile

import pytest
from made import grid, regression, settings

from normkit.report import render
from normkit.report.look import DARK, LIGHT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium", path="/usr/bin")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--enable-logging=stderr", "--v=0"),
]

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "chromium" not in os.environ.get("NORMKIT_REQUIRE", ""),
    reason="chromium is not installed; NORMKIT_REQUIRE=chromium makes this a failure",
)

# Runs after the page's own script and leaves what it saw in the document.
PROBE = """<script>
const seen = {figures: [], resources: performance.getEntriesByType("resource").map((entry) => entry.name)};
const color = (element, property) => getComputedStyle(element)[property];
seen.paper = color(document.querySelector(".normkit"), "backgroundColor");
seen.page = color(document.documentElement, "backgroundColor");
for (const svg of document.querySelectorAll("svg")) {
  const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal, points = JSON.parse(svg.dataset.points);
  const drawn = [...svg.querySelectorAll("path")].map((path) => path.getBBox()).filter((b) => b.width + b.height > 0);
  const texts = [...svg.querySelectorAll("text")].filter((text) => text.getBBox().width > 0);
  const tips = points.map(([x, y]) => {
    const at = {clientX: box.left + x * box.width / view.width, clientY: box.top + y * box.height / view.height};
    svg.dispatchEvent(new PointerEvent("pointermove", at));
    const tip = svg.parentNode.querySelector(".tip"), place = tip.getBoundingClientRect();
    const inside = place.left >= box.left - 1 && place.right <= box.right + 1 && color(tip, "display") === "block";
    return [tip.textContent, inside];
  });
  svg.dispatchEvent(new PointerEvent("pointerleave"));
  const hidden = color(svg.parentNode.querySelector(".tip"), "display") === "none";
  svg.dispatchEvent(new KeyboardEvent("keydown", {key: "Escape"}));
  for (let n = 0; n < points.length; n++) svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
  const first = svg.parentNode.querySelector(".tip").textContent;
  svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
  const second = svg.parentNode.querySelector(".tip").textContent;
  seen.figures.push({drawn: drawn.length, texts: texts.length, points, tips, hidden, keys: [first, second],
    width: box.width, color: color(svg.querySelector("text[style*='var(--v']"), "fill"), focus: svg.tabIndex,
    tools: svg.parentNode.children.length});
}
const report = document.createElement("pre");
report.id = "seen";
report.textContent = JSON.stringify(seen);
document.body.append(report);
</script>"""

PHONE = """<!doctype html><body><iframe style="width: 360px; height: 640px; border: 0" srcdoc="%s"></iframe><script>
onload = () => {
  const inside = document.querySelector("iframe").contentDocument.documentElement;
  const report = document.createElement("pre");
  report.id = "seen";
  report.textContent = JSON.stringify({inner: inside.clientWidth, needed: inside.scrollWidth});
  document.body.append(report);
};
</script></body>"""


def browse(text, *flags):
    """Open a page; what its probe saw, and the lines of its console."""
    assert CHROMIUM is not None, "NORMKIT_REQUIRE asks for chromium, which is not installed"
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/page.html"
        with open(path, "w") as file:  # noqa: PTH123
            file.write(text)
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}/profile", *flags, "--dump-dom", f"file://{path}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    return json.loads(html.unescape(found[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probed(page):
    return page.replace("</body>", f"{PROBE}</body>")


def rgb(color):
    return "rgb({}, {}, {})".format(*bytes.fromhex(color[1:]))


MADE = {"grid": (grid, 6), "regression": (regression, 4), "settings": (settings, 1 + 3 * 4)}


@pytest.fixture(scope="module")
def pages():
    return {name: render.page(make()) for name, (make, _) in MADE.items()}


@pytest.mark.parametrize("name", MADE)
def test_every_figure_is_drawn_and_tells_its_values(pages, name):
    seen, console = browse(probed(pages[name]))
    assert console == []
    assert seen["resources"] == []
    assert len(seen["figures"]) == MADE[name][1]
    for figure in seen["figures"]:
        assert figure["drawn"] >= 8
        assert figure["texts"] >= 6
        assert figure["width"] > 300
        assert figure["hidden"]
        assert figure["focus"] == 0
        labels = [label for _, _, label in figure["points"]]
        assert labels
        assert figure["keys"] == [labels[0], labels[min(1, len(labels) - 1)]]
        at = {}
        for x, y, label in figure["points"]:
            at.setdefault((x, y), set()).add(label)
        for (x, y, _), (tip, inside) in zip(figure["points"], figure["tips"], strict=True):
            assert tip in at[x, y]
            assert inside, tip
    assert rgb(LIGHT["paper"]) == seen["paper"] == seen["page"]


def test_dark_mode_has_its_own_colours(pages):
    seen, console = browse(probed(pages["grid"]), "--blink-settings=preferredColorScheme=0")
    assert console == []
    assert rgb(DARK["paper"]) == seen["paper"] == seen["page"]
    assert {figure["color"] for figure in seen["figures"]} <= {rgb(c) for n, c in DARK.items() if n.startswith("v")}


@pytest.mark.parametrize("name", MADE)
def test_no_page_is_wider_than_a_phone(pages, name):
    seen, _ = browse(PHONE % html.escape(pages[name]))
    assert seen["inner"] == 360
    assert seen["needed"] <= 360


def test_a_notebook_may_hold_several_results():
    parts = [render.fragment(make()) for make in (regression, settings)]
    seen, console = browse(probed(f"<!doctype html><body>{parts[0]}{parts[1]}{parts[0]}</body>"))
    assert console == []
    # One tip and one mark beside each drawing, however many copies of the script ran.
    assert {figure["tools"] for figure in seen["figures"]} == {3}


def test_a_broken_page_would_be_seen(pages):
    _, console = browse(
        probed(pages["regression"].replace("(() => {", "(() => { missing();", 1)).replace(PROBE, "<pre id=seen>0</pre>")
    )
    assert len(console) == 1
    seen, _ = browse(PHONE % html.escape("<!doctype html><p style='width: 400px'>wide"))
    assert seen["needed"] > 360
