"""The flags of diffusers' official DreamBooth scripts: names, types, defaults and the checks between them."""

import argparse
import math
import os
import warnings
from collections.abc import Sequence
from typing import NoReturn

from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType


class RunError(Exception):
    """The run cannot start or go on. The message is one line: what is wrong and how to mend it."""


class OneLineParser(argparse.ArgumentParser):
    """Answers a mistake with one line; the usage of 66 flags would bury it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def add_shared_arguments(
    parser: argparse.ArgumentParser, *, output_dir: str, resolution: int, learning_rate: float, weight_decay: float
) -> None:
    """Adds the flags that the official SD and SDXL scripts share; the defaults that differ are arguments."""
    _add_model_and_data(parser, resolution)
    _add_prior(parser)
    _add_training(parser, output_dir)
    _add_optimizer(parser, learning_rate, weight_decay)
    _add_hub_logs_and_validation(parser)
    _add_hardware(parser)


def _add_model_and_data(parser: argparse.ArgumentParser, resolution: int) -> None:
    flag = parser.add_argument_group("model and photos").add_argument
    flag("--pretrained_model_name_or_path", required=True, help="Pipeline to start from: a folder or a Hub id.")
    flag("--revision", help="Git revision of the model on the Hub.")
    flag("--variant", help="Variant of the weight files, for example fp16.")
    flag("--instance_prompt", required=True, help='Prompt of the photos, for example "a photo of sks dog".')
    flag("--resolution", type=int, default=resolution, help="Pixels of the short side, and of the square crop.")
    flag("--center_crop", action="store_true", help="Crop the centre instead of a random place.")


def _add_prior(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("prior preservation").add_argument
    flag("--with_prior_preservation", action="store_true", help="Train on sampled images of the class, too.")
    flag("--prior_loss_weight", type=float, default=1.0, help="Weight of the loss on class images.")
    flag("--class_data_dir", help="Folder of class images; missing ones are sampled into it.")
    flag("--class_prompt", help='Prompt of the class images, for example "a photo of dog".')
    flag("--num_class_images", type=int, default=100, help="How many class images to have and to use.")
    flag("--sample_batch_size", type=int, default=4, help="Class images sampled at a time, per device.")
    flag(
        "--prior_generation_precision",
        choices=["no", "fp32", "fp16", "bf16"],
        help="Precision of that sampling; default fp16 on a GPU, else fp32.",
    )


def _add_training(parser: argparse.ArgumentParser, output_dir: str) -> None:
    flag = parser.add_argument_group("training").add_argument
    flag("--output_dir", default=output_dir, help="Where results, checkpoints and logs go.")
    flag("--seed", type=int, help="Seed of everything random.")
    flag("--train_text_encoder", action="store_true", help="Train the text encoder beside the UNet.")
    flag("--train_batch_size", type=int, default=4, help="Photos a step, per device.")
    flag("--num_train_epochs", type=int, default=1, help="Passes over the photos; --max_train_steps overrides it.")
    flag("--max_train_steps", type=int, help="Optimizer updates.")
    flag("--gradient_accumulation_steps", type=int, default=1, help="Batches whose gradients make up one update.")
    flag("--gradient_checkpointing", action="store_true", help="Trade time for memory in the backward pass.")
    flag("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints.")
    flag("--checkpoints_total_limit", type=int, help="Keep at most this many checkpoints.")
    flag("--resume_from_checkpoint", help='A checkpoint of this output folder, or "latest".')
    flag("--snr_gamma", type=float, help="Gamma of Min-SNR loss weights (arXiv 2303.09556); 5.0 is usual.")


def _add_optimizer(parser: argparse.ArgumentParser, learning_rate: float, weight_decay: float) -> None:
    flag = parser.add_argument_group("optimizer").add_argument
    flag("--learning_rate", type=float, default=learning_rate, help="Learning rate after warm-up.")
    flag("--scale_lr", action="store_true", help="Multiply it by devices, batch size and accumulation steps.")
    flag("--lr_scheduler", default="constant", help="linear, cosine, cosine_with_restarts, polynomial, constant, ...")
    flag("--lr_warmup_steps", type=int, default=500, help="Updates of warm-up.")
    flag("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    flag("--lr_power", type=float, default=1.0, help="Exponent of polynomial.")
    flag("--use_8bit_adam", action="store_true", help="AdamW8bit of bitsandbytes.")
    flag("--adam_beta1", type=float, default=0.9, help="Decay of the mean of gradients.")
    flag("--adam_beta2", type=float, default=0.999, help="Decay of the mean of their squares.")
    flag("--adam_weight_decay", type=float, default=weight_decay, help="0 while the penalty is on, unless given.")
    flag("--adam_epsilon", type=float, default=1e-08, help="Added to its root.")
    flag("--max_grad_norm", type=float, default=1.0, help="Clip the norm of the gradient to this.")


def _add_hub_logs_and_validation(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("validation").add_argument
    flag("--validation_prompt", help="Sample images of this prompt along the way.")
    flag("--num_validation_images", type=int, default=4, help="How many.")
    flag = parser.add_argument_group("hub and logs").add_argument
    flag("--push_to_hub", action="store_true", help="Upload the result.")
    flag("--hub_token", help="Token for the upload; default: the one of `hf auth login`.")
    flag("--hub_model_id", help="Repository to push to; default: the name of --output_dir.")
    flag("--logging_dir", default="logs", help="Folder of the logs, inside --output_dir.")
    flag("--report_to", default="tensorboard", help='Tracker: tensorboard, wandb, comet_ml, ... or "all".')


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    flag = parser.add_argument_group("hardware").add_argument
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: what `accelerate config` says.")
    flag("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    flag("--dataloader_num_workers", type=int, default=0, help="Processes that load photos; 0: the main one.")
    flag("--local_rank", type=int, default=-1, help="Set by launchers; LOCAL_RANK in the environment wins.")
    flag("--enable_xformers_memory_efficient_attention", action="store_true", help="Attention of xformers.")


def add_sd_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that only the official SD script has."""
    flag = parser.add_argument_group("Stable Diffusion").add_argument
    flag("--instance_data_dir", required=True, help="Folder with the photos of the subject.")
    flag("--tokenizer_name", help="Another tokenizer than the pipeline's: a folder or a Hub id.")
    flag("--tokenizer_max_length", type=int, help="Tokens a prompt; default: the tokenizer's.")
    flag("--text_encoder_use_attention_mask", action="store_true", help="Hide padding from the text encoder.")
    flag("--pre_compute_text_embeddings", action="store_true", help="Encode prompts once, then drop the encoder.")
    flag("--skip_save_text_encoder", action="store_true", help="Leave the text encoder out of the saved pipeline.")
    flag("--class_labels_conditioning", help='"timesteps" feeds the timestep as class label, too.')
    flag("--offset_noise", action="store_true", help="Shift each image's noise by 0.1 of a constant.")
    flag("--set_grads_to_none", action="store_true", help="Free gradients instead of zeroing them.")
    flag("--validation_steps", type=int, default=100, help="Updates between validations.")
    flag("--validation_images", nargs="+", help="Images the validation pipeline takes beside the prompt.")
    flag(
        "--validation_scheduler",
        default="DPMSolverMultistepScheduler",
        choices=["DPMSolverMultistepScheduler", "DDPMScheduler"],
        help="Scheduler of validation.",
    )


def add_lipreg_arguments(
    parser: argparse.ArgumentParser, *, weight: float, reduction: str, reductions: Sequence[str]
) -> None:
    """Adds the flags of the penalty; the defaults are the paper's for the script's configuration."""
    flag = parser.add_argument_group("drift penalty").add_argument
    flag("--lipreg_weight", type=float, default=weight, help="Weight of the penalty; 0 is the official script.")
    flag("--lipreg_reduction", default=reduction, choices=reductions, help="How squared drift becomes one number.")
    flag("--lipreg_text_encoder_weight", type=float, help="Weight for a trained text encoder; default: the UNet's.")
    flag("--lipreg_teacher_device", help='Where the pretrained weights are kept, for example "cpu".')
    flag("--lipreg_teacher_dtype", choices=["fp32", "fp16", "bf16"], help="Their type; default: the model's, exact.")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks; a mistake ends in one line and exit code 2."""
    args = parser.parse_args(arguments)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    check_numbers(parser, args)
    check_shared(parser, args)
    check_lipreg(parser, args)
    return args


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses numbers that no run can use."""
    at_least_one = [
        "resolution", "sample_batch_size", "train_batch_size", "num_train_epochs", "max_train_steps",
        "gradient_accumulation_steps", "checkpointing_steps", "validation_steps", "tokenizer_max_length",
    ]  # fmt: skip
    for name in at_least_one:
        number = vars(args).get(name)
        if number is not None and number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    for name, number in vars(args).items():
        if isinstance(number, float) and not (math.isfinite(number) and number >= 0):
            parser.error(f"--{name} must be a finite number, 0 or more, got {number}")


def check_shared(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The official checks between flags, and values that would only fail after the models are loaded."""
    if args.with_prior_preservation:
        if args.class_data_dir is None:
            parser.error("--with_prior_preservation needs --class_data_dir, a folder for class images")
        if args.class_prompt is None:
            parser.error("--with_prior_preservation needs --class_prompt, a prompt for class images")
    elif args.class_data_dir is not None or args.class_prompt is not None:
        warnings.warn("--class_data_dir and --class_prompt do nothing without --with_prior_preservation", stacklevel=2)
    schedulers = [scheduler.value for scheduler in SchedulerType if scheduler != SchedulerType.PIECEWISE_CONSTANT]
    if args.lr_scheduler not in schedulers:
        parser.error(f"--lr_scheduler must be one of {', '.join(schedulers)}, got {args.lr_scheduler}")
    trackers = [tracker.value for tracker in LoggerType]
    if args.report_to not in trackers:
        parser.error(f"--report_to must be one of {', '.join(trackers)}, got {args.report_to}")
    if args.report_to == "wandb" and args.hub_token is not None:
        parser.error("--report_to wandb with --hub_token: use `hf auth login` instead, tokens do not belong in runs")


def check_sd(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The checks that only the official SD script makes."""
    if args.train_text_encoder and args.pre_compute_text_embeddings:
        parser.error("--train_text_encoder and --pre_compute_text_embeddings exclude each other")


def check_lipreg(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Keeps weight and reduction together, and weight decay from pulling the other way."""
    # argparse hands out the default object itself, so `is` tells a default from the same number given by the user.
    weight_is_default = args.lipreg_weight is parser.get_default("lipreg_weight")
    if weight_is_default and args.lipreg_reduction != parser.get_default("lipreg_reduction"):
        parser.error(
            f"--lipreg_reduction {args.lipreg_reduction} needs a --lipreg_weight of its own: the default, "
            f"{args.lipreg_weight:g}, is meant for {parser.get_default('lipreg_reduction')}"
        )
    if args.lipreg_text_encoder_weight is None:
        args.lipreg_text_encoder_weight = args.lipreg_weight
    elif not args.train_text_encoder:
        warnings.warn("--lipreg_text_encoder_weight does nothing without --train_text_encoder", stacklevel=2)
    penalised = args.lipreg_weight > 0 or (args.train_text_encoder and args.lipreg_text_encoder_weight > 0)
    if penalised and args.adam_weight_decay is parser.get_default("adam_weight_decay"):
        args.adam_weight_decay = 0.0
