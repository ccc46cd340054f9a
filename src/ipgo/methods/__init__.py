"""The methods that ipgo knows. A new one is a file here and a line in `METHODS`."""

from __future__ import annotations

from ipgo.methods.ipgo import IPGO
from ipgo.methods.raw import Raw
from ipgo.task import Method

__all__ = ["IPGO", "METHODS", "Raw"]

METHODS: dict[str, type[Method]] = {"raw": Raw, "ipgo": IPGO}
