"""Many processes, one model: launching ranks, collectives, and the ways to cut a model."""

from minillm.parallel.launch import RankError, launch

__all__ = ["RankError", "launch"]
