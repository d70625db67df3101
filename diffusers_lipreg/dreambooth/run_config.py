"""config.yaml: what a run was started with, beside its result and in its checkpoints, and what resuming makes of it."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from accelerate.logging import get_logger
from PIL import Image

from .. import __version__
from ..errors import RunError, one_line, printable
from .captions import METADATA, beside
from .models import Base
from .output import CONFIG

logger = get_logger(__name__)
NEVER_WRITTEN = ("hub_token", "resume_from_checkpoint")

# What a resumed run does with a flag that has another value than in its checkpoint. The states in a checkpoint fit only
# the old values of what is refused. What is warned of changes what the model learns from, or the random draws: the
# result is then that of neither command alone.
RULES = {
    "takes effect": """
        learning_rate text_encoder_lr scale_lr lr_scheduler lr_warmup_steps lr_num_cycles lr_power max_grad_norm
        adam_beta1 adam_beta2 adam_epsilon adam_weight_decay adam_weight_decay_text_encoder
        prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup
        max_train_steps num_train_epochs snr_gamma prior_loss_weight lora_dropout
        lipreg_weight lipreg_text_encoder_weight lipreg_teacher_device lipreg_teacher_dtype
        checkpointing_steps checkpoints_total_limit resume_from_checkpoint keep_best probe_steps probe_prompts
        validation_prompt validation_steps validation_epochs validation_images validation_scheduler
        num_validation_images extract_lora_rank output_kohya_format skip_save_text_encoder
        output_dir logging_dir report_to push_to_hub hub_token hub_model_id cache_dir debug local_rank
        sample_batch_size prior_generation_precision dataloader_num_workers allow_tf32
        gradient_checkpointing enable_xformers_memory_efficient_attention set_grads_to_none
        cache_latents pre_compute_text_embeddings
    """.split(),
    "refused": """
        pretrained_model_name_or_path revision train_text_encoder rank lora_alpha use_dora
        optimizer use_8bit_adam lipreg_reduction drift_budget do_edm_style_training
    """.split(),
    "warned": """
        instance_data_dir dataset_name dataset_config_name image_column caption_column repeats instance_prompt
        with_prior_preservation class_data_dir class_prompt num_class_images
        resolution center_crop random_flip image_interpolation_mode offset_noise seed
        train_batch_size gradient_accumulation_steps mixed_precision variant pretrained_vae_model_name_or_path
        tokenizer_name tokenizer_max_length text_encoder_use_attention_mask class_labels_conditioning
    """.split(),
}


def start(args: Namespace, base: Base, checkpoint: Path | None) -> dict[str, Any]:
    """Return the configuration of a run that begins, or goes on from a checkpoint after a comparison with its own.

    Flags and their values are its items; one more, "run", holds the id that a run keeps when it is resumed, versions,
    the base (its commit on the Hub, or a hash of the weights in a folder) and the SHA-256 of each photo. Call it before
    anything is worked out from the flags.
    """
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    flags = {name: value for name, value in sorted(vars(args).items()) if name not in NEVER_WRITTEN}
    run = {
        "id": uuid.uuid4().hex,
        "versions": {"diffusers_lipreg": __version__} | {name: version(name) for name in packages},
        "base": _fingerprint(base),
        "photos": {} if args.instance_data_dir is None else _hashes(Path(args.instance_data_dir)),
    }
    config = {**flags, "run": run}
    if checkpoint is not None:
        before = read(checkpoint)
        if before is None:
            logger.info(f"{checkpoint} has no {CONFIG}: its flags are not compared with those of this run.")
        else:
            _compare(before, config, checkpoint)
            run["id"] = before["run"]["id"]
    return config


def write(config: Mapping[str, Any], path: Path, **more: Any) -> None:
    """Write a configuration and the time to a file; `more` are further items of its "run"."""
    whole = {**config, "run": {**config["run"], "time": time.time(), **more}}
    path.write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read(folder: str | Path) -> dict[str, Any] | None:
    """Return the configuration in a folder, or `None` if there is none, as in checkpoints of the official scripts.

    Raises:
        RunError: It cannot be read, or is not one that `write` wrote.
    """
    path = Path(folder, CONFIG)
    if not path.exists():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        run = config["run"]
        fits = isinstance(run["time"], float) and isinstance(run["files"], dict)
        texts = [run["id"], run["base"], *run["photos"].values()]
        if not fits or not all(isinstance(text, str) for text in texts):
            raise ValueError("its run is not of this form")
    except Exception as error:  # a reader of YAML meets any text here
        raise RunError(f"{path}: cannot be read ({one_line(error)}).") from error
    return config


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Name the flags whose values differ from those of a checkpoint, by their rules."""
    changed = {
        name: printable(f"--{name} was {_shown(before[name])} and is {_shown(now[name])}")
        for name in before.keys() & now.keys() - {"run", "instance_data_dir"}
        if before[name] != now[name]
    }
    old, new = before["run"], now["run"]
    if old["base"] == new["base"]:  # under another name, perhaps
        changed.pop("pretrained_model_name_or_path", None)
        changed.pop("revision", None)
    else:
        base = f"--pretrained_model_name_or_path was {_shown(before.get('pretrained_model_name_or_path'))} ({old['base']})"
        changed["pretrained_model_name_or_path"] = printable(
            f"{base} and is {now['pretrained_model_name_or_path']} ({new['base']})"
        )
    then, today = set(old["photos"].values()), set(new["photos"].values())
    if then != today:
        changed["instance_data_dir"] = (
            f"--instance_data_dir has other photos or captions ({len(then - today)} removed, {len(today - then)} added)"
        )
        if not then & today and "instance_prompt" in changed:
            raise RunError(
                f"--resume_from_checkpoint: {checkpoint} is of another subject: {changed['instance_prompt']}, and none of "
                "the photos is the same. Choose another --output_dir, or leave --resume_from_checkpoint out."
            )
    found = {rule: ", ".join(changed[name] for name in names if name in changed) for rule, names in RULES.items()}
    if found["refused"]:
        raise RunError(
            f"--resume_from_checkpoint: {checkpoint} does not fit: {found['refused']}. Give the old values, or start anew "
            "without --resume_from_checkpoint."
        )
    if found["warned"]:
        logger.warning(
            f"Going on from {checkpoint} with the new values, so that the result is that of neither command alone: "
            f"{found['warned']}."
        )
    if found["takes effect"]:
        logger.info(f"From {checkpoint} on, these take effect: {found['takes effect']}.")


def _shown(value: Any) -> str:
    return "another list" if isinstance(value, (list, dict)) else f"{value!s:.200}"


def _fingerprint(base: Base) -> str:
    """Return the commit of a pipeline on the Hub, or a hash of samples from the UNet's files in a folder."""
    if base.commit is not None:
        return f"commit {base.commit}"
    samples = hashlib.sha256()
    for path in sorted(base.folders["unet"].glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            for offset in range(0, size, 1 + size // 256):
                file.seek(offset)
                samples.update(file.read(4096))
    return f"sha256 {samples.hexdigest()}"


def _hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each image in a folder, and of its captions, by file name."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and os.access(path, os.R_OK)]
    images = [path for path in files if path.suffix.lower() in Image.registered_extensions()]
    captions = [*beside(images, files).values(), *(path for path in files if path.name == METADATA)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in images + captions}
