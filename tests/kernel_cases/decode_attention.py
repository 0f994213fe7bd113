"""One query against a cache in splits: grouped heads, unequal lengths, caches with rubbish."""

import torch

from kernels import decode_attention
from tests.kernel_cases import Case, Fault, shapes, strided


def _cache(b, h, g, s, d, lengths=None, scale_by=1.0, form=None, rubbish=False, **settings):
    """`form` changes the strides of k and v; `rubbish`: NaN behind the last key of each."""

    def inputs(rng):
        q, k, v = (
            torch.randn(shape, generator=rng, dtype=torch.float64) * scale_by
            for shape in ((b, h, 1, d), (b, g, s, d), (b, g, s, d))
        )
        given = {"q": q, **settings}
        if lengths is not None:
            given["lengths"] = torch.tensor(lengths)
        if rubbish:
            beyond = torch.arange(s) >= given["lengths"][:, None]
            k, v = (x.masked_fill(beyond[:, None, :, None], float("nan")) for x in (k, v))
        return given | {"k": k if form is None else form(k), "v": v if form is None else form(v)}

    return inputs


def _strided(inputs):
    """q, k and v with every second place used."""
    return lambda rng: {n: strided(x) if n in "qkv" else x for n, x in inputs(rng).items()}


def _exact(k, v, splits=None, **given):
    """Rubbish counts nowhere, and splits do not matter."""
    return decode_attention.reference(k=k.nan_to_num(), v=v.nan_to_num(), **given)


def _case(name, inputs, **more):
    # float32: sums over d and over up to a thousand keys, twice; narrow types: the weights are
    # rounded once more on a GPU, each on its own
    slack = {torch.float32: 64, torch.float16: 4, torch.bfloat16: 4}
    return Case(name, "decode_attention", inputs, reference=_exact, slack=slack, **more)


F32 = {"dtypes": (torch.float32,)}
TWO = {"dtypes": (torch.float32, torch.bfloat16)}
CASES = [
    *(_case(f"{s} keys", _cache(1, 2, 2, s, 16)) for s in shapes()),
    *(_case(f"width {d}", _cache(1, 4, 2, 41, d), **TWO) for d in (20, 80, 256)),
    # one number in a row, the mean of 41 that cancel
    _case("width 1", _cache(1, 4, 2, 41, 1), terms=1.0),
    _case("two heads to a key", _cache(1, 6, 3, 41, 16)),
    _case("all heads to one key", _cache(1, 5, 1, 41, 16)),
    _case("a group of 67", _cache(1, 67, 1, 41, 16), dtypes=(torch.float32, torch.float16)),
    *(_case(f"{n} splits", _cache(1, 2, 1, 127, 20, splits=n), **TWO) for n in (1, 2, 3)),
    _case("a split of several blocks", _cache(1, 2, 1, 1023, 128, splits=1), **F32),
    _case("17 splits of 1023", _cache(1, 2, 1, 1023, 20, splits=17), **F32),
    _case("more splits than keys", _cache(1, 1, 1, 5, 8, splits=19), **TWO),
    _case("unequal lengths", _cache(4, 2, 1, 41, 16, lengths=[41, 1, 0, 17])),
    _case(
        "unequal lengths in splits",
        _cache(4, 2, 1, 41, 16, lengths=[41, 1, 0, 17], splits=3),
        **TWO,
    ),
    _case("rubbish behind", _cache(3, 2, 1, 41, 20, lengths=[5, 0, 33], splits=2, rubbish=True)),
    _case("only empty caches", _cache(2, 2, 1, 41, 16, lengths=[0, 0], splits=2)),
    _case("no keys at all", _cache(2, 2, 1, 0, 16)),
    _case("another scale", _cache(1, 4, 2, 41, 16, scale=0.7, splits=2), **TWO),
    _case("large numbers", _cache(1, 4, 2, 41, 16, scale_by=1e4, splits=2)),
    _case("part of a longer cache", _cache(2, 2, 2, 99, 20, form=lambda x: x[:, :, :57]), **TWO),
    _case(
        "heads behind tokens",
        _cache(2, 2, 41, 4, 20, form=lambda x: x.transpose(1, 2)[:, :2]),
        **TWO,
    ),
    _case("strided", _strided(_cache(2, 4, 1, 41, 20)), **TWO),
    _case("no sequences", _cache(0, 4, 2, 5, 16), **F32),
]

FAULTS = [
    Fault("scale missing", '"ieee") * scale', '"ieee")', "5 keys"),
    Fault("a key too many", "< end, scores", "< end + 1, scores", "5 keys"),
    Fault("a key too few", "< end, scores", "< end - 1, scores", "5 keys"),
    Fault(
        "keys beyond the length",
        "tl.minimum(start + size, length)",
        "tl.minimum(start + size, s)",
        "unequal lengths",
    ),
    Fault("rubbish is read", "(key < end) & (col", "(key < s) & (col", "rubbish behind"),
    Fault(
        "sums not rescaled",
        "acc * keep[:, None] + tl.dot",
        "acc + tl.dot",
        "a split of several blocks",
    ),
    Fault("splits overlap", "start = split * size", "start = split * (size - 1)", "3 splits"),
    Fault(
        "heads in the wrong order",
        "* g + kv) * group + row",
        "* g + kv) + row * g",
        "two heads to a key",
    ),
    Fault(
        "splits weigh the same",
        "weight = tl.exp(lse - safe)",
        "weight = tl.where(here, 1.0, 0.0)",
        "3 splits",
    ),
    Fault(
        "the last splits left out",
        "range(0, splits, CHUNK)",
        "range(0, splits - 1, CHUNK)",
        "17 splits of 1023",
    ),
    Fault(
        "nothing minus nothing",
        'tl.where(new == float("-inf"), 0.0, new)',
        "new",
        "only empty caches",
    ),
    Fault("strides ignored", "x if x.stride(-1) == 1 else x.contiguous()", "x", "strided"),
    Fault("strides of q ignored", "q, lengths = q.contiguous(), ", "lengths = ", "strided"),
]
