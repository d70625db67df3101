#!/usr/bin/env python
"""DreamBooth for Stable Diffusion 1.x/2.x with a penalty on the drift from the pretrained weights.

Every flag of diffusers' official train_dreambooth.py, and five for the penalty. The paper's configuration:

    accelerate launch train_dreambooth_lipreg.py \
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir sks-dog \
      --train_batch_size 1 --learning_rate 2e-6 --lr_warmup_steps 0 --max_train_steps 1000 --push_to_hub
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import file_exists
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from diffusers_lipreg import TeacherSnapshotCallback
from diffusers_lipreg.dreambooth import (
    arguments,
    checkpoints,
    data,
    hub,
    optimization,
    prior,
    runtime,
    text,
    validation,
)
from diffusers_lipreg.drift import REDUCTIONS

logger = get_logger(__name__)


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = arguments.OneLineParser(description="DreamBooth for Stable Diffusion without distributional drift.")
    arguments.add_shared_arguments(
        parser, output_dir="dreambooth-model", resolution=512, learning_rate=5e-6, weight_decay=1e-2
    )
    arguments.add_sd_arguments(parser)
    arguments.add_lipreg_arguments(parser, weight=500.0, reduction="tensor_mean", reductions=REDUCTIONS)
    args = arguments.parse(parser, input_args)
    arguments.check_sd(parser, args)
    return args


class Models:
    """The pipeline's parts that training needs."""

    def __init__(self, args: argparse.Namespace) -> None:
        source = {"pretrained_model_name_or_path": args.pretrained_model_name_or_path, "revision": args.revision}
        weights = {**source, "variant": args.variant}
        text_encoder_class = text.text_encoder_class(args.pretrained_model_name_or_path, args.revision)
        if args.tokenizer_name:
            self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name, revision=args.revision)
        else:
            self.tokenizer = AutoTokenizer.from_pretrained(**source, subfolder="tokenizer")
        self.noise_scheduler = DDPMScheduler.from_pretrained(**source, subfolder="scheduler")
        self.text_encoder = text_encoder_class.from_pretrained(**weights, subfolder="text_encoder")
        # Pipelines that diffuse pixels, such as DeepFloyd IF, have no VAE.
        self.vae = AutoencoderKL.from_pretrained(**weights, subfolder="vae") if has_vae(args) else None
        self.unet = UNet2DConditionModel.from_pretrained(**weights, subfolder="unet")
        self.unet_channels = self.unet.config.in_channels
        self.train_text_encoder = args.train_text_encoder

        for model in (self.text_encoder, self.vae):
            if model is not None:
                model.requires_grad_(False)
        for model in self.trained.values():
            model.float().requires_grad_(True)
        if args.enable_xformers_memory_efficient_attention:
            self.unet.enable_xformers_memory_efficient_attention()
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if args.train_text_encoder:
                self.text_encoder.gradient_checkpointing_enable()

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The models whose weights change, by name."""
        return {name: getattr(self, name) for name in ("unet", *(["text_encoder"] if self.train_text_encoder else []))}

    def prepare(self, accelerator: Accelerator, *others: Any) -> Sequence[Any]:
        """Hands the trained models and the others to the accelerator, moves the frozen ones; returns the others."""
        trained = list(self.trained)
        prepared = accelerator.prepare(*self.trained.values(), *others)
        for name, model in zip(trained, prepared, strict=False):
            setattr(self, name, model)
        for name in {"vae", "text_encoder"} - set(trained):
            if getattr(self, name) is not None:
                getattr(self, name).to(accelerator.device, dtype=runtime.weight_dtype(accelerator))
        return prepared[len(trained) :]


def has_vae(args: argparse.Namespace) -> bool:
    if Path(args.pretrained_model_name_or_path).is_dir():
        return Path(args.pretrained_model_name_or_path, "vae", "config.json").is_file()
    return file_exists(args.pretrained_model_name_or_path, "vae/config.json", revision=args.revision)


def encode_images(vae: AutoencoderKL | None, pixels: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, H/8, W/8) of pixels (B, 3, H, W); the pixels themselves without a VAE."""
    if vae is None:
        return pixels
    return vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor


def encode_prompts(
    args: argparse.Namespace, models: Models, device: torch.device
) -> tuple[text.TextStates, dict[str, Any]]:
    """The text states of a batch by its size, and what a pipeline takes for the validation prompt."""
    options = {"max_length": args.tokenizer_max_length, "use_mask": args.text_encoder_use_attention_mask}
    prompts = [args.instance_prompt, *([args.class_prompt] if args.with_prior_preservation else [])]
    encoder = text.Prompts(models.tokenizer, prompts, **options)

    def states(batch_size: int) -> torch.Tensor:
        return encoder.encode(models.text_encoder, batch_size)

    if args.train_text_encoder:
        return states, {"prompt": args.validation_prompt}
    if not args.pre_compute_text_embeddings:
        # Prompts and encoder never change. One entry a size: other matrix shapes may round otherwise.
        return cache(states), {"prompt": args.validation_prompt}
    of_batch = encoder.precompute(models.text_encoder, device)
    validation_prompt = {
        name: text.Prompts(models.tokenizer, [prompt], **options).precompute(models.text_encoder, device)(1)
        for name, prompt in (("prompt_embeds", args.validation_prompt or ""), ("negative_prompt_embeds", ""))
    }
    models.text_encoder = models.tokenizer = None
    return of_batch, validation_prompt


def take_teachers(args: argparse.Namespace, trained: dict[str, nn.Module]) -> dict[str, TeacherSnapshotCallback]:
    """The penalty of each trained model, with its teacher; none where the weight is 0."""
    weights = {"unet": args.lipreg_weight, "text_encoder": args.lipreg_text_encoder_weight}
    penalties = {}
    for name in trained:
        if weights[name] > 0:
            penalties[name] = TeacherSnapshotCallback(
                weights[name],
                args.lipreg_reduction,
                dtype=runtime.DTYPES[args.lipreg_teacher_dtype],
                device=args.lipreg_teacher_device,
                prefix="" if name == "unet" else f"{name}_",
            )
            penalties[name].on_train_begin(model=trained[name])
    return penalties


def validate(
    args: argparse.Namespace, accelerator: Accelerator, models: Models, prompt: dict[str, Any], step: int
) -> list[Image.Image]:
    """Samples from the weights as they are and hands the images to the trackers."""
    text_encoder = None if models.text_encoder is None else checkpoints.unwrap(accelerator, models.text_encoder)
    pipeline = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        unet=checkpoints.unwrap(accelerator, models.unet),
        text_encoder=text_encoder,
        tokenizer=models.tokenizer,
        revision=args.revision,
        variant=args.variant,
        dtype=runtime.weight_dtype(accelerator),
        **({} if models.vae is None else {"vae": models.vae}),
    )
    validation.set_scheduler(pipeline, args.validation_scheduler)
    images = validation.sample_images(args, accelerator, pipeline, prompt)
    validation.log_images(accelerator, images, args.validation_prompt, step)
    return images


def save(args: argparse.Namespace, accelerator: Accelerator, models: Models) -> DiffusionPipeline:
    """Writes the pipeline with the trained weights into the output folder."""
    trained = {name: checkpoints.unwrap(accelerator, model) for name, model in models.trained.items()}
    if args.skip_save_text_encoder:
        trained["text_encoder"] = None
    pipeline = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, **trained
    )
    validation.set_scheduler(pipeline)
    pipeline.save_pretrained(args.output_dir)
    return pipeline


def publish(
    args: argparse.Namespace,
    repo_id: str,
    pipeline: DiffusionPipeline,
    penalties: dict[str, TeacherSnapshotCallback],
    images: list[Image.Image],
) -> None:
    """Pushes the saved pipeline with its model card to the Hub."""
    family = "stable-diffusion" if isinstance(pipeline, StableDiffusionPipeline) else "if"
    tags = ["text-to-image", "dreambooth", "diffusers-training", family, f"{family}-diffusers", "lipschitz-drift"]
    facts = {}
    for penalty in penalties.values():
        facts[f"lipreg_{penalty.prefix}weight"] = f"{penalty.weight:g}"
        facts["lipreg_reduction"] = penalty.reduction
        facts[f"{penalty.prefix}drift_relative"] = f"{penalty.logs[penalty.prefix + 'drift_relative']:.3g}"
    hub.save_card(hub.model_card(args, repo_id, facts, tags, images), images, args.output_dir)
    hub.upload(args, repo_id)


def denoising_loss(
    args: argparse.Namespace, models: Models, pixels: torch.Tensor, text_states: text.TextStates
) -> torch.Tensor:
    """|| eps - eps_theta(z_t, t, c) ||^2 of one batch at random timesteps, as the flags shape it."""
    scheduler = models.noise_scheduler
    latents = pixels
    if models.vae is not None:
        latents = models.vae.encode(pixels).latent_dist.sample() * models.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    if args.offset_noise:
        noise = noise + 0.1 * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if models.unet_channels == 2 * latents.shape[1]:  # an upscaler: it sees the image to improve beside the noisy one
        noisy = torch.cat([noisy, noisy], dim=1)
    labels = timesteps if args.class_labels_conditioning == "timesteps" else None
    prediction = models.unet(noisy, timesteps, text_states(len(latents)), class_labels=labels, return_dict=False)[0]
    if prediction.shape[1] == 6:  # mean and variance: only the mean is trained
        prediction = prediction.chunk(2, dim=1)[0]
    return optimization.dreambooth_loss(
        prediction,
        optimization.diffusion_target(scheduler, latents, noise, timesteps),
        None if args.snr_gamma is None else optimization.min_snr_weights(scheduler, timesteps, args.snr_gamma),
        args.prior_loss_weight if args.with_prior_preservation else None,
    )


def main(args: argparse.Namespace) -> None:
    accelerator = runtime.start_accelerator(args)
    instance_images = data.find_instance_images(args.instance_data_dir)
    runtime.check_pipeline(args.pretrained_model_name_or_path, args.revision)
    runtime.check_output_dir(args.output_dir)
    checkpoint = checkpoints.find(args.output_dir, args.resume_from_checkpoint)
    repo_id = hub.create_repository(args) if args.push_to_hub and accelerator.is_main_process else None
    class_images = prior.ensure_class_images(args, accelerator) if args.with_prior_preservation else []

    models = Models(args)
    text_states, validation_prompt = encode_prompts(args, models, accelerator.device)
    dataset = data.DreamBoothDataset(
        instance_images, class_images, data.PhotoTransform(args.resolution, args.center_crop)
    )
    sampler = data.ResumableBatchSampler(dataset, args.train_batch_size)
    loader = DataLoader(
        dataset, batch_sampler=sampler, collate_fn=data.collate, num_workers=args.dataloader_num_workers
    )
    updates_per_epoch = optimization.plan_steps(args, math.ceil(len(loader) / accelerator.num_processes))
    optimization.scale_learning_rate(args, accelerator.num_processes)
    parameters = [parameter for model in models.trained.values() for parameter in model.parameters()]
    optimizer = optimization.create_adamw(args, parameters)
    lr_scheduler = optimization.create_lr_scheduler(args, optimizer, accelerator.num_processes)
    checkpoints.save_models_by_name(accelerator, models.trained)
    optimizer, loader, lr_scheduler = models.prepare(accelerator, optimizer, loader, lr_scheduler)
    accelerator.init_trackers("dreambooth", config=runtime.tracker_config(args))

    penalties = take_teachers(args, models.trained)  # the pretrained model: taken before a checkpoint is loaded
    step = 0 if checkpoint is None else checkpoints.load(accelerator, sampler, checkpoint, updates_per_epoch)
    first_epoch = step // updates_per_epoch
    if step >= args.max_train_steps:
        logger.info(f"{checkpoint} has all {args.max_train_steps} updates: nothing is left to train.")
        first_epoch = args.num_train_epochs
    images: list[Image.Image] = []
    progress = tqdm(
        desc="Steps", initial=step, total=args.max_train_steps, disable=not accelerator.is_local_main_process
    )
    for _ in range(first_epoch, args.num_train_epochs):
        for model in models.trained.values():
            model.train()
        for batch in loader:
            with accelerator.accumulate(*models.trained.values()):
                pixels = batch["pixel_values"].to(runtime.weight_dtype(accelerator))
                loss = denoising_loss(args, models, pixels, text_states)
                runtime.check_finite(loss, step)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    for name, penalty in penalties.items():  # the new idea: the gradient of weight * drift
                        penalty.on_pre_optimizer_step(
                            model=models.trained[name], loss_scale=runtime.loss_scale(accelerator)
                        )
                    accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad(set_to_none=args.set_grads_to_none)

            if accelerator.sync_gradients:
                step += 1
                progress.update(1)
                if step % args.checkpointing_steps == 0:
                    checkpoints.save(accelerator, sampler, args.output_dir, step, args.checkpoints_total_limit)
                if args.validation_prompt is not None and step % args.validation_steps == 0:
                    if accelerator.is_main_process:
                        images = validate(args, accelerator, models, validation_prompt, step)
            logs = {"loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]}
            for penalty in penalties.values():
                penalty.on_log(logs=logs)
            progress.set_postfix(**logs)
            accelerator.log(logs, step=step)
            if step >= args.max_train_steps:
                break

    accelerator.wait_for_everyone()
    for name, penalty in penalties.items():
        penalty.on_train_end(model=models.trained[name])
        logger.info(f"Final drift: {penalty.logs}")
    if accelerator.is_main_process:
        pipeline = save(args, accelerator, models)
        if args.push_to_hub:
            publish(args, repo_id, pipeline, penalties, images)
    accelerator.end_training()


if __name__ == "__main__":
    runtime.run(main, parse_args())
