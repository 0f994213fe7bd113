"""Pure views: tokens as HTML, attention weights as a figure. The widgets only move their inputs."""

from __future__ import annotations

import html
import zlib
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

# Pale backgrounds under dark ink: the same contrast in a light and in a dark theme.
TOKEN_COLORS = (
    "#bfe0f5",
    "#fbd5b5",
    "#c5ead9",
    "#efd0e2",
    "#fbe7a8",
    "#d8d4f2",
    "#d9e6b8",
    "#f3c9c4",
)
TOKEN_INK = "#1a1a1a"
_VISIBLE = str.maketrans({" ": "\u00b7", "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d"})


def pieces(tokenizer: object, text: str) -> list[str | bytes]:
    """Cut `text` into the pieces that `tokenizer` makes of it.

    `tokenizer` is a function from text to pieces, or has `encode` together with either
    `vocab: dict[int, bytes]` or `decode`, or is a list of pieces made already. Raises ValueError
    for anything else.

    >>> pieces(str.split, "two words")
    ['two', 'words']
    """
    encode = getattr(tokenizer, "encode", None)
    if isinstance(tokenizer, list | tuple):
        return list(tokenizer)
    if encode is None:
        if not callable(tokenizer):
            raise ValueError(
                f"a {type(tokenizer).__name__} is no tokenizer: it needs encode and vocab or "
                "decode, or must be a function from text to pieces, or the pieces"
            )
        return list(tokenizer(text))
    ids = encode(text)
    vocab = getattr(tokenizer, "vocab", None)
    if isinstance(vocab, dict) and all(isinstance(vocab.get(i), bytes | str) for i in ids):
        return [vocab[i] for i in ids]
    if not hasattr(tokenizer, "decode"):
        raise ValueError(f"{type(tokenizer).__name__} has encode, but neither vocab nor decode")
    return [tokenizer.decode([i]) for i in ids]


def visible(piece: str | bytes) -> str:
    r"""The piece as text in which nothing is invisible: spaces, line ends, bytes that are no text.

    >>> visible(" a\n"), visible("é".encode()[:1])
    ('·a↵', '<C3>')
    """
    if isinstance(piece, bytes):
        piece = piece.decode("utf-8", errors="surrogateescape")
    shown = piece.translate(_VISIBLE)
    return "".join(f"<{ord(c) - 0xDC00:02X}>" if 0xDC80 <= ord(c) <= 0xDCFF else c for c in shown)


def token_html(tokens: Iterable[str | bytes], caption: str = "") -> str:
    """Colored boxes, one for each token, as HTML.

    The color depends on the token alone, so it stays when the text around it changes; a thin gap
    parts equal neighbors. Everything is escaped. A token that ends a line also breaks the line.

    >>> token_html(["a<b"]).count("a&lt;b")
    1
    """
    boxes = []
    for token in tokens:
        raw = token if isinstance(token, bytes) else token.encode("utf-8", errors="surrogatepass")
        color = TOKEN_COLORS[zlib.crc32(raw) % len(TOKEN_COLORS)]
        boxes.append(
            f'<span style="background:{color};color:{TOKEN_INK};border-radius:3px;padding:1px 2px;'
            f'margin:1px;white-space:pre-wrap;display:inline-block">{html.escape(visible(token))}'
            "</span>" + ("<br>" if raw.endswith(b"\n") else "")
        )
    head = f'<div style="font:13px sans-serif;margin-bottom:3px">{caption}</div>' if caption else ""
    return (
        f'<div style="margin:6px 0;line-height:1.9">{head}'
        f'<div style="font-family:monospace;font-size:14px">{"".join(boxes)}</div></div>'
    )


def compare_tokens(tokenizers: dict[str, object], text: str) -> str:
    """`token_html` under each tokenizer, with the count and the bytes per token, as HTML."""
    size = len(text.encode("utf-8", errors="replace"))
    blocks = []
    for name, tokenizer in tokenizers.items():
        cut = pieces(tokenizer, text)
        rate = f", {size / len(cut):.2f} bytes each" if cut else ""
        noun = "token" if len(cut) == 1 else "tokens"
        caption = f"<b>{html.escape(name)}</b>: {len(cut)} {noun}{rate}"
        blocks.append(token_html(cut, caption))
    return "".join(blocks)


def as_array(weights: object) -> np.ndarray:
    """Attention weights [layers, heads, queries, keys] as NumPy; fewer axes in front are added.

    Raises ValueError unless there are two to four axes.
    """
    if hasattr(weights, "detach"):
        weights = weights.detach().cpu().float().numpy()
    array = np.asarray(weights, dtype=float)
    if not 2 <= array.ndim <= 4:
        raise ValueError(
            f"attention weights of shape {array.shape} must be [layers, heads, queries, keys], "
            "or leave out axes at the front"
        )
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def attention_figure(
    weights: object,
    tokens: Sequence[str],
    layer: int = 0,
    head: int = 0,
    title: str | None = None,
) -> Figure:
    """Who looks at whom: the weights of one head, queries down, keys across.

    weights: [layers, heads, t, s] (tensor or array), rows sum to 1; tokens: the s keys, of which
    the queries are the last t. Exact zeros, which is what a mask leaves, are hatched.

    Raises ValueError when shapes, `layer` or `head` do not fit.
    """
    array = as_array(weights)
    layers, heads, t, s = array.shape
    if len(tokens) != s or t > s:
        raise ValueError(f"{len(tokens)} tokens do not label weights of shape {array.shape}")
    if not (0 <= layer < layers and 0 <= head < heads):
        raise ValueError(
            f"layer={layer}, head={head} must lie within {layers} layers and {heads} heads"
        )
    shown = array[layer, head]
    labels = [visible(token) for token in tokens]
    side = float(np.clip(0.3 * s + 1.4, 4.2, 9.0))
    with plt.rc_context({"axes.grid": False}):
        fig, ax = plt.subplots(figsize=(side + 1.0, max(3.4, side * t / s)))
        image = ax.imshow(
            np.ma.masked_equal(shown, 0.0), cmap="Blues", vmin=0.0, vmax=max(1e-9, shown.max())
        )
        ax.patch.set(hatch="////", edgecolor="#cccccc", facecolor="#f6f6f6", linewidth=0)
        size = float(np.clip(320 / s, 6.5, 12))
        ax.set_xticks(range(s), labels, rotation=90, fontsize=size)
        ax.set_yticks(range(t), labels[s - t :], fontsize=size)
        ax.set(xlabel="looks at (key)", ylabel="token (query)")
        ax.set_title(title if title is not None else f"layer {layer}, head {head}")
        fig.colorbar(image, ax=ax, label="attention weight", shrink=0.8)
    return fig
