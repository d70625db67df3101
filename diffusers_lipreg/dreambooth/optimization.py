"""Objective, optimizer and the arithmetic of steps, as in the official scripts."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LRScheduler

from .arguments import RunError


def diffusion_target(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict: the noise, or the velocity of a v-prediction model."""
    if scheduler.config.prediction_type == "epsilon":
        return noise
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise RunError(f"The scheduler predicts {scheduler.config.prediction_type}; supported: epsilon, v_prediction.")


def min_snr_weights(scheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of each sample, (B,): min(snr, gamma) / snr, over snr + 1 for v-prediction (arXiv 2303.09556)."""
    snr = compute_snr(scheduler, timesteps)
    divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    return snr.clamp(max=gamma) / divisor


def dreambooth_loss(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, prior_weight: float | None = None
) -> Tensor:
    """Mean squared error in float32; of a batch with class images, instance loss + prior_weight * class loss.

    Args:
        prediction, target: (B, C, H, W); with a prior weight the second half of B is class images.
        weights: Of each sample in the instance half, for Min-SNR. The class half has none.
        prior_weight: `None` for a batch without class images.
    """
    prediction, target = prediction.float(), target.float()
    if prior_weight is not None:
        (prediction, prior_prediction), (target, prior_target) = prediction.chunk(2), target.chunk(2)
    if weights is None:
        loss = mse_loss(prediction, target)
    else:
        errors = mse_loss(prediction, target, reduction="none")
        loss = (errors.mean(dim=list(range(1, errors.ndim))) * weights[: len(errors)]).mean()
    if prior_weight is not None:
        loss = loss + prior_weight * mse_loss(prior_prediction, prior_target)
    return loss


def create_adamw(args: Namespace, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' 8-bit one."""
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW
    if args.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        except ImportError as error:
            raise RunError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def scale_learning_rate(args: Namespace, num_processes: int) -> None:
    """With `--scale_lr`, multiplies `args.learning_rate` by the photos that make up an update."""
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * num_processes


def create_lr_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, num_processes: int) -> LRScheduler:
    """diffusers' schedule of that name. Prepared by accelerate it is stepped once for each process."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * num_processes,
        num_training_steps=args.max_train_steps * num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def plan_steps(args: Namespace, batches: int) -> int:
    """Fills in `args.max_train_steps` and `args.num_train_epochs`; returns the updates in an epoch of `batches`."""
    updates_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * updates_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / updates_per_epoch)
    return updates_per_epoch
