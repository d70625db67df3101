"""Tensors that FSDP2 (`torch.distributed.fsdp.fully_shard`) has divided among processes."""

import sys
from typing import Any

from torch import Tensor, nn


def to_local(tensor: Any) -> Tensor:
    """Return the part of a sharded tensor that this process holds, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Any) -> bool:
    # Importing this takes half as long as all of torch, and until somebody does there is no such tensor.
    sharding = sys.modules.get("torch.distributed.tensor")
    return sharding is not None and isinstance(tensor, sharding.DTensor)


def all_reduce_sum(sums: Tensor, like: Any) -> Tensor:
    """Add up sums over local parts on all processes that share `like`, with one all-reduce."""
    if not is_sharded(like):
        return sums
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    return DTensor.from_local(sums, like.device_mesh, placements).full_tensor()


def reshard(module: nn.Module) -> None:
    """Divide again what FSDP2 keeps whole after a forward pass that no backward pass follows."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
