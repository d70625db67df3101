"""Objective, optimizer and the arithmetic of steps, as in the official scripts."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from accelerate.logging import get_logger
from diffusers import EDMEulerScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LRScheduler

from ..errors import RunError

logger = get_logger(__name__)


def check_prediction_type(scheduler) -> None:
    """Refuses a model that predicts what no loss here knows."""
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise RunError(f"The scheduler predicts {scheduler.config.prediction_type}; supported: epsilon, v_prediction.")


def diffusion_target(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict: the noise, or the velocity of a v-prediction model."""
    check_prediction_type(scheduler)
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


def min_snr_weights(scheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Min-SNR weight of each sample, (B,): min(snr, gamma) / snr, over snr + 1 for v-prediction (arXiv 2303.09556)."""
    snr = compute_snr(scheduler, timesteps)
    divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    return snr.clamp(max=gamma) / divisor


def dreambooth_loss(
    prediction: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    prior_weight: float | None = None,
    noise_weights: Tensor | None = None,
) -> Tensor:
    """Mean squared error in float32; of a batch with class images, instance loss + prior_weight * class loss.

    Args:
        prediction, target: (B, C, H, W); with a prior weight the second half of B is class images.
        weights: (B,), of each sample for Min-SNR. The class half goes without.
        prior_weight: `None` for a batch without class images.
        noise_weights: (B, 1, 1, 1), of each sample for its noise level, in both halves, as EDM training has them.
    """
    errors = mse_loss(prediction.float(), target.float(), reduction="none")
    if noise_weights is not None:
        errors = noise_weights.float() * errors
    if prior_weight is not None:
        errors, prior_errors = errors.chunk(2)
    if weights is None:
        loss = errors.mean()
    else:
        loss = (errors.mean(dim=list(range(1, errors.ndim))) * weights[: len(errors)]).mean()
    if prior_weight is not None:
        loss = loss + prior_weight * prior_errors.mean()
    return loss


def edm_input(scheduler, noisy: Tensor, sigmas: Tensor) -> Tensor:
    """The noisy latents (B, C, H, W) scaled to unit variance for the UNet; sigmas are (B, 1, 1, 1)."""
    if isinstance(scheduler, EDMEulerScheduler):
        return scheduler.precondition_inputs(noisy, sigmas)
    return noisy / ((sigmas**2 + 1) ** 0.5)


def edm_denoised(scheduler, prediction: Tensor, noisy: Tensor, sigmas: Tensor) -> Tensor:
    """The clean latents that the UNet's output stands for."""
    if isinstance(scheduler, EDMEulerScheduler):
        return scheduler.precondition_outputs(noisy, prediction, sigmas)
    check_prediction_type(scheduler)
    if scheduler.config.prediction_type == "v_prediction":
        return prediction * (-sigmas / (sigmas**2 + 1) ** 0.5) + (noisy / (sigmas**2 + 1))
    return prediction * (-sigmas) + noisy


def create_lora_optimizer(
    args: Namespace, adapters: Mapping[str, list[nn.Parameter]], fused: bool
) -> torch.optim.Optimizer:
    """The optimizer of `--optimizer` over adapters; those of text encoders have a rate and decay of their own."""
    text_encoders = [parameters for name, parameters in adapters.items() if name != "unet"]
    name = args.optimizer.lower()
    if name not in ("adamw", "prodigy"):
        logger.warning(f"--optimizer {args.optimizer} is not known (AdamW, prodigy): using AdamW.")
    text_lr = args.text_encoder_lr or args.learning_rate
    if name == "prodigy":
        if args.learning_rate <= 0.1:
            logger.warning(f"Prodigy finds the rate itself: use --learning_rate 1, not {args.learning_rate}.")
        if args.text_encoder_lr != args.learning_rate and text_encoders:
            logger.warning("Prodigy has one rate for all: --text_encoder_lr is not used.")
        text_lr = args.learning_rate
    groups = [{"params": adapters["unet"], "lr": args.learning_rate}] + [
        {"params": parameters, "lr": text_lr, "weight_decay": args.adam_weight_decay_text_encoder}
        for parameters in text_encoders
    ]
    if name != "prodigy":
        return create_adamw(args, groups, fused)
    if args.use_8bit_adam:
        logger.warning("--use_8bit_adam is for AdamW only: not used.")
    from prodigyopt import Prodigy

    return Prodigy(
        groups,
        betas=(args.adam_beta1, args.adam_beta2),
        beta3=args.prodigy_beta3,
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        decouple=args.prodigy_decouple,
        use_bias_correction=args.prodigy_use_bias_correction,
        safeguard_warmup=args.prodigy_safeguard_warmup,
    )


def create_adamw(
    args: Namespace, parameters: Sequence[nn.Parameter] | Sequence[dict], fused: bool
) -> torch.optim.Optimizer:
    """AdamW, all of a step in one kernel if `fused`, or bitsandbytes' 8-bit one, over parameters or groups of them."""
    optimizer_class: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as optimizer_class
    elif fused:
        optimizer_class = partial(torch.optim.AdamW, fused=True)
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
