"""Tensors that FSDP2 (`torch.distributed.fsdp.fully_shard`) has divided among processes."""

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def summed(sums: Tensor, like: Tensor) -> Tensor:
    """Sums over local parts become those over the whole, on all processes that share `like`, with one all-reduce."""
    if not isinstance(like, DTensor):
        return sums
    placements = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    return DTensor.from_local(sums, like.device_mesh, placements).full_tensor()


def reshard(module: nn.Module) -> None:
    """Divides again what FSDP2 keeps whole from a forward pass until its backward, which may never come."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
