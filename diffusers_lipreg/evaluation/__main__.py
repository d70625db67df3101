"""Evaluate a personalized pipeline, or adapters, against its base: scores, drift, and a report with images.

    python -m diffusers_lipreg.evaluation --base stable-diffusion-v1-5/stable-diffusion-v1-5 --personalized sks-dog \
      --instance_data_dir photos --subject "sks dog" --class_noun dog --output_dir sks-dog-report

After an interruption, run the same command again: it keeps the images that exist.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from tqdm.auto import tqdm

from ..dreambooth.images import find_instance_images
from ..dreambooth.preflight import check_folder
from ..dreambooth.validation import set_scheduler
from ..errors import OneLineParser, run_cli
from ..loading import (
    check_same_architecture,
    find_device,
    load_personalized,
    load_pipeline,
    one_line_errors,
    read_probe_prompts,
    silence_libraries,
)
from . import report
from .drift import DriftMeter
from .encoders import ClipEncoder, DinoEncoder, Encoder
from .generation import Sampling, SubjectFiles, generate_images, image_folder, image_set
from .prompts import find_subjects
from .scores import score_subject

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAME = "python -m diffusers_lipreg.evaluation"


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(prog=NAME, description=(__doc__ or "").split("\n")[0])
    flag = parser.add_argument_group("models").add_argument
    flag("--base", required=True, help="The pretrained pipeline: a folder or a Hub id.")
    flag("--revision", help="Its Git revision on the Hub.")
    flag("--variant", help="Variant of its weight files, for example fp16.")
    flag("--personalized", required=True, help="A pipeline or adapters; with --dataset, {} is the subject's name.")
    flag = parser.add_argument_group("one subject").add_argument
    flag("--instance_data_dir", help="Folder with its photos.")
    flag("--subject", help='Its name in prompts, for example "sks dog".')
    flag("--class_noun", help="What it is one of, for example dog.")
    flag = parser.add_argument_group("the whole benchmark").add_argument
    flag("--dataset", help="Folder of the DreamBooth data set: a folder of photos for each subject.")
    flag("--unique_token", default="sks", help="The token in the subjects' training prompts.")
    flag = parser.add_argument_group("prompts").add_argument
    flag("--templates_file", help="Prompts to replace the benchmark's 25, one a line, {} for the subject.")
    flag("--probe_prompts", help="Prompts unrelated to the subject, one a line, to measure drift on.")
    flag = parser.add_argument_group("images").add_argument
    flag("--output_dir", default="evaluation", help="Folder for images and reports.")
    flag("--images_per_prompt", type=int, default=4, help="Images of each prompt.")
    flag("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    flag("--guidance_scale", type=float, default=7.5, help="Weight of classifier-free guidance.")
    flag("--resolution", type=int, help="Pixels; default: the pipeline's own.")
    flag("--scheduler", help="Scheduler class of diffusers, for example DDPMScheduler; default: the pipeline's own.")
    flag("--batch_size", type=int, default=4, help="Images generated at a time.")
    flag("--seed", type=int, default=0, help="Seed of all noise.")
    flag("--dtype", choices=DTYPES, help="Of images; default fp16 on a GPU, else fp32. Drift is in fp32.")
    flag("--device", help="Default: the GPU, if there is one.")
    flag = parser.add_argument_group("encoders").add_argument
    clip, dino = ["openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"], ["facebook/dino-vits16"]
    flag("--clip", nargs="+", default=clip, help="CLIP models of transformers: folders or Hub ids.")
    flag("--dino", nargs="+", default=dino, help="DINO or other ViT models of transformers: folders or Hub ids.")
    args = parser.parse_args(input_args)
    parser.check_texts(args)
    one = ("instance_data_dir", "subject", "class_noun")
    given = [f"--{name}" for name in one if vars(args)[name] is not None]
    missing = [f"--{name}" for name in one if vars(args)[name] is None]
    if args.dataset is not None and given:
        parser.error(f"{given[0]} is for one subject, not for --dataset")
    if args.dataset is None and missing:
        parser.error(f"{' and '.join(missing)} missing: name the subject, its class and its photos, or give --dataset")
    rules = {
        "images_per_prompt": ("at least 1", args.images_per_prompt >= 1),
        "num_inference_steps": ("at least 1", args.num_inference_steps >= 1),
        "batch_size": ("at least 1", args.batch_size >= 1),
        "resolution": ("a multiple of 8", args.resolution is None or args.resolution in range(8, 2**16, 8)),
        "guidance_scale": ("a finite number", math.isfinite(args.guidance_scale)),
        "seed": (f"0 to {2**32 - 1}", 0 <= args.seed < 2**32),
    }
    for name, (expected, fits) in rules.items():
        if not fits:
            parser.error(f"--{name} {vars(args)[name]}: expected {expected}")
    return args


def evaluate(args: argparse.Namespace) -> None:
    """Measure drift, generate images, score them, and write the report."""
    device, output_dir, subjects = find_device(args.device), Path(args.output_dir), find_subjects(args)
    unrelated = read_probe_prompts(args.probe_prompts)
    flag = "--instance_data_dir" if args.dataset is None else "--dataset"
    photos = {subject.name: find_instance_images(subject.photos, flag) for subject in subjects}
    check_folder(args.output_dir, "--output_dir")
    report.check_place(output_dir)
    encoders: list[Encoder] = [*map(DinoEncoder, args.dino), *map(ClipEncoder, args.clip)]
    args.dtype = args.dtype or ("fp16" if device.type == "cuda" else "fp32")
    sampling = Sampling(
        args.num_inference_steps, args.guidance_scale, args.resolution, args.batch_size, args.seed, DTYPES[args.dtype]
    )
    images = {subject.name: image_set(subject, unrelated, args.images_per_prompt) for subject in subjects}

    base = load_base(args)
    meter = DriftMeter(base, unrelated, sampling, device)
    root, drifts, files = output_dir / "images", {}, {}
    folder = image_folder(root / "base", base, sampling)
    for subject in subjects:
        name = subject.name
        pipeline = load_personalized(subject.personalized, args.base, torch.float32, args.revision, args.variant)
        check_same_architecture(base, pipeline, subject.personalized)
        pipeline.scheduler = type(base.scheduler).from_config(base.scheduler.config)
        folders = {"base": folder, "personalized": image_folder(root / name, pipeline, sampling)}
        files[name] = SubjectFiles(photos[name], images[name], folders)
        drifts[name] = meter.measure(pipeline, subject.personalized)
        generate_images(pipeline, folders["personalized"], [images[name]], sampling, device)
        del pipeline  # a GPU may have room for one at a time
    generate_images(base, folder, images.values(), sampling, device)

    del base, meter
    for encoder in encoders:
        encoder.model.to(device)
    results = {}
    for subject in tqdm(subjects, desc="scores", unit="subject"):
        scores = score_subject(subject, files[subject.name], encoders)
        results[subject.name] = {**subject._asdict(), **scores, "drift": drifts[subject.name]}
    summary = report.summarize(args, results)
    text = json.dumps(summary, indent=2, allow_nan=False, default=str)
    (output_dir / "report.json").write_text(text + "\n", encoding="utf-8")
    (output_dir / "report.html").write_text(report.html(summary, files), encoding="utf-8")
    print(report.text(summary))
    print(f"{output_dir / 'report.html'} {output_dir / 'report.json'}")


def load_base(args: argparse.Namespace) -> Any:
    """Load the base in float32, without its safety checker, and with the scheduler of `--scheduler`."""
    pipeline = load_pipeline("--base", args.base, torch.float32, args.revision, args.variant, safety_checker=None)
    if args.scheduler is not None:
        with one_line_errors(f"--scheduler {args.scheduler}: it does not fit --base"):
            if not issubclass(getattr(diffusers, args.scheduler), SchedulerMixin):
                raise TypeError("it is no scheduler")
            set_scheduler(pipeline, args.scheduler)
    return pipeline


def run(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    silence_libraries()

    def interruptible(args: argparse.Namespace) -> None:
        try:
            evaluate(args)
        except KeyboardInterrupt:
            command = f"{NAME} {shlex.join(sys.argv[1:] if argv is None else argv)}"
            print(f"\nInterrupted. The images so far are kept; to go on: {command}", file=sys.stderr)
            sys.exit(130)

    run_cli(interruptible, args, NAME)


if __name__ == "__main__":
    run()
