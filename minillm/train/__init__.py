"""Objectives and the training loop."""

from minillm.train.loop import Step, evaluate, train
from minillm.train.losses import cross_entropy, masked_mean

__all__ = ["Step", "cross_entropy", "evaluate", "masked_mean", "train"]
