"""Compute the loss, and create the optimizer and the learning rate schedule, as the official scripts do."""

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


def diffusion_target(scheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet should predict: the noise, or the velocity of a v-prediction model."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    return noise


def min_snr_weights(scheduler, timesteps: Tensor, gamma: float) -> Tensor:
    """Return Min-SNR weights (B,): min(snr, gamma) / snr, or / (snr + 1) for v-prediction (arXiv 2303.09556)."""
    snr = compute_snr(scheduler, timesteps)
    divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    return snr.clamp(max=gamma) / divisor


def dreambooth_loss(
    model_pred: Tensor,
    target: Tensor,
    *,
    snr_weights: Tensor | None = None,
    prior_loss_weight: float | None = None,
    sigma_weights: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error in float32, or instance loss + prior_loss_weight * class loss.

    Args:
        model_pred, target: (B, C, H, W); with `prior_loss_weight` the second half of B is class images.
        snr_weights: Min-SNR weights (B,); they do not apply to class images.
        prior_loss_weight: `None` for a batch without class images.
        sigma_weights: EDM's weights (B, 1, 1, 1) by noise level, for all images.
    """
    errors = mse_loss(model_pred.float(), target.float(), reduction="none")
    if sigma_weights is not None:
        errors = sigma_weights.float() * errors
    if prior_loss_weight is not None:
        errors, prior_errors = errors.chunk(2)
    if snr_weights is None:
        loss = errors.mean()
    else:
        loss = (errors.mean(dim=list(range(1, errors.ndim))) * snr_weights[: len(errors)]).mean()
    if prior_loss_weight is not None:
        loss = loss + prior_loss_weight * prior_errors.mean()
    return loss


def edm_input(scheduler, noisy_latents: Tensor, sigmas: Tensor) -> Tensor:
    """Scale noisy latents (B, C, H, W) to unit variance for the UNet; sigmas are (B, 1, 1, 1)."""
    if isinstance(scheduler, EDMEulerScheduler):
        return scheduler.precondition_inputs(noisy_latents, sigmas)
    return noisy_latents / ((sigmas**2 + 1) ** 0.5)


def edm_denoised(scheduler, model_pred: Tensor, noisy_latents: Tensor, sigmas: Tensor) -> Tensor:
    """Return the clean latents that the UNet's output stands for."""
    if isinstance(scheduler, EDMEulerScheduler):
        return scheduler.precondition_outputs(noisy_latents, model_pred, sigmas)
    if scheduler.config.prediction_type == "v_prediction":
        return model_pred * (-sigmas / (sigmas**2 + 1) ** 0.5) + (noisy_latents / (sigmas**2 + 1))
    return model_pred * (-sigmas) + noisy_latents


def create_optimizer(args: Namespace, models: Mapping[str, nn.Module], fused: bool) -> torch.optim.Optimizer:
    """Create the optimizer of `--optimizer`, AdamW without that flag, over the weights that require gradients.

    In the SDXL script the text encoders have a learning rate and a weight decay of their own.
    """
    trainable = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    if "optimizer" not in args:
        return create_adamw(args, [p for parameters in trainable.values() for p in parameters], fused)
    text_encoders = [parameters for name, parameters in trainable.items() if name != "unet"]
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
    groups = [{"params": trainable["unet"], "lr": args.learning_rate}] + [
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
    """Create AdamW, in its fused form or bitsandbytes' 8-bit one, over parameters or groups of them.

    Raises:
        RunError: A learning rate makes a first step that float32 cannot hold.
    """
    for name in ("learning_rate", "text_encoder_lr"):
        if vars(args).get(name, 0) / (1 - args.adam_beta1) > torch.finfo(torch.float32).max:
            raise RunError(f"--{name} {vars(args)[name]:g} is too large: AdamW divides it by 1 - adam_beta1.")
    optimizer_class: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, fused=True if fused else None)
    if args.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        optimizer_class = AdamW8bit
    return optimizer_class(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def scale_learning_rate(args: Namespace, num_processes: int) -> None:
    """With `--scale_lr`, multiply `args.learning_rate` by the number of photos in an update."""
    if args.scale_lr:
        args.learning_rate *= args.gradient_accumulation_steps * args.train_batch_size * num_processes


def create_lr_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, num_processes: int) -> LRScheduler:
    """Create the learning rate schedule; accelerate steps it once for each process."""
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * num_processes,
        num_training_steps=args.max_train_steps * num_processes,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def plan_steps(args: Namespace, batches: int) -> int:
    """Fill in `args.max_train_steps` and `args.num_train_epochs`; return the updates in an epoch of `batches`."""
    num_update_steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    args.num_train_epochs = math.ceil(args.max_train_steps / num_update_steps_per_epoch)
    return num_update_steps_per_epoch
