"""torch.compile of the UNet, and whether the gradient that it leaves is the right one."""

import random
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

from .arguments import RunError, one_line
from .checkpoints import unwrap

logger = get_logger(__name__)

# Of the norm of the gradient, that the difference of the two may have: bfloat16 takes 0.02, the faults that are known 0.3.
TOLERANCE = 0.1


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
    # torch 2.13 gets the gradient before an upsampler wrong where it changes memory formats (seen on a CPU).
    torch._inductor.config.layout_optimization = accelerator.device.type != "cpu"
    torch._inductor.config.fallback_random = True  # dropout draws what it draws without a compiler
    if args.torch_compile:
        unwrap(accelerator, models["unet"]).compile()
    asked = "--torch_compile" if args.torch_compile else f"accelerate's dynamo_backend {backend.value.lower()}"
    logger.info("Compiling, and comparing the gradient of one batch with that of the plain models; this takes minutes.")
    try:
        error = gradient_error(accelerator, models, lambda: loss(example(args, accelerator, loader)))
    except TorchDynamoException as failure:
        raise RunError(f"{asked}: nothing can be compiled here, leave it out: {one_line(failure)}") from failure
    if not error <= TOLERANCE:
        raise RunError(
            f"{asked}: PyTorch {torch.__version__} compiles a gradient that is off by {error:.0%} of its norm. Leave it out, "
            "or take another version of PyTorch."
        )


def example(args: Namespace, accelerator: Accelerator, loader: DataLoader) -> dict:
    """A batch of the loader's shape, without its order being drawn."""
    photos = loader.dataset.dataset
    return send_to_device(
        loader.collate_fn([photos[0]] * min(args.train_batch_size, len(photos))), accelerator.device
    )


def gradient_error(accelerator: Accelerator, models: Mapping[str, nn.Module], loss: Callable[[], Tensor]) -> float:
    """||g - g'|| / ||g||, g the gradient of the loss and g' what compiled code makes of it, at equal random numbers.

    One is taken from the other where gradients add up, so that no memory but theirs is needed. Random states and
    gradients are then as before.
    """
    parameters = [p for model in models.values() for p in model.parameters() if p.requires_grad]
    scale = 1.0 if accelerator.scaler is None else 2.0**10  # of small gradients in float16

    def add_gradient(factor: float) -> float:
        with torch.random.fork_rng([accelerator.device] if accelerator.device.type == "cuda" else []):
            torch.manual_seed(0)
            (factor * scale * loss()).backward()
        return get_total_norm([p.grad for p in parameters if p.grad is not None]).item()

    state = random.getstate()
    for model in models.values():
        model.train()
    with torch.compiler.set_stance("force_eager"):
        norm = add_gradient(1.0)
    error = add_gradient(-1.0) / norm
    for parameter in parameters:
        parameter.grad = None
    random.setstate(state)
    return error
