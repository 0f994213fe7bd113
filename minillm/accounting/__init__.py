"""Where the bytes and the FLOPs go: counted from a config alone, without a tensor."""

from minillm.accounting import flops, memory, parameters, roofline
from minillm.accounting.roofline import HARDWARE, Hardware, Work, this_cpu

__all__ = ["HARDWARE", "Hardware", "Work", "flops", "memory", "parameters", "roofline", "this_cpu"]
