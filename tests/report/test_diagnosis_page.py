"""The page of a diagnosis in headless Chromium: nothing to load, dark and light, no wider than a phone."""

import html

from test_browser import PHONE, browse, pytestmark, rgb  # noqa: F401  # skipped without chromium

from normkit.checks.findings import Diagnosis, Finding, Fix
from normkit.report.look import DARK, LIGHT

PROBE = """<script>
const report = document.createElement("pre"), style = getComputedStyle(document.querySelector(".normkit"));
report.id = "seen";
report.textContent = JSON.stringify({
  paper: style.backgroundColor,
  resources: performance.getEntriesByType("resource").length,
  sections: document.querySelectorAll(".finding").length,
  stories: [...document.querySelectorAll("details p")].map((p) => p.textContent.length),
});
document.body.append(report);
</script>"""


def page():
    path = "backbone.stages.0.blocks.11.a_rather_long_name_of_a_module.norm"
    line = f"model.get_submodule('{path}').momentum = 0.1; normkit.recalibrate(model, data)"
    findings = [
        Finding(severity, path, "words " * 30, {}, Fix(line), code="NK102", title="statistics")
        for severity in ("error", "warning", "info")
    ]
    found = Diagnosis("Net", f"3 findings at {path}", tuple(findings), 1, ("NK102",), {"optimizer": "none was given"})
    return found._formats()[".html"]()


def test_on_a_screen_and_on_a_phone_light_and_dark():
    for flags, colors in (((), LIGHT), (("--blink-settings=preferredColorScheme=0",), DARK)):
        seen, console = browse(page().replace("</body>", f"{PROBE}</body>"), *flags)
        assert console == []
        assert seen["paper"] == rgb(colors["paper"])
        assert (seen["resources"], seen["sections"]) == (0, 3)
        assert min(seen["stories"]) > 20
    seen, _ = browse(PHONE % html.escape(page()))
    assert seen["needed"] <= seen["inner"] == 360
