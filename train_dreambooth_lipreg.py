#!/usr/bin/env python
"""DreamBooth for Stable Diffusion 1.x/2.x with a penalty on the drift from the pretrained weights.

Every flag of diffusers' official train_dreambooth.py, and those for the penalty. The paper's configuration:

    python train_dreambooth_lipreg.py \
      --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \
      --instance_data_dir photos --instance_prompt "a photo of sks dog" --output_dir sks-dog \
      --train_batch_size 1 --learning_rate 2e-6 --lr_warmup_steps 0 --max_train_steps 1000 --push_to_hub
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffusers_lipreg import AdapterSnapshot
from diffusers_lipreg.dreambooth import arguments
from diffusers_lipreg.dreambooth.interruption import GracefulExit, guarded, read_flags, run_script
from diffusers_lipreg.drift import REDUCTIONS
from diffusers_lipreg.errors import OneLineParser


def build_parser() -> OneLineParser:
    parser = OneLineParser(description="DreamBooth for Stable Diffusion without distributional drift.")
    arguments.add_shared_arguments(
        parser, output_dir="dreambooth-model", resolution=512, learning_rate=5e-6, weight_decay=1e-2
    )
    arguments.add_sd_arguments(parser)
    reductions = (*REDUCTIONS, *AdapterSnapshot.reductions)
    arguments.add_lipreg_arguments(parser, weight=500.0, reduction="tensor_mean", reductions=reductions)
    return parser


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    if parser.parse_known_args(input_args)[0].rank is not None:  # the paper's defaults for adapters
        parser.set_defaults(lipreg_weight=1e-7, lipreg_reduction="factors")
    args = arguments.parse(parser, input_args)
    arguments.check_sd(parser, args)
    fitting = REDUCTIONS if args.rank is None else AdapterSnapshot.reductions
    if args.lipreg_reduction not in (*fitting, "output"):
        kind = "full fine-tuning" if args.rank is None else "--rank"
        parser.error(
            f"--lipreg_reduction {args.lipreg_reduction} is not for {kind}: choose {' or '.join((*fitting, 'output'))}"
        )
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)  # before the imports below, which take seconds: a mistake is told at once

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import release_memory
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer

from diffusers_lipreg import TeacherSnapshot
from diffusers_lipreg.dreambooth import (
    checkpoints,
    data,
    latents,
    lora,
    optimization,
    preflight,
    setup,
    validation,
)
from diffusers_lipreg.dreambooth.loop import TrainableModels, TrainingRun
from diffusers_lipreg.dreambooth.models import TEACHER_FLAGS, Base, limit_length, loading_errors, text_encoder_class
from diffusers_lipreg.dreambooth.prompts import PromptEncoder
from diffusers_lipreg.losses import Snapshot
from diffusers_lipreg.outputs import MEASURED_PROMPTS, generic_prompts
from diffusers_lipreg.regularizer import DriftRegularizer, Recordings, check_rounding

logger = get_logger(__name__)
EmbedPrompts = Callable[[Sequence[str]], Tensor]  # from B prompts to prompt_embeds (B, length, width)


class Models(TrainableModels):
    """The parts of the pipeline that training needs. Without `--rank` all weights of a trained model change."""

    lora_pipeline = StableDiffusionPipeline

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, base: Base) -> None:
        self.text_encoder = base.load("text_encoder", text_encoder_class(base.folders["text_encoder"]))
        if args.tokenizer_name:
            source = {"revision": args.revision, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name, **source)
            self.tokenizer = limit_length(tokenizer, self.text_encoder.config)
        else:
            self.tokenizer = base.load("tokenizer")
        self.prompt_encoder = PromptEncoder(
            self.tokenizer, args.tokenizer_max_length, args.text_encoder_use_attention_mask
        )
        self.noise_scheduler = base.load("scheduler", DDPMScheduler)
        self.vae = base.load("vae") if "vae" in base.classes else None
        self.unet = base.load("unet")
        self.in_channels = self.unet.config.in_channels  # DDP hides the configuration
        self.weight_dtype = setup.weight_dtype(accelerator)
        self.trainable_names = ["unet", "text_encoder"] if args.train_text_encoder else ["unet"]
        if args.enable_xformers_memory_efficient_attention:
            self.unet.enable_xformers_memory_efficient_attention()
        if args.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if args.train_text_encoder:
                self.text_encoder.gradient_checkpointing_enable()

        for model in (self.text_encoder, self.vae):
            if model is not None:
                model.requires_grad_(False)
        if args.rank is None:
            for model in self.trainable.values():
                model.float().requires_grad_(True)
        else:
            for model in self.trainable.values():
                model.to(accelerator.device, dtype=self.weight_dtype)
            lora.add_adapters(args, self.trainable)
        # With --pre_compute_text_embeddings the official script encodes on the CPU, in float32.
        if not args.train_text_encoder and not args.pre_compute_text_embeddings:
            self.text_encoder.to(accelerator.device, dtype=self.weight_dtype)
        if self.vae is not None:
            self.vae.to(accelerator.device, dtype=self.weight_dtype)
        self.unwrapped = self.trainable

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        return {"unet": self.unet, "text_encoder": self.text_encoder, "tokenizer": self.tokenizer}

    def free_text_encoders(self) -> None:
        """Free the memory of the text encoder."""
        self.text_encoder = self.tokenizer = None
        release_memory()


def encode_prompts(
    args: argparse.Namespace, accelerator: Accelerator, models: Models, photos: Sequence[data.Photo]
) -> tuple[EmbedPrompts, dict[str, Any]]:
    """Return a lookup of prompt embeddings, and the inputs by which a pipeline samples the validation prompt.

    A text encoder that is not trained encodes everything here: no later step needs it.
    """
    encoder = models.prompt_encoder
    if args.train_text_encoder:
        # The encoder is looked up at each step: what DDP wraps around it later averages its gradients.
        return lambda prompts: encoder.encode(models.text_encoder, prompts), {"prompt": args.validation_prompt}
    distinct = sorted({photo.prompt for photo in photos})
    class_prompt = [args.class_prompt] if args.with_prior_preservation else []
    if args.pre_compute_text_embeddings or len(distinct) > 1:
        batches = [[prompt] for prompt in distinct + class_prompt]
    else:  # The official script encodes whole batches, and a batch of another size may round differently.
        batches = [distinct * args.train_batch_size + class_prompt * args.train_batch_size]
    embed_prompts = encoder.precompute(models.text_encoder, accelerator.device, batches)
    validation_inputs = {}
    if args.validation_prompt is not None:
        alone = encoder.precompute(models.text_encoder, accelerator.device, [[args.validation_prompt], [""]])
        validation_inputs = {"prompt_embeds": alone([args.validation_prompt]), "negative_prompt_embeds": alone([""])}
    return embed_prompts, validation_inputs


def take_snapshot(args: argparse.Namespace, base: Base, models: Models, name: str) -> Snapshot:
    """Return the snapshot of the pretrained weights of the model `name`."""
    model = models.unwrapped[name]
    if args.rank is not None:
        return AdapterSnapshot(model)
    with loading_errors(args, TEACHER_FLAGS):
        if args.lipreg_teacher_device == "disk":
            return TeacherSnapshot(model, state_dict=base.stored(name, model))
        dtype = setup.DTYPES.get(args.lipreg_teacher_dtype)
        if dtype is not None:
            check_rounding(model, dtype, args.learning_rate)
        return TeacherSnapshot(model, dtype=dtype, device=args.lipreg_teacher_device)


def predict(
    args: argparse.Namespace,
    models: Models,
    unet: nn.Module,
    noisy_latents: Tensor,
    timesteps: Tensor,
    prompt_embeds: Tensor,
) -> Tensor:
    """Return the UNet's prediction (B, C, H, W) for noisy latents (B, C, H, W), timesteps (B,) and prompt_embeds (B, L, D)."""
    if models.in_channels == 2 * noisy_latents.shape[1]:  # an upscaler: it also sees the image to improve
        noisy_latents = torch.cat([noisy_latents, noisy_latents], dim=1)
    class_labels = timesteps if args.class_labels_conditioning == "timesteps" else None
    model_pred = unet(noisy_latents, timesteps, prompt_embeds, class_labels=class_labels, return_dict=False)[0]
    return model_pred.chunk(2, dim=1)[0] if model_pred.shape[1] == 6 else model_pred  # IF also predicts a variance


def denoising_loss(
    args: argparse.Namespace, models: Models, batch: dict[str, Any], embed_prompts: EmbedPrompts
) -> Tensor:
    """Return the DreamBooth loss of a batch at random timesteps: the squared error of model_pred for noise or velocity."""
    scheduler = models.noise_scheduler
    if models.vae is None:
        model_input = batch["pixel_values"].to(models.weight_dtype)
    else:
        model_input = latents.sample_latents(models.vae, batch) * models.vae.config.scaling_factor
    noise = torch.randn_like(model_input)
    if args.offset_noise:
        noise = noise + 0.1 * torch.randn(*model_input.shape[:2], 1, 1, device=model_input.device)
    num_train_timesteps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, num_train_timesteps, (len(model_input),), device=model_input.device)
    noisy_latents = scheduler.add_noise(model_input, noise, timesteps)
    prompt_embeds = embed_prompts(batch["prompts"])
    snr_weights = None
    if args.snr_gamma is not None:
        snr_weights = optimization.min_snr_weights(scheduler, timesteps, args.snr_gamma)
    return optimization.dreambooth_loss(
        predict(args, models, models.unet, noisy_latents, timesteps, prompt_embeds),
        optimization.diffusion_target(scheduler, model_input, noise, timesteps),
        snr_weights=snr_weights,
        prior_loss_weight=args.prior_loss_weight if batch["has_class_images"] else None,
    )


def validate(
    args: argparse.Namespace,
    accelerator: Accelerator,
    base: Base,
    models: Models,
    inputs: dict[str, Any],
    global_step: int,
) -> list[Image.Image]:
    """Sample images from the current weights and log them; every process has to call it."""
    full_models = checkpoints.gather_full_models(accelerator, models.unwrapped)
    if not accelerator.is_main_process:
        return []
    parts = {"text_encoder": models.text_encoder, **full_models, "tokenizer": models.tokenizer}
    if models.vae is not None and not latents.is_freed(models.vae):
        parts["vae"] = models.vae
    pipeline = base.pipeline(models.weight_dtype, **parts)
    validation.set_scheduler(pipeline, args.validation_scheduler)
    images = validation.sample_images(args, accelerator, pipeline, inputs, steps=25)
    validation.log_images(accelerator, images, args.validation_prompt, global_step)
    return images


def save_weights(args: argparse.Namespace, models: Mapping[str, nn.Module], folder: str | Path) -> None:
    """Write what was trained and nothing else: models in sub-folders of their names, or the adapters."""
    if args.rank is None:
        checkpoints.save_models(models, str(folder))
    else:
        lora.save_adapters(StableDiffusionPipeline, folder, lora.adapter_weights(models, lora.scale(args)))


def complete_pipeline(args: argparse.Namespace, base: Base, models: Mapping[str, nn.Module], folder: Path) -> None:
    """Write what a pipeline needs besides the trained models, in their dtype: one of several dtypes does not run."""
    parts = {**models, "text_encoder": None} if args.skip_save_text_encoder else models
    pipeline = base.pipeline(torch.float32, **parts)
    validation.set_scheduler(pipeline)
    for name, part in pipeline.components.items():
        if part is not None and name not in models:
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)
    if args.skip_save_text_encoder:
        shutil.rmtree(folder / "text_encoder", ignore_errors=True)


def extract_adapters(
    args: argparse.Namespace, base: Base, models: Mapping[str, nn.Module], folder: Path
) -> dict[str, str]:
    """Write adapters that approximate the trained models, and return rows of the model card on them."""
    pretrained = {name: base.load(name, type(model)) for name, model in models.items()}
    weights, kept = lora.extract_adapters(models, pretrained, args.extract_lora_rank)
    lora.save_adapters(StableDiffusionPipeline, folder, weights)
    logger.info(f"The adapters of rank {args.extract_lora_rank} keep {kept:.1%} of the squared drift.")
    return {"extract_lora_rank": str(args.extract_lora_rank), "squared drift kept by these adapters": f"{kept:.1%}"}


def save_rest(args: argparse.Namespace, base: Base, models: Mapping[str, nn.Module], folder: Path) -> dict[str, str]:
    """Write the result's further files, and return rows of the model card on them."""
    if args.rank is None:
        complete_pipeline(args, base, models, folder)
    return {} if args.extract_lora_rank is None else extract_adapters(args, base, models, folder)


def hub_metadata(args: argparse.Namespace, models: Models) -> dict[str, Any]:
    """Return the license and the tags of the model card."""
    family = "if" if models.vae is None else "stable-diffusion"
    tags = ["text-to-image", "dreambooth", "diffusers-training", family, f"{family}-diffusers"]
    if args.rank is not None:
        tags += ["dora" if args.use_dora else "lora", "template:sd-lora"]
    return {"license": "creativeml-openrail-m", "tags": tags}


@guarded
def main(args: argparse.Namespace, graceful_exit: GracefulExit) -> None:
    # Check the flags, folders and the base; sample class images; load the models.
    prompts = preflight.prompts_to_record(args, generic_prompts(), MEASURED_PROMPTS)
    run = TrainingRun(args, graceful_exit, sdxl=False)
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
    run.prepare(models, data.DreamBoothDataset(run.photos, run.class_images, run.transform))

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
    run.start(regularizer, "dreambooth")

    for batch in run.batches(partial(validate, args, accelerator, run.base, models, validation_inputs)):
        with accelerator.accumulate(*models.trainable.values()):
            loss = denoising_loss(args, models, batch, embed_prompts)
            run.check_finite(loss=loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                regularizer.add_gradient_()  # the new line: it adds weight * d(drift)/d(theta)
                run.clip_gradients()
            run.optimizer.step()
            run.lr_scheduler.step()
            run.optimizer.zero_grad(set_to_none=args.set_grads_to_none)
        run.after_batch(loss)

    card_rows = run.save(partial(save_weights, args), partial(save_rest, args, run.base))
    run.publish(card_rows=card_rows, **hub_metadata(args, models))


if __name__ == "__main__":
    run_script(main, ARGS)
