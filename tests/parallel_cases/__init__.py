"""What tests of parallelism share: models, one process to compare with, and what ranks found.

Each file holds strategies: how ranks train a model, what each has to hold, and faults that the
comparison has to find. `run` is what a rank does with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.model import LM
from minillm.parallel.dropout import Places, place_dropout
from minillm.parallel.group import Tracer
from minillm.train.optim import AdamW

# 38 entries: 4 ranks have 9 or 10 of them; 12 rows: 2, 3 and 4 times 3 passes divide them
VOCABULARY, ROWS, TOKENS, STEPS = 38, 12, 8, 3
KINDS = ("weights", "exp_avg", "exp_avg_sq")
"""what is held of each parameter: its value, and AdamW's two moments"""
HYPER = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


@dataclass(frozen=True)
class Feature:
    """A model, and in how many passes a rank goes through its rows before an update."""

    name: str
    cfg: ModelConfig
    passes: int = 1


def config(**changes: Any) -> ModelConfig:
    """Four layers, four heads, learned positions."""
    base = {"vocab_size": VOCABULARY, "d_model": 16, "n_layers": 4, "n_heads": 4, "max_len": 12}
    return ModelConfig(**base | changes)


_GROUPED = {"n_heads": 8, "n_kv_heads": 4, "head_dim": 4, "position": "rope", "norm": "rms"}
_GROUPED |= {"qk_norm": True, "mlp": "swiglu"}
FEATURES = {
    feature.name: feature
    for feature in (
        Feature("tied", config(tie_embeddings=True, bias=True)),
        Feature("untied", config(tie_embeddings=False, norm="rms", mlp="swiglu")),
        Feature("gqa", config(tie_embeddings=False, **_GROUPED)),
        Feature("dropout", config(tie_embeddings=False, bias=True, dropout=0.25)),
        Feature("accumulation", config(tie_embeddings=False, position="rope"), passes=2),
        Feature("all at once", config(**_GROUPED, bias=True, dropout=0.25), passes=2),
    )
}


def build(feature: Feature, dtype: torch.dtype, seed: int = 0) -> LM:
    """A model with biases and norms that matter."""
    model = LM(feature.cfg, seed).to(torch.float64)
    rng = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.ndim == 1 else 0.05
            p += scale * torch.randn(p.shape, dtype=p.dtype, generator=rng)
    return model.to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets [rows, tokens] of a step, in every process the same."""
    rng = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS + 1), generator=rng)
    return tokens[:, :-1], tokens[:, 1:]


def everywhere(rows: Tensor | None = None, positions: Tensor | None = None) -> Places:
    """All rows and positions, but for those that are given."""
    rows = torch.arange(ROWS) if rows is None else rows
    return Places(0, rows, torch.arange(TOKENS) if positions is None else positions)


def placed(model: nn.Module, places: Places, first_layer: int = 0) -> nn.Module:
    """The model, with its dropout placed if it has any."""
    return place_dropout(model, places, first_layer) if model.cfg.dropout else model


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, mean over tokens."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# -- one process ---------------------------------------------------------------------------------


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, a tied one under both."""
    return dict(model.named_parameters(remove_duplicate=False))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies, by name."""
    return {name: p.grad.clone() for name, p in named(model).items()}


class Whole(NamedTuple):
    """What one process has: of the first step, and of all parameters after the last one."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]
    """by kind and name"""
    names: set[str]
    """of the parameters, of a tied one the first"""


@cache
def one_process(feature: Feature, dtype: torch.dtype = torch.float64) -> Whole:
    """All rows in one pass."""
    places = everywhere()
    model = placed(build(feature, dtype), places)
    optimizer = AdamW(model.parameters(), **HYPER)
    for step in range(STEPS):
        places.seed = step
        tokens, targets = batch(step)
        optimizer.zero_grad()
        logits = model(tokens)
        loss = mean_loss(logits, targets)
        loss.backward()
        if not step:
            first = logits.detach(), loss.detach(), gradients_of(model)
        optimizer.step()
    held = {name: {"weights": p.detach()} | optimizer.state[p] for name, p in named(model).items()}
    state = {kind: {name: x[kind] for name, x in held.items()} for kind in KINDS}
    return Whole(*first, state, {name for name, _ in model.named_parameters()})


# -- ranks ---------------------------------------------------------------------------------------

Held = dict[tuple[str, tuple[str, ...]], Tensor]
"""(kind, names of the parameters that it is a part of) -> what lies on this rank"""


@dataclass
class Setup:
    """A rank that is ready to train; all of its names are those of the whole model."""

    module: nn.Module
    """what is called, wrapped or cut"""
    optimizer: torch.optim.Optimizer
    places: Places
    work: Callable[[int], tuple[Tensor | None, Tensor | None]]
    """of a step: all passes, until gradients are final; own logits, and the loss of all rows"""
    rows: Tensor
    positions: Tensor
    """of the logits"""
    gradients: Callable[[], dict[str, Tensor]]
    weights: Callable[[], dict[str, Tensor]]
    """put together again"""
    held: Callable[[], Held]
    tracer: Tracer


class Found(NamedTuple):
    """What a rank found; `None` and missing names: another one has it."""

    rows: Tensor
    positions: Tensor
    logits: Tensor | None
    loss: Tensor | None
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    held: Held
    modules: dict[str, str]
    """path -> the module's class; path.attend -> the file of the function there"""
    operations: Counter[str]
    """recorded by the tracer in the last step"""


class Fault(NamedTuple):
    """A mistake: what `patches` name, as "module.function", becomes something else on all ranks."""

    what: str
    patches: Mapping[str, Any]
    feature: str
    part: str
    """the first part that has to differ: what comes before it is right"""


@dataclass(frozen=True)
class Strategy:
    """A way to divide the work, and what has to be true of it."""

    name: str
    ranks: int
    start: Callable[[Feature, torch.dtype], Setup]
    share: Callable[[tuple[str, ...], list[Tensor], int], Tensor]
    """names, whole tensors, rank -> what this rank holds of them; written without the package"""
    modules: Mapping[str, str]
    """some of `Found.modules` that show what was replaced, and what was not"""
    operations: tuple[str, ...]
    """that a training step uses, on some rank, and none but these"""
    faults: tuple[Fault, ...]
    names: Callable[[int, set[str]], set[str]] = lambda rank, names: names
    """those that a rank holds, of all"""


def hold(module: nn.Module, optimizer: torch.optim.Optimizer) -> Held:
    """Parameters and moments of an ordinary optimizer, as they lie here."""
    found = {}
    for name, p in module.named_parameters():
        found["weights", (name,)] = p.detach().clone()
        found |= {(kind, (name,)): optimizer.state[p][kind].clone() for kind in KINDS[1:]}
    return found


def train(setup: Setup, steps: int = STEPS) -> Found:
    """A few steps."""
    for step in range(steps):
        setup.tracer.clear()
        setup.optimizer.zero_grad()
        setup.places.seed = step
        logits, loss = setup.work(step)
        if not step:
            first = logits, loss, setup.gradients()
        setup.optimizer.step()
    operations = Counter(e.op for e in setup.tracer.events)
    modules = {path: type(m).__name__ for path, m in setup.module.named_modules()}
    for path, m in setup.module.named_modules():
        if hasattr(m, "attend"):
            modules[f"{path}.attend"] = getattr(m.attend, "func", m.attend).__module__
    whole = setup.weights(), setup.held()
    return Found(setup.rows, setup.positions, *first, *whole, modules, operations)


def run(
    strategy: Strategy, jobs: Sequence[tuple[Feature, torch.dtype, Fault | None]]
) -> list[Found]:
    """On a rank: one job after the other; one step where only its gradients are looked at."""
    found = []
    for feature, dtype, fault in jobs:
        short = dtype == torch.float32 or (fault is not None and fault.part != "weights")
        with planted(fault.patches if fault else {}):
            found.append(train(strategy.start(feature, dtype), 1 if short else STEPS))
    return found


@contextmanager
def planted(patches: Mapping[str, Any]) -> Iterator[None]:
    """Something else in the place of each "module.function"."""
    with ExitStack() as stack:
        for target, wrong in patches.items():
            stack.enter_context(patch(target, wrong))
        yield


# -- the comparison ------------------------------------------------------------------------------


def _close(part: str, found: Tensor, want: Tensor, scale: float) -> None:
    torch.testing.assert_close(
        found, want, rtol=1e-9, atol=1e-11 * scale, msg=lambda text: f"{part}: {text}"
    )


def compare(ranks: Sequence[Found], want: Whole) -> None:
    """Raise AssertionError, which begins with the part, unless ranks have what one process has.

    All four parts together on all ranks, in float64; whatever several ranks have, they all have.
    """
    seen = torch.zeros(ROWS, TOKENS)
    for x in (x for x in ranks if x.logits is not None):
        _close("logits", x.logits, want.logits[x.rows][:, x.positions], 1.0)
        seen[x.rows[:, None], x.positions] += 1
    assert seen.min() > 0, "logits: of some tokens nobody has them"
    losses = [x.loss for x in ranks if x.loss is not None]
    assert losses, "loss: nobody has it"
    for loss in losses:
        _close("loss", loss, want.loss, 1.0)
    for part in ("gradients", "weights"):
        whole = want.gradients if part == "gradients" else want.state["weights"]
        scale = max(float(x.abs().max()) for x in whole.values())
        for x in ranks:
            for name, found in getattr(x, part).items():
                _close(f"{part} of {name}", found, whole[name], scale)
        missing = want.names.difference(*(getattr(x, part) for x in ranks))
        assert not missing, f"{part}: nobody has {sorted(missing)}"


def relative(found: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The length of what separates two gradients, relative to that of the second."""
    pairs = [(x.double().flatten(), want[name].double().flatten()) for name, x in found.items()]
    ours, exact = (torch.cat(x) for x in zip(*pairs, strict=True))
    return float((ours - exact).norm() / exact.norm())
