#!/usr/bin/env python
"""DreamBooth with LoRA for Stable Diffusion XL, with a penalty on the drift from the pretrained model.

Every flag of diffusers' official train_dreambooth_lora_sdxl.py, and those for the penalty. The paper's configuration:

    python train_dreambooth_lora_lipreg_sdxl.py \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
      --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir sks-dog-lora \
      --train_batch_size 1 --gradient_accumulation_steps 4 --learning_rate 5e-4 --lr_warmup_steps 0 \
      --max_train_steps 500 --mixed_precision fp16 --push_to_hub
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.logging import get_logger
from accelerate.utils import release_memory
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from diffusers_lipreg import AdapterSnapshot, Denoiser
from diffusers_lipreg.dreambooth import (
    arguments,
    checkpoints,
    data,
    hub,
    lora,
    moments,
    optimization,
    preflight,
    prior,
    resumable,
    run_config,
    setup,
    text,
    trackers,
    validation,
)
from diffusers_lipreg.dreambooth.checkpoints import Checkpoints
from diffusers_lipreg.dreambooth.interruption import GracefulExit, guarded, run_script
from diffusers_lipreg.dreambooth.models import Base, loading, text_encoder_class
from diffusers_lipreg.dreambooth.photos import find_photos
from diffusers_lipreg.errors import OneLineParser, RunError
from diffusers_lipreg.probe import PROMPTS
from diffusers_lipreg.regularizer import DriftRegularizer

logger = get_logger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="DreamBooth LoRA for SDXL without distributional drift.")
    arguments.add_shared_arguments(
        parser, output_dir="lora-dreambooth-model", resolution=1024, learning_rate=1e-4, weight_decay=1e-4
    )
    arguments.add_sdxl_arguments(parser)
    arguments.add_lipreg_arguments(parser, weight=1e-6, reduction="factors", reductions=AdapterSnapshot.reductions)
    return parser


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = arguments.parse(parser, input_args)
    arguments.check_sdxl(parser, args)
    return args


class Models:
    """SDXL's parts, frozen, with adapters on those that are trained."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, base: Base) -> None:
        dtype = setup.weight_dtype(accelerator)
        self.tokens = text.read_once([base.load(name) for name in ("tokenizer", "tokenizer_2")])
        self.noise_scheduler = base.load("scheduler", noise_scheduler_class(args, base))
        self.edm = not isinstance(self.noise_scheduler, DDPMScheduler)
        for name in ("text_encoder", "text_encoder_2"):
            encoder = base.load(name, text_encoder_class(base.folders[name]))
            setattr(self, name, encoder.requires_grad_(False).to(accelerator.device, dtype=dtype))
        self.vae = load_vae(base).to(accelerator.device)
        self.unet = base.load("unet")
        self.unet.requires_grad_(False).to(accelerator.device, dtype=dtype)
        if args.enable_xformers_memory_efficient_attention:
            self.unet.enable_xformers_memory_efficient_attention()
        self.trained_names = list(lora.TARGETS) if args.train_text_encoder else ["unet"]
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if args.train_text_encoder:
                for encoder in self.text_encoders:
                    encoder.gradient_checkpointing_enable()
        lora.add_adapters(args, self.trained, alpha=args.rank)

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [self.text_encoder, self.text_encoder_2]

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The models with adapters, by name."""
        return {name: getattr(self, name) for name in self.trained_names}


def load_vae(base: Base) -> AutoencoderKL:
    """Always in float32, for the VAE of SDXL overflows in float16."""
    return base.load("vae").requires_grad_(False).to(dtype=torch.float32)


def noise_scheduler_class(args: argparse.Namespace, base: Base) -> type:
    """EDM's where the model was trained with it, Euler's for training in EDM's terms, else DDPM's."""
    if "EDM" in base.classes["scheduler"].__name__:
        if args.snr_gamma is not None:
            raise RunError("--snr_gamma has no meaning for a model trained with an EDM scheduler: leave it out.")
        return EDMEulerScheduler
    return EulerDiscreteScheduler if args.do_edm_style_training else DDPMScheduler


TextStates = Callable[[Sequence[str]], tuple[torch.Tensor, torch.Tensor]]


def encode_prompts(args: argparse.Namespace, models: Models, run_prompts: Sequence[str]) -> TextStates:
    """The text states of a batch by its prompts, which are some of the run's: instance rows first, then class rows.

    Frozen text encoders are run here for the last time, and let go.
    """
    if args.train_text_encoder:

        def encode(prompts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
            # The encoders as they are then: what DDP has put around them averages their gradients.
            return text.encode_sdxl(models.tokens, models.text_encoders, prompts)

    else:
        prompts = {*run_prompts, *([args.class_prompt] if args.with_prior_preservation else [])}
        known = {prompt: text.encode_sdxl(models.tokens, models.text_encoders, [prompt]) for prompt in sorted(prompts)}
        models.text_encoder = models.text_encoder_2 = None
        release_memory()

        def encode(prompts: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
            states, pooled = zip(*(known[prompt] for prompt in prompts), strict=True)
            return torch.cat(states), torch.cat(pooled)

    same = args.caption_column is None and len(set(run_prompts)) == 1  # then the official script encodes one row

    def text_states(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        different = tuple(prompts[:1] if same else prompts)
        if args.with_prior_preservation:
            different += (args.class_prompt,) * len(different)
        states, pooled = encode(different)
        rows = len(prompts) if same else 1
        return states.repeat_interleave(rows, dim=0), pooled.repeat_interleave(rows, dim=0)

    return text_states


def probe_denoiser(args: argparse.Namespace, models: Models, prompts: Sequence[str], dtype: torch.dtype) -> Denoiser:
    """The bare models as the probe calls them; call it while they are bare, and the text encoders are there."""
    unet, encode = models.unet, partial(text.encode_sdxl, models.tokens, models.text_encoders)
    if not args.train_text_encoder:  # holds no encoder
        encode = {(prompt,): encode([prompt]) for prompt in prompts}.__getitem__
    time_ids = [
        float(args.resolution),
        float(args.resolution),
        0.0,
        0.0,
        float(args.resolution),
        float(args.resolution),
    ]

    def denoise(noisy: torch.Tensor, timestep: torch.Tensor, texts: list[str]) -> torch.Tensor:
        alone = [encode((prompt,)) for prompt in texts]
        states, pooled = (torch.cat(parts).to(dtype) for parts in zip(*alone, strict=True))
        conditions = {"time_ids": noisy.new_tensor([time_ids] * len(noisy), dtype=dtype), "text_embeds": pooled}
        return unet(noisy.to(dtype), timestep, states, added_cond_kwargs=conditions, return_dict=False)[0]

    return Denoiser(denoise, list(models.trained.values()))


def draw_latents(
    args: argparse.Namespace, vae: AutoencoderKL, batch: dict[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    """Latents (B, 4, H/8, W/8) of a batch, of the mean and scale that the UNet was trained on."""
    latents = moments.draw(vae, batch)
    if vae.config.latents_mean is not None and vae.config.latents_std is not None:
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(latents)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return ((latents - mean) * vae.config.scaling_factor / std).to(dtype)
    latents = latents * vae.config.scaling_factor
    return latents.to(dtype) if args.pretrained_vae_model_name_or_path is None else latents


def denoising_loss(
    args: argparse.Namespace,
    models: Models,
    batch: dict[str, Any],
    text_states: TextStates,
    dtype: torch.dtype,
    prior_weight: float | None,
) -> torch.Tensor:
    """|| eps - eps_theta(z_t, t, c) ||^2 of one batch at random timesteps, or its counterpart in EDM's terms."""
    scheduler = models.noise_scheduler
    latents = draw_latents(args, models.vae, batch, dtype)
    noise = torch.randn_like(latents)
    steps = scheduler.config.num_train_timesteps
    if models.edm:
        indices = torch.randint(0, steps, (len(latents),))
        timesteps = scheduler.timesteps[indices].to(latents.device)
        sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1).to(latents)
    else:
        timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    states, pooled = text_states(batch["prompts"])
    prediction = models.unet(
        optimization.edm_input(scheduler, noisy, sigmas) if models.edm else noisy,
        timesteps,
        states,
        added_cond_kwargs={"time_ids": batch["time_ids"].to(latents.device, dtype), "text_embeds": pooled},
        return_dict=False,
    )[0]
    noise_weights = None
    if models.edm:
        prediction, target = optimization.edm_denoised(scheduler, prediction, noisy, sigmas), latents
        if not isinstance(scheduler, EDMEulerScheduler):
            noise_weights = sigmas**-2
    else:
        target = optimization.diffusion_target(scheduler, latents, noise, timesteps)
    return optimization.dreambooth_loss(
        prediction,
        target,
        None if args.snr_gamma is None else optimization.min_snr_weights(scheduler, timesteps, args.snr_gamma),
        prior_weight,
        noise_weights,
    )


def held_out_loss(
    args: argparse.Namespace, models: Models, batch: dict[str, Any], text_states: TextStates, dtype: torch.dtype
) -> torch.Tensor:
    """The denoising loss on crops that are not trained on; of the text states it needs the instance half."""

    def instance_states(prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states, pooled = text_states(prompts)
        return states[: len(prompts)], pooled[: len(prompts)]

    return denoising_loss(args, models, batch, instance_states, dtype, prior_weight=None)


def load_pipeline(base: Base, models: Models, dtype: torch.dtype, **parts: Any) -> DiffusionPipeline:
    """The base pipeline with parts exchanged, ready to sample."""
    pipeline = base.pipeline(dtype, vae=load_vae(base) if moments.dropped(models.vae) else models.vae, **parts)
    if not models.edm:
        validation.set_scheduler(pipeline, "DPMSolverMultistepScheduler")
    return pipeline


def save_weights(models: Mapping[str, nn.Module], folder: str) -> None:
    lora.save_adapters(StableDiffusionXLPipeline, folder, lora.adapter_weights(models))


@guarded
def main(args: argparse.Namespace, graceful_exit: GracefulExit) -> None:
    accelerator = setup.start_accelerator(args, DistributedDataParallelKwargs(find_unused_parameters=True))
    base = preflight.open_base(args, accelerator, sdxl=True)
    probe_prompts = preflight.probe_prompts(args, PROMPTS)
    photos = find_photos(args)
    output, checkpoint, repo_id = preflight.open_output(args, accelerator, base)
    config = run_config.start(args, base, checkpoint)
    with loading(args):
        class_images = prior.ensure_class_images(args, accelerator, base) if args.with_prior_preservation else []
        transform = data.PhotoTransform(
            args.resolution, args.center_crop, args.image_interpolation_mode, args.random_flip
        )
        images_to_encode = len(photos) * args.repeats + len(class_images)  # photos are cropped once in any case
        cached = moments.cacheable(args, images_to_encode, class_images, transform, has_vae=True)
        models = Models(args, accelerator, base)
    bare = models.trained
    dtype = setup.weight_dtype(accelerator)
    denoiser = probe_denoiser(args, models, probe_prompts, dtype)
    text_states = encode_prompts(args, models, [photo.prompt for photo in photos])
    dataset = data.PreparedPhotos(photos, args.repeats, class_images, transform)
    crops = {}
    if args.keep_best:
        pixels = data.held_out_crops([photo.open for photo in photos[:4]], args.resolution)
        time_ids = torch.tensor([[args.resolution, args.resolution, 0, 0, args.resolution, args.resolution]])
        crops = moments.of_crops(models.vae, pixels, accelerator.device)
        crops |= {"prompts": [photo.prompt for photo in photos[:4]], "time_ids": time_ids.repeat(len(pixels), 1)}
    layouts = moments.cache(args, accelerator, models.vae, dataset) if cached else None
    loader = resumable.make_loader(args, dataset, layouts)
    updates_per_epoch = optimization.plan_steps(args, math.ceil(len(loader) / accelerator.num_processes))
    optimization.scale_learning_rate(args, accelerator.num_processes)
    trainable = {name: [p for p in model.parameters() if p.requires_grad] for name, model in bare.items()}
    optimizer = optimization.create_lora_optimizer(args, trainable, setup.fuses_adamw(accelerator))
    parameters = [p for adapters in trainable.values() for p in adapters]
    preflight.check_disk(args, parameters)
    lr_scheduler = optimization.create_lr_scheduler(args, optimizer, accelerator.num_processes)
    checkpoints.write_models_with(accelerator, *lora.checkpoint_functions(StableDiffusionXLPipeline, bare))
    optimizer, loader, lr_scheduler = setup.prepare(
        accelerator, models, models.trained_names, optimizer, loader, lr_scheduler
    )
    saved = Checkpoints(args, accelerator, output, config, loader, lr_scheduler)
    regularizer = DriftRegularizer.from_args(  # of the adapters as they start: before a checkpoint is loaded
        args,
        accelerator,
        models.trained,
        lambda name: AdapterSnapshot(bare[name]),
        denoiser,
        models.noise_scheduler,
        data.latent_shape(models.vae, args.resolution),
        probe_prompts,
        subject_loss=partial(held_out_loss, args, models, crops, text_states, dtype),
        save_best=partial(saved.save_best, bare, save_weights),
    )
    step, epochs = saved.resume(checkpoint, updates_per_epoch, regularizer)
    prior_weight = args.prior_loss_weight if args.with_prior_preservation else None
    loss_of = partial(denoising_loss, args, models, text_states=text_states, dtype=dtype, prior_weight=prior_weight)
    playground = isinstance(models.noise_scheduler, EDMEulerScheduler)
    project = "dreambooth-lora-playground" if playground else "dreambooth-lora-sd-xl"
    trackers.start_trackers(args, accelerator, project)
    images: list[Image.Image] = []
    progress = tqdm(
        desc="Steps", initial=step, total=args.max_train_steps, disable=not accelerator.is_local_main_process
    )
    graceful_exit.defer("finishing this update and writing a checkpoint")
    for epoch in epochs:
        for model in models.trained.values():
            model.train()
        for batch in loader:
            with accelerator.accumulate(*models.trained.values()):
                loss = loss_of(batch)
                saved.check_finite(step, loss=loss)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    regularizer.add_gradient_()  # the new idea: + weight * d(drift)/d(theta)
                    saved.check_finite(step, gradient=accelerator.clip_grad_norm_(parameters, args.max_grad_norm))
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                step += 1
                progress.update(1)
                regularizer.after_step(step)
                stopping = graceful_exit.requested(accelerator)
                if stopping or step % args.checkpointing_steps == 0:
                    last = saved.save(step, regularizer)
            logs = {"loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]} | regularizer.logs
            progress.set_postfix(**logs)
            accelerator.log(logs, step=step)
            if accelerator.sync_gradients and stopping:
                progress.close()
                graceful_exit.exit(accelerator, last)
            if step >= args.max_train_steps:
                break
        if accelerator.is_main_process and args.validation_prompt is not None and epoch % args.validation_epochs == 0:
            parts = {name: getattr(models, name) for name in lora.TARGETS}
            live = {name: checkpoints.unwrap(accelerator, part) for name, part in parts.items() if part is not None}
            pipeline = load_pipeline(base, models, dtype, **live)
            images = validation.sample_images(
                args, accelerator, pipeline, {"prompt": args.validation_prompt}, steps=50
            )
            validation.log_images(accelerator, images, args.validation_prompt, step)

    progress.close()
    graceful_exit.defer("finishing the result")
    accelerator.wait_for_everyone()
    regularizer.finish()
    if accelerator.is_main_process:
        with saved.writing(args.output_dir):
            with output.result(partial(save_weights, bare)) as folder:
                if args.output_kohya_format:
                    lora.save_kohya(folder, lora.adapter_weights(bare))
    with hub.result_is_safe(output, repo_id):
        if accelerator.is_main_process and args.validation_prompt is not None and not graceful_exit.signal:
            pipeline = load_pipeline(base, models, dtype)
            trained = {name: getattr(pipeline, name) for name in models.trained_names}
            lora.add_adapters(args, trained, alpha=args.rank)
            lora.load_adapters(args.output_dir, trained)
            images = validation.sample_images(
                args, accelerator, pipeline, {"prompt": args.validation_prompt}, steps=25
            )
            validation.log_images(accelerator, images, args.validation_prompt, step, name="test")
        accelerator.end_training()
        if repo_id is not None:
            family = "playground" if playground else "stable-diffusion-xl"
            kind = "dora" if args.use_dora else "lora"
            tags = ["text-to-image", "diffusers-training", "diffusers", kind, "template:sd-lora", family]
            hub.publish(
                args,
                output,
                repo_id,
                images,
                graceful_exit.at_once,
                license="playground-v2dot5-community" if playground else "openrail++",
                tags=[*tags, f"{family}-diffusers", *(["lipschitz-drift"] if regularizer.penalties else [])],
                penalty=regularizer.card_metadata,
                adapters=True,
                commit=base.commit,
            )
        elif accelerator.is_main_process:
            graceful_exit.at_once(f"The result is whole in {args.output_dir}.")


if __name__ == "__main__":
    run_script(main, parse_args)
