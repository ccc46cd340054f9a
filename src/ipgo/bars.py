"""The progress bars of libraries, which show themselves also where nobody waits for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def only_of_downloads(place: str | Path | None, *loggings: Any) -> Iterator[None]:
    """No bars of libraries while `place` is opened, unless it is a hub id that someone at a terminal waits for.

    Args:
        place: a path or a hub id; None: no file at all.
        loggings: `diffusers.utils.logging` and `transformers.utils.logging`, which switch their bars.
    """
    waiting = place is not None and not Path(place).exists() and sys.stderr.isatty()
    shown = [] if waiting else [each for each in loggings if each.is_progress_bar_enabled()]
    for each in shown:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in shown:
            each.enable_progress_bar()
