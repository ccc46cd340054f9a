"""The hub, which may be out of reach: its own clients take minutes to say so."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipgo.errors import first_line
from ipgo.files import is_hub_id

SECONDS = 10.0  # that an answer may take
AGAIN = 60.0  # seconds until one that did not come is asked for again
# By the addresses of hubs: which have answered, and when one has not, and why.
_answered: set[str] = set()
_silent: dict[str, tuple[float, str]] = {}


class UnreachableError(OSError):
    """There is no connection, and what is asked for was not fetched before."""


@contextmanager
def within_reach(*places: str | Path) -> Iterator[None]:
    """Inside, what is asked of the hub comes from what was fetched before, if there is no connection.

    The hub's client tries six times for each of a dozen files, with growing pauses: four minutes for a missing model,
    and as long for one that is there. So it is asked once, and told the answer.

    Args:
        places: what is opened; if no hub id is among them, nothing happens.

    Raises:
        UnreachableError: instead of the errors that a client which was told to stay offline has for a missing file.
    """
    if all(Path(place).exists() or not is_hub_id(place) for place in places):
        yield
        return
    from huggingface_hub import constants  # here, because it takes a while
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    reason = None if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    if reason is None:
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UnreachableError(f"no connection: {reason}") from error
    finally:
        constants.HF_HUB_OFFLINE = False


def _unreachable(address: str) -> str | None:
    """Why a hub does not answer; None if it does, whatever it says. What was so a minute ago is not asked again."""
    from huggingface_hub import get_session

    if address in _answered:
        return None
    when, reason = _silent.get(address, (-math.inf, ""))
    if time.monotonic() - when < AGAIN:
        return reason
    try:
        get_session().head(address, timeout=SECONDS)
    except Exception as error:  # its HTTP library has many
        reason = first_line(error)
        _silent[address] = time.monotonic(), reason
        return reason
    _answered.add(address)
    return None
