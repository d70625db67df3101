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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers_lipreg import AdapterSnapshot
from diffusers_lipreg.dreambooth import arguments
from diffusers_lipreg.dreambooth.interruption import GracefulExit, guarded, read_flags, run_script
from diffusers_lipreg.errors import OneLineParser


def build_parser() -> OneLineParser:
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


if __name__ == "__main__":
    ARGS = read_flags(parse_args)  # before the imports below, which take seconds: a mistake is told at once

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import release_memory
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusers_lipreg.dreambooth import data, latents, lora, optimization, preflight, setup, validation
from diffusers_lipreg.dreambooth.loop import TrainableModels, TrainingRun
from diffusers_lipreg.dreambooth.models import Base, loading_errors, text_encoder_class
from diffusers_lipreg.dreambooth.prompts import encode_sdxl, sdxl_tokenizer
from diffusers_lipreg.errors import RunError
from diffusers_lipreg.losses import Snapshot
from diffusers_lipreg.outputs import MEASURED_PROMPTS, generic_prompts
from diffusers_lipreg.regularizer import DriftRegularizer, Recordings

EmbedPrompts = Callable[[Sequence[str]], tuple[Tensor, Tensor]]  # from prompts to their embeddings, and pooled ones


class Models(TrainableModels):
    """The parts of SDXL, frozen, with adapters on the UNet and, with `--train_text_encoder`, on the text encoders."""

    lora_pipeline = StableDiffusionXLPipeline

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, base: Base) -> None:
        self.weight_dtype = setup.weight_dtype(accelerator)
        self.tokenize = sdxl_tokenizer([base.load(name) for name in ("tokenizer", "tokenizer_2")])
        self.noise_scheduler = base.load("scheduler", noise_scheduler_class(args, base))
        self.edm = not isinstance(self.noise_scheduler, DDPMScheduler)
        self.playground = isinstance(self.noise_scheduler, EDMEulerScheduler)
        self.text_encoder, self.text_encoder_2 = (
            base.load(name, text_encoder_class(base.folders[name]))
            .requires_grad_(False)
            .to(accelerator.device, dtype=self.weight_dtype)
            for name in ("text_encoder", "text_encoder_2")
        )
        self.vae = load_vae(base).to(accelerator.device)
        self.unet = base.load("unet")
        self.unet.requires_grad_(False).to(accelerator.device, dtype=self.weight_dtype)
        if args.enable_xformers_memory_efficient_attention:
            self.unet.enable_xformers_memory_efficient_attention()
        self.trainable_names = list(lora.LORA_TARGET_MODULES) if args.train_text_encoder else ["unet"]
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if args.train_text_encoder:
                for encoder in self.text_encoders:
                    encoder.gradient_checkpointing_enable()
        lora.add_adapters(args, self.trainable)
        self.unwrapped = self.trainable

    @property
    def text_encoders(self) -> list[Any]:
        return [self.text_encoder, self.text_encoder_2]

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    def free_text_encoders(self) -> None:
        """Free the memory of the text encoders."""
        self.text_encoder = self.text_encoder_2 = None
        release_memory()


def noise_scheduler_class(args: argparse.Namespace, base: Base) -> type:
    """Return the scheduler class to train with: EDM's for a model trained with it, Euler's for EDM training, or DDPM's."""
    if "EDM" in base.classes["scheduler"].__name__:
        if args.snr_gamma is not None:
            raise RunError("--snr_gamma has no meaning for a model trained with an EDM scheduler: leave it out.")
        return EDMEulerScheduler
    return EulerDiscreteScheduler if args.do_edm_style_training else DDPMScheduler


def load_vae(base: Base) -> AutoencoderKL:
    """Load the VAE in float32: that of SDXL overflows in float16."""
    return base.load("vae").requires_grad_(False).to(dtype=torch.float32)


def encode_prompts(
    args: argparse.Namespace, accelerator: Accelerator, models: Models, photos: Sequence[data.Photo]
) -> tuple[EmbedPrompts, dict[str, Any]]:
    """Return a lookup of prompt embeddings, and the inputs by which a pipeline samples the validation prompt.

    Text encoders that are not trained encode everything here: no later step needs them.
    """

    class_prompt = [args.class_prompt] if args.with_prior_preservation else []
    distinct = {*(photo.prompt for photo in photos), *class_prompt}

    def encode(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        # The encoders are looked up at each step: what DDP wraps around them later averages their gradients.
        return encode_sdxl(models.text_encoders, models.tokenize(prompts))

    known = {} if args.train_text_encoder else {prompt: encode([prompt]) for prompt in sorted(distinct)}

    def look_up(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        prompt_embeds, pooled_prompt_embeds = zip(*(known[prompt] for prompt in prompts), strict=True)
        return torch.cat(prompt_embeds), torch.cat(pooled_prompt_embeds)

    # The official script encodes a prompt that all photos share once, and repeats the embeddings.
    shared = args.caption_column is None and len({photo.prompt for photo in photos}) == 1

    def embed_prompts(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        encoded = list(dict.fromkeys(prompts)) if shared else prompts
        repeats = len(prompts) // len(encoded)
        prompt_embeds, pooled_prompt_embeds = (encode if args.train_text_encoder else look_up)(encoded)
        return prompt_embeds.repeat_interleave(repeats, dim=0), pooled_prompt_embeds.repeat_interleave(repeats, dim=0)

    return embed_prompts, {"prompt": args.validation_prompt}


def take_snapshot(args: argparse.Namespace, base: Base, models: Models, name: str) -> Snapshot:
    """Return the snapshot of the pretrained weights of the model `name`."""
    return AdapterSnapshot(models.unwrapped[name])


def sample_model_input(args: argparse.Namespace, models: Models, batch: dict[str, Any]) -> Tensor:
    """Sample latents (B, 4, H/8, W/8) of a batch, and shift and scale them as the UNet expects."""
    model_input = latents.sample_latents(models.vae, batch)
    config = models.vae.config
    if config.latents_mean is not None and config.latents_std is not None:
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(model_input)
            for values in (config.latents_mean, config.latents_std)
        )
        return ((model_input - mean) * config.scaling_factor / std).to(models.weight_dtype)
    model_input = model_input * config.scaling_factor
    # The official script leaves the latents in float32 when another VAE is given.
    return model_input.to(models.weight_dtype) if args.pretrained_vae_model_name_or_path is None else model_input


def denoising_loss(
    args: argparse.Namespace, models: Models, batch: dict[str, Any], embed_prompts: EmbedPrompts
) -> Tensor:
    """Return the loss || eps - eps_theta(z_t, t, c) ||^2 of a batch at random timesteps, or EDM's loss."""
    scheduler = models.noise_scheduler
    model_input = sample_model_input(args, models, batch)
    noise = torch.randn_like(model_input)
    num_train_timesteps = scheduler.config.num_train_timesteps
    if models.edm:
        indices = torch.randint(0, num_train_timesteps, (len(model_input),))
        timesteps = scheduler.timesteps[indices].to(model_input.device)
        sigmas = scheduler.sigmas[indices].view(-1, 1, 1, 1).to(model_input)
    else:
        timesteps = torch.randint(0, num_train_timesteps, (len(model_input),), device=model_input.device)
    noisy_latents = scheduler.add_noise(model_input, noise, timesteps)
    prompt_embeds, pooled_prompt_embeds = embed_prompts(batch["prompts"])
    time_ids = batch["time_ids"].to(model_input.device, models.weight_dtype)
    model_pred = models.unet(
        optimization.edm_input(scheduler, noisy_latents, sigmas) if models.edm else noisy_latents,
        timesteps,
        prompt_embeds,
        added_cond_kwargs={"time_ids": time_ids, "text_embeds": pooled_prompt_embeds},
        return_dict=False,
    )[0]
    snr_weights = sigma_weights = None
    if models.edm:
        model_pred, target = optimization.edm_denoised(scheduler, model_pred, noisy_latents, sigmas), model_input
        if not models.playground:
            sigma_weights = sigmas**-2
    else:
        target = optimization.diffusion_target(scheduler, model_input, noise, timesteps)
        if args.snr_gamma is not None:
            snr_weights = optimization.min_snr_weights(scheduler, timesteps, args.snr_gamma)
    return optimization.dreambooth_loss(
        model_pred,
        target,
        snr_weights=snr_weights,
        prior_loss_weight=args.prior_loss_weight if batch["has_class_images"] else None,
        sigma_weights=sigma_weights,
    )


def validate(
    args: argparse.Namespace,
    accelerator: Accelerator,
    base: Base,
    models: Models,
    inputs: dict[str, Any],
    global_step: int,
    final: bool = False,
) -> list[Image.Image]:
    """Sample images from the current weights and log them; if `final`, from the adapters as they are saved."""
    if not accelerator.is_main_process:
        return []
    parts = {"vae": load_vae(base) if latents.is_freed(models.vae) else models.vae}
    if not final:
        for name in lora.LORA_TARGET_MODULES:
            if getattr(models, name) is not None:
                parts[name] = models.unwrapped.get(name, getattr(models, name))
    pipeline = base.pipeline(models.weight_dtype, **parts)
    if not models.edm:
        validation.set_scheduler(pipeline, "DPMSolverMultistepScheduler")
    if final:
        trained = {name: getattr(pipeline, name) for name in models.trainable_names}
        lora.add_adapters(args, trained)
        lora.load_adapters(trained, args.output_dir)
    images = validation.sample_images(args, accelerator, pipeline, inputs, steps=25 if final else 50)
    name = "test" if final else "validation"
    validation.log_images(accelerator, images, args.validation_prompt, global_step, name=name)
    return images


def save_weights(args: argparse.Namespace, models: Mapping[str, nn.Module], folder: str | Path) -> None:
    """Write the adapters."""
    lora.save_adapters(StableDiffusionXLPipeline, folder, lora.adapter_weights(models))


def save_rest(args: argparse.Namespace, base: Base, models: Mapping[str, nn.Module], folder: Path) -> dict[str, str]:
    """Write the adapters in kohya's format, too, with `--output_kohya_format`; return rows of the model card."""
    if args.output_kohya_format:
        weights = lora.to_kohya(lora.adapter_weights(models))
        save_file(weights, folder / lora.KOHYA_WEIGHTS, metadata={"format": "pt"})
    return {}


def hub_metadata(args: argparse.Namespace, models: Models) -> dict[str, Any]:
    """Return the license and the tags of the model card."""
    family = "playground" if models.playground else "stable-diffusion-xl"
    kind = "dora" if args.use_dora else "lora"
    return {
        "license": "playground-v2dot5-community" if models.playground else "openrail++",
        "tags": [
            "text-to-image",
            "diffusers-training",
            "diffusers",
            kind,
            "template:sd-lora",
            family,
            f"{family}-diffusers",
        ],
    }


@guarded
def main(args: argparse.Namespace, graceful_exit: GracefulExit) -> None:
    # Check the flags, folders and the base; sample class images; load the models.
    prompts = preflight.prompts_to_record(args, generic_prompts(), MEASURED_PROMPTS)
    run = TrainingRun(args, graceful_exit, DistributedDataParallelKwargs(find_unused_parameters=True), sdxl=True)
    accelerator = run.accelerator
    with loading_errors(args):
        models = Models(args, accelerator, run.base)

    # Record the pretrained pipeline, encode what frozen models encode, and hand the rest to accelerate.
    held_out = {}
    if args.keep_best:
        held_out = latents.held_out_batch(models.vae, run.photos, args.resolution, accelerator.device)
    recordings = Recordings.from_args(
        args, accelerator, partial(run.base.sampler, models.vae, **models.pipeline_parts), models.unwrapped, *prompts
    )
    embed_prompts, validation_inputs = encode_prompts(args, accelerator, models, run.photos)
    if not args.train_text_encoder:
        models.free_text_encoders()
    run.prepare(models, data.SDXLDreamBoothDataset(run.photos, args.repeats, run.class_images, run.transform))

    # Remember the pretrained model, then go on from a checkpoint.
    regularizer = DriftRegularizer.from_args(
        args,
        accelerator,
        models.trainable,
        take_snapshot=partial(take_snapshot, args, run.base, models),
        recordings=recordings,
        subject_loss=partial(denoising_loss, args, models, held_out, embed_prompts),
        save_best=partial(run.checkpoints.save_best, models.unwrapped, partial(save_weights, args)),
    )
    run.start(regularizer, "dreambooth-lora-playground" if models.playground else "dreambooth-lora-sd-xl")

    validate_now = partial(validate, args, accelerator, run.base, models, validation_inputs)
    for batch in run.batches(validate_now):
        with accelerator.accumulate(*models.trainable.values()):
            loss = denoising_loss(args, models, batch, embed_prompts)
            run.check_finite(loss=loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                regularizer.add_gradient_()  # the new line: it adds weight * d(drift)/d(theta)
                run.clip_gradients()
            run.optimizer.step()
            run.lr_scheduler.step()
            run.optimizer.zero_grad()
        run.after_batch(loss)

    card_rows = run.save(partial(save_weights, args), partial(save_rest, args, run.base))
    run.publish(card_rows=card_rows, validate=partial(validate_now, final=True), **hub_metadata(args, models))


if __name__ == "__main__":
    run_script(main, ARGS)
