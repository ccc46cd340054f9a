"""The report of a stored run, word for word: what changes in it is meant to, or a mistake.

After a change that is meant, look at it and store it: `python tests/golden/test_golden_page.py`.
"""

import re
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ipgo import IPGO, Ascent, Insertion, InsertionAdapter, Progress, Run, Sampling, Score
from ipgo.chunks import Cost
from ipgo.config import RunConfig
from ipgo.report.build import render

PAGE = Path(__file__).parent / "report.html"
PROMPTS = ("a fox on <b>red</b>", "an owl & a lemon")
CONFIG = RunConfig(
    PROMPTS,
    IPGO(Insertion(1, 1, rank=2), Ascent(steps=3)),
    reward="emoji-clip",
    held_out=("emoji-aesthetic",),
    sampling=Sampling(steps=4),
    seeds=(0, 1),
    unseen_seeds=2,
)
FACTS = {
    "versions": {"ipgo": "0", "python": "3", "torch": "2", "diffusers": "0", "transformers": "5"},
    "device": "a machine",
    "threads": 1,
    "dtype": "float32",
    "schedule": "DDIM",
    "weights": "0123456789abcdef",
    "guidance_scale": 2.5,
    "started": "2026-01-01 00:00:00",
    "rewards": {
        "emoji-clip": {"id": "emoji-clip", "weights": "ab"},
        "emoji-aesthetic": {"id": "emoji-aesthetic"},
    },
}


def stored(folder: Path) -> Run:
    """A finished run, later judged again, of which every number is chosen by hand."""
    run = Run.open(folder / "run", CONFIG)
    run.start(FACTS)
    (chunk,) = run.chunks()
    adapter = InsertionAdapter(PROMPTS, 8, replace(CONFIG.method.insertion, norm=1.0))
    cost = Cost()
    for step in (1, 2, 3):
        values = torch.tensor([0.5 + 0.1 * step, 0.4 - 0.05 * step])
        none = torch.zeros(2)
        progress = Progress(step, 3, values, values, none, none + 1, none.bool(), None, adapter, dict, over=2)
        cost = Cost({"denoiser": 16 * step, "denoiser_grad": 4 * step, "reward": 2 * step}, 1.5 * step, 100)
        run.record(chunk, progress, cost)
    for row, prompt in enumerate(run.prompts):
        scores = []
        for place, seed in enumerate(CONFIG.judged_seeds):
            for when, method, level in (("before", "raw", 0.5), ("after", "ipgo", 0.6 - 0.15 * row)):
                shade = int(255 * (level + place / 100))
                run.save_image(prompt, when, seed, Image.new("RGB", (4, 4), (shade, 80 * row, 0)))
                aesthetic = 0.9 - 0.1 * (when == "after") - place / 200
                scores += [
                    Score(method, prompt.text, seed, "emoji-clip", level + place / 100, False),
                    Score(method, prompt.text, seed, "emoji-aesthetic", aesthetic, True),
                    Score(
                        method, prompt.text, seed, "judge-object", float(when == "before" or place > 0), True
                    ),
                ]
        paid = {
            "calls": {"denoiser": 24.0, "denoiser_grad": 6.0, "reward": 3.0},
            "parameters": 68,
            "measured": {"seconds": 2.25, "peak_memory_mib": 100, "fitted_together": 2, "sessions": 1},
        }
        run.save_adapter(prompt, adapter.row(row))
        run.finish(prompt, scores, paid, False, FACTS["rewards"], truncated=row == 1)
    again = [
        Score(method, PROMPTS[0], 1002, "emoji-clip", value, False)
        for method, value in (("raw", 0.5), ("ipgo", 0.7))
    ]
    run.judge_again(again, {"emoji-clip": FACTS["rewards"]["emoji-clip"]}, run.drawn_by)
    run.close()
    return run


def page() -> str:
    """The report without pictures' bytes, which depend on versions of others, style, and blanks at ends of lines."""
    with tempfile.TemporaryDirectory() as folder:
        text = render(stored(Path(folder)))
    text = re.sub(r"data:image/png;base64,[^\"]+", "PICTURE", text)
    text = re.sub(r"<style>.*?</style>", "<style>STYLE</style>", text, flags=re.DOTALL)
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


def test_the_report_of_a_stored_run() -> None:
    assert page() == PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
