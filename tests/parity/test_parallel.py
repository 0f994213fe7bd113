"""Our parallelism against PyTorch's own on the same ranks, and both against one process.

DDP, FSDP2, tensor parallelism by DTensor, torch.distributed.pipelining: logits, loss, gradients,
and weights after three steps.
"""

from contextlib import nullcontext
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining import schedules as S
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from minillm.parallel import launch
from minillm.parallel.group import Tracer, world
from tests.parallel_cases import (
    FEATURES,
    HYPER,
    ROWS,
    TOKENS,
    Feature,
    Setup,
    batch,
    build,
    compare,
    config,
    data,
    everywhere,
    gradients_of,
    mean_loss,
    named,
    one_process,
    pipeline,
    placed,
    tensor,
    train,
)

pytestmark = pytest.mark.slow  # many ranks

DOUBLE = torch.float64
# normalized heads would need a sum of their own, which PyTorch's plans leave to the user
GROUPED = Feature("gqa", config(n_heads=8, n_kv_heads=4, position="rope", norm="rms", mlp="swiglu"))


def whole(x):
    """A copy, put together where it is divided."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def setup(module, model, places, passes, mean_of=1, last_only=None, **settings):
    """Torch's optimizer; a loss that is a mean over `mean_of` ranks."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, **HYPER)

    def work(step):
        tokens, targets = batch(step)
        logits, losses = [], []
        for i, rows in enumerate(passes):
            places.rows = rows
            with nullcontext() if last_only is None or i + 1 == len(passes) else last_only():
                y = module(tokens[rows], **settings)
                loss = mean_loss(y, targets[rows]) / len(passes)
                loss.backward()
            logits.append(y.detach())
            losses.append(loss.detach())
        total = sum(losses) / mean_of
        if mean_of > 1:
            dist.all_reduce(total)
        return torch.cat(logits), total

    return Setup(
        module,
        optimizer,
        places,
        work,
        torch.cat(list(passes)),
        torch.arange(TOKENS),
        lambda: {name: whole(p.grad) for name, p in named(model).items()},
        lambda: {name: whole(p) for name, p in named(model).items()},
        dict,
        Tracer(),
    )


# -- rows ----------------------------------------------------------------------------------------


def replicated(feature):
    """PyTorch's DDP."""
    own = torch.arange(ROWS).chunk(dist.get_world_size())[dist.get_rank()]
    places = everywhere(own)
    model = placed(build(feature, DOUBLE), places)
    ddp = nn.parallel.DistributedDataParallel(model)
    passes = own.chunk(feature.passes)
    return setup(ddp, model, places, passes, dist.get_world_size(), ddp.no_sync)


def fully_sharded(feature):
    """PyTorch's FSDP2, with a unit for each block."""
    n = dist.get_world_size()
    own = torch.arange(ROWS).chunk(n)[dist.get_rank()]
    places = everywhere(own)
    model = placed(build(feature, DOUBLE), places)
    mesh = init_device_mesh("cpu", (n,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = setup(model, model, places, own.chunk(feature.passes), n)

    def held():
        return {
            ("weights", (name,)): p.to_local().detach().clone()
            for name, p in model.named_parameters()
        }

    found.held = held
    return found


# -- slices --------------------------------------------------------------------------------------

PLAN = {
    **{f"blocks.*.{name}": ColwiseParallel() for name in ("attn.q", "attn.k", "attn.v", "mlp.up")},
    "blocks.*.attn.out": RowwiseParallel(),
    "blocks.*.mlp.down": RowwiseParallel(),
    "tokens": RowwiseParallel(input_layouts=Replicate()),
    "head": ColwiseParallel(output_layouts=Replicate()),
}
GATE = {"blocks.*.mlp.gate": ColwiseParallel()}
NORM = SequenceParallel(use_local_output=True)
GATHER = {"input_layouts": Shard(1), "desired_input_layouts": Replicate(), "use_local_output": True}
DIVIDED = {
    **PLAN,
    "blocks.*.norm1": NORM,
    "blocks.*.norm2": NORM,
    "norm": NORM,
    "blocks.*.attn": PrepareModuleInput(**GATHER),
    "blocks.*.mlp": PrepareModuleInput(**GATHER),
    "blocks.*.attn.out": RowwiseParallel(output_layouts=Shard(1)),
    "blocks.*.mlp.down": RowwiseParallel(output_layouts=Shard(1)),
    "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


def by_dtensor(feature, plan):
    """PyTorch's tensor parallelism, whose plan reads as ours does."""
    n, places = dist.get_world_size(), everywhere()
    if plan is DIVIDED:
        places.positions = torch.arange(TOKENS).chunk(n)[dist.get_rank()]
    model = build(feature, DOUBLE)
    plan = plan | (GATE if feature.cfg.gated else {})
    parallelize_module(model, init_device_mesh("cpu", (n,)), plan)
    if feature.cfg.tie_embeddings:  # it has made two of them
        model.head.weight = model.tokens.weight
    placed(model, places)
    passes = torch.arange(ROWS).chunk(feature.passes)
    return setup(model, model, places, passes, positions=torch.arange(TOKENS))


# -- layers --------------------------------------------------------------------------------------

SCHEDULES = {
    "gpipe": (S.ScheduleGPipe, 3, 1),
    "1f1b": (S.Schedule1F1B, 3, 1),
    "interleaved": (S.ScheduleInterleaved1F1B, 2, 2),
    "zero-bubble": (S.ScheduleInterleavedZeroBubble, 2, 2),
}


def pipelined(feature, name):
    """torch.distributed.pipelining over the same slices of the model."""
    kind, devices, chunks = SCHEDULES[name]
    rank, n, last = dist.get_rank(), devices * chunks, devices - 1
    stages = [pipeline.Slice(build(feature, DOUBLE), s, n) for s in range(rank, n, devices)]
    theirs = [
        PipelineStage(stage, rank + i * devices, n, torch.device("cpu"))
        for i, stage in enumerate(stages)
    ]
    # it would divide what earlier passes have left, too; so the mean is taken below
    options = {"loss_fn": mean_loss, "scale_grads": False}
    engine = kind(theirs if chunks > 1 else theirs[0], pipeline.MICRO_BATCHES, **options)
    module = nn.ModuleList(stages)
    passes = torch.arange(ROWS).chunk(feature.passes)
    found = setup(module, module, everywhere(), passes)

    def work(step):
        (tokens, targets), logits, total = batch(step), [], 0.0
        for rows in passes:
            losses = []
            y = engine.step(
                *([tokens[rows]] if rank == 0 else []),
                target=targets[rows] if rank == last else None,
                losses=losses if rank == last else None,
            )
            if rank == last:
                logits.append(y.detach())
                total += torch.stack(losses).mean() / len(passes)
        for p in module.parameters():
            p.grad /= len(passes) * pipeline.MICRO_BATCHES
        pipeline.sum_tied(stages, world())
        return (torch.cat(logits), total.detach()) if rank == last else (None, None)

    def weights():
        return pipeline.of_all(stages, lambda s: dict(s.model.named_parameters()))

    found.work, found.weights = work, lambda: {k: p.detach() for k, p in weights().items()}
    found.gradients = lambda: pipeline.of_all(stages, lambda s: gradients_of(s.model))
    return found


# -- equal? --------------------------------------------------------------------------------------

STRATEGIES = {s.name: s for f in (data, tensor, pipeline) for s in f.STRATEGIES}
F = FEATURES
WAYS = {
    "DDP": ("ddp", replicated, 3, [F["tied"], F["dropout"], F["all at once"]]),
    "FSDP2": ("zero-3", fully_sharded, 3, [F["tied"], F["dropout"], F["all at once"]]),
    "DTensor": ("tp", partial(by_dtensor, plan=PLAN), 4, [F["tied"], GROUPED, F["dropout"]]),
    "DTensor, divided tokens": (
        "tp+sp",
        partial(by_dtensor, plan=DIVIDED),
        4,
        [GROUPED, F["accumulation"]],
    ),
    **{
        name: (
            name if name in STRATEGIES else None,  # of the zero-bubble schedules ours is another
            partial(pipelined, name=name),
            devices,
            [F["tied"], F["gqa"], F["accumulation"]],
        )
        for name, (_, devices, _) in SCHEDULES.items()
    },
}


def both(name):
    """What a rank found with ours and with theirs, of each feature."""
    ours, theirs, _, features = WAYS[name]
    found = []
    for feature in features:
        own = train(STRATEGIES[ours].start(feature, DOUBLE)) if ours else None
        found.append((own, train(theirs(feature))))
    return found


@cache
def launched(name):
    return launch(both, name, world_size=WAYS[name][2], timeout=240)


def every():
    for name, (*_, features) in WAYS.items():
        for i, feature in enumerate(features):
            yield pytest.param(name, i, id=f"{name}-{feature.name}")


@pytest.mark.parametrize(("name", "i"), list(every()))
def test_ours_and_theirs_have_the_same_numbers(name, i):
    ours, theirs = zip(*(rank[i] for rank in launched(name)), strict=True)
    compare(theirs, one_process(WAYS[name][3][i]))
    for own, other in zip(ours, theirs, strict=True):
        for part in ("logits", "loss", "gradients", "weights") if own else ():
            got, want = getattr(own, part), getattr(other, part)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        for key, x in other.held.items():  # the same rows, but for the padding
            torch.testing.assert_close(own.held[key][: len(x)], x, rtol=1e-9, atol=1e-11)
            assert not own.held[key][len(x) :].any()
