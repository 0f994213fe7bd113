"""Ring attention and context parallelism on real ranks, against attention over the whole."""

import re

import pytest
import torch
import torch.nn.functional as F

from minillm.config import ModelConfig
from minillm.model import LM, attend
from minillm.parallel import collectives as C
from minillm.parallel import context as X
from minillm.parallel import launch
from minillm.parallel.dropout import Places, place_dropout
from minillm.parallel.group import Link, Tracer, world

pytestmark = pytest.mark.slow  # many ranks, many times

B, D = 2, 4
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def inputs(length, heads, kv_heads, dtype=torch.float64):
    """q, k, v and the gradient of the output, of a whole sequence, in every process the same."""
    rng = torch.Generator().manual_seed(length)
    sizes = (heads, kv_heads, kv_heads, heads)
    return [
        torch.randn(B, h, length, D, generator=rng, dtype=torch.float64).to(dtype) for h in sizes
    ]


def full(q, k, v, grad, causal, window=None, scale=None):
    """Output and gradients of one process."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    mask = mask.tril() if causal else mask
    mask = mask.triu(1 - window) if window else mask
    out = attend(q, k, v, mask=mask, scale=scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad.double())]


# length, query heads, key/value heads, causal, window, scale
SHAPES = [
    (8, 2, 2, True, None, None),
    (13, 4, 2, True, None, None),  # odd, grouped
    (13, 3, 1, False, None, 0.3),
    (31, 2, 1, True, 5, None),  # some blocks see nothing
    (9, 2, 2, True, 1, None),
]


def rings(dtype=torch.float64, divide=X.zigzag):
    group, found = world(), []
    for length, heads, kv_heads, causal, window, scale in SHAPES:
        places = tuple(divide(length, group.size))
        mine = places[group.index]
        *qkv, grad = (x[:, :, mine] for x in inputs(length, heads, kv_heads, dtype))
        qkv = [x.requires_grad_() for x in qkv]
        out = X.ring_attention(*qkv, X.Sight(places, causal, window, scale), group)
        grads = torch.autograd.grad(out, qkv, grad)
        found.append((mine, out.detach(), *grads))
    return found


def blocks(length, n):
    """Contiguous shares, as one would cut without thinking of the mask."""
    return list(torch.arange(length).tensor_split(n))


def deviation(ranks, dtype=torch.float64):
    """Of each shape: the largest distance of output or gradients from one process."""
    worst = []
    for s, (length, heads, kv_heads, causal, window, scale) in enumerate(SHAPES):
        whole = full(*inputs(length, heads, kv_heads, dtype), causal, window, scale)
        parts = [rank[s] for rank in ranks]
        assert sorted(torch.cat([p[0] for p in parts]).tolist()) == list(range(length))
        assert all(x.dtype == dtype for p in parts for x in p[1:])
        pairs = [(x, want[:, :, p[0]]) for p in parts for x, want in zip(p[1:], whole, strict=True)]
        worst.append(max(float((x.double() - want).abs().max()) for x, want in pairs))
    return worst


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_ring_gives_what_attention_over_all_gives(n):
    assert max(deviation(launch(rings, world_size=n))) < 1e-12


def test_any_division_in_order_and_other_types_too():
    assert max(deviation(launch(rings, divide=blocks, world_size=3))) < 1e-12
    found = deviation(launch(rings, torch.bfloat16, world_size=2), torch.bfloat16)
    assert max(found) < 0.1


def test_zigzag_covers_all_and_gives_all_ranks_the_same_work():
    for n in range(1, 6):
        for length in range(2 * n, 40):
            places = X.zigzag(length, n)
            assert sorted(torch.cat(places).tolist()) == list(range(length))
            assert all((x.diff() > 0).all() for x in places)
            sizes = [len(x) for x in places]
            assert max(sizes) - min(sizes) <= 2

    def work(places):
        """Pairs of query and key that each rank computes, and those that are visible."""
        n, sight, done, visible = len(places), X.Sight(tuple(places)), [], []
        for i in range(n):
            cut = [sight.block(i, j) for j in range(n)]
            ones = [torch.ones(len(places[i]), len(places[j]), dtype=torch.bool) for j in range(n)]
            done.append(
                sum(x[b[0], b[1]].sum().item() for x, b in zip(ones, cut, strict=True) if b)
            )
            seen = [places[i][:, None] >= keys for keys in places]
            visible.append(sum(x.sum().item() for x in seen))
        return done, visible

    done, visible = work(X.zigzag(64, 4))
    assert len(set(done)) == len(set(visible)) == 1 and sum(visible) == 64 * 65 // 2
    assert sum(done) < 64 * 64 * 0.63  # the masked half is left out, up to the diagonal blocks
    done, visible = work(blocks(64, 4))
    assert max(visible) > 6 * min(visible)


def traffic(length, link):
    tracer = Tracer()
    group = world(tracer=tracer, link=link)
    places = tuple(X.zigzag(length, group.size))
    q, k, v = (x[:, :, places[group.index]] for x in inputs(length, 4, 2)[:3])
    k.requires_grad_()
    out = X.ring_attention(q, k, v, X.Sight(places), group)
    forward = [(e.op, e.sent) for e in tracer.events]
    tracer.clear()
    out.sum().backward()
    return forward, [(e.op, e.sent) for e in tracer.events]


def test_keys_and_values_go_around_once_and_with_their_gradients_once_more():
    n, length = 4, 16
    block = 2 * B * 2 * length // n * D * 8  # keys and values of one rank
    for forward, backward in launch(traffic, length, Link(0.001, 1e9), world_size=n):
        assert forward == [("ring", block)] * (n - 1)
        assert backward == [("ring", block)] * (n - 1 + n)


# -- the model -----------------------------------------------------------------------------------


def config(**changes):
    base = {"vocab_size": 29, "d_model": 16, "n_layers": 2, "n_heads": 4, "max_len": 32}
    return ModelConfig(**base | {"n_kv_heads": 2, "tie_embeddings": False} | changes)


CASES = {
    "rope": config(position="rope", norm="rms", mlp="swiglu", qk_norm=True),
    "learned": config(dropout=0.2, bias=True, tie_embeddings=True),
    "window": config(position="sinusoidal", window=3, attention_scale=0.7),
}
LENGTH = 13


def batch():
    rng = torch.Generator().manual_seed(5)
    tokens = torch.randint(29, (B, LENGTH + 1), generator=rng)
    return tokens[:, :-1], tokens[:, 1:]


def train(model, positions, total):
    """Logits, loss and gradients of the first of three steps, and the weights afterwards.

    `total` sums over ranks; the loss is a mean over all tokens of all ranks.
    """
    tokens, targets = (x[:, positions] for x in batch())
    places = Places(0, torch.arange(B), positions)
    if model.cfg.dropout:
        place_dropout(model, places)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        places.seed = step
        optimizer.zero_grad()
        logits = model(tokens, positions=positions)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss / (B * LENGTH)
        loss.backward()
        for p in model.parameters():
            p.grad = total(p.grad)
        if not step:
            named = model.named_parameters()
            found = logits.detach(), total(loss.detach()), {k: p.grad.clone() for k, p in named}
        optimizer.step()
    return *found, model.state_dict()


def cases_on_ranks(replace=True):
    group = world()
    places, found = X.zigzag(LENGTH, group.size), {}
    for name, cfg in CASES.items():
        model = LM(cfg, seed=1).double()
        mine = X.context_parallel(model, group, places) if replace else places[group.index]
        found[name] = (mine, *train(model, mine, lambda x: C.all_reduce(x, group)))
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_a_model_with_divided_tokens_equals_one_process(n):
    ranks = launch(cases_on_ranks, world_size=n)
    for name, cfg in CASES.items():
        model = LM(cfg, seed=1).double()
        logits, loss, grads, weights = train(model, torch.arange(LENGTH), lambda x: x)
        for mine, own_logits, own_loss, own_grads, own_weights in (rank[name] for rank in ranks):
            torch.testing.assert_close(own_logits, logits[:, mine], **CLOSE)
            torch.testing.assert_close(own_loss, loss, **CLOSE)
            for own, want in ((own_grads, grads), (own_weights, weights)):
                assert own.keys() == want.keys()
                for key in want:
                    torch.testing.assert_close(own[key], want[key], **CLOSE)


def test_without_the_ring_a_rank_sees_only_its_own_tokens():
    """A broken variant: right positions, attention left as it was."""
    ranks = launch(cases_on_ranks, replace=False, world_size=2)
    logits = train(LM(CASES["rope"], seed=1).double(), torch.arange(LENGTH), lambda x: x)[0]
    mine, own, *_ = ranks[0]["rope"]
    assert (own - logits[:, mine]).abs().max() > 1e-5


def test_a_ring_that_forgets_a_gradient_is_found():
    def forgetful():
        slopes = X._slopes

        def broken(*args):
            dq, dkv = slopes(*args)
            return dq, dkv * (world().index != 1)  # what rank 1 adds is lost

        X._slopes = broken
        return rings()

    assert min(deviation(launch(forgetful, world_size=2))) > 1e-3


BAD = [
    (lambda g: X.zigzag(3, 2), "3 tokens are too few for two chunks on each of 2 ranks"),
    (lambda g: X.context_parallel(LM(config()), g, [torch.arange(4)]), "1 places of 2 ranks"),
    (
        lambda g: X.context_parallel(LM(config()), g, [torch.arange(4), torch.arange(4)]),
        "each position from 0 to 7 once",
    ),
    (
        lambda g: X.context_parallel(torch.nn.Linear(2, 2), g, X.zigzag(4, 2)),
        "no module with an `at",
    ),
    (lambda g: ring(g, 4, 3, 1), r"q \(1, 1, 4, 2\), k \(1, 1, 3, 2\).* must hold the 4 tokens"),
    (lambda g: ring(g, 4, 4, 2), "1 query heads cannot share 2 key/value heads"),
    (lambda g: ring(g, 4, 4, 1, n=3), "places of 3 ranks in a group of 2"),
    (lambda g: alibi(g), "knows no ALiBi or T5 bias"),
]


def ring(group, queries, keys, kv_heads, n=2):
    k = torch.ones(1, kv_heads, keys, 2)
    sight = X.Sight(tuple(X.zigzag(4 * n, n)))
    X.ring_attention(torch.ones(1, 1, queries, 2), k, k, sight, group)


def alibi(group):
    model = LM(config(position="alibi"))
    mine = X.context_parallel(model, group, X.zigzag(LENGTH, 2))
    model(batch()[0][:, mine], positions=mine)


def bad_input():
    """What each call of the table says."""
    said = []
    for call, _ in BAD:
        with pytest.raises(ValueError) as error:
            call(world())
        said.append(str(error.value))
    return said


def test_bad_input_is_named():
    for said in launch(bad_input, world_size=2):
        for text, (_, match) in zip(said, BAD, strict=True):
            assert re.search(match, text), (text, match)
