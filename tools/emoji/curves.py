"""Plot what the stages logged while they trained: `python -m tools.emoji.curves --out docs/emoji-curves.png`."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from tools.emoji.sprites import BUILD

NOT_SHOWN = ("step", "norm", "per_second")
WINDOW = 9  # rows of the log that a point is the median of: single batches say little


def smoothed(values: np.ndarray) -> np.ndarray:
    """The running median."""
    half = WINDOW // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", nargs="+", help="default: all that have a log")
    parser.add_argument("--out", type=Path, default=Path("docs/emoji-curves.png"))
    options = parser.parse_args()
    stages = options.stages or sorted(path.stem for path in (BUILD / "logs").glob("*.jsonl"))
    figure, axes = plt.subplots(
        1, len(stages), figsize=(5 * len(stages), 3.2), layout="constrained", squeeze=False
    )
    for axis, stage in zip(axes[0], stages, strict=True):
        rows = [json.loads(line) for line in (BUILD / "logs" / f"{stage}.jsonl").read_text().splitlines()]
        steps = np.array([row["step"] for row in rows])
        for name in (key for key in rows[0] if key not in NOT_SHOWN):
            values = np.array([row[name] for row in rows])
            own = axis.twinx() if name == "psnr" else axis
            own.plot(
                steps, smoothed(values), label=name, color="0.3" if own is not axis else None, linewidth=1.2
            )
            if own is not axis:
                own.set_ylabel("psnr, dB (gray)")
        axis.set(title=stage, xlabel="step")
        axis.legend(fontsize=8)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
