"""torch.compile of the UNet, and whether the gradient that it leaves is the right one."""

from argparse import Namespace
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, send_to_device
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from ..errors import RunError, one_line
from .checkpoints import unwrap

logger = get_logger(__name__)

# Of the norm of the gradient, that the two may differ by: the fault that is known takes 0.6 of it, bfloat16 0.02 with random
# weights, and more with trained ones, whose loss is a small difference of large numbers.
TOLERANCE = 0.2


def compile_unet(
    args: Namespace,
    accelerator: Accelerator,
    models: Mapping[str, nn.Module],
    loader: DataLoader,
    loss: Callable[[dict], Tensor],
) -> None:
    """Compiles the UNet, if `--torch_compile` asks for that, and refuses what a compiler makes of the models if it is wrong.

    Names of weights stay, for it is compiled in place. What accelerate's own configuration has compiled is looked at, too.
    """
    backend = accelerator.state.dynamo_plugin.backend
    if not args.torch_compile and backend == DynamoBackend.NO:
        return
    # torch 2.13 gets the gradient before an upsampler wrong where it may change memory formats; on a GPU nobody has looked.
    if accelerator.device.type == "cpu":
        torch._inductor.config.layout_optimization = False
    torch._inductor.config.fallback_random = True  # dropout draws what it draws without a compiler
    if args.torch_compile:
        unwrap(accelerator, models["unet"]).compile()
    asked = "--torch_compile" if args.torch_compile else f"accelerate's dynamo_backend {backend.value.lower()}"
    logger.info("Compiling, and comparing a gradient with that of the plain models; this takes minutes.")
    try:
        errors = [
            gradient_error(accelerator, models, lambda size=size: loss(example(accelerator, loader, size)))
            for size in batch_sizes(args, accelerator.num_processes, len(loader.dataset))
        ]
    except TorchDynamoException as failure:
        raise RunError(f"{asked}: nothing can be compiled here, leave it out: {one_line(failure)}") from failure
    for error in (error for error in errors if not error <= TOLERANCE):
        raise RunError(
            f"{asked}: PyTorch {torch.__version__} compiles a gradient that is off by {error:.0%} of its norm. Leave it out, "
            "or take another version of PyTorch."
        )


def batch_sizes(args: Namespace, processes: int, photos: int) -> list[int]:
    """Those of an epoch, the full one last: from the second on, what is compiled is for all.

    Several processes have full batches alone: accelerate fills them up.
    """
    if processes > 1:
        return [args.train_batch_size]
    return sorted({photos % args.train_batch_size, min(args.train_batch_size, photos)} - {0})


def example(accelerator: Accelerator, loader: DataLoader, size: int) -> dict:
    """A batch as the loader makes them, without its order being drawn."""
    return send_to_device(loader.collate_fn([loader.dataset.dataset[0]] * size), accelerator.device)


def gradient_error(accelerator: Accelerator, models: Mapping[str, nn.Module], loss: Callable[[], Tensor]) -> float:
    """||g - g'|| / ||g||, g the gradient of the loss and g' what compiled code makes of it, at equal random numbers.

    One is taken from the other where gradients add up, so that no memory but theirs is needed. It leaves the models in
    training, without gradients, and the random states of CPU and CUDA as they were. Where g is 0 or not finite there is
    nothing to compare, and 0 comes back: the training that follows has its own words for that.
    """
    parameters = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    scale = 1.0 if accelerator.scaler is None else 2.0**10  # of small gradients in float16

    def add_gradient(factor: float) -> Tensor:
        with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
            torch.manual_seed(0)
            (factor * scale * loss()).backward()
        return get_total_norm([p.grad for p in parameters if p.grad is not None])

    for model in models.values():
        model.train()
    with torch.compiler.set_stance("force_eager"):
        norm = add_gradient(1.0)
    error = (add_gradient(-1.0) / norm).item() if 0 < norm < torch.inf else 0.0
    for parameter in parameters:
        parameter.grad = None
    return error
