"""May what is in a folder be continued with these models and settings?"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipgo.errors import ResumeError


def with_judges_of(there: Mapping[str, Any], now: Mapping[str, Any], optimised: str) -> dict[str, Any]:
    """The facts `there`, with what `now` says of all rewards but the optimised one."""
    judges = {name: identity for name, identity in now.get("rewards", {}).items() if name != optimised}
    return {**there, "rewards": {**there.get("rewards", {}), **judges}}


def check_models(path: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise `ResumeError` if `path`, with the facts `there`, was drawn or scored by models other than `now`'s.

    What is in one folder is compared, so a name must keep its model, in one format.
    """
    before, after = there.get("rewards", {}), now.get("rewards", {})
    other = [name for name in after if name in before and before[name] != after[name]]
    if other:
        own = after[other[0]].get("preprocessing") == "its own"
        what = (
            "the file it is written in, or what it computes by,"
            if own
            else "its weights, preprocessing or version"
        )
        raise ResumeError(
            f"{str(path)!r} was scored by another {other[0]!r} ({what} differ{'s' * own}), and the scores are not "
            f"comparable; give the same {'one' if own else 'weights'}, or another folder"
        )
    differing = differing_in(there, now)
    if differing is None:
        return
    words = {
        "dtype": "was drawn in {0}, not {1}, and the images are not comparable; give a backend in that format",
        "schedule": "was drawn with the scheduler {0}, not {1}, and the images are not comparable; give the same one",
        "weights": "was drawn by a backend with other weights ({0} there, {1} now), and the images are not comparable; "
        "give the same weights",
    }
    told = words[differing].format(there[differing], now[differing])
    raise ResumeError(f"{str(path)!r} {told}, or another folder")


def differing_in(there: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first part of a backend's identity that both state and in which they differ.

    Fingerprints of weights compare in one format only, so that comes first.
    """
    known = (key for key in ("dtype", "schedule", "weights") if there.get(key) and now.get(key))
    return next((key for key in known if there[key] != now[key]), None)


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Which of the flat settings `now` differ, as `sampling.steps 20 there, 30 now`; "" if none does."""
    keys = [key for key in now if there.get(key) != now[key]]
    values = {key: "{} there, {} now".format(*_short(there.get(key), now[key])) for key in keys}
    return "; ".join(f"{key} {value}" for key, value in values.items())


def _short(*values: Any) -> list[str]:
    """Values as texts that show where they differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in values]
    alike = len(os.path.commonprefix(texts))  # noqa: RUF071  characters are what is compared
    start = 0 if alike < 40 else alike - 20
    cut = [f"{'...' * (start > 0)}{text[start:]}" for text in texts]
    return [text if len(text) <= 60 else f"{text[:57]}..." for text in cut]
