"""The HTML pages in a real browser: what they load, how wide they are, and whether they can be read.

Needs Playwright and a chromium (`pip install playwright`, Debian's `apt install chromium`); without them it is skipped.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from ipgo import cli
from tests.browser.conftest import CHROMIUM

pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

HOSTILE = (
    "<script>document.title = 'broken'</script> <b>a fox</b> & \"a lemon\" of "
    "aratherlongwordthatnobodywouldeverbreak"
)
SHORT = ("--reward", "colorfulness", "--held-out", "contrast", "--sampling.steps", "2", "--unseen-seeds", "1")
PHONE, DESKTOP = 390, 1280

# Also those further down, which wait until somebody looks.
DECODED = """Promise.all([...document.images].map(each => {
    each.loading = "eager";
    return each.decode().then(() => true, () => false);
}))"""


@pytest.fixture(scope="module")
def pages(pipeline_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    where = ("--backend", pipeline_folder, "--long-prompts", "truncate", *SHORT)
    ascent = ("--method.ascent.steps", "2", "--method.ascent.backprop_steps", "1", "--seeds", "0")
    assert cli.main(["fit", HOSTILE, "a second fox", *where, *ascent, "--out", str(folder / "run")]) == 0
    methods = ("--methods", "raw,ipgo,best-of-n,reno", "--budget", "30", "--price", "2", "2")
    assert cli.main(["compare", HOSTILE, "a fox", *where, *methods, "--out", str(folder / "table")]) == 0
    return {"run": folder / "run/report.html", "comparison": folder / "table/comparison.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_a_page_opens_from_its_file(
    name: str, width: int, scheme: str, pages: dict[str, Path], chromium: Any
) -> None:
    """It asks for nothing else, runs nothing, is as wide as the screen, and its text stands out."""
    context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pages[name].as_uri())
    pictures = page.evaluate(DECODED)
    assert len(pictures) > 4
    assert all(pictures)
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert said == []
    assert page.title() != "broken"
    assert HOSTILE[:20] in page.inner_text("body")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    behind, text = (_lightness(page, colour) for colour in ("backgroundColor", "color"))
    if scheme == "light":
        behind, text = text, behind
    assert behind < 0.3
    assert text > 0.7
    if shots := os.environ.get("IPGO_SHOTS"):  # to be looked at
        page.screenshot(path=f"{shots}/{name}-{width}-{scheme}.png", full_page=True)
    context.close()


def _lightness(page: Any, colour: str) -> float:
    """Of the body's text or background, from 0 to 1."""
    found = page.evaluate(f"getComputedStyle(document.body).{colour}")
    red, green, blue = (int(each) for each in re.findall(r"\d+", found)[:3])
    return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
