"""Write the flags of a run to config.yaml in its result and checkpoints, and compare them when it is resumed."""

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

from .. import __version__
from ..errors import RunError, as_run_error, one_line, printable
from .captions import METADATA, caption_files
from .images import has_image_name
from .models import Base
from .output import CONFIG

logger = get_logger(__name__)
NEVER_WRITTEN = ("hub_token", "resume_from_checkpoint")

# What a resumed run does with a flag whose value differs from the checkpoint's. A flag is refused if the states in the
# checkpoint fit its old value only. A warning tells of flags that change the training data or the random draws:
# neither command alone would then give the result.
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
        lipreg_prompts lipreg_points
        resolution center_crop random_flip image_interpolation_mode offset_noise seed
        train_batch_size gradient_accumulation_steps mixed_precision variant pretrained_vae_model_name_or_path
        tokenizer_name tokenizer_max_length text_encoder_use_attention_mask class_labels_conditioning
    """.split(),
}


def start(args: Namespace, base: Base, checkpoint: Path | None) -> dict[str, Any]:
    """Return the configuration of a run, after comparing it with that of the checkpoint to resume from, if any.

    Its items are the flags, and "run": the id that a run keeps when it is resumed, versions, the base (its commit on
    the Hub, or a hash of the weights in a folder) and the SHA-256 of each photo. Call it before flags are changed.
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
    """Write a configuration to a file; the time and `more` become items of its "run"."""
    whole = {**config, "run": {**config["run"], "time": time.time(), **more}}
    path.write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read(folder: str | Path) -> dict[str, Any] | None:
    """Return the configuration in a folder, or `None` where there is none: the official scripts write none."""
    path = Path(folder, CONFIG)
    if not path.exists():
        return None
    with as_run_error(lambda error: f"{path}: cannot be read ({one_line(error)})."):  # a YAML file may hold anything
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        run = config["run"]
        texts = [run["id"], run["base"], *run["photos"].values(), *run["files"]]
        fits = isinstance(run["time"], float) and isinstance(run["files"], dict)
        if not fits or not all(isinstance(text, str) for text in texts):
            raise ValueError("its run is not of this form")
        for value in config.values():
            _shown(value)  # Python does not write out an integer of thousands of digits
    return config


def _compare(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path) -> None:
    """Log the flags whose values differ from those of a checkpoint, or refuse them, as `RULES` has it."""
    changes = _changed_flags(before, now)
    old, new = (set(config["run"]["photos"].values()) for config in (before, now))
    if old != new:
        changes["instance_data_dir"] = (
            f"--instance_data_dir has other photos or captions ({len(old - new)} removed, {len(new - old)} added)"
        )
        if not old & new and "instance_prompt" in changes:
            raise RunError(
                f"--resume_from_checkpoint: {checkpoint} is of another subject: {changes['instance_prompt']}, and "
                "none of the photos is the same. Choose another --output_dir, or leave --resume_from_checkpoint out."
            )
    found = {rule: ", ".join(changes[name] for name in names if name in changes) for rule, names in RULES.items()}
    if found["refused"]:
        raise RunError(
            f"--resume_from_checkpoint: {checkpoint} does not fit: {found['refused']}. Give the old values, or start "
            "again without --resume_from_checkpoint."
        )
    if found["warned"]:
        logger.warning(
            f"Going on from {checkpoint} with new values, so that neither command alone would give the result: "
            f"{found['warned']}."
        )
    if found["takes effect"]:
        logger.info(f"From {checkpoint} on, these take effect: {found['takes effect']}.")


def _changed_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Describe each flag whose value has changed, photos excepted. A base of another name may be the same."""
    names = before.keys() & now.keys() - {"run", "instance_data_dir", "pretrained_model_name_or_path", "revision"}
    changes = {
        name: f"--{name} was {_shown(before[name])} and is {_shown(now[name])}"
        for name in names
        if before[name] != now[name]
    }
    if before["run"]["base"] != now["run"]["base"]:
        old, new = (
            f"{_shown(config.get('pretrained_model_name_or_path'))} ({config['run']['base']})"
            for config in (before, now)
        )
        changes["pretrained_model_name_or_path"] = f"--pretrained_model_name_or_path was {old} and is {new}"
    return {name: printable(change) for name, change in changes.items()}


def _shown(value: Any) -> str:
    """Return a value as a message shows it."""
    return "another list" if isinstance(value, (list, dict)) else f"{value!s:.200}"


def _fingerprint(base: Base) -> str:
    """Return the commit of a base on the Hub, or a hash of samples from its UNet's files in a folder."""
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
    """Return the SHA-256 of each image in a folder and of its captions, by file name."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and os.access(path, os.R_OK)]
    images = [path for path in files if has_image_name(path)]
    captions = [*caption_files(images, files).values(), *(path for path in files if path.name == METADATA)]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in images + captions}
