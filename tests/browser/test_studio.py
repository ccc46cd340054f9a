"""The studio in a real browser: type a prompt, fit it, and see the pictures change.

Needs gradio (`pip install "ipgo[studio]"`), Playwright and a chromium; without them it is skipped.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipgo import cli, load_backend
from tests.browser.conftest import CHROMIUM

pytest.importorskip("gradio")
pytest.importorskip("playwright.sync_api")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    pytest.mark.filterwarnings("default"),  # of gradio's server, in threads of its own
]

HOSTILE = "<script>document.title = 'broken'</script> <b>a fox</b> & \"a lemon\""
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def address(pipeline_folder: str, out: Path) -> Iterator[str]:
    from ipgo.studio.app import Place, launch, page
    from ipgo.studio.live import Live

    blocks = page(Live(load_backend(pipeline_folder)), Place({"backend": pipeline_folder}, out))
    yield launch(blocks)
    blocks.close(verbose=False)


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    """The page in a new tab, which must ask for nothing elsewhere and complain of nothing."""
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(PATIENCE)
    outside: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: outside.append(request.url))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(address)
    tab.wait_for_selector("#view .ipgo")
    tab.wait_for_selector("#fit")
    yield tab
    assert [url for url in outside if not url.startswith((address, "data:", "blob:"))] == []
    assert complaints == []
    tab.close()


def settings(page: Any, **typed: str) -> None:
    """A reward of pixels, and short fits."""
    page.get_by_label("Reward", exact=True).fill("colorfulness")
    page.keyboard.press("Tab")
    page.get_by_text("All settings of the method").click()
    page.get_by_text("Sampling, and other settings").click()
    for group, fields in (
        ("method.ascent", {"steps": "3", "backprop_steps": "1"}),
        ("sampling", {"steps": "2", "fit_steps": "null"}),
    ):
        page.locator("button.label-wrap", has_text=re.compile(rf"^\s*{group}\b")).click()
        for name, value in fields.items():
            page.locator(f"[id='{group}.{name}'] textarea, [id='{group}.{name}'] input").fill(value)


def test_type_fit_and_see_the_pictures_change(page: Any, out: Path) -> None:
    settings(page)
    page.get_by_label("Prompt", exact=True).fill(HOSTILE)
    page.get_by_label("Noise seeds").first.fill("0")
    page.locator("#fit").click()
    page.wait_for_selector(".status.done")
    pictures = page.locator("#view figure img")
    sources = [pictures.nth(number).get_attribute("src") for number in range(pictures.count())]
    assert len(sources) == 2
    assert sources[0] != sources[1]
    assert page.locator("#view svg").count() == 1  # no rewards are held out
    assert page.title() == "ipgo studio"
    assert page.locator("#view b", has_text="a fox").count() == 0
    assert "ipgo fit" in page.locator(".cm-content").inner_text()

    report = page.frame_locator("#report iframe")
    report.locator("h1").wait_for()
    assert report.locator("h1").inner_text() == HOSTILE
    assert report.locator("h1 b").count() == 0
    assert sorted(path.name for path in out.iterdir())

    page.get_by_role("tab", name="On other noise").click()
    page.locator("#numbers textarea").fill("5 6")
    page.locator("#draw").click()
    page.wait_for_selector("#pairs figure")
    assert page.locator("#pairs figure").count() == 4


def test_what_cannot_be_fitted_is_one_sentence(page: Any) -> None:
    settings(page)
    page.locator("#fit").click()
    page.wait_for_selector(".status.failed")
    assert "prompt" in page.locator(".status.failed span").inner_text()
    page.get_by_label("Prompt", exact=True).fill("a fox")
    page.get_by_label("Reward", exact=True).fill("cmd:touch {image}")
    page.keyboard.press("Tab")
    page.locator("#fit").click()
    page.wait_for_selector(".status.failed:has-text('where the studio is started')")


def test_an_earlier_fit_is_there_for_the_next_visitor(page: Any) -> None:
    page.wait_for_selector("#report iframe")
    assert page.frame_locator("#report iframe").locator("h1").inner_text() == HOSTILE


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_is_as_wide_as_the_window(chromium: Any, address: str, width: int, scheme: str) -> None:
    tab = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab.goto(address)
    tab.wait_for_selector("#view .ipgo")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.close()


def test_it_answers_to_its_own_name_alone_and_takes_no_files(address: str) -> None:
    """Or else a site that names itself as this machine could start fits, in the browser of whoever looks at it."""
    httpx = pytest.importorskip("httpx")
    assert httpx.get(address).status_code == 200
    assert httpx.get(address, headers={"Host": "evil.example"}).status_code == 400
    upload = httpx.post(f"{address}gradio_api/upload", files={"files": ("evil.py", b"print('here')")})
    assert upload.status_code >= 400


@pytest.mark.skipif(os.name != "posix", reason="there are no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(
    number: signal.Signals, pipeline_folder: str, tmp_path: Path
) -> None:
    def usual() -> None:  # a job in the background does not know Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    words = ["studio", "--backend", pipeline_folder, "--out", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "ipgo", *words], stdout=subprocess.PIPE, text=True, preexec_fn=usual
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        httpx = pytest.importorskip("httpx")
        assert "ipgo studio" in httpx.get(address).text
        process.send_signal(number)
        assert process.wait(60) == 0


def test_a_port_that_is_taken_is_named(
    pipeline_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ["studio", "--backend", pipeline_folder, "--out", str(tmp_path), "--port", str(port)]
        assert cli.main(words) == 2
    assert f"port {port}; another program has it" in capsys.readouterr().err.splitlines()[-1]
