"""Draw the README's picture from the shipped model and its log: python assets/readme_picture.py"""

import json
import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from minillm import zoo  # noqa: E402
from minillm.data import stories  # noqa: E402
from minillm.model import attention_maps  # noqa: E402
from minillm.teach import plots  # noqa: E402


def draw_loss(ax, log, unigram):
    steps = log["steps"]
    ax.semilogy([s["tokens"] / 1e6 for s in steps], [s["loss"] for s in steps])
    plots.bound(ax, unigram, "knows how often each token occurs")
    plots.bound(
        ax, log["entropy_of_stories"], "knows the grammar: nothing can be lower", below=True
    )
    ax.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)", ylim=(0.2, 10))
    ax.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    ax.minorticks_off()
    ax.set_title("A model learns to write stories")


def draw_attention(ax, maps, pieces, layer, head):
    ax.imshow(np.sqrt(maps[layer, head]), cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(len(pieces)), pieces, rotation=90, fontsize=11)
    ax.set_yticks(range(len(pieces)), pieces, fontsize=11)
    ax.grid(False)
    ax.set(xlabel="token looked at", ylabel="token that looks")
    ax.set_title(f"Where it looks (layer {layer}, head {head})")


def sharpest_far_head(maps):
    """The head that puts most weight on tokens 5 or more places back, the first one left out."""
    t = maps.shape[-1]
    distance = np.arange(t)[:, None] - np.arange(t)
    far = (distance >= 5) & (np.arange(t) > 0)
    return np.unravel_index((maps * far).max(-1).mean(-1).argmax(), maps.shape[:2])


def main():
    plots.use_style()
    model, tokenizer = zoo.load("tiny")
    end = tokenizer.special_ids["<|endoftext|>"]
    texts = [[*tokenizer.encode(text), end] for text in stories.generate(500, seed=1)]
    f = np.bincount(np.concatenate(texts)) / sum(map(len, texts))
    unigram = -(f[f > 0] * np.log(f[f > 0])).sum()
    ids = [end, *tokenizer.encode(stories.generate(1, seed=5)[0])[:28]]
    maps = attention_maps(model, torch.tensor([ids]))[0].numpy()
    pieces = [tokenizer.decode([i]).strip() or "·" for i in ids]
    pieces[0] = "start"
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 6.2), width_ratios=(6, 7))
    draw_loss(left, json.loads((ASSETS / "models" / "tiny.log.json").read_text()), unigram)
    draw_attention(right, maps, pieces, *sharpest_far_head(maps))
    fig.savefig(ASSETS / "readme.png")


if __name__ == "__main__":
    main()
