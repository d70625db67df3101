"""Define the flags of diffusers' official DreamBooth scripts and ours, and check them one by one and together."""

import argparse
import os
import re
import warnings
from collections.abc import Iterable, Sequence

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ..errors import OneLineParser

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
AT_LEAST_ONE = """
    resolution sample_batch_size train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
    checkpointing_steps validation_steps validation_epochs tokenizer_max_length repeats rank extract_lora_rank lipreg_points
""".split()
AT_LEAST_ZERO = ("dataloader_num_workers", "lr_warmup_steps", "probe_steps")
OUTPUT_WEIGHT = 3.0  # where predictions have a mean square of about 1, as those of noise
BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout")


def add_shared_arguments(
    parser: argparse.ArgumentParser, *, output_dir: str, resolution: int, learning_rate: float, weight_decay: float
) -> None:
    """Add the flags that the official SD and SDXL scripts share; the defaults that differ are arguments."""
    flag = parser.add_argument_group("model and photos").add_argument
    flag("--pretrained_model_name_or_path", required=True, help="Pipeline to start from: a folder or a Hub id.")
    flag("--revision", help="Git revision of the model on the Hub.")
    flag("--variant", help="Variant of the weight files, for example fp16.")
    flag("--instance_prompt", required=True, help='Prompt of the photos, for example "a photo of sks dog".')
    flag("--resolution", type=int, default=resolution, help="Pixels of the short side, and of the square crop.")
    flag("--center_crop", action="store_true", help="Crop the center instead of a random place.")

    flag = parser.add_argument_group("prior preservation").add_argument
    flag("--with_prior_preservation", action="store_true", help="Train on sampled images of the class, too.")
    flag("--prior_loss_weight", type=float, default=1.0, help="Weight of the loss on class images.")
    flag("--class_data_dir", help="Folder of class images; missing ones are sampled into it.")
    flag("--class_prompt", help='Prompt of the class images, for example "a photo of dog".')
    flag("--num_class_images", type=int, default=100, help="How many class images to have and to use.")
    flag("--sample_batch_size", type=int, default=4, help="Class images sampled at a time, per device.")
    precisions = ["no", "fp32", "fp16", "bf16"]
    flag("--prior_generation_precision", choices=precisions, help="Default: fp16 on a GPU, else fp32.")

    flag = parser.add_argument_group("training").add_argument
    flag("--output_dir", default=output_dir, help="Where results, checkpoints and logs go.")
    flag("--seed", type=int, help="Seed of everything random.")
    flag("--train_text_encoder", action="store_true", help="Train the text encoder, too.")
    flag("--train_batch_size", type=int, default=4, help="Photos a step, per device.")
    flag("--num_train_epochs", type=int, default=1, help="Passes over the photos; --max_train_steps overrides it.")
    flag("--max_train_steps", type=int, help="Optimizer updates.")
    flag("--gradient_accumulation_steps", type=int, default=1, help="Batches whose gradients make up one update.")
    flag("--gradient_checkpointing", action="store_true", help="Trade time for memory in the backward pass.")
    flag("--checkpointing_steps", type=int, default=500, help="Updates between checkpoints.")
    flag("--checkpoints_total_limit", type=int, help="Keep at most this many checkpoints.")
    flag("--resume_from_checkpoint", help='A checkpoint of this output folder, or "latest".')
    flag("--snr_gamma", type=float, help="Gamma of Min-SNR loss weights (arXiv 2303.09556); 5.0 is usual.")
    action = argparse.BooleanOptionalAction
    flag("--cache_latents", action=action, help="Encode images once, and drop the VAE; default: where lossless.")

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

    flag = parser.add_argument_group("validation").add_argument
    flag("--validation_prompt", help="Sample images of this prompt along the way.")
    flag("--num_validation_images", type=int, default=4, help="How many.")

    flag = parser.add_argument_group("hub and logs").add_argument
    flag("--push_to_hub", action="store_true", help="Upload the result.")
    flag("--hub_token", help="Token for the upload; default, and safer: HF_TOKEN or `hf auth login`.")
    flag("--hub_model_id", help="Repository to push to; default: the name of --output_dir.")
    flag("--logging_dir", default="logs", help="Folder of the logs, inside --output_dir.")
    flag("--report_to", default="tensorboard", help='Tracker: tensorboard, wandb, comet_ml, ... or "all".')

    flag = parser.add_argument_group("hardware").add_argument
    flag("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: what `accelerate config` says.")
    flag("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later.")
    flag("--dataloader_num_workers", type=int, default=0, help="Processes that load photos; 0: the main one.")
    flag("--local_rank", type=int, default=-1, help="Set by launchers; LOCAL_RANK in the environment wins.")
    flag("--enable_xformers_memory_efficient_attention", action="store_true", help="Attention of xformers.")
    flag("--debug", action="store_true", help="Show where in the code a run was stopped.")


def _add_adapters(parser: argparse.ArgumentParser, rank: int | None) -> None:
    flag = parser.add_argument_group("adapters").add_argument
    flag("--rank", type=int, default=rank, help="Rank of LoRA adapters.")
    flag("--lora_dropout", type=float, default=0.0, help="Dropout of their input.")
    flag("--use_dora", action="store_true", help="Weight-decomposed adapters (DoRA, arXiv 2402.09353).")


def add_sd_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only the official SD script has, and those with which ours trains adapters or extracts them."""
    flag = parser.add_argument_group("Stable Diffusion").add_argument
    flag("--instance_data_dir", required=True, help="Folder with the photos of the subject.")
    flag("--caption_column", help="Field of captions in the metadata.jsonl beside the photos.")
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
    schedulers = ["DPMSolverMultistepScheduler", "DDPMScheduler"]
    flag("--validation_scheduler", default=schedulers[0], choices=schedulers, help="Scheduler of validation.")
    _add_adapters(parser, rank=None)
    flag = parser.add_argument_group("adapters, further").add_argument
    flag("--lora_alpha", type=float, help="They are scaled by alpha / rank; default: the rank.")
    flag("--extract_lora_rank", type=int, help="After full fine-tuning, write adapters of this rank, too.")


def boolean(text: str) -> bool:
    """Read true or false from a word: `type=bool` would take any word for true."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text}")
    return text.lower() in ("true", "1", "yes")


def add_sdxl_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only the official SDXL LoRA script has."""
    flag = parser.add_argument_group("SDXL: photos and captions").add_argument
    flag("--instance_data_dir", help="Folder with the photos of the subject.")
    flag("--dataset_name", help="A data set in their place: a folder that `datasets` reads, or a Hub id.")
    flag("--dataset_config_name", help="Its configuration.")
    flag("--cache_dir", help="Where `datasets` keeps it.")
    flag("--image_column", default="image", help="Its column of images.")
    flag("--caption_column", help="Its column of captions, or the field of a folder's metadata.jsonl.")
    flag("--repeats", type=int, default=1, help="How often each photo stands in an epoch.")
    flag("--random_flip", action="store_true", help="Mirror half of the photos.")
    _add_adapters(parser, rank=4)
    modes = ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"]
    flag("--image_interpolation_mode", default="lanczos", choices=modes, help="How photos are resized.")

    flag = parser.add_argument_group("SDXL: model and training").add_argument
    flag("--pretrained_vae_model_name_or_path", help="Another VAE, for example one that is exact in fp16.")
    flag("--do_edm_style_training", action="store_true", help="Train in the terms of EDM (arXiv 2206.00364).")
    flag("--output_kohya_format", action="store_true", help="Write the adapters in kohya's format, too.")
    flag("--validation_epochs", type=int, default=50, help="Epochs between validations.")

    flag = parser.add_argument_group("SDXL: optimizer").add_argument
    flag("--optimizer", default="AdamW", help="AdamW or prodigy.")
    flag("--text_encoder_lr", type=float, default=5e-6, help="Learning rate of the text encoders' adapters.")
    flag("--adam_weight_decay_text_encoder", type=float, default=1e-3, help="Their weight decay.")
    flag("--prodigy_beta3", type=float, help="Decay of prodigy's step size estimate; default: root of beta2.")
    flag("--prodigy_decouple", type=boolean, default=True, help="Decoupled weight decay, as in AdamW.")
    flag("--prodigy_use_bias_correction", type=boolean, default=True, help="Bias correction, as in Adam.")
    flag("--prodigy_safeguard_warmup", type=boolean, default=True, help="Keep warm-up out of that estimate.")


def add_lipreg_arguments(
    parser: argparse.ArgumentParser, *, weight: float, reduction: str, reductions: Iterable[str]
) -> None:
    """Add the flags of the penalty; the defaults are the paper's for the models of the script."""
    flag = parser.add_argument_group("drift penalty").add_argument
    flag("--lipreg_weight", type=float, default=weight, help="Weight of the penalty; 0 is the official script.")
    flag("--drift_budget", type=float, help="Find the weight that ends at this relative output drift, such as 0.02.")
    flag(
        "--lipreg_reduction",
        default=reduction,
        choices=[*reductions, "output"],
        help="What is held near the pretrained model: weights, in one of several ways, or output, its predictions.",
    )
    flag("--lipreg_text_encoder_weight", type=float, help="Weight for a trained text encoder; default: the UNet's.")
    flag("--lipreg_teacher_device", help='Where pretrained weights are kept: "cpu", "disk"; adapters need none.')
    flag(
        "--lipreg_teacher_dtype",
        choices=["fp32", "fp16", "bf16"],
        help="Their type; default: the smallest that is exact.",
    )
    flag("--lipreg_prompts", help="With the reduction output: file with a prompt a line; default: generic ones.")
    flag("--lipreg_points", type=int, default=1024, help="With the reduction output: recorded calls to hold it on.")
    flag = parser.add_argument_group("output drift").add_argument
    flag("--probe_steps", type=int, default=500, help="Updates between measurements of output drift; 0: never.")
    flag("--probe_prompts", help="File with a prompt in each line to measure it on; default: a few generic ones.")
    flag("--keep_best", action="store_true", help="Write checkpoint-best: the best mean of likeness and retention.")


def parse(parser: OneLineParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the flags and check them; a mistake ends the process with one line and exit code 2."""
    args = parser.parse_args(arguments)
    if args.hub_token and not re.fullmatch(r"[!-~]+", args.hub_token):
        parser.error("--hub_token holds a character that no token has")  # the client's message would quote it
    local_rank = os.environ.get("LOCAL_RANK", str(args.local_rank))
    if not re.fullmatch(r"-?\d{1,9}", local_rank):
        parser.error(f"LOCAL_RANK in the environment is {local_rank!r}, not a number")
    args.local_rank = int(local_rank)
    parser.check_texts(args)
    if not args.instance_prompt.strip():
        warnings.warn("--instance_prompt is empty: no prompt will call for the subject", stacklevel=2)
    check_numbers(parser, args)
    check_shared(parser, args)
    check_lipreg(parser, args)
    return args


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse numbers that no run can use."""
    at_least_one = set(AT_LEAST_ONE)
    if args.with_prior_preservation:
        at_least_one.add("num_class_images")
    if args.validation_prompt is not None:
        at_least_one.add("num_validation_images")
    numbers = {name: number for name, number in vars(args).items() if isinstance(number, (int, float))}
    for name, number in numbers.items():
        if name in at_least_one and number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
        if name in AT_LEAST_ZERO and number < 0:
            parser.error(f"--{name} must be 0 or more, got {number}")
        if name in BELOW_ONE and number >= 1:
            parser.error(f"--{name} must be below 1, got {number}")
        if isinstance(number, int) and number >= 2**63:
            parser.error(f"--{name} must be below {2**63}, got {number}")
        if isinstance(number, float) and not 0 <= number <= FLOAT32_MAX:
            parser.error(f"--{name} must be a finite number, 0 or more, that float32 can hold, got {number}")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be from 0 to {2**32 - 1}, got {args.seed}")
    for name in ("learning_rate", "max_grad_norm", "snr_gamma", "lora_alpha"):
        if vars(args).get(name) == 0:
            parser.error(f"--{name} must be above 0: nothing would be trained")


def check_shared(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make the official checks between flags, and refuse values that would fail only after the models are loaded."""
    if args.with_prior_preservation:
        if args.class_data_dir is None:
            parser.error("--with_prior_preservation needs --class_data_dir, a folder for class images")
        if args.class_prompt is None:
            parser.error("--with_prior_preservation needs --class_prompt, a prompt for class images")
    elif args.class_data_dir is not None or (args.class_prompt is not None and args.lipreg_reduction != "output"):
        warnings.warn("--class_data_dir and --class_prompt do nothing without --with_prior_preservation", stacklevel=2)
    from diffusers.optimization import SchedulerType  # imported late: it takes a second, and --help does without

    schedulers = [scheduler.value for scheduler in SchedulerType if scheduler != SchedulerType.PIECEWISE_CONSTANT]
    if args.lr_scheduler not in schedulers:
        parser.error(f"--lr_scheduler must be one of {', '.join(schedulers)}, got {args.lr_scheduler}")
    trackers = [tracker.value for tracker in LoggerType]
    if args.report_to not in trackers:
        parser.error(f"--report_to must be one of {', '.join(trackers)}, got {args.report_to}")
    wanted = [tracker.value for tracker in get_available_trackers()] if args.report_to == "all" else [args.report_to]
    others = sorted(set(wanted) - {"tensorboard"})
    if others and args.hub_token is not None:  # wandb, comet_ml, clearml and swanlab store the command line
        parser.error(
            f"--hub_token with {others[0]}, which may store the command line: set HF_TOKEN or use `hf auth login` instead"
        )


def check_sd(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make the checks that only the official SD script has."""
    if args.train_text_encoder and args.pre_compute_text_embeddings:
        parser.error("--train_text_encoder and --pre_compute_text_embeddings exclude each other")
    if args.rank is None:
        for flag in ("lora_alpha", "lora_dropout", "use_dora"):
            if vars(args)[flag]:
                parser.error(f"--{flag} is about adapters: it needs --rank")
    elif args.extract_lora_rank is not None:
        parser.error("--extract_lora_rank is for full fine-tuning: with --rank there are adapters already")


def check_sdxl(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Make the checks that only the official SDXL LoRA script has."""
    if args.dataset_name is None and args.instance_data_dir is None:
        parser.error("specify either --dataset_name or --instance_data_dir")
    if args.dataset_name is not None and args.instance_data_dir is not None:
        parser.error("specify only one of --dataset_name and --instance_data_dir")
    if args.do_edm_style_training and args.snr_gamma is not None:
        parser.error("--do_edm_style_training and --snr_gamma exclude each other")


def check_lipreg(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check the flags of the penalty, and set the weight decay to 0 while it is on.

    The decay pulls towards zero, the penalty towards the pretrained weights.
    """
    _check_kind(parser, args)
    # argparse hands out the default object itself, so `is` tells a default from the same number given by the user.
    weight_is_default = args.lipreg_weight is parser.get_default("lipreg_weight")
    if args.drift_budget is not None:
        _check_budget(parser, args, weight_is_default)
        return
    if args.keep_best and args.probe_steps == 0:
        parser.error("--keep_best chooses by what is measured along the way: it needs --probe_steps above 0")
    if weight_is_default and args.lipreg_reduction == "output":
        args.lipreg_weight = OUTPUT_WEIGHT
    elif weight_is_default and args.lipreg_reduction != parser.get_default("lipreg_reduction"):
        parser.error(
            f"--lipreg_reduction {args.lipreg_reduction} needs a --lipreg_weight of its own: the default, "
            f"{args.lipreg_weight:g}, is meant for {parser.get_default('lipreg_reduction')}"
        )
    if args.use_dora and args.lipreg_reduction == "factors" and args.lipreg_weight > 0:
        warnings.warn(
            "factors sums the squares of the adapters' A and B; DoRA's magnitudes are not in it. product measures the "
            "change of the merged weights, magnitudes included",
            stacklevel=2,
        )
    if args.lipreg_text_encoder_weight is None:
        args.lipreg_text_encoder_weight = args.lipreg_weight
    elif not args.train_text_encoder:
        warnings.warn("--lipreg_text_encoder_weight does nothing without --train_text_encoder", stacklevel=2)
    if args.lipreg_weight > 0 or (args.train_text_encoder and args.lipreg_text_encoder_weight > 0):
        _stop_weight_decay(parser, args)


def _check_kind(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that belong to another kind of penalty."""
    teacher = (args.lipreg_teacher_device, args.lipreg_teacher_dtype)
    if args.rank is not None and teacher != (None, None):
        parser.error(
            "--lipreg_teacher_device and --lipreg_teacher_dtype are for full fine-tuning: adapters need no teacher"
        )
    if args.lipreg_teacher_device == "disk" and args.lipreg_teacher_dtype is not None:
        parser.error(
            "--lipreg_teacher_dtype does nothing with --lipreg_teacher_device disk, which keeps the file's type"
        )
    points_are_default = args.lipreg_points == parser.get_default("lipreg_points")
    if args.lipreg_reduction == "output":
        if teacher != (None, None):
            parser.error("--lipreg_teacher_device and --lipreg_teacher_dtype are for weights, not for outputs")
    elif args.lipreg_prompts is not None or not points_are_default:
        parser.error("--lipreg_prompts and --lipreg_points need --lipreg_reduction output")


def _stop_weight_decay(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("adam_weight_decay", "adam_weight_decay_text_encoder"):
        if name in args and vars(args)[name] is parser.get_default(name):
            setattr(args, name, 0.0)


def _check_budget(parser: argparse.ArgumentParser, args: argparse.Namespace, weight_is_default: bool) -> None:
    """Check `--drift_budget`; leave the weights to it (`None`), with the reduction of Algorithm 1 by default."""
    if not weight_is_default or args.lipreg_text_encoder_weight is not None:
        parser.error("--drift_budget finds the weight itself: it and --lipreg_weight exclude each other")
    if args.drift_budget == 0:
        parser.error("--drift_budget must be above 0, got 0.0")
    args.lipreg_weight = None
    if args.lipreg_reduction is parser.get_default("lipreg_reduction"):
        args.lipreg_reduction = {"tensor_mean": "sum", "factors": "product"}[args.lipreg_reduction]
    if args.lipreg_reduction == "factors":
        parser.error(
            "--lipreg_reduction factors does not measure a change, so --drift_budget cannot steer it: use product"
        )
    _stop_weight_decay(parser, args)
