"""What happens without a connection to the hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import CLIPImageProcessor

import ipgo
from ipgo import InputError, from_pretrained, hub, load_backend, load_reward
from ipgo.methods.promptist import BUNDLED
from tests.conftest import byte_tokenizer, put_into_cache
from tests.reward_models import tiny_clip


class Line:
    """An HTTP client, and how often it was asked."""

    def __init__(self, connected: bool) -> None:
        self.connected, self.asked = connected, 0

    def head(self, address: str, timeout: float) -> None:
        assert address == constants.ENDPOINT
        assert timeout <= 10
        self.asked += 1
        if not self.connected:
            raise OSError("Name or service not known\nand more")


@pytest.fixture(autouse=True)
def _empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "_answered", set())
    monkeypatch.setattr(hub, "_silent", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Line:
    found = Line(request.param)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: found)
    return found


@pytest.mark.parametrize("line", [False], indirect=True)
@pytest.mark.parametrize(
    ("what", "opened"),
    [
        ("backend 'owner/model' is not here", load_backend),
        ("reward 'clip:owner/model' needs", lambda place: load_reward(f"clip:{place}")),
        ("adapter 'owner/model' is not a folder", from_pretrained),
    ],
)
def test_without_a_connection_it_is_said_at_once(line: Line, what: str, opened: Any) -> None:
    """The client itself tries six times for each file; here it may not try at all."""
    with pytest.raises(InputError, match=rf"{what}.*no connection: Name or service not known"):
        opened("owner/model")
    assert line.asked == 1
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("line", [False], indirect=True)
def test_paths_ask_nothing(line: Line, tmp_path: Path) -> None:
    with hub.within_reach(tmp_path, "a/b.safetensors", "./owner/model"):
        assert not constants.HF_HUB_OFFLINE
    assert not line.asked


@pytest.mark.parametrize("line", [True], indirect=True)
def test_a_hub_that_has_answered_is_not_asked_again(line: Line) -> None:
    for _ in range(2):
        with hub.within_reach("owner/model"):
            assert not constants.HF_HUB_OFFLINE
    assert line.asked == 1


@pytest.mark.parametrize("line", [False], indirect=True)
def test_a_hub_may_come_back(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub.within_reach("owner/model"):
        assert constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "AGAIN", 0.0)
    line.connected = True
    with hub.within_reach("owner/model"):
        assert not constants.HF_HUB_OFFLINE
    assert line.asked == 2


@pytest.mark.parametrize("line", [False], indirect=True)
def test_who_wants_no_connection_is_not_given_one(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LocalEntryNotFoundError), hub.within_reach("owner/model"):
        huggingface_hub.hf_hub_download("owner/model", "model_index.json")
    assert not line.asked
    assert constants.HF_HUB_OFFLINE


PINNED = """
import torch
import ipgo
from ipgo.methods.promptist import _load

print(ipgo.from_pretrained("owner/adapter@v2").prompts)
print(ipgo.load_reward("clip:owner/clip@v2", device="cpu").name)
network, tokenizer = _load("owner/writer@v2", "owner/writer@v2", torch.device("cpu"))
print(network.config.model_type, len(tokenizer) > 0)
"""


def test_a_revision_pins_adapters_rewards_and_rewriters_too(tmp_path: Path) -> None:
    """Each from what the hub has given before, where only that revision is."""
    place, cache = tmp_path / "clip", tmp_path / "cache"
    tiny_clip().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        place
    )
    ipgo.save_adapter(
        ipgo.InsertionAdapter(("a fox",), 16, ipgo.Insertion(1, 1, rank=4)), tmp_path / "adapter"
    )
    sources = {"clip": place, "adapter": tmp_path / "adapter", "writer": BUNDLED}
    for name, source in sources.items():
        put_into_cache(cache, f"owner/{name}", source, revision="v2")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    command = [sys.executable, "-c", PINNED]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["('a fox',)", "clip:owner/clip@v2", "gpt2 True"]
