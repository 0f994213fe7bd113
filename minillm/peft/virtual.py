"""Virtual tokens: keys and values that stand before the text in every layer, and are trained.

A prefix has keys and values of its own in each layer (`minillm.peft.prefix`); a prompt has vectors
before the first, from which the frozen model itself makes the keys and values
(`minillm.peft.prompt`). Either way the model computes what it always does, except that attention
finds n tokens more to look at: what stands in for its operation puts them before the others, and
what stands in for its positions counts them, so that the text begins at position n. They take n
places of the context: `model.cfg.max_len` is what is left for text.
"""

# b batch, n virtual tokens, l layers, g key/value heads, d head width, w model width

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.model.attention import Attention
from minillm.model.lm import LM
from minillm.peft import files
from minillm.peft.inject import Addition, Wrapper, detach, freeze, innermost, replace


class Table(nn.Module):
    """An encoder that is nothing but what it gives: `weight` [n, ...]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self) -> Tensor:
        """[n, ...]."""
        return self.weight


class VirtualTokens(Wrapper):
    """Stands for a model's `position`: n tokens come first, those of the text count on from n.

    `encoder` gives what is trained; `read` turns it into keys and values [1, g, n, d] of every
    layer. The model asks for a bias once in each pass, before its first block: that is when they
    are computed, except when older keys show that the pass goes on with a text it began (then they
    are those the text began with, as a cache would have them).
    """

    known: ClassVar[tuple[str, ...]] = ()
    """settings of `peft` that say how the numbers were trained, not what is done with them"""

    def __init__(self, model: LM, encoder: nn.Module, length: int) -> None:
        super().__init__(model.position)
        self.encoder, self.length = encoder.to(model.head.weight), length
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.model = (model,)  # in a tuple, or the model would become a part of its own part

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"layers": []}  # of one pass; tensors with a past cannot be copied

    def read(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every layer."""
        raise NotImplementedError

    @staticmethod
    def sizes(model: LM) -> tuple[int, int, int]:
        """Numbers a virtual token, width and heads as `peft` counts them."""
        raise NotImplementedError

    @staticmethod
    def turn(model: LM, table: Tensor, back: bool = False) -> Tensor:
        """What the encoder gives, as it stands in their files, or from there `back`."""
        return table

    def add(self, x: Tensor, positions: Tensor) -> Tensor:
        """`Position.add`, n places on; ValueError when text and virtual tokens do not fit."""
        most, n = self.base.cfg.max_len, self.length
        if positions.is_cpu and (last := int(positions.max()) + 1 + n) > most:
            raise ValueError(
                f"{n} virtual tokens and {last - n} tokens of text exceed the context of {most} "
                f"by {last - most}"
            )
        return self.base.add(x, positions + n)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """`Position.rotation`, n places on."""
        return self.base.rotation(positions + self.length)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """`Position.bias` of queries and keys, with the virtual tokens before the keys."""
        begins, n = queries.shape[-1] == keys.shape[-1], self.length
        if begins or not self.layers or torch.is_grad_enabled():
            self.layers = self.read()
        virtual = torch.arange(n, device=keys.device).expand(*keys.shape[:-1], n)
        return self.base.bias(queries + n, torch.cat([virtual, keys + n], -1))


class Attend(Addition):
    """Stands for a layer's attention operation: the same, over the virtual tokens as well."""

    def __init__(self, base: Callable[..., Tensor], virtual: VirtualTokens, layer: int) -> None:
        super().__init__()
        self.base, self.layer, self.virtual = base, layer, (virtual,)

    @property
    def peft_type(self) -> str | None:
        """That of the virtual tokens."""
        return self.virtual[0].peft_type

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        """As `minillm.model.attention.attend`; everybody may look at every virtual token."""
        if layers := self.virtual[0].layers:
            before = [x.expand(len(k), -1, -1, -1) for x in layers[self.layer]]
            k, v = (torch.cat([x.to(y.dtype), y], 2) for x, y in zip(before, (k, v), strict=True))
            if mask is not None:
                mask = F.pad(mask, (before[0].shape[2], 0), value=True)
        return self.base(q, k, v, mask=mask, **others)


def attach(model: LM, virtual: VirtualTokens) -> LM:
    """Freeze the base and put virtual tokens before every text; in place."""
    freeze(model)
    replace(model, "position", virtual)
    for i, attn in enumerate(attentions(model)):
        put(attn, Attend(attn.attend, virtual, i))
    model.cfg = changed(model.cfg, max_len=model.cfg.max_len - virtual.length)
    return model


def remove_virtual(model: LM) -> LM:
    """Take prefix or prompt off again; the base stays frozen. ValueError if there is none."""
    model.cfg = attached(model).base.cfg
    detach(model, VirtualTokens)
    for attn in attentions(model):
        put(attn, attn.attend.base)
    return model


def attached(model: LM) -> VirtualTokens:
    """The virtual tokens of a model; ValueError if it has none."""
    if not isinstance(model.position, VirtualTokens):
        raise ValueError("no prefix or prompt is attached to this model")
    return model.position


def fold(model: LM) -> LM:
    """Drop the encoder behind a trained prefix or prompt and keep what it gives; same function.

    ValueError if nothing is attached.
    """
    virtual = attached(model)
    virtual.encoder = Table(virtual.encoder())
    return model


def keys_values(model: LM, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What every layer of a model makes of vectors x [n, w] at its first places: [1, g, n, d]."""
    places = torch.arange(len(x), device=x.device)
    bias = innermost(model.position).bias(places, places)
    # where virtual tokens are attached, the text begins at 0 and they stand before it
    places = places - getattr(model.position, "length", 0)
    stream, rotation = model.place(x[None], places), model.position.rotation(places)
    layers = [_Recorder() for _ in model.blocks]
    for block, layer in zip(model.blocks, layers, strict=True):
        stream = block(stream, None, layer, rotation, bias)
    return [layer.seen for layer in layers]


class _Recorder:
    """Stands for a layer's cache, to look at what would be kept in it."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `LayerCache.append` of an empty cache, gradients allowed."""
        self.seen = k, v
        return k, v


def vectors_of(model: LM, tokens: Sequence[int], length: int) -> Tensor:
    """Vectors [length, w] of tokens, repeated or cut to `length`; ValueError for unknown ones."""
    ids, last = list(tokens), model.cfg.vocab_size - 1
    if not ids or not 0 <= min(ids) <= max(ids) <= last:
        raise ValueError(f"tokens={ids} must be at least one id from 0 to {last}")
    return model.tokens.weight.detach()[(ids * -(-length // len(ids)))[:length]]


def check(model: LM, length: int, room: bool = True) -> None:
    """Raise ValueError where so many virtual tokens cannot stand before a text of at least one.

    Without `room`, they are such as take no place in the context.
    """
    if not isinstance(model, LM):
        raise ValueError(f"virtual tokens stand before the text of an LM, not of a {type(model)}")
    if length < 1:
        raise ValueError(f"length={length}: there must be at least one virtual token")
    if any(isinstance(attn.attend, Addition) for attn in attentions(model)):
        raise ValueError("virtual tokens or a LLaMA-Adapter are attached: take them off first")
    if room and length >= model.cfg.max_len:
        raise ValueError(
            f"length={length} leaves no place for text in a context of {model.cfg.max_len}: "
            f"{length - model.cfg.max_len + 1} too many"
        )
    if room and model.cfg.window is not None:
        raise ValueError(f"a text would leave its prompt behind a window of {model.cfg.window}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from PyTorch's global generator, started at `seed`; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        yield


def attentions(model: LM) -> list[Attention]:
    """The attention of every block, behind whatever is wrapped around it."""
    return [innermost(block.attn) for block in model.blocks]


def put(attn: nn.Module, operation: Callable[..., Tensor]) -> None:
    """Set the attention operation of a layer, which is a module or a plain function."""
    del attn.attend
    attn.attend = operation


def to_peft(model: LM, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `files.save_adapter` writes: what the encoder gives, without the encoder.

    There is one set of virtual tokens, whatever `name` says.
    """
    virtual = attached(model)
    _, width, heads = virtual.sizes(model)
    settings = {"num_virtual_tokens": virtual.length, "num_transformer_submodules": 1}
    settings |= {"num_layers": model.cfg.n_layers}
    settings |= {"token_dim": width, "num_attention_heads": heads}
    return settings, {"prompt_embeddings": virtual.turn(model, virtual.encoder())}


def from_peft(
    kind: type[VirtualTokens],
    model: LM,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    name: str,
) -> None:
    """Attach what `peft` wrote; ValueError for settings, tensors or shapes that do not fit."""
    free = ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers", *kind.known)
    files.check_config(config, {**dict.fromkeys(free), "num_transformer_submodules": (1,)})
    n = config["num_virtual_tokens"]
    shapes = {key: tuple(x.shape) for key, x in tensors.items()}
    if shapes != (wanted := {"prompt_embeddings": (n, kind.sizes(model)[0])}):
        raise ValueError(f"this model needs {wanted}, the adapter has {shapes}")
    check(model, n)
    table = Table(kind.turn(model, tensors["prompt_embeddings"], back=True))
    attach(model, kind(model, table, n))
