"""Imported once by the server from which ranks are forked: what would cost each of them seconds."""

import torch
import torch._dynamo
import torch.distributed
import torch.distributed.device_mesh
import torch.distributed.fsdp
import torch.nn.parallel.distributed

import minillm.parallel.worker

__all__ = ["minillm", "torch"]
