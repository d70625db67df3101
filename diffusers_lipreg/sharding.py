"""Tensors that FSDP2 (`torch.distributed.fsdp.fully_shard`) has divided among processes."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate


def to_local(tensor: Tensor) -> Tensor:
    """Return the part of a sharded tensor that this process holds, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def all_reduce_sum(sums: Tensor, like: Tensor) -> Tensor:
    """Add up sums over local parts on all processes that share `like`, with one all-reduce."""
    if not isinstance(like, DTensor):
        return sums
    placements = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    return DTensor.from_local(sums, like.device_mesh, placements).full_tensor()


def reshard(module: nn.Module) -> None:
    """Divide again what FSDP2 keeps whole after a forward pass that no backward pass follows."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
