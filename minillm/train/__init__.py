"""Objectives, optimizers, precision, the training loop, and what lets a run survive."""

from minillm.train.checkpoint import Checkpoints
from minillm.train.loop import NotFiniteError, Step, evaluate, next_token_loss, train
from minillm.train.losses import cross_entropy, masked_mean
from minillm.train.objectives import (
    Problem,
    blank_infilling,
    causal,
    masked,
    prefix,
    span_corruption,
)
from minillm.train.optim import Adafactor, AdamW, clip_grad_norm, decay_groups
from minillm.train.precision import LossScaler, MasterWeights, OverflowRatio, prepare
from minillm.train.schedules import batch_ramp, constant, inverse_sqrt, warmup_cosine
from minillm.train.spikes import Rewind, SpikeDetector, rewind_and_skip
from minillm.train.state import read_state, write_state

__all__ = [
    "Adafactor",
    "AdamW",
    "Checkpoints",
    "LossScaler",
    "MasterWeights",
    "NotFiniteError",
    "OverflowRatio",
    "Problem",
    "Rewind",
    "SpikeDetector",
    "Step",
    "batch_ramp",
    "blank_infilling",
    "causal",
    "clip_grad_norm",
    "constant",
    "cross_entropy",
    "decay_groups",
    "evaluate",
    "inverse_sqrt",
    "masked",
    "masked_mean",
    "next_token_loss",
    "prefix",
    "prepare",
    "read_state",
    "rewind_and_skip",
    "span_corruption",
    "train",
    "warmup_cosine",
    "write_state",
]
