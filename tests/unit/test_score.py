"""`ipgo score`: pictures from files, by the bundled rewards."""

from __future__ import annotations

import csv
import io
import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ipgo
import ipgo.rewards
from ipgo import cli
from ipgo.cli_score import BATCH, find_images, match_prompts
from ipgo.errors import InputError
from ipgo.images import from_pil
from ipgo.rewards import identity_of, load_reward
from ipgo.rewards.checkpoints import fingerprint
from tests.conftest import Terminal, one_sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More pictures than a batch, of two sizes and kinds."""
    place, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(BATCH + 3):
        size = (64, 64) if number % 5 else (48, 80)
        noise = Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8))
        (noise.convert("L") if number == 2 else noise).save(place / f"{number:02d}.png")
    (place / "notes.txt").write_text("no picture")
    return place


def test_every_picture_gets_its_own_score(folder: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "scores.csv"
    files = sorted(folder.glob("*.png"))
    texts = [f"a fox on a {'blue' if number % 2 else 'red'} background" for number in range(len(files))]
    prompts.write_text("\n".join(texts))
    rewards = ["emoji-clip", "contrast", "0.5*emoji-aesthetic+colorfulness"]
    command = ["score", str(folder), "--reward", *rewards, "--prompts", str(prompts), "--out", str(out)]
    assert cli.main(command) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert [row["prompt"] for row in rows] == texts
    for spec in rewards:
        reward = ipgo.load_reward(spec, device="cpu")
        for row, file, text in zip(rows, files, texts, strict=True):
            with Image.open(file) as picture, torch.no_grad():
                alone = reward(from_pil(picture)[None], [text])
            assert float(row[spec]) == pytest.approx(alone.item(), abs=1e-5)
        (digits,) = {row[f"{spec} fingerprint"] for row in rows}
        assert digits == fingerprint(ipgo.rewards.identity_of(reward))


def test_a_place_may_begin_at_home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --out=~/x reaches us, which no shell expands."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["score", str(folder), "--reward", "contrast", "--out=~/scores.csv"]) == 0
    assert (tmp_path / "scores.csv").is_file()


def test_beside_a_table_is_what_scored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["score", str(folder), "--reward", "contrast", "--out", str(tmp_path / "scores.csv")]
    beside = tmp_path / "scores.rewards.json"
    beside.write_text('{"mine": 1}')
    assert cli.main(words) == 2
    assert "holds something else" in one_sentence(capsys)
    beside.unlink()
    for _ in range(2):  # its own file is replaced
        assert cli.main(words) == 0
        stored = json.loads(beside.read_text())["rewards"]
        assert stored == {"contrast": identity_of(load_reward("contrast"))}
    header, line = (tmp_path / "scores.csv").read_text().splitlines()[:2]
    assert header.endswith("contrast fingerprint")
    assert line.endswith(fingerprint(stored["contrast"]))


def test_json_says_what_scored(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    assert cli.main(["score", str(folder), "--reward", "contrast", "--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    values = [row["contrast"] for row in stored["images"]]
    assert stored["means"]["contrast"] == pytest.approx(sum(values) / len(values))
    assert stored["rewards"]["contrast"]["id"] == "contrast"
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert cli.main(["score", str(folder / "00.png"), "--reward", "contrast"]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header == "file,prompt,contrast,contrast fingerprint"
    assert float(line.split(",")[2]) == values[0]


def test_sixteen_bits_of_grey_are_not_cut_off(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray((ramp / 257).round().astype(np.uint8)).save(tmp_path / "flat.png")
    deep, flat = (from_pil(Image.open(tmp_path / name)) for name in ("deep.png", "flat.png"))
    assert deep.shape == flat.shape == (3, 64, 64)
    assert (deep - flat).abs().max() <= 0.5 / 255 + 1 / 65535


def test_a_photograph_is_scored_as_it_was_held(tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))
    turned, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(from_pil(Image.open(tmp_path / "turned.png")), from_pil(upright))


@pytest.mark.parametrize("name", ["prompts.csv", "PROMPTS.CSV"])
def test_a_table_names_the_pictures(name: str, folder: Path, tmp_path: Path) -> None:
    table, out = tmp_path / name, tmp_path / "scores.csv"
    table.write_text("file,prompt\nx/01.png,one\n00.png,zero\n")
    command = ["score", str(folder / "00.png"), str(folder / "01.png"), "--reward", "emoji-clip"]
    assert cli.main([*command, "--prompts", str(table), "--out", str(out)]) == 0
    assert [row["prompt"] for row in csv.DictReader(out.read_text().splitlines())] == ["zero", "one"]


def test_pictures_of_one_name_have_the_prompts_of_their_folders(folder: Path, tmp_path: Path) -> None:
    table, out = tmp_path / "prompts.csv", tmp_path / "scores.csv"
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "00.png").write_bytes((folder / "00.png").read_bytes())
    command = ["score", str(tmp_path / "b"), str(tmp_path / "a"), "--reward", "contrast"]
    command += ["--prompts", str(table), "--out", str(out)]
    table.write_text("file,prompt\na/00.png,in a\nb/00.png,in b\n")
    assert cli.main(command) == 0
    assert [row["prompt"] for row in csv.DictReader(out.read_text().splitlines())] == ["in b", "in a"]


@pytest.mark.parametrize("spec", ["{tmp}/mine.py:fussy", "cmd:sh {tmp}/fussy.sh {{image}} {{prompt}}"])
def test_what_was_scored_is_kept_when_a_reward_fails(
    spec: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the picture at which it fails is named, though pictures come in batches."""
    (tmp_path / "mine.py").write_text(
        "def fussy(images, prompts):\n    if 'no' in prompts:\n        raise ValueError('no')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    (tmp_path / "fussy.sh").write_text('test "$2" != no && echo 1\n')
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes((folder / "01.png").read_bytes())
    rows = "".join(f"{name}.png,{'no' if name == 'c' else 'yes'}\n" for name in "abcd")
    (tmp_path / "prompts.csv").write_text(f"file,prompt\n{rows}")
    words = [
        "score",
        str(tmp_path),
        "--reward",
        spec.format(tmp=tmp_path),
        "--out",
        str(tmp_path / "out.csv"),
    ]
    assert cli.main([*words, "--prompts", str(tmp_path / "prompts.csv")]) != 0
    said = capsys.readouterr()
    with (tmp_path / "out.csv").open() as lines:
        kept = [Path(row["file"]).name for row in csv.DictReader(lines)]
    assert "c.png')" in said.err
    assert kept == ["a.png", "b.png"]
    assert "the mean of 2" in said.out


@pytest.mark.parametrize("name", ["out.csv", "out.json"])
def test_what_was_scored_is_there_before_the_end(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a process that is killed takes no more away than its last seconds."""
    out, seen = tmp_path / name, tmp_path / "seen"
    (tmp_path / "look.sh").write_text(f"cp '{out}' '{seen}'; echo 1\n")
    monkeypatch.setattr("ipgo.cli_score.EVERY", -1)
    images = [str(folder / f"{number:02d}.png") for number in range(3)]
    assert (
        cli.main(["score", *images, "--reward", f"cmd:sh {tmp_path}/look.sh {{image}}", "--out", str(out)])
        == 0
    )
    kept, before = out.read_text(), seen.read_text()
    assert [text.count(".png") for text in (before, kept)] == [2, 3]
    if name == "out.csv":
        assert kept.startswith(before)
        assert (tmp_path / "out.rewards.json").is_file()
    else:
        assert json.loads(before)["images"] == json.loads(kept)["images"][:2]


def test_images_that_are_left_out_are_said(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("0.png", "b.gif", "c.TIFF", "deeper/d.gif", "notes.txt", ".hidden.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / "00.png").read_bytes())
    assert find_images([tmp_path]) == [tmp_path / "0.png"]
    assert "are left out: 3 of another kind (.gif, .tiff) than .png, " in caplog.text
    caplog.clear()
    find_images([folder])
    assert not caplog.text


def test_a_picture_counts_once_and_a_line_without_one_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert find_images([folder / "02.png", folder]) == find_images(
        [folder / "02.png", *find_images([folder])]
    )
    assert len(find_images([folder / "02.png", folder])) == BATCH + 3
    (tmp_path / "p.csv").write_text("file,prompt\n00.png,a\nlost.png,b\n")
    words = ["score", str(folder / "00.png"), "--reward", "contrast", "--prompts", str(tmp_path / "p.csv")]
    assert cli.main(words) == 0
    assert "has lines of no image here: 1, such as 'lost.png'" in caplog.text
    assert "contrast: " in capsys.readouterr().err  # the mean; the table is on stdout


def test_folders_within_a_folder_are_scored_too(folder: Path, tmp_path: Path) -> None:
    for name in ("b.png", "2/1.png", "10/1.png", "2/deeper/1.png", ".thumbnails/1.png", "2/._1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((folder / "00.png").read_bytes())
    found = [str(each.relative_to(tmp_path)) for each in find_images([tmp_path])]
    assert found == ["b.png", "2/1.png", "2/deeper/1.png", "10/1.png"]
    (tmp_path / "10/run.json").write_text("{}")
    with pytest.raises(InputError, match=r"10' is a run's folder"):
        find_images([tmp_path])


def test_progress_is_shown_on_a_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\n\ndef calm(images, prompts):\n    time.sleep(0.15)\n    return images.mean((1, 2, 3))\n"
    )
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    command = ["score", str(folder / "01.png"), str(folder / "00.png"), str(folder / "02.png")]
    assert cli.main([*command, "--reward", f"{slow}:calm", "--prompt", "a fox"]) == 0
    for count in ("0/3", "1/3", "2/3"):
        assert f" {count} [" in shown.getvalue()


@pytest.mark.parametrize("spec", [*ipgo.rewards.REWARDS, "cmd:true {image}", "cmd:true {image} {prompt}"])
def test_who_looks_at_prompts_is_known_without_loading(spec: str) -> None:
    needed = ipgo.rewards.needs_prompts(f"2*{spec}")
    assert ipgo.rewards.needs_prompts(f"contrast+{spec}") == needed
    if spec not in ipgo.rewards.REWARDS or ipgo.rewards.REWARDS[spec].source is None:
        assert ipgo.rewards.uses_prompts(ipgo.load_reward(spec, device="cpu")) == needed
    else:
        assert needed == (spec != "aesthetic")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}", "--reward", "emoji-clip"], "may look at prompts; give --prompts or --prompt"),
        (["{folder}", "--reward", "contras"], "unknown reward 'contras'; did you mean 'contrast'"),
        (["{folder}/notes.txt", "--reward", "contrast"], "is neither a folder nor an image file"),
        (["{tmp}", "--reward", "contrast"], "has no image file"),
        (["{folder}", "--reward", "contrast", "--out", "x.txt"], "must end in .csv or .json"),
        (["{folder}", "--reward", "contrast", "--prompts", "one:test"], "has 30 lines for 19 images"),
        (["{folder}", "--reward", "contrast", "--prompts", "one", "--prompt", "a"], "both given"),
        (["{folder}", "--reward", "clip"], "reward 'clip' may look at prompts"),
        (["{tmp}/broken.png", "--reward", "contrast"], "cannot be read"),
        (["{tmp}/half.png", "--reward", "contrast"], "half.png' cannot be read"),
        (
            ["{tmp}/float.tiff.png", "--reward", "contrast"],
            "cannot be read: its pixels are numbers of mode 'F'",
        ),
        (["{tmp}/bomb.png", "--reward", "contrast"], "bomb.png' cannot be read: Image size"),
        (["{folder}", "--reward", "contrast", "--prompts", "{tmp}/latin.csv"], "latin.csv' cannot be read"),
        (["{folder}", "--reward", "contrast", "--device", "gpu"], "unknown device 'gpu'"),
        (["{folder}", "--reward", "contrast", "--out", "{folder}/00.png/x.csv"], "which cannot be written"),
        (
            ["{folder}", "--reward", "contrast", "--prompts", "{tmp}/twice.csv"],
            "has several prompts for image",
        ),
        (
            ["{folder}", "--reward", "contrast", "--prompts", "{tmp}/p.csv"],
            "has no line for image '00.png'",
        ),
        (
            ["{folder}", "--reward", "contrast", "--prompts", "{tmp}/blank.csv"],
            "00.png' is empty; it needs at least",
        ),
        (
            ["{folder}", "--reward", "contrast", "--prompts", "{tmp}/number.jsonl"],
            "number.jsonl' line 3: prompt is 7; it must be a text",
        ),
        (["{tmp}/half.jpg", "--reward", "contrast"], "half.jpg' cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And comes before any model is loaded."""
    monkeypatch.setattr(ipgo.rewards, "load_reward", None)
    if any(word.startswith("{tmp}/") for word in words):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
        (tmp_path / "half.png").write_bytes((folder / "01.png").read_bytes()[:2000])
        Image.new("F", (8, 8)).save(tmp_path / "float.tiff.png", "TIFF")
        head = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
        signed = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + signed + b"\0\0\0\0IDAT")
        whole = io.BytesIO()
        Image.effect_noise((64, 64), 90).save(whole, "JPEG")
        (tmp_path / "half.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        names = sorted(file.name for file in folder.glob("*.png"))
        (tmp_path / "blank.csv").write_text("file,prompt\n" + "".join(f"{name}, \n" for name in names))
        (tmp_path / "latin.csv").write_bytes(b"file,prompt\n00.png,caf\xe9\n")
        (tmp_path / "p.csv").write_text("file,prompt\nzz.png,a\n")
        lines = ({"file": name, "prompt": 7 if name == names[1] else "a"} for name in names)
        (tmp_path / "number.jsonl").write_text("\n" + "\n".join(map(json.dumps, lines)))
        (tmp_path / "twice.csv").write_text("file,prompt\n00.png,a\n00.png,b\n")
    assert cli.main(["score", *(word.format(folder=folder, tmp=tmp_path) for word in words)]) == 2
    assert message in one_sentence(capsys)


@pytest.mark.parametrize("name", ["p.csv", "p.jsonl"])
def test_a_prompt_goes_to_the_picture_that_its_line_names(tmp_path: Path, name: str) -> None:
    """Not to one of the same name in another folder, nor by order."""
    pictures = [tmp_path / folder / "x.png" for folder in ("a", "b")]
    lines = {"b/x.png": "two", "elsewhere/a/x.png": "one"}
    if name == "p.csv":
        table = "\n".join(["file,prompt", *(f"{file},{prompt}" for file, prompt in lines.items())])
    else:
        table = "\n".join(json.dumps({"file": file, "prompt": prompt}) for file, prompt in lines.items())
    (tmp_path / name).write_text(table)
    assert match_prompts(pictures, str(tmp_path / name), None) == ["one", "two"]
    (tmp_path / name).write_text("\n".join(line for line in table.splitlines() if "b/x.png" not in line))
    with pytest.raises(InputError, match=r"has no line for image '.*b/x.png'"):
        match_prompts(pictures, str(tmp_path / name), None)


def test_numbers_in_names_count_as_such(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "1.png", "a10-3.png", "a9-20.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    found = [file.name for file in find_images([tmp_path])]
    assert found == ["1.png", "2.png", "10.png", "a9-20.png", "a10-3.png", "b.png"]
