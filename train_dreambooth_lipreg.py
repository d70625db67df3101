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
import math
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import release_memory
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from diffusers_lipreg import AdapterSnapshot, Denoiser, TeacherSnapshot
from diffusers_lipreg.dreambooth import (
    arguments,
    captions,
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
from diffusers_lipreg.dreambooth.models import TEACHER_FLAGS, Base, limit_length, loading, text_encoder_class
from diffusers_lipreg.drift import REDUCTIONS
from diffusers_lipreg.errors import OneLineParser
from diffusers_lipreg.losses import Snapshot
from diffusers_lipreg.probe import PROMPTS
from diffusers_lipreg.regularizer import DriftRegularizer, check_rounding

logger = get_logger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="DreamBooth for Stable Diffusion without distributional drift.")
    arguments.add_shared_arguments(
        parser, output_dir="dreambooth-model", resolution=512, learning_rate=5e-6, weight_decay=1e-2
    )
    arguments.add_sd_arguments(parser)
    arguments.add_sd_adapter_arguments(parser)
    reductions = (*REDUCTIONS, *AdapterSnapshot.reductions)
    arguments.add_lipreg_arguments(parser, weight=500.0, reduction="tensor_mean", reductions=reductions)
    return parser


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    if parser.parse_known_args(input_args)[0].rank is not None:  # the paper's for adapters
        parser.set_defaults(lipreg_weight=1e-7, lipreg_reduction="factors")
    args = arguments.parse(parser, input_args)
    arguments.check_sd(parser, args)
    fitting = REDUCTIONS if args.rank is None else AdapterSnapshot.reductions
    if args.lipreg_reduction not in fitting:
        kind = "full fine-tuning" if args.rank is None else "--rank"
        parser.error(f"--lipreg_reduction {args.lipreg_reduction} is not for {kind}: choose {' or '.join(fitting)}")
    return args


class Models:
    """The pipeline's parts that training needs; what is trained is so whole, or with `--rank` by adapters."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, base: Base) -> None:
        self.text_encoder = base.load("text_encoder", text_encoder_class(base.folders["text_encoder"]))
        if args.tokenizer_name:
            source = {"revision": args.revision, "trust_remote_code": False}
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name, **source)
            self.tokenizer = limit_length(tokenizer, self.text_encoder.config)
        else:
            self.tokenizer = base.load("tokenizer")
        self.noise_scheduler = base.load("scheduler", DDPMScheduler)
        self.vae = base.load("vae") if "vae" in base.classes else None
        self.unet = base.load("unet")
        self.unet_channels = self.unet.config.in_channels
        self.dtype = setup.weight_dtype(accelerator)
        self.trained_names = ["unet", "text_encoder"] if args.train_text_encoder else ["unet"]
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
            for model in self.trained.values():
                model.float().requires_grad_(True)
        else:
            for model in self.trained.values():
                model.to(accelerator.device, dtype=self.dtype)
            lora.add_adapters(args, self.trained, alpha=args.lora_alpha or args.rank)

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The models whose weights change, by name."""
        return {name: getattr(self, name) for name in self.trained_names}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights that change."""
        return [p for model in self.trained.values() for p in model.parameters() if p.requires_grad]

    def place_frozen(self, accelerator: Accelerator, names: Sequence[str]) -> None:
        for name in set(names) - set(self.trained_names):
            if getattr(self, name) is not None:
                getattr(self, name).to(accelerator.device, dtype=self.dtype)


def encode_prompts(
    args: argparse.Namespace, models: Models, device: torch.device, prompts: Sequence[str]
) -> tuple[text.TextStates, dict[str, Any]]:
    """The text states of a batch by its prompts, those of the run, and what a pipeline takes for the validation prompt.

    A frozen text encoder is run here for the last time, and let go.
    """
    encoder = text.Prompts(models.tokenizer, args.tokenizer_max_length, args.text_encoder_use_attention_mask)
    class_prompt = [args.class_prompt] if args.with_prior_preservation else []

    def rows(prompts: Sequence[str]) -> list[str]:
        return [*prompts, *class_prompt * len(prompts)]

    if args.train_text_encoder:
        return lambda prompts: encoder.encode(models.text_encoder, rows(prompts)), {"prompt": args.validation_prompt}
    different = sorted(set(prompts))
    if args.pre_compute_text_embeddings or len(different) > 1:
        batches = [[prompt] for prompt in [*different, *class_prompt]]
    else:  # in the shape of a batch, as the official script has it
        batches = [rows(different * args.train_batch_size)]
    states_of = encoder.precompute(models.text_encoder, device, batches)
    validation_prompt = {}
    if args.validation_prompt is not None:
        alone = encoder.precompute(models.text_encoder, device, [[args.validation_prompt], [""]])
        validation_prompt = {
            "prompt_embeds": alone([args.validation_prompt]),
            "negative_prompt_embeds": alone([""]),
        }
    models.text_encoder = models.tokenizer = None
    release_memory()
    return lambda prompts: states_of(rows(prompts)), validation_prompt


def probe_denoiser(
    args: argparse.Namespace, accelerator: Accelerator, models: Models, prompts: Sequence[str]
) -> Denoiser:
    """The bare models as the probe calls them; call it while they are bare, and the text encoder is there."""
    unet, channels, encoder, dtype = models.unet, models.unet_channels, models.text_encoder, models.dtype
    prompt_encoder = text.Prompts(models.tokenizer, args.tokenizer_max_length, args.text_encoder_use_attention_mask)
    states_of = partial(prompt_encoder.encode, encoder)
    if not args.train_text_encoder:  # holds no encoder
        states_of = prompt_encoder.precompute(encoder, accelerator.device, [[prompt] for prompt in prompts])

    def denoise(noisy: torch.Tensor, timestep: torch.Tensor, texts: list[str]) -> torch.Tensor:
        states = torch.cat([states_of([prompt]) for prompt in texts])
        return predict(args, unet, channels, noisy.to(dtype), timestep.expand(len(noisy)), states.to(dtype))

    return Denoiser(denoise, list(models.trained.values()))


def validate(
    args: argparse.Namespace,
    accelerator: Accelerator,
    base: Base,
    models: Models,
    trained: Mapping[str, nn.Module],
    prompt: dict[str, Any],
    step: int,
) -> list[Image.Image]:
    """Samples from the weights as they are, those of the bare `trained`, and hands the images to the trackers."""
    pipeline = base.pipeline(
        models.dtype,
        **{"text_encoder": models.text_encoder, **trained},
        tokenizer=models.tokenizer,
        **({} if models.vae is None or moments.dropped(models.vae) else {"vae": models.vae}),
    )
    validation.set_scheduler(pipeline, args.validation_scheduler)
    images = validation.sample_images(args, accelerator, pipeline, prompt, steps=25)
    validation.log_images(accelerator, images, args.validation_prompt, step)
    return images


def take_snapshot(args: argparse.Namespace, base: Base, models: dict[str, nn.Module], name: str) -> Snapshot:
    """Take the snapshot of one of the bare models; a teacher in the dtype and place that the flags name."""
    with loading(args, TEACHER_FLAGS):
        if args.rank is not None:
            return AdapterSnapshot(models[name])
        if args.lipreg_teacher_device == "disk":
            return TeacherSnapshot(models[name], state_dict=base.stored(name, models[name]))
        dtype = setup.DTYPES[args.lipreg_teacher_dtype]
        if dtype is not None:
            check_rounding(models[name], dtype, args.learning_rate)
        return TeacherSnapshot(models[name], dtype=dtype, device=args.lipreg_teacher_device)


def save_weights(args: argparse.Namespace, models: Mapping[str, nn.Module], folder: str) -> None:
    """Writes what was trained and nothing else: models in sub-folders of their names, or the adapters."""
    if args.rank is None:
        checkpoints.save_models(models, folder)
    else:
        scale = (args.lora_alpha or args.rank) / args.rank
        lora.save_adapters(StableDiffusionPipeline, folder, lora.adapter_weights(models, scale))


def save_rest(args: argparse.Namespace, base: Base, models: Mapping[str, nn.Module], folder: Path) -> dict[str, str]:
    """Write what makes a pipeline of the trained models in the folder; return what is notable about it.

    All of it is in float32, as the trained models are: with parts of another type it would not run as it is loaded.
    """
    if args.rank is not None:
        return {}
    parts = dict(models, text_encoder=None) if args.skip_save_text_encoder else models
    pipeline = base.pipeline(torch.float32, **parts)
    validation.set_scheduler(pipeline)
    for name, part in pipeline.components.items():
        if part is not None and name not in models:
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)
    if args.skip_save_text_encoder:
        shutil.rmtree(folder / "text_encoder", ignore_errors=True)
    if args.extract_lora_rank is None:
        return {}
    pretrained = {name: base.load(name, type(model)) for name, model in models.items()}
    weights, kept = lora.extract_adapters(models, pretrained, args.extract_lora_rank)
    lora.save_adapters(StableDiffusionPipeline, folder, weights)
    logger.info(f"The adapters of rank {args.extract_lora_rank} keep {kept:.1%} of the squared drift.")
    return {"extract_lora_rank": str(args.extract_lora_rank), "squared drift kept by these adapters": f"{kept:.1%}"}


def predict(
    args: argparse.Namespace,
    unet: nn.Module,
    channels: int,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    states: torch.Tensor,
) -> torch.Tensor:
    """The UNet's prediction (B, C, H, W) for noisy latents (B, C, H, W) at timesteps (B,) and text states (B, L, D)."""
    if channels == 2 * noisy.shape[1]:  # an upscaler: it sees the image to improve beside the noisy one
        noisy = torch.cat([noisy, noisy], dim=1)
    labels = timesteps if args.class_labels_conditioning == "timesteps" else None
    prediction = unet(noisy, timesteps, states, class_labels=labels, return_dict=False)[0]
    return prediction.chunk(2, dim=1)[0] if prediction.shape[1] == 6 else prediction  # only the mean is trained


def denoising_loss(
    args: argparse.Namespace,
    models: Models,
    batch: dict[str, Any],
    text_states: text.TextStates,
    prior_weight: float | None,
) -> torch.Tensor:
    """|| eps - eps_theta(z_t, t, c) ||^2 of one batch at random timesteps, as the flags shape it."""
    scheduler = models.noise_scheduler
    if models.vae is None:
        latents = batch["pixel_values"].to(models.dtype)
    else:
        latents = moments.draw(models.vae, batch) * models.vae.config.scaling_factor
    noise = torch.randn_like(latents)
    if args.offset_noise:
        noise = noise + 0.1 * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    return optimization.dreambooth_loss(
        predict(args, models.unet, models.unet_channels, noisy, timesteps, text_states(batch["prompts"])),
        optimization.diffusion_target(scheduler, latents, noise, timesteps),
        None if args.snr_gamma is None else optimization.min_snr_weights(scheduler, timesteps, args.snr_gamma),
        prior_weight,
    )


def held_out_loss(
    args: argparse.Namespace, models: Models, batch: dict[str, Any], text_states: text.TextStates
) -> torch.Tensor:
    """The denoising loss on crops that are not trained on; of the text states it needs the instance half."""
    return denoising_loss(args, models, batch, lambda prompts: text_states(prompts)[: len(prompts)], prior_weight=None)


@guarded
def main(args: argparse.Namespace, graceful_exit: GracefulExit) -> None:
    accelerator = setup.start_accelerator(args)
    instance_images = data.find_instance_images(args.instance_data_dir)
    prompts = captions.prompts_of_folder(args, instance_images)
    base = preflight.open_base(args, accelerator, sdxl=False)
    probe_prompts = preflight.probe_prompts(args, PROMPTS)
    output, checkpoint, repo_id = preflight.open_output(args, accelerator, base)
    config = run_config.start(args, base, checkpoint)
    with loading(args):
        class_images = prior.ensure_class_images(args, accelerator, base) if args.with_prior_preservation else []
        transform = data.PhotoTransform(args.resolution, args.center_crop)
        images_seen = [*instance_images, *class_images]
        cached = moments.cacheable(args, len(images_seen), images_seen, transform, "vae" in base.classes)
        models = Models(args, accelerator, base)
    bare = models.trained
    models.place_frozen(accelerator, ["vae"] if args.pre_compute_text_embeddings else ["vae", "text_encoder"])
    denoiser = probe_denoiser(args, accelerator, models, probe_prompts)
    text_states, validation_prompt = encode_prompts(args, models, accelerator.device, prompts)
    dataset = data.DreamBoothDataset(instance_images, class_images, transform, prompts)
    crops = {}
    if args.keep_best:
        pixels = data.held_out_crops([partial(data.open_image, path) for path in instance_images[:4]], args.resolution)
        crops = moments.of_crops(models.vae, pixels, accelerator.device) | {"prompts": prompts[:4]}
    layouts = moments.cache(args, accelerator, models.vae, dataset) if cached else None
    loader = resumable.make_loader(args, dataset, layouts)
    updates_per_epoch = optimization.plan_steps(args, math.ceil(len(loader) / accelerator.num_processes))
    optimization.scale_learning_rate(args, accelerator.num_processes)
    optimizer = optimization.create_adamw(args, models.parameters, setup.fuses_adamw(accelerator))
    preflight.check_disk(args, models.parameters)
    lr_scheduler = optimization.create_lr_scheduler(args, optimizer, accelerator.num_processes)
    if args.rank is None:
        save_models, load_models = partial(checkpoints.save_models, bare), partial(checkpoints.load_models, bare)
    else:
        scale = (args.lora_alpha or args.rank) / args.rank
        save_models, load_models = lora.checkpoint_functions(StableDiffusionPipeline, bare, scale)
    checkpoints.write_models_with(accelerator, save_models, load_models)
    optimizer, loader, lr_scheduler = setup.prepare(
        accelerator, models, models.trained_names, optimizer, loader, lr_scheduler
    )
    parameters = models.parameters  # others than before, where FSDP has divided them

    saved = Checkpoints(args, accelerator, output, config, loader, lr_scheduler)
    regularizer = DriftRegularizer.from_args(  # of the pretrained model: before a checkpoint is loaded
        args,
        accelerator,
        models.trained,
        partial(take_snapshot, args, base, bare),
        denoiser,
        models.noise_scheduler,
        data.latent_shape(models.vae, args.resolution),
        probe_prompts,
        subject_loss=partial(held_out_loss, args, models, crops, text_states),
        save_best=partial(saved.save_best, bare, partial(save_weights, args)),
    )
    step, epochs = saved.resume(checkpoint, updates_per_epoch, regularizer)
    prior_weight = args.prior_loss_weight if args.with_prior_preservation else None
    loss_of = partial(denoising_loss, args, models, text_states=text_states, prior_weight=prior_weight)
    trackers.start_trackers(args, accelerator, "dreambooth")
    images: list[Image.Image] = []
    progress = tqdm(
        desc="Steps", initial=step, total=args.max_train_steps, disable=not accelerator.is_local_main_process
    )
    graceful_exit.defer("finishing this update and writing a checkpoint")
    for _ in epochs:
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
                optimizer.zero_grad(set_to_none=args.set_grads_to_none)

            if accelerator.sync_gradients:
                step += 1
                progress.update(1)
                regularizer.after_step(step)
                stopping = graceful_exit.requested(accelerator)
                if stopping or step % args.checkpointing_steps == 0:
                    last = saved.save(step, regularizer)
                if args.validation_prompt is not None and step % args.validation_steps == 0 and not stopping:
                    trained = checkpoints.whole(accelerator, bare)
                    if accelerator.is_main_process:
                        images = validate(args, accelerator, base, models, trained, validation_prompt, step)
            logs = {"loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]} | regularizer.logs
            progress.set_postfix(**logs)
            accelerator.log(logs, step=step)
            if accelerator.sync_gradients and stopping:
                progress.close()
                graceful_exit.exit(accelerator, last)
            if step >= args.max_train_steps:
                break

    progress.close()
    graceful_exit.defer("finishing the result")
    accelerator.wait_for_everyone()
    regularizer.finish()
    trained = checkpoints.whole(accelerator, bare)
    facts = regularizer.card_metadata
    if accelerator.is_main_process:
        with saved.writing(args.output_dir):
            with output.result(partial(save_weights, args, trained)) as folder:
                facts |= save_rest(args, base, trained, folder)
    with hub.result_is_safe(output, repo_id):
        accelerator.end_training()
        if repo_id is not None:
            family = "stable-diffusion" if models.vae is not None else "if"
            kind = ["lora" if not args.use_dora else "dora", "template:sd-lora"] if args.rank is not None else []
            tags = ["text-to-image", "dreambooth", "diffusers-training", family, f"{family}-diffusers", *kind]
            hub.publish(
                args,
                output,
                repo_id,
                images,
                graceful_exit.at_once,
                license="creativeml-openrail-m",
                tags=[*tags, *(["lipschitz-drift"] if regularizer.penalties else [])],
                penalty=facts,
                adapters=args.rank is not None,
                commit=base.commit,
            )
        elif accelerator.is_main_process:
            graceful_exit.at_once(f"The result is whole in {args.output_dir}.")


if __name__ == "__main__":
    run_script(main, parse_args)
