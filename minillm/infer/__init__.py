"""Using a trained model."""

from minillm.infer.generate import generate

__all__ = ["generate"]
