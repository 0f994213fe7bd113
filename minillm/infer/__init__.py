"""Using a trained model."""

from minillm.infer.generate import generate
from minillm.infer.prepare import prepare
from minillm.infer.sampling import choose, probabilities

__all__ = ["choose", "generate", "prepare", "probabilities"]
