"""The studio while it fits, as a visitor sees it: docs/studio.png.

    pip install ".[studio]" playwright      # and a chromium, such as Debian's package of that name
    python benchmarks/studio_picture.py

The default fit of a prompt of the train half, photographed at one of its last steps.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from ipgo import load_backend
from ipgo.prompts import read_prompts
from ipgo.studio.app import Place, launch, page
from ipgo.studio.live import Live

PATIENCE = 600_000  # milliseconds


def photograph(prompt: str, step: int, out: Path) -> None:
    """Fit the prompt in the studio's page, and keep what it looks like at a step."""
    with tempfile.TemporaryDirectory() as runs, sync_playwright() as started:
        live = Live(load_backend("emoji"))
        blocks = page(live, Place({"backend": "emoji"}, Path(runs)))
        address = launch(blocks)
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1360, "height": 960})
        tab.set_default_timeout(PATIENCE)
        tab.goto(address)
        tab.get_by_label("Prompt", exact=True).fill(prompt)
        tab.locator("#fit").click()
        reached = f"parseInt(document.querySelector('.status strong')?.innerText.split(' ')[1]) >= {step}"
        tab.wait_for_function(reached)
        tab.screenshot(path=out)
        browser.close()
        live.stop()
        live.join()
        blocks.close(verbose=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompt", default=read_prompts("one:train")[1])
    parser.add_argument("--step", type=int, default=36)
    parser.add_argument("--out", type=Path, default=Path("docs/studio.png"))
    args = parser.parse_args()
    photograph(args.prompt, args.step, args.out)


if __name__ == "__main__":
    main()
