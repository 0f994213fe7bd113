"""Draw the README's picture from the shipped model and its log: python assets/readme_picture.py"""

import json
import sys
import textwrap
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from minillm import zoo  # noqa: E402
from minillm.data import stories  # noqa: E402
from minillm.infer import generate  # noqa: E402
from minillm.teach import plots  # noqa: E402


def draw_loss(ax, log, unigram):
    """The loss on held-out stories as it fell, between what is trivial and what is possible."""
    steps = log["steps"]
    ax.semilogy([s["tokens"] / 1e6 for s in steps], [s["held_out"] for s in steps])
    plots.bound(ax, unigram, "knows how often each token occurs")
    entropy = log["entropy_per_story"] * log["recipe"]["held_out"] / log["held_out_tokens"]
    plots.bound(ax, entropy, "knows the grammar: nothing can be lower", below=True)
    ax.set(xlabel="training tokens (millions)", ylabel="loss on new stories (nats per token)")
    ax.set(ylim=(0.2, 10))
    ax.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    ax.minorticks_off()
    ax.set_title("A model learns to write stories")


def write_story(model, tokenizer, seed):
    """A story of the model's own, drawn at temperature 1."""
    end = tokenizer.special_ids["<|endoftext|>"]
    rng = torch.Generator().manual_seed(seed)
    said = generate(model, torch.tensor([[end]]), 300, generator=rng, stop=end)
    return tokenizer.decode([token.item() for token in said][:-1])


def draw_story(ax, text, width=52):
    """The story as a page of text."""
    ax.set_axis_off()
    ax.set_title("One that it wrote")
    page = textwrap.fill(text, width)
    box = {"boxstyle": "round,pad=0.8", "facecolor": "#F7F3EA", "edgecolor": "#C9BFA8"}
    ax.text(0.06, 0.5, page, va="center", fontsize=13, linespacing=1.5, bbox=box)


def main():
    plots.use_style()
    model, tokenizer = zoo.load("storyteller")
    end = tokenizer.special_ids["<|endoftext|>"]
    texts = [[*tokenizer.encode(text), end] for text in stories.generate(500, seed=1)]
    f = np.bincount(np.concatenate(texts)) / sum(map(len, texts))
    unigram = -(f[f > 0] * np.log(f[f > 0])).sum()
    story = write_story(model, tokenizer, seed=0)
    print(story)
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 6.2), width_ratios=(6, 7))
    log = json.loads((ASSETS / "models" / "storyteller.log.json").read_text(encoding="utf-8"))
    draw_loss(left, log, unigram)
    draw_story(right, story)
    fig.savefig(ASSETS / "readme.png")


if __name__ == "__main__":
    main()
