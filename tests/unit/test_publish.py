"""A run as a folder for others: the adapter, and a card that a user's text cannot break."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image

import ipgo
from ipgo import cli, files
from ipgo.images import to_pil
from ipgo.model_card import MOST, escape, model_card
from ipgo.rewards.checkpoints import fingerprint
from tests.conftest import one_sentence

PROMPTS = ("a fox | ![x](http://evil) <script>", "```\n# a *lemon*")


def settings(pipeline_folder: str, steps: int = 2) -> dict[str, Any]:
    return {
        "backend": pipeline_folder,
        "reward": "colorfulness",
        "method": ipgo.IPGO(ipgo.Insertion(1, 1), ipgo.Ascent(steps=steps, backprop_steps=1)),
        "sampling": ipgo.Sampling(steps=2),
        "unseen_seeds": 1,
    }


@pytest.fixture(scope="module")
def run(pipeline_folder: str, tmp_path_factory: pytest.TempPathFactory) -> ipgo.Run:
    out = tmp_path_factory.mktemp("runs") / "two"
    ipgo.fit(PROMPTS, out=out, **settings(pipeline_folder))
    return ipgo.Run.open(out)


def test_what_is_published_draws_what_the_run_drew(
    run: ipgo.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "card"
    assert cli.main(["publish", str(run.path), "--out", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(folder / "README.md")]
    adapter = ipgo.from_pretrained(folder)
    assert adapter.prompts == PROMPTS
    backend = ipgo.load_backend(run.config.backend)
    for prompt in run.prompts:
        ours, theirs = (
            ipgo.generate(backend, [prompt.text], [0], each, ipgo.Sampling(steps=2))
            for each in (adapter, run.load_adapter(prompt))
        )
        assert torch.equal(ours, theirs)
        assert (folder / f"images/{prompt.id}-after.png").read_bytes() == run.image_file(
            prompt, "after", 1000
        ).read_bytes()
    ipgo.save_pretrained(run, folder)  # again, over itself
    own = run.adapter_folder(run.prompts[0])  # has an adapter, too
    with pytest.raises(ipgo.InputError, match="holds something else"):
        ipgo.save_pretrained(run, own)
    assert not (own / "README.md").exists()
    (folder / "README.md").write_text("# My project\n")
    with pytest.raises(ipgo.InputError, match="holds something else"):
        ipgo.save_pretrained(run, folder)
    assert (folder / "README.md").read_text() == "# My project\n"


@pytest.mark.parametrize("first", ["README.md", "adapter.safetensors", "adapter.json", "after.png"])
def test_what_was_cut_short_is_published_again(
    run: ipgo.Run, tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = files.write

    def killed(file: Path, content: bytes, **options: Any) -> None:
        if file.name.endswith(first):
            file.parent.mkdir(exist_ok=True)
            file.with_name(f".{file.name}.draft").write_bytes(content[:10])
            raise KeyboardInterrupt
        write(file, content, **options)

    monkeypatch.setattr(files, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        ipgo.save_pretrained(run, tmp_path / "card")
    monkeypatch.undo()
    folder = ipgo.save_pretrained(run, tmp_path / "card")
    assert not list(folder.rglob(".*.draft"))
    assert ipgo.from_pretrained(folder).prompts == PROMPTS


def test_pictures_of_an_earlier_publication_go_and_others_stay(run: ipgo.Run, tmp_path: Path) -> None:
    images = ipgo.save_pretrained(run, tmp_path / "card") / "images"
    own = {file.name for file in images.iterdir()}
    for name in ("0007-a-cat-12345678-after.png", "logo.png", ".DS_Store"):
        (images / name).write_bytes(b"")
    ipgo.save_pretrained(run, tmp_path / "card")
    assert {file.name for file in images.iterdir()} == {*own, "logo.png", ".DS_Store"}


def test_what_is_published_knows_the_weights_it_was_learned_on(
    run: ipgo.Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipeline may have been another one than its name says, as with a LoRA."""
    folder = ipgo.save_pretrained(run, tmp_path / "card")
    assert f"the fingerprint {run.facts['weights']}" in (folder / "README.md").read_text()
    words = ["generate", str(folder), PROMPTS[0], "--steps", "1", "--out", str(tmp_path / "images")]
    assert cli.main(words) == 0
    assert "other weights" not in caplog.text
    stored = json.loads((folder / "adapter.json").read_text())
    stored["drawn_by"]["weights"] = "those of a LoRA"
    (folder / "adapter.json").write_text(json.dumps(stored))
    assert cli.main(words) == 0
    assert "learned on a backend with other weights" in caplog.text


def test_what_is_tied_to_its_noise_is_shown_on_it(pipeline_folder: str, tmp_path: Path) -> None:
    own = settings(pipeline_folder) | {"method": ipgo.BestOfN(n=3)}
    ipgo.fit(PROMPTS[:1], out=tmp_path / "run", **own)
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    card = (ipgo.save_pretrained(tmp_path / "run", tmp_path / "card") / "README.md").read_text()
    assert "| prompt | raw, seed 0 (fitted) | adapted |" in card
    assert ", [0], adapter" in card
    assert "On unseen noise" not in card
    assert "fitted to, one image" in card
    assert "nan" not in card


def test_the_code_on_the_card_draws_the_picture_on_the_card(
    run: ipgo.Run, tmp_path: Path, pipeline_folder: str
) -> None:
    own = {"sampling": ipgo.Sampling(steps=3, guidance_scale=2.0, negative_prompt="a `dog`")}
    ipgo.fit(PROMPTS[:1], out=tmp_path / "run", **(settings(pipeline_folder) | own))
    other = ipgo.Run.open(tmp_path / "run")
    ipgo.save_pretrained(other, tmp_path / "card")
    code = (tmp_path / "card/README.md").read_text().split("```")[1].removeprefix("python\n")
    assert "Sampling(steps=3, guidance_scale=2.0, negative_prompt=" in code
    names: dict[str, Any] = {}
    exec(code, names)
    (drawn,) = to_pil(names["images"])
    (picture,) = (tmp_path / "card/images").glob("*-after.png")
    assert drawn.tobytes() == Image.open(picture).convert("RGB").tobytes()


def test_the_code_on_the_card_asks_for_a_pipeline_that_nobody_else_has(
    make_pipe: Callable[..., Any], tmp_path: Path
) -> None:
    own = settings("") | {"backend": make_pipe(), "sampling": ipgo.Sampling(steps=2, guidance_scale=2.0)}
    ipgo.fit(PROMPTS[:1], out=tmp_path / "run", **own)
    card = (ipgo.save_pretrained(tmp_path / "run", tmp_path / "card") / "README.md").read_text()
    assert "`pipe` is the StableDiffusionPipeline that it was fitted on, which is to be given" in card
    names: dict[str, Any] = {"pipe": make_pipe()}
    exec(card.split("```")[1].removeprefix("python\n"), names)
    (drawn,) = to_pil(names["images"])
    (picture,) = (tmp_path / "card/images").glob("*-after.png")
    assert drawn.tobytes() == Image.open(picture).convert("RGB").tobytes()


def test_the_card_says_what_it_is_and_holds_no_markup_of_a_prompt(run: ipgo.Run) -> None:
    card = model_card(run, run.load_adapter(run.prompts[0]), "this/repository")
    _, header, body = card.split("---\n", 2)
    about = yaml.safe_load(header)
    assert about["library_name"] == "ipgo"
    assert "ipgo-insertion" in about["tags"]
    assert "base_model" not in about  # a local folder is no model of the hub
    for words in (
        "On unseen noise",
        "colorfulness (optimised)",
        "seed 1000 (unseen)",
        "fitted to, word for word",
    ):
        assert words in body, words
    before, code, after = body.split("```")
    for markup in ("<script>", "![x]", "*lemon*", "\n# a "):
        assert markup not in before + after
    assert "a fox" in code
    stated = yaml.safe_load(body.split("## Rewards")[1].split("preprocessing.\n")[1].split("## Settings")[0])
    assert stated.keys() == run.identities.keys()
    assert "colorfulness" in stated
    for name, about in run.identities.items():
        assert stated[name] == {"fingerprint": fingerprint(about), **about}
    fences = [line for line in body.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```"]
    assert len(body.split("## Pictures")[1].split("## Use")[0].strip().splitlines()) == 2 + min(MOST, 2)


def test_the_card_tells_fitted_noise_from_unseen(pipeline_folder: str, tmp_path: Path) -> None:
    method = ipgo.IPGO(ipgo.Insertion(1, 1), ipgo.Ascent(steps=2, backprop_steps=1, lr=0.5))
    own = {"method": method, "seeds": (0,), "unseen_seeds": 2, "held_out": ["contrast"]}
    result = ipgo.fit(PROMPTS, out=tmp_path / "run", **(settings(pipeline_folder) | own))
    run = ipgo.Run.open(tmp_path / "run")
    fitted, unseen = model_card(run, run.whole_adapter()[0], "this/repository").split("On unseen noise")
    for text, gains in ((fitted, result.on_fitted_seeds), (unseen, result.on_unseen_seeds)):
        for gain, kind in zip(gains, ("optimised", "held out"), strict=True):
            numbers = f"{gain.before:.3f} | {gain.after:.3f} | {gain.gain.value:+.3f}"
            assert f"| {gain.reward} ({kind}) | {numbers} (" in text


def test_the_card_counts_what_failed(pipeline_folder: str, tmp_path: Path) -> None:
    def steep(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Without a finite gradient for the second prompt: the root of zero."""
        values = images.mean((1, 2, 3))
        trouble = torch.tensor([float(prompt == PROMPTS[1]) for prompt in prompts])
        return values + (trouble * (values - values.detach()).abs() + 1 - trouble).sqrt()

    own = {"reward": steep, "seeds": (0,), "held_out": [], "chunk": 1}
    ipgo.fit(PROMPTS, out=tmp_path / "run", **(settings(pipeline_folder) | own))
    run = ipgo.Run.open(tmp_path / "run")
    assert [each["status"] for each in run.results()] == ["finished", "failed"]
    assert "1 prompt failed." in model_card(run, run.whole_adapter()[0], "this/repository")


def test_the_card_of_a_model_of_the_hub_names_it_and_says_how_a_plain_pipeline_draws(run: ipgo.Run) -> None:
    other = ipgo.Run(run.path, replace(run.config, backend="sd15"))
    card = model_card(other, run.load_adapter(run.prompts[0]), "this/repository")
    _, header, body = card.split("---\n", 2)
    place = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert yaml.safe_load(header)["base_model"] == place
    assert f"from_pretrained({place!r})" in body
    assert "kwargs = adapter.prompt_kwargs(pipe, 'a fox" in body
    for code in body.split("```")[1::2]:
        compile(code.removeprefix("python\n"), "card", "exec")


@pytest.mark.parametrize("scheduler", [None, "lms"])
def test_the_code_for_a_plain_pipeline_draws_the_picture_too(
    run: ipgo.Run, tmp_path: Path, scheduler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = ipgo.Sampling(steps=3, guidance_scale=2.0, negative_prompt="a `dog`")
    other = ipgo.Run(run.path, replace(run.config, sampling=sampling, scheduler=scheduler))
    monkeypatch.setattr("ipgo.model_card._base", lambda backend: backend)  # as if the folder were the hub's
    ipgo.save_pretrained(other, tmp_path / "card")
    _, code, _, plain, *_ = (tmp_path / "card/README.md").read_text().split("```")
    names: dict[str, Any] = {}
    exec(code.removeprefix("python\n").replace("this/repository", str(tmp_path / "card")), names)
    latents = names["backend"].noise([1000])[:, 0]
    again = plain.removeprefix("python\n").replace(
        "pipe(**kwargs", "pipe(latents=latents, output_type='pt', **kwargs"
    )
    exec(again, names | {"latents": latents}, names)
    torch.testing.assert_close(names["image"], names["images"][0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "method",
    [
        ipgo.DRaFT(ascent=ipgo.Ascent(steps=1, backprop_steps=1)),
        ipgo.TextCraftor(ascent=ipgo.Ascent(steps=1, backprop_steps=1)),
        ipgo.DNO(ascent=ipgo.Ascent(steps=1, backprop_steps=None)),
    ],
)
def test_code_for_a_plain_pipeline_is_shown_where_it_runs(
    method: Any, pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = ipgo.Sampling(steps=2, guidance_scale=2.0, eta=float(isinstance(method, ipgo.DNO)))
    own = settings(pipeline_folder) | {"method": method, "sampling": sampling, "seeds": [0]}
    ipgo.fit(PROMPTS[:1], out=tmp_path / "run", **own)
    monkeypatch.setattr("ipgo.model_card._base", lambda backend: backend)  # as if the folder were the hub's
    ipgo.save_pretrained(tmp_path / "run", tmp_path / "card")
    card = (tmp_path / "card/README.md").read_text()
    assert ("Or in a pipeline of diffusers" in card) == isinstance(method, ipgo.DRaFT)
    assert "prompt_kwargs" not in card
    if isinstance(method, ipgo.DRaFT):
        _, code, _, plain, *_ = card.split("```")
        names: dict[str, Any] = {}
        exec(code.removeprefix("python\n").replace("this/repository", str(tmp_path / "card")), names)
        latents = names["backend"].noise([1000])[:, 0]
        drawn = "image = pipe(latents=latents, output_type='pt', prompt="
        again = plain.removeprefix("python\n").replace("image = pipe(", drawn)
        exec(again, names | {"latents": latents}, names)
        torch.testing.assert_close(names["image"], names["images"][0], atol=1e-4, rtol=0)


def test_what_learned_nothing_is_not_published(pipeline_folder: str, tmp_path: Path) -> None:
    ipgo.fit(PROMPTS[:1], out=tmp_path / "run", **(settings(pipeline_folder) | {"method": "raw"}))
    with pytest.raises(ipgo.InputError, match="of the method 'raw', which learns nothing to publish"):
        ipgo.save_pretrained(tmp_path / "run", tmp_path / "card")


def test_the_code_for_a_plain_pipeline_opens_it_in_the_format_of_the_run(
    run: ipgo.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipgo.model_card._base", lambda backend: backend)
    other = ipgo.Run(run.path, replace(run.config, dtype="bfloat16"))
    plain = (
        model_card(other, run.load_adapter(run.prompts[0]), "this/repository")
        .split("```")[3]
        .removeprefix("python\n")
    )
    names: dict[str, Any] = {"ipgo": ipgo}
    exec(plain[: plain.index("kwargs =")], names)
    assert names["pipe"].unet.dtype == torch.bfloat16


def test_the_code_for_a_plain_pipeline_has_the_noise_of_the_run(
    run: ipgo.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipgo.model_card._base", lambda backend: backend)
    other = ipgo.Run(run.path, replace(run.config, sampling=ipgo.Sampling(steps=2, eta=0.5)))
    plain = model_card(other, run.load_adapter(run.prompts[0]), "this/repository").split("```")[3]
    assert "num_inference_steps=2, **scale, eta=0.5" in plain


def test_the_code_for_a_plain_pipeline_draws_the_picture_of_the_card(
    run: ipgo.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipgo.model_card._base", lambda backend: backend)
    folder = ipgo.save_pretrained(run.path, tmp_path / "card")
    _, code, _, plain, *_ = (folder / "README.md").read_text().split("```")
    names: dict[str, Any] = {}
    exec(code.removeprefix("python\n").replace("this/repository", str(folder)), names)
    exec(plain.removeprefix("python\n").replace("image = pipe(", "image = pipe(output_type='pt', "), names)
    torch.testing.assert_close(names["image"], names["images"][0], atol=1e-4, rtol=0)


def test_the_code_for_a_plain_pipeline_has_the_guidance_of_the_model_that_drew(
    run: ipgo.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few-step model of an untold name is drawn without guidance, which a pipeline does not know."""
    monkeypatch.setattr("ipgo.model_card._base", lambda backend: backend)
    monkeypatch.setitem(run.facts, "guidance_scale", 1.0)
    other = ipgo.Run(run.path, replace(run.config, sampling=ipgo.Sampling(steps=3)))
    monkeypatch.setattr(type(other), "drawn_by", {"guidance_scale": 1.0})
    plain = model_card(other, run.load_adapter(run.prompts[0]), "this/repository").split("```")[3]
    assert "pipeline_guidance(1.0)" in plain
    assert "num_inference_steps=3, **scale" in plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere"], "'/nowhere' does not exist; give the folder of a run"),
        (["{run}", "--private"], "private needs --push OWNER/NAME"),
        (["{run}", "--push", "just-a-name"], "'just-a-name' is not a model name of the hub"),
        (["{run}", "--out", "{run}/prompts"], "holds something else; give a new or empty one"),
        (["{run}", "--push"], "expected one argument"),
        (["{run}", "--out", "{run}/run.json/x"], "which cannot be written: Not a directory"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, run: ipgo.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["publish", *(word.format(run=run.path) for word in words)]) == 2
    assert message in one_sentence(capsys)
    assert not (run.path / "published").exists()


def test_text_is_escaped_to_what_a_reader_sees() -> None:
    assert escape("a_b <i>\n*x*") == "a&#95;b &#60;i&#62; &#42;x&#42;"
    assert escape("plain, words.") == "plain, words."


def test_a_run_without_results_and_an_unknown_model(
    pipeline_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*arguments: Any, **options: Any) -> str:
        raise OSError("no route to host\nand more")

    config = ipgo.Run.open(tmp_path / "new", _config(pipeline_folder))
    with pytest.raises(ipgo.InputError, match="no finished prompt yet"):
        ipgo.save_pretrained(config, tmp_path / "card")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ipgo.InputError, match=r"'nobody/nothing' is not a folder.*no route to host$"):
        ipgo.from_pretrained("nobody/nothing")


def _config(pipeline_folder: str) -> Any:
    from ipgo.config import RunConfig

    return RunConfig(("a",), **settings(pipeline_folder))


def test_what_goes_to_the_hub_says_nothing_of_where_things_are(pipeline_folder: str, tmp_path: Path) -> None:
    private = tmp_path / "private-p of some customer whose name nobody may know" / "private-q and private-r"
    private.mkdir(parents=True)
    shutil.copytree(pipeline_folder, private / "model")
    (private / "mine.py").write_text("def warmth(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    (private / "score.sh").write_text("#!/bin/sh\necho 1\n")
    (private / "score.sh").chmod(0o755)
    own = {"reward": f"{private}/mine.py:warmth", "held_out": [f"cmd:'{private}/score.sh' {{image}}"]}
    ipgo.fit("a fox", out=tmp_path / "run", **(settings(str(private / "model")) | own | {"seeds": [0]}))
    folder = ipgo.save_pretrained(tmp_path / "run", tmp_path / "card", repository="me/fox")
    for file in filter(Path.is_file, folder.rglob("*")):
        content = file.read_bytes()
        assert not [
            word for word in ("private", "customer", "know", str(tmp_path)) if word.encode() in content
        ]
    card = (folder / "README.md").read_text()
    for told in (
        "optimising mine.py&#58;warmth",
        "| cmd&#58;score.sh &#123;image&#125; (held out)",
        "load_backend('model')",
    ):
        assert told in card, told
    stated = yaml.safe_load(card.split("## Settings")[1])
    assert (stated["reward"], stated["held_out"]) == ("mine.py:warmth", ["cmd:score.sh {image}"])
    assert json.loads((folder / "adapter.json").read_text())["settings"]["backend"] == "model"
    at_home = ipgo.save_pretrained(tmp_path / "run", tmp_path / "own")  # where its code shall run
    card = (at_home / "README.md").read_text()
    assert repr(str(private / "model")) in card
    assert f"\n    reward: {private}/mine.py:warmth\n" in card  # in one line, however long


@pytest.mark.parametrize(
    ("names", "public", "message"),
    [
        (None, False, ""),
        ([".gitattributes"], False, ""),
        (["README.md", "LICENSE"], False, ""),  # as the hub's form begins one
        ([".gitattributes", "README.md", "adapter.json", "adapter.safetensors"], False, ""),
        (
            [".gitattributes"],
            True,
            "repository 'me/fox' is public; make it private on the hub, or give another",
        ),
        (
            ["README.md", "model.safetensors"],
            False,
            "repository 'me/fox' holds something else; give a new one",
        ),
    ],
)
def test_pushing_uploads_the_folder_and_overwrites_nothing_else(
    run: ipgo.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: list[str] | None,
    public: bool,
    message: str,
) -> None:
    done: list[tuple[str, Any]] = []

    class Hub:
        def repo_exists(self, name: str) -> bool:
            return names is not None

        def model_info(self, name: str) -> Any:
            return SimpleNamespace(
                private=not public, siblings=[SimpleNamespace(rfilename=each) for each in names or ()]
            )

        def __init__(self, **about: Any) -> None:
            pass

        def create_repo(self, name: str, **options: Any) -> str:
            done.append(("create", (name, options)))
            return f"https://hub/{name}"

        def upload_folder(
            self,
            *,
            repo_id: str,
            folder_path: Path,
            commit_message: str,
            delete_patterns: list[str],
            ignore_patterns: list[str],
        ) -> None:
            assert delete_patterns == ["images/*.png"]
            inside = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*")]
            kept = huggingface_hub.utils.filter_repo_objects(inside, ignore_patterns=ignore_patterns)
            done.append(("upload", (repo_id, sorted({Path(name).parts[0] for name in kept}))))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    (tmp_path / "card").mkdir()
    (tmp_path / "card/.DS_Store").write_bytes(b"")
    if message:
        with pytest.raises(ipgo.InputError, match=message):
            ipgo.push_to_hub(run, tmp_path / "card", "me/fox", private=True)
        assert not done
        return
    assert ipgo.push_to_hub(run, tmp_path / "card", "me/fox", private=True) == "https://hub/me/fox"
    card = (tmp_path / "card/README.md").read_text()
    assert run.config.backend not in card + (tmp_path / "card/adapter.json").read_text()
    assert "ipgo.from_pretrained('me/fox')" in card
    assert f"load_backend({Path(run.config.backend).name!r})" in card
    assert done == [
        ("create", ("me/fox", {"private": True, "exist_ok": True})),
        ("upload", ("me/fox", ["README.md", "adapter.json", "adapter.safetensors", "images"])),
    ]
