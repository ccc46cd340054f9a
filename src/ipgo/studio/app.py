"""The studio's page: its parts, and what happens when one of them is touched."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from jinja2 import Template
from markupsafe import Markup
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ipgo import report as report_package
from ipgo.backends import Backend
from ipgo.defaults import reward_for
from ipgo.errors import InputError, IpgoError, first_line
from ipgo.methods import METHODS
from ipgo.models import bundled_rewards
from ipgo.prompts import halves, prompt_sets, read_prompts
from ipgo.report import charts
from ipgo.report.build import environment, render
from ipgo.rewards import REWARDS
from ipgo.store import Run
from ipgo.studio import form
from ipgo.studio.live import Live, View
from ipgo.vocabulary import draws_bundled_world

STYLE = Path(__file__).parent / "studio.css"
PATIENCE = 1.0  # seconds after which a page looks whether anybody still reads it
MOST = 8  # pictures of new noise at once
LOOPBACK = ("127.0.0.1", "localhost")
logger = logging.getLogger("ipgo")


@dataclass(frozen=True)
class Place:
    """What the studio was started with.

    Attributes:
        settings: those of `RunConfig` that open the backend, and so are the same for all fits; `backend` among them.
        out: the folder of the runs.
        rewards: further ones to choose from, such as mine.py:warmth.
    """

    settings: Mapping[str, Any]
    out: Path
    rewards: tuple[str, ...] = ()

    @property
    def backend(self) -> str:
        """The name, folder, file or hub id of the backend."""
        return str(self.settings["backend"])


def page(live: Live, place: Place) -> gr.Blocks:
    """The page, to be launched."""
    handlers = _Handlers(live, place)
    quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_name": False}
    with gr.Blocks(title="ipgo studio", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(f"# ipgo studio\n{_about(live.backend, place.backend)}")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                asked = _questions(place)
                touched = gr.Column()
                with gr.Accordion("Sampling, and other settings", open=False):
                    common = _boxes(form.common_fields(place.backend))
                command = gr.Code(
                    label="The same in a terminal",
                    language="shell",
                    interactive=False,
                    wrap_lines=True,
                    lines=1,
                    max_lines=8,
                    visible=False,
                )
            with gr.Column(scale=5, min_width=360):
                shown = gr.HTML(elem_id="view", apply_default_css=False)
                earlier = gr.Dropdown([], label="Of which fit", elem_id="earlier", interactive=True)
                with gr.Tab("Report"):
                    report = gr.HTML(elem_id="report", apply_default_css=False)
                with gr.Tab("On other noise"):
                    gr.Markdown(
                        "Does it hold on noise that was not fitted? This draws the prompt of the fit above."
                    )
                    with gr.Row():
                        numbers = gr.Textbox("100 101 102 103", label="Noise seeds", elem_id="numbers")
                        draw = gr.Button("Draw", elem_id="draw")
                    pairs = gr.HTML(elem_id="pairs", apply_default_css=False)
        outputs = [shown, command, earlier, report]

        with touched:  # with the buttons, since a click needs the fields of the method that is chosen

            @gr.render(inputs=[asked["method"]])  # type: ignore[untyped-decorator]
            def settings(method: str) -> None:
                with gr.Row():
                    fit = gr.Button("Fit", variant="primary", elem_id="fit")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("All settings of the method", open=False):
                    own = _boxes(form.fields(place.backend, method))
                boxes = common | own

                def start(values: dict[Any, Any]) -> Iterator[list[Any]]:
                    typed = {field: values[box] for field, box in boxes.items()}
                    yield from handlers.start({name: values[box] for name, box in asked.items()}, typed)

                fit.click(start, {*asked.values(), *boxes.values()}, outputs, **quiet)
                stop.click(live.stop, api_name=False)

        earlier.input(handlers.show, [earlier], [report], **quiet)
        draw.click(handlers.draw, [earlier, numbers], [pairs], api_name=False)
        blocks.load(handlers.watch, None, outputs, **quiet)
    return blocks


def _questions(place: Place) -> dict[str, gr.components.Component]:
    """What is asked of every fit, by name."""
    known = _rewards(place)
    prompt = gr.Textbox(label="Prompt", lines=2, placeholder=_placeholder(place.backend), interactive=True)
    if examples := _examples(place.backend):
        gr.Examples(examples, [prompt], label="For example")
    reward = gr.Dropdown(
        known,
        value=reward_for(place.backend),
        label="Reward",
        allow_custom_value=True,
        interactive=True,
        info="What the pictures are to have more of. Sums work: clip+0.5*aesthetic",
    )
    held_out = gr.Dropdown(
        known,
        value=_judges(place),
        label="Held out",
        multiselect=True,
        allow_custom_value=True,
        interactive=True,
        info="Rewards that only judge (what is optimised does not). Where they fall, the reward is fooled",
    )
    with gr.Row():
        method = gr.Dropdown(list(METHODS), value="ipgo", label="Method", min_width=120, interactive=True)
        seeds = gr.Textbox(
            label="Noise seeds", placeholder="the method's own", min_width=120, interactive=True
        )
    return {"prompt": prompt, "reward": reward, "held_out": held_out, "method": method, "seeds": seeds}


def launch(
    blocks: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, inbrowser: bool = False
) -> str:
    """Serve the page from a thread of its own, and return its address; `OSError` if the port is taken."""
    theme = gr.themes.Soft(
        primary_hue="indigo",
        neutral_hue="stone",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    hosts = list(LOOPBACK) if host in LOOPBACK else ["*"]
    _, address, _ = blocks.queue().launch(
        server_name=host,
        server_port=port,
        inbrowser=inbrowser,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        theme=theme,
        head=head(),
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        max_file_size=1,  # nothing is uploaded
        # What another site makes a visitor's browser ask for, under a name of its own for this machine, is refused.
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
    )
    return str(address)


def head() -> str:
    """The page's style: the colours and charts of the reports, and what only this page has."""
    report = Path(report_package.__file__).parent
    colours, drawn = ((report / name).read_text(encoding="utf-8") for name in ("colours.css", "charts.css"))
    return f"<style>\n{colours}\n.ipgo {{\n{drawn}}}\n{STYLE.read_text(encoding='utf-8')}</style>"


class _Handlers:
    """What the parts of the page do. `start` and `watch` give the values of all `outputs` of the page."""

    def __init__(self, live: Live, place: Place) -> None:
        self.live, self.place = live, place
        self.asked: tuple[str, str, list[str]] | None = None  # prompt, reward and flags of the latest fit

    def start(self, main: Mapping[str, Any], typed: Mapping[form.Field, str | bool]) -> Iterator[list[Any]]:
        """Begin a fit, and show it until it ends."""
        place, prompt, reward = self.place, main["prompt"] or "", main["reward"] or ""
        judging = list(main["held_out"] or ())
        try:
            usual = judging == _judges(place)
            words = form.flags(main["method"], main["seeds"] or "", None if usual else judging, typed)
            config = form.settle(place.settings, prompt, reward, words, place.rewards)
            self.live.start(config, place.out)
        except Exception as error:
            yield [_refused("This cannot be fitted", error), *self._same()]
            return
        self.asked = prompt, reward, words
        yield from self.watch()

    def watch(self) -> Iterator[list[Any]]:
        """Show what there is to see until nothing changes any more."""
        view, seen = self.live.view, None
        while view is not seen or view.busy:
            if view is seen:
                yield [gr.skip(), *self._same()]  # a page that is gone ends this here
            else:
                kept = [gr.skip(), gr.skip()] if view.busy else self._kept(view)
                yield [_shown(view), self._command(view), *kept]
            seen = view
            if view.busy:
                view = self.live.after(view, PATIENCE)

    def show(self, name: str | None) -> str:
        """The report of a fit."""
        if not name:
            return ""
        try:
            run = self._run(name)
            page = run.path / "report.html"
            return _framed(page.read_text(encoding="utf-8") if page.is_file() else render(run))
        except Exception as error:
            return _refused("This cannot be shown", error)

    def draw(self, name: str | None, numbers: str) -> str:
        """The prompt of a fit from other noise, before and after."""
        try:
            if not name:
                raise InputError("no fit is shown; fit a prompt first")
            seeds = form.seeds(numbers)
            if len(seeds) > MOST:
                raise InputError(f"seeds has {len(seeds)} entries; at most {MOST} are drawn at once")
            run = self._run(name)
            return _template("pairs").render(pairs=self.live.draw(run, seeds), prompt=run.config.prompts[0])
        except Exception as error:
            return _refused("This cannot be drawn", error)

    def _run(self, name: str) -> Run:
        if name not in fits(self.place.out):
            raise InputError(f"there is no fit {name!r} in {str(self.place.out)!r}")
        return Run.open(self.place.out / name)

    def _command(self, view: View) -> gr.Code:
        if self.asked is None or view.run is None:
            return gr.Code(visible=False)
        return gr.Code(form.command(self.place.settings, *self.asked, str(view.run.path)), visible=True)

    def _kept(self, view: View) -> list[Any]:
        """The list of the fits with this one chosen, and its report."""
        names = fits(self.place.out)
        chosen = view.run.path.name if view.run is not None and view.run.path.name in names else None
        chosen = chosen or (names[0] if names else None)
        return [gr.Dropdown(names, value=chosen), self.show(chosen)]

    @staticmethod
    def _same() -> list[Any]:
        return [gr.skip(), gr.skip(), gr.skip()]


def _refused(title: str, error: Exception) -> str:
    """What cannot be done, and why."""
    if not isinstance(error, IpgoError):
        logger.error("%s", title, exc_info=error)
    return _shown(
        View("failed", said=str(error) if isinstance(error, IpgoError) else first_line(error)), title
    )


def _shown(view: View, title: str = "") -> str:
    """A view as the page has it."""
    config = view.run.config if view.run is not None else None
    hues = {name: charts.hue(number) for number, name in enumerate(view.gains)}
    history = [
        {"reward": reward, "best": best, "over": view.over}
        for reward, best in zip(view.rewards, view.best, strict=True)
    ]
    name, bold = charts.so_far(history)
    columns = [
        {
            "name": "noise that changes" if seed is None else f"noise seed {seed}",
            "before": view.before.get(seed),
            "now": view.now.get(seed),
        }
        for seed in dict.fromkeys([*view.before, *view.now])
    ]
    return _template("view").render(
        view=view,
        title=title or _title(view),
        note=view.said or _note(view),
        prompt="" if config is None else config.prompts[0],
        reward="" if config is None else config.reward,
        columns=columns,
        curve=charts.curve(view.rewards, bold, view.raw),
        curve_name=name,
        lines=charts.lines(view.gains, hues, "steps", 0.0),
        held_out=[
            {"name": name, "hue": hues[name], "gain": line[-1][1]} for name, line in view.gains.items()
        ],
    )


def _title(view: View) -> str:
    """What is going on, in a few words."""
    steps = f"step {view.step} of {view.total}"
    return {
        "idle": "",
        "loading": "Loading the rewards, and drawing the raw prompt",
        "fitting": steps.capitalize() if view.step else "The first step",
        "drawing": "Drawing before and after, also on noise that was not fitted",
        "done": "Done",
        "stopped": f"Stopped after {steps}" if view.step else "Stopped",
        "failed": "The fit has failed",
    }[view.stage]


def _note(view: View) -> str:
    """What a reader wants to know besides."""
    if view.stage == "fitting" and view.left is not None:
        return (
            f"about {view.left:.0f} s to go" if view.left < 100 else f"about {view.left / 60:.0f} min to go"
        )
    return {
        "done": f"Kept in {view.run.path if view.run else ''}. Below is what came of it.",
        "stopped": "Fit with the same settings goes on from here.",
    }.get(view.stage, "")


def fits(out: Path) -> list[str]:
    """The names of the runs in a folder, the latest first."""
    begun = {}
    for file in out.glob("*/run.json"):
        with contextlib.suppress(OSError):  # it may be deleted meanwhile
            begun[file.parent.name] = file.stat().st_mtime
    return sorted(begun, key=lambda name: begun[name], reverse=True)


def _framed(page: str) -> str:
    """A page of its own within this one, of which it takes no style and which it cannot touch."""
    return Markup('<iframe title="report" sandbox="" srcdoc="{}"></iframe>').format(page)


def _boxes(fields: Sequence[form.Field]) -> dict[form.Field, gr.components.Component]:
    """A box to fill or to tick for each setting, in the part of the settings that it belongs to."""
    boxes: dict[form.Field, gr.components.Component] = {}
    for group in dict.fromkeys(field.group for field in fields):
        with gr.Accordion(group, open=False):
            for field in (each for each in fields if each.group == group):
                kind = gr.Checkbox if isinstance(field.default, bool) else gr.Textbox
                boxes[field] = kind(
                    field.default, label=field.name, info=field.help, interactive=True, elem_id=field.flag
                )
    return boxes


def _template(name: str) -> Template:
    return environment("ipgo.studio").get_template(f"{name}.html.j2")


def _rewards(place: Place) -> list[str]:
    """Those to choose from: the bundled model's for it alone, and those that were named."""
    bundled = draws_bundled_world(place.backend)
    own = [name for name in REWARDS if bundled or not name.startswith("emoji-")]
    return list(dict.fromkeys([reward_for(place.backend), *place.rewards, *own]))


def _judges(place: Place) -> list[str]:
    """The rewards that only judge where no others are asked for."""
    return list(bundled_rewards(place.backend))


def _examples(backend: str) -> list[str]:
    """Prompts that the model can draw, where that is known."""
    if not draws_bundled_world(backend):
        return []
    return [read_prompts(f"{name}:train")[0] for name in prompt_sets() if "train" in halves(name)]


def _placeholder(backend: str) -> str:
    return "a lemon on a blue background" if draws_bundled_world(backend) else "a lighthouse at dawn"


def _about(backend: Backend, name: str) -> str:
    what = "the bundled model" if draws_bundled_world(name) else f"`{name}`"
    return f"{what}, {backend.image_size} pixels, on {backend.device}"
