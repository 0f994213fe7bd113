"""Draw what PPO did with and without the KL penalty from the recorded runs: run this file."""

import json
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from minillm.data import cards  # noqa: E402
from minillm.recipes.align_stages import TESTING  # noqa: E402
from minillm.teach import plots  # noqa: E402

CURVES = {"reward": "what the reward model says", "true_reward": "what the card is worth"}
TITLES = {"kl": "PPO held near where it started", "free": "the same without the KL penalty"}


def draw(ax, runs, title):
    """Both rewards against the iteration: thin lines are seeds, thick ones their mean."""
    for color, (key, label) in zip(plots.COLORS, CURVES.items(), strict=False):
        curves = np.array([run["curves"][key] for run in runs])
        x = np.arange(1, curves.shape[1] + 1)
        ax.plot(x, curves.T, color=color, linewidth=1, alpha=0.4)
        ax.plot(x, curves.mean(0), color=color, linewidth=3.5, label=label)
    said = runs[0]["after"]["cards"][0]
    ax.set(xlabel="iteration", title=f"{title}\n“{said}”")
    ax.axhline(0, color="gray", linewidth=0.8)


def main():
    plots.use_style()
    record = json.loads((ASSETS / "benchmarks" / "align.json").read_text(encoding="utf-8"))
    fig, axes = plt.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    for ax, (arm, title) in zip(axes, TITLES.items(), strict=True):
        draw(ax, [run for run in record["runs"] if run["arm"] == arm], title)
    axes[0].set_ylabel("points")
    axes[0].legend(loc="lower right")
    asked = cards.requests(1, TESTING, "held_out")[0].text
    fig.suptitle(f"Asked for after training: “{asked}”")
    fig.savefig(ASSETS / "alignment.png")


if __name__ == "__main__":
    main()
