"""Planted wrong answers for chapter 05's assignment: each must lose points in its task."""

RMS = """
def rms_norm(x, weight, eps=1e-5):
    wide = {wide}
    y = wide / {size}
    return ({y}).to(x.dtype)
"""
WIDE = "x.to(torch.promote_types(x.dtype, torch.float32))"
SIZE = "(wide.square().mean(-1, keepdim=True) + eps).sqrt()"
WEIGHTED = "y * weight.to(y.dtype)"

SWIGLU = """
def swiglu(x, gate, up, down):
    g, u = x @ gate.T, x @ up.T
    return ({hidden}) @ down.T


def hidden_width(d, multiple):
    return {width}
"""
HIDDEN, WIDTH = "g * torch.sigmoid(g) * u", "-(-8 * d // (3 * multiple)) * multiple"

BLOCK = """
def block(x, parts, norms, placement="pre", alpha=1.0):
    if placement not in ("pre", "post", "deepnorm", "sandwich"):
        {unknown}
    for f, norm in zip(parts, norms, strict=True):
        if placement == "pre":
            x = {pre}
        elif placement == "sandwich":
            before, behind = norm
            x = {sandwich}
        else:
            x = {post}
    return x
"""
JOINS = {
    "unknown": "raise ValueError(placement)",
    "pre": "x + f(norm(x))",
    "sandwich": "x + behind(f(before(x)))",
    "post": "norm((alpha if placement == 'deepnorm' else 1.0) * x + f(x))",
}
IN_PARALLEL = """
def block(x, parts, norms, placement="pre", alpha=1.0):
    if placement == "pre":
        return x + sum(f(n(x)) for f, n in zip(parts, norms, strict=True))
    if placement == "sandwich":
        return x + sum(m(f(n(x))) for f, (n, m) in zip(parts, norms, strict=True))
    if placement not in ("post", "deepnorm"):
        raise ValueError(placement)
    for f, n in zip(parts, norms, strict=True):
        x = n((alpha if placement == "deepnorm" else 1.0) * x + f(x))
    return x
"""

LLAMA = """
def llama(tokens, w, cfg):
    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], w[f"{{name}}.weight"], {eps})

    x = w["tokens.weight"][tokens]
    turn = rotation(torch.arange(tokens.shape[1]), cfg.d_head, {theta})
    for i in range({layers}):
        attn, mlp = f"blocks.{{i}}.attn", f"blocks.{{i}}.mlp"
        n = norm(x, f"blocks.{{i}}.norm1")
        q, k, v = (
            rearrange(n @ w[f"{{attn}}.{{name}}.weight"].T, "b t ({heads}) -> b h t d", d=cfg.d_head)
            for name in ("q", "k", "v")
        )
        y = attend({q}, {k}, {v}, causal={causal})
        x = x + rearrange(y, "b h t d -> b t (h d)") @ w[f"{{attn}}.out.weight"].T
        n = {second}
        hidden = {hidden}
        x = x + hidden @ w[f"{{mlp}}.down.weight"].T
    return {last} @ w["{head}.weight"].T
"""
RIGHT = {
    "eps": "cfg.norm_eps",
    "theta": "cfg.rope_theta",
    "layers": "cfg.n_layers",
    "heads": "h d",
    "q": "rotate(q, *turn)",
    "k": "rotate(k, *turn)",
    "v": "v",
    "causal": "True",
    "second": 'norm(x, f"blocks.{i}.norm2")',
    "hidden": 'F.silu(n @ w[f"{mlp}.gate.weight"].T) * (n @ w[f"{mlp}.up.weight"].T)',
    "last": 'norm(x, "norm")',
    "head": "head",
}
SWAPPED = 'F.silu(n @ w[f"{mlp}.up.weight"].T) * (n @ w[f"{mlp}.gate.weight"].T)'

NAMES = """
def from_gpt2(state):
    whole = {{
        "transformer.wte.weight": "tokens.weight",
        "transformer.wpe.weight": "position.table",
        "transformer.ln_f.weight": "norm.weight",
        "transformer.ln_f.bias": "norm.bias",
    }}
    parts = {{
        "ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attn.", "attn.c_proj": "attn.out",
        "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
    }}
    ours = {{}}
    for name, x in state.items():
        words = name.split(".")
        if name in whole:
            ours[whole[name]] = x
            continue
        number, module, kind = words[2] if len(words) > 2 else "", ".".join(words[3:-1]), words[-1]
        if module not in parts or words[0] != "transformer":
            {unknown}
        {turn}
        pieces = zip({order}, x.chunk(3), strict=True) if module == "attn.c_attn" else [("", x)]
        for letter, piece in pieces:
            ours[f"blocks.{number}.{{parts[module]}}{{letter}}.{{kind}}"] = piece
    {head}
    return ours
"""
READ = {
    "unknown": "raise ValueError(name)",
    "turn": "x = x.T if 'c_' in module and x.ndim == 2 else x",
    "order": "'qkv'",
    "number": "{number}",
    "head": "ours['head.weight'] = ours['tokens.weight']",
}

COUNT = """
def count(cfg):
    d = cfg.d_model
    attention = {attention}
    mlp = {mlp} * d * cfg.mlp_width
    tables = cfg.vocab_size * {tables}
    tables += cfg.max_len if {learned} else 0
    return tables * d + cfg.n_layers * (attention + mlp + {norms} * d) + {last}
"""
COUNTED = {
    "attention": "2 * d * cfg.d_head * (cfg.n_heads + cfg.kv_heads)",
    "mlp": "(3 if cfg.gated else 2)",
    "tables": "(1 if cfg.tie_embeddings else 2)",
    "learned": "cfg.position == 'learned'",
    "norms": "2",
    "last": "d",
}

WRONG = {
    "t1_rms": [
        RMS.format(wide="x", size=SIZE, y="y * weight"),
        RMS.format(wide=WIDE, size="(wide.var(-1, keepdim=True) + eps).sqrt()", y=WEIGHTED),
        RMS.format(
            wide=WIDE, size="(wide.square().mean(-1, keepdim=True).sqrt() + eps)", y=WEIGHTED
        ),
        RMS.format(
            wide=WIDE, size="(wide.square().sum(-1, keepdim=True) + eps).sqrt()", y=WEIGHTED
        ),
        RMS.format(wide=WIDE, size="(wide.square().mean() + eps).sqrt()", y=WEIGHTED),
        RMS.format(wide=WIDE, size=SIZE, y="y"),
        RMS.format(wide="x.float()", size=SIZE, y=WEIGHTED),
    ],
    "t2_swiglu": [
        SWIGLU.format(hidden="g * u * torch.sigmoid(u)", width=WIDTH),
        SWIGLU.format(hidden="torch.sigmoid(g) * u", width=WIDTH),
        SWIGLU.format(hidden="g * torch.sigmoid(g) + u", width=WIDTH),
        SWIGLU.format(hidden=HIDDEN, width="(8 * d // 3) // multiple * multiple"),
        SWIGLU.format(hidden=HIDDEN, width="(8 * d // 3 // multiple + 1) * multiple"),
        SWIGLU.format(hidden=HIDDEN, width="-(-(8 / 3 * d) // multiple) * multiple"),
    ],
    "t3_block": [
        IN_PARALLEL,
        BLOCK.format(**JOINS | {"post": "norm(x) + f(x)"}),
        BLOCK.format(**JOINS | {"post": "norm(alpha * x + f(x))"}),
        BLOCK.format(**JOINS | {"post": "norm(x + alpha * f(x))"}),
        BLOCK.format(**JOINS | {"sandwich": "behind(x + f(before(x)))"}),
        BLOCK.format(**JOINS | {"unknown": "pass"}),
        BLOCK.format(**JOINS | {"pre": "norm(x) + f(norm(x))"}),
    ],
    "t4_llama": [
        LLAMA.format(**RIGHT | {"k": "k"}),
        LLAMA.format(**RIGHT | {"v": "rotate(v, *turn)"}),
        LLAMA.format(**RIGHT | {"causal": "False"}),
        LLAMA.format(**RIGHT | {"heads": "d h"}),
        LLAMA.format(**RIGHT | {"second": "n"}),
        LLAMA.format(**RIGHT | {"hidden": SWAPPED}),
        LLAMA.format(**RIGHT | {"last": "x"}),
        LLAMA.format(**RIGHT | {"head": "tokens"}),
        LLAMA.format(**RIGHT | {"layers": "2"}),
        LLAMA.format(**RIGHT | {"theta": "10_000.0"}),
        LLAMA.format(**RIGHT | {"eps": "1e-5"}),
    ],
    "t5_names": [
        NAMES.format(**READ | {"turn": "pass"}),
        NAMES.format(**READ | {"turn": "x = x.T if x.ndim == 2 and 'c_attn' not in name else x"}),
        NAMES.format(**READ | {"order": "'kqv'"}),
        NAMES.format(**READ | {"unknown": "continue"}),
        NAMES.format(**READ | {"unknown": "raise ValueError('unknown name')"}),
        NAMES.format(**READ | {"head": "pass"}),
        NAMES.format(**READ | {"number": "{number[0]}"}),
    ],
    "t6_count": [
        COUNT.format(**COUNTED | {"attention": "4 * d * d"}),
        COUNT.format(**COUNTED | {"mlp": "2"}),
        COUNT.format(**COUNTED | {"tables": "2"}),
        COUNT.format(**COUNTED | {"learned": "True"}),
        COUNT.format(**COUNTED | {"last": "0"}),
        COUNT.format(**COUNTED | {"norms": "1"}),
        COUNT.format(**COUNTED | {"attention": "2 * d * (d + cfg.d_head * cfg.kv_heads)"}),
    ],
}
