"""Draw the ways to adapt a model from the recorded runs: python assets/shootout_picture.py"""

import json
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

import matplotlib.pyplot as plt  # noqa: E402

from minillm.teach import plots  # noqa: E402

KINDS = {
    "low rank, merged for use": ("LoRA",),
    "adapters and factors": ("adapter", "(IA)"),
    "before the text": ("prompt", "prefix", "tuning v", "SPoT", "LLaMA"),
    "everything": ("full",),
}


def kind_of(name):
    """Which of KINDS a method is of; LLaMA-Adapter has its own keys and values before the text."""
    found = [kind for kind, parts in KINDS.items() if any(part in name for part in parts)]
    return "before the text" if "LLaMA" in name else found[0]


def draw(ax, recorded):
    """A bar from the worst to the best seed for each method, its mean marked and named."""
    colors = dict(zip(KINDS, plots.COLORS, strict=False))
    points = []
    for name, entry in recorded["methods"].items():
        cards = [run["card"] for run in entry["runs"]]
        size, mean = entry["runs"][0]["parameters"], sum(cards) / len(cards)
        color = colors[kind_of(name)]
        ax.plot([size, size], [min(cards), max(cards)], color=color, linewidth=4, alpha=0.35)
        ax.plot(size, mean, "o", color=color, markersize=8)
        points.append((size, mean, name, color))
    ax.set_xscale("log")
    ax.set(xlim=(600, 5e6), ylim=(-0.07, 1.13))
    seeds = len(recorded["recipe"]["seeds"])
    ax.set(
        xlabel="numbers that are trained", ylabel=f"cards right (mean and range of {seeds} seeds)"
    )
    steps = recorded["recipe"]["steps"]
    ax.set_title(f"One task, one model, {steps} steps: ways to adapt it")
    handles = [
        plt.Line2D([], [], marker="o", linestyle="", color=c, label=k) for k, c in colors.items()
    ]
    ax.legend(handles=handles, loc="upper left")
    plots.label_points(ax, *(list(column) for column in zip(*points, strict=True)))


def main():
    plots.use_style()
    recorded = json.loads((ASSETS / "benchmarks" / "adapt.json").read_text(encoding="utf-8"))
    fig, ax = plt.subplots(figsize=(13, 7))
    draw(ax, recorded)
    fig.savefig(ASSETS / "shootout.png")


if __name__ == "__main__":
    main()
