"""What a model thinks of texts: the probability of continuations, and a vector for each text."""

# n prompts, k options, b batch, t tokens, d model width

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.data.batches import pad
from minillm.infer.batching import Prompt, by_length, check_fits, prompt_ids
from minillm.model.lm import LM
from minillm.tokenizers.bpe import BPE


@torch.no_grad()
def log_probs(
    model: LM,
    tokenizer: BPE,
    prompts: Sequence[Prompt],
    options: Sequence[str] | Sequence[Sequence[str]],
    *,
    chat: bool = False,
    batch: int = 64,
) -> Tensor:
    """log p(option | prompt) in nats, summed over the option's tokens: [n, k] in float64.

    `options` are k texts for all prompts, or k texts for each. Prompt and option are encoded apart,
    as in generation, so an option should begin with the blank that would stand there. The end
    marker behind an option is not counted.

    Raises ValueError for an empty option and where prompt and option exceed the context.
    """
    each = [options] * len(prompts) if all(isinstance(x, str) for x in options) else options
    if len(each) != len(prompts) or len({len(some) for some in each}) > 1:
        raise ValueError(
            f"{len(prompts)} prompts need one list of options, or {len(prompts)} of equal length"
        )
    if not prompts:
        return torch.zeros(0, len(options), dtype=torch.float64)
    heads = [prompt_ids(tokenizer, prompt, chat) for prompt in prompts]
    known = {text: tokenizer.encode_ordinary(text) for some in each for text in some}
    if any(not ids for ids in known.values()):
        raise ValueError("an empty option has no probability: options must have a token")
    pairs = [(head, known[text]) for head, some in zip(heads, each, strict=True) for text in some]
    rows = [head + tail for head, tail in pairs]
    check_fits(rows, 0, model.cfg.max_len)
    found = torch.zeros(len(rows), dtype=torch.float64)
    for group in by_length(rows, batch):
        # an option ends its row, so what stands behind it (padding) is seen by no token of it
        tokens, _ = pad([rows[i][:-1] for i in group], 0)
        hidden = model.hidden(tokens)
        width = max(len(pairs[i][1]) for i in group)
        last = torch.tensor([len(rows[i]) - 2 for i in group])
        places = (last[:, None] - torch.arange(width)).clamp(min=0)  # backward from the last token
        at = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = model.head(at) * model.cfg.logit_scale
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted, real = pad([pairs[i][1][::-1] for i in group], 0)
        nats = logits.gather(-1, wanted[..., None]).squeeze(-1) - logits.logsumexp(-1)
        found[torch.tensor(group)] = nats.where(real, 0.0).double().sum(-1)
    return found.view(len(prompts), -1)


@torch.no_grad()
def embeddings(model: LM, tokenizer: BPE, texts: Sequence[str], batch: int = 64) -> Tensor:
    """A vector for each text: the mean of the last hidden vectors of its tokens, [n, d].

    Raises ValueError where a text exceeds the context.
    """
    rows = [prompt_ids(tokenizer, text) for text in texts]
    if not rows:
        return torch.zeros(0, model.cfg.d_model)
    check_fits(rows, 0, model.cfg.max_len)
    found = torch.zeros(len(rows), model.cfg.d_model, dtype=model.head.weight.dtype)
    for group in by_length(rows, batch):
        tokens, real = pad([rows[i] for i in group], 0)
        hidden = model.hidden(tokens) * real[..., None]
        found[torch.tensor(group)] = hidden.sum(1) / real.sum(1, keepdim=True)
    return found
