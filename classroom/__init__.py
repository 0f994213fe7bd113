"""The classroom: execute lectures, hand out copies, release assignments and grade them."""

from minillm.paths import ROOT, write_atomically

__all__ = ["ROOT", "write_atomically"]
