"""Rewards from outside: real commands, and a person at a terminal that is not there."""

import hashlib
import io
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from ipgo.errors import InputError, RewardError
from ipgo.methods import BestOfN
from ipgo.rewards import check_reward, external, identity_of, load_reward, score
from ipgo.sampling import Sampling
from ipgo.task import Task
from tests.conftest import Terminal

IMAGES = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "two dogs; $(touch broken) 'here' {image}"]


@pytest.fixture
def script(tmp_path):
    """Writes a shell script and returns its path."""

    def write(body):
        file = tmp_path / "score.sh"
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(0o755)
        return str(file)

    return write


# -- commands ----------------------------------------------------------------------------------------------


def test_a_command_is_given_the_picture_and_the_prompt(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script('head -c 8 "$1" | od -An -c >> seen; echo "$2" >> seen; echo "$#" >> seen; echo ${#2}')
    reward = load_reward("cmd:./score.sh {image} {prompt}", device="cpu")
    assert score(reward, IMAGES, PROMPTS).tolist() == [len(prompt) for prompt in PROMPTS]
    assert not reward.differentiable
    assert reward.name == "cmd:./score.sh {image} {prompt}"
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line.split() for line in seen[::3]] == [["211", "P", "N", "G", "\\r", "\\n", "032", "\\n"]] * 2
    assert seen[1::3] == PROMPTS  # as it is: no shell reads it
    assert seen[2::3] == ["2", "2"]
    assert not (tmp_path / "broken").exists()


@pytest.mark.skipif(os.name != "posix", reason="there are no process groups")
def test_ctrl_c_does_not_reach_a_command(script, tmp_path, monkeypatch):
    """It is a terminal's signal to a whole process group; the step is to end first."""
    monkeypatch.chdir(tmp_path)
    script("ps -o pgid= -p $$")
    found = score(load_reward("cmd:./score.sh {image}", device="cpu"), IMAGES, PROMPTS).tolist()
    assert os.getpgrp() not in found


def test_a_command_may_be_part_of_a_sum(script):
    file = script("expr 3 '*' 2 + 1")
    spec = f"contrast+0.5*cmd:{file} a+b 2*c {{image}}"
    check_reward(spec)
    reward = load_reward(spec, device="cpu")
    plain = load_reward("contrast", device="cpu")(IMAGES, PROMPTS)
    torch.testing.assert_close(score(reward, IMAGES, PROMPTS), plain + 3.5)
    assert not reward.differentiable
    assert load_reward(f"cmd:{file} {{image}}+2", device="cpu").words == [file, "{image}+2"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("echo no good >&2; exit 3", "failed with exit status 3: no good"),
        ("exit 1", "failed with exit status 1: nothing on stderr"),
        ("echo fine", "printed 'fine'; it must print one number"),
        ("echo 1; echo 2", r"printed '1\\n2'; it must print one number"),
        ("true", "printed ''"),
        ("echo nan", "is not a finite number for 2 of 2 images"),
        ("sleep 5", "took more than 0.2 seconds"),
    ],
)
def test_a_command_that_fails_is_named(script, monkeypatch, body, message):
    monkeypatch.setattr(external, "PATIENCE", 0.2 if "sleep" in body else 30)
    reward = load_reward(f"cmd:{script(body)} {{image}}", device="cpu")
    with pytest.raises(RewardError, match=message):
        score(reward, IMAGES, PROMPTS)


def test_a_command_that_takes_too_long_leaves_nothing_running(script, monkeypatch, tmp_path):
    monkeypatch.setattr(external, "PATIENCE", 1)
    reward = load_reward(
        f"cmd:{script(f'sleep 60 & echo $! > {tmp_path}/child; wait')} {{image}}", device="cpu"
    )
    with pytest.raises(RewardError, match="took more than 1 seconds"):
        score(reward, IMAGES, PROMPTS)
    child = int((tmp_path / "child").read_text())
    for _ in range(50):  # it ends a moment after the signal, and then whoever inherits it has to look
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the command's own child goes on")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("./nothing-there.sh {image}", "no program './nothing-there.sh' that can be run"),
        ("sh -c 'echo 1", "cannot be split into words"),
        ("echo 1", r"must say where the picture's file goes: \{image\}"),
        ("", r"\{image\}"),
    ],
)
def test_wrong_commands_are_refused(line, message):
    for load in (check_reward, load_reward):
        with pytest.raises(InputError, match=message):
            load(f"cmd:{line}")


def test_a_command_is_known_by_its_line_and_its_files(script, tmp_path):
    file, table = script("cat $2"), tmp_path / "table.csv"
    table.write_text("1")
    line = f"cmd:{file} {{image}} {table}"
    first = identity_of(load_reward(f"2*{line}", device="cpu"))["terms"][0]["reward"]
    assert first["id"] == line
    assert first["weights"] == [hashlib.sha256(Path(each).read_bytes()).hexdigest() for each in (file, table)]
    table.write_text("2")
    assert identity_of(load_reward(line, device="cpu")) != first
    table.write_text("1")
    assert identity_of(load_reward(line, device="cpu")) == first
    long = f"cmd:{sys.executable} -c '{'#' * 5_000}' {{image}}"  # no name of a file may be so long
    assert len(identity_of(load_reward(long, device="cpu"))["weights"]) == 1
    found = identity_of(load_reward("cmd:wc -c {image}", device="cpu"))
    assert found["weights"] == [hashlib.sha256(Path(shutil.which("wc")).read_bytes()).hexdigest()]


def test_a_search_with_a_command(script, backend):
    """Best-of-N by the file's size."""
    reward = load_reward(f"cmd:{script('wc -c < $1')} {{image}}", device="cpu")
    steps = list(BestOfN(n=3).fit(Task(backend, reward, ("sun",), Sampling(steps=1))))
    assert steps[-1].best.item() == max(step.rewards.item() for step in steps) > 100


# -- people ------------------------------------------------------------------------------------------------


def test_a_person_is_asked_until_there_is_a_number(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", Terminal("7.5\nwell\nnan\n\n-2\n"))
    reward = load_reward("2*ask:cosy + warm, 0 to 10?", device="cpu")
    assert score(reward, IMAGES, PROMPTS).tolist() == [15.0, -4.0]
    assert not reward.differentiable
    asked = capsys.readouterr().err
    assert asked.count("cosy + warm, 0 to 10?") == 5
    assert asked.count("please type a number") == 3
    assert "0.png  'a cat': cosy" in asked


def test_a_person_is_known_by_the_question(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    found = identity_of(load_reward("ask: how cosy? ", device="cpu"))
    assert (found["id"], found["weights"]) == ("ask:how cosy?", None)
    assert identity_of(load_reward("ask:", device="cpu"))["id"] == "ask:how good is it?"


def test_a_person_who_leaves(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("1\n"))
    reward = load_reward("ask:", device="cpu")
    with pytest.raises(RewardError, match="'ask:' got no answer: the input has ended"):
        score(reward, IMAGES, PROMPTS)


def test_without_a_terminal_nobody_is_asked(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    for load in (check_reward, load_reward):
        with pytest.raises(InputError, match="there is no terminal to ask at"):
            load("contrast+ask:")
