"""Sessions of the command in processes of their own, which are killed at random moments and go on."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = """
import sys
from ipgo import cli, runner
runner.CHECKPOINT_SECONDS = 0.05
sys.exit(cli.main(sys.argv[1:]))
"""


def begin(words: Sequence[str], out: Path, names: str = "*") -> subprocess.Popen[bytes]:
    """`ipgo` with these words, once it has written a file of these names: the imports before take seconds."""
    before = _newest(out, names)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], **quiet)
    while _newest(out, names) == before and process.poll() is None:
        time.sleep(0.01)
    return process


def kill(process: subprocess.Popen[bytes], after: float) -> bool:
    """Kill it after so many seconds; False if it has ended well by itself before."""
    try:
        code = process.wait(after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    assert code == 0
    return False


def _newest(out: Path, names: str) -> float:
    """When one of these files was written last; a draft may be gone before it is looked at."""
    times = [0.0]
    for file in out.rglob(names):
        try:
            times.append(file.stat().st_mtime)
        except FileNotFoundError:
            continue
    return max(times)
