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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..dreambooth.images import find_instance_images
from ..dreambooth.preflight import check_folder
from ..dreambooth.setup import DTYPES
from ..errors import OneLineParser, run_cli
from ..loading import (
    check_same_architecture,
    find_device,
    load_personalized,
    load_pipeline,
    read_probe_prompts,
    silence_libraries,
)
from . import prompts
from .drift import DriftMeter
from .generation import Sampling, generate_images, use_scheduler, write_whole
from .page import html
from .prompts import Subject
from .report import subject_info, summarize, table
from .results import BASE, Images, personalized_folder, score_subject
from .scores import ClipEncoder, DinoEncoder

NAME = "python -m diffusers_lipreg.evaluation"
CLIP = ["openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"]
DINO = ["facebook/dino-vits16"]


def build_parser() -> OneLineParser:
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
    dtypes = ["fp32", "fp16", "bf16"]
    flag("--dtype", choices=dtypes, help="Of images; default fp16 on a GPU, else fp32. Drift is in fp32.")
    flag("--device", help="Default: the GPU, if there is one.")
    flag = parser.add_argument_group("encoders").add_argument
    flag("--clip", nargs="+", default=CLIP, help="CLIP models of transformers: folders or Hub ids.")
    flag("--dino", nargs="+", default=DINO, help="DINO or other ViT models of transformers: folders or Hub ids.")
    return parser


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(input_args)
    parser.check_texts(args)
    one = {"--instance_data_dir": args.instance_data_dir, "--subject": args.subject, "--class_noun": args.class_noun}
    missing = [name for name, value in one.items() if value is None]
    if args.dataset is not None and len(missing) < len(one):
        parser.error(f"{next(name for name in one if one[name] is not None)} is for one subject, not for --dataset")
    if args.dataset is None and missing:
        parser.error(f"{' and '.join(missing)} missing: name the subject, its class and its photos, or give --dataset")
    for name in ("images_per_prompt", "num_inference_steps", "batch_size"):
        if vars(args)[name] < 1:
            parser.error(f"--{name} {vars(args)[name]}: expected at least 1")
    if args.resolution is not None and (args.resolution < 8 or args.resolution % 8):
        parser.error(f"--resolution {args.resolution}: expected a multiple of 8")
    if not math.isfinite(args.guidance_scale):
        parser.error(f"--guidance_scale {args.guidance_scale}: expected a finite number")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: expected 0 to {2**32 - 1}")
    return args


def find_subjects(args: argparse.Namespace) -> list[Subject]:
    templates = None if args.templates_file is None else prompts.read_templates(args.templates_file)
    if args.dataset is not None:
        return prompts.benchmark_subjects(args.dataset, args.unique_token, args.personalized, templates)
    return [prompts.one_subject(args.subject, args.class_noun, args.instance_data_dir, args.personalized, templates)]


def evaluate(args: argparse.Namespace) -> None:
    """Measure drift, generate images, score them, and write the report.

    Drift comes first because it loads every model, and so finds early what does not fit.
    """
    device, output_dir, subjects = find_device(args.device), Path(args.output_dir), find_subjects(args)
    unrelated = read_probe_prompts(args.probe_prompts)
    flag = "--instance_data_dir" if args.dataset is None else "--dataset"
    photos = {subject.name: find_instance_images(subject.photos, flag) for subject in subjects}
    check_folder(args.output_dir, "--output_dir")
    encoders: list[DinoEncoder | ClipEncoder] = [DinoEncoder(model, device) for model in args.dino]
    encoders += [ClipEncoder(model, device) for model in args.clip]
    dtype = DTYPES[args.dtype] or (torch.float16 if device.type == "cuda" else torch.float32)
    size = args.resolution
    sampling = Sampling(args.num_inference_steps, args.guidance_scale, size, args.batch_size, args.seed, dtype)

    drifts = measure_drifts(args, subjects, DriftMeter(load_base(args, torch.float32), unrelated, sampling, device))
    images = {s.name: Images(output_dir, s, unrelated, args.images_per_prompt) for s in subjects}
    generate_all(args, subjects, images, sampling, device)
    results = {}
    for subject in tqdm(subjects, desc="scores", unit="subject"):
        scores = score_subject(subject, photos[subject.name], images[subject.name], encoders)
        results[subject.name] = {**subject_info(subject), **scores, "drift": drifts[subject.name]}

    report = summarize(args, sampling, results)
    write_whole(output_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_whole(output_dir / "report.html", html(report, photos, images))
    print(table(report))
    print(f"{output_dir / 'report.html'} {output_dir / 'report.json'}")


def load_base(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """Load the base without its safety checker, with the scheduler of `--scheduler`."""
    pipeline = load_pipeline("--base", args.base, dtype, args.revision, args.variant, safety_checker=None)
    return use_scheduler(pipeline, args.scheduler)


def load_subject(args: argparse.Namespace, subject: Subject, scheduler: Any, dtype: torch.dtype) -> Any:
    """Load the personalized pipeline of a subject, with a scheduler like the base's in place of its own."""
    pipeline = load_personalized(subject.personalized, args.base, dtype, args.revision, args.variant)
    pipeline.scheduler = type(scheduler).from_config(scheduler.config)
    return pipeline


def measure_drifts(args: argparse.Namespace, subjects: Sequence[Subject], meter: DriftMeter) -> dict[str, Any]:
    """Return the drift of each subject's pipeline, by the subject's name."""
    drifts = {}
    for subject in tqdm(subjects, desc="drift", unit="subject"):
        pipeline = load_subject(args, subject, meter.base.scheduler, torch.float32)
        check_same_architecture(meter.base, pipeline, subject.personalized)
        drifts[subject.name] = meter.measure(pipeline, subject.personalized)
    return drifts


def generate_all(
    args: argparse.Namespace,
    subjects: Sequence[Subject],
    images: Mapping[str, Images],
    sampling: Sampling,
    device: torch.device,
) -> None:
    """Generate the images of the base, then those of each subject's pipeline."""
    base, output_dir = load_base(args, sampling.dtype), Path(args.output_dir)
    specs = [spec for subject in subjects for spec in images[subject.name].base.all]
    generate_images(base, output_dir / BASE, specs, sampling, device, "images of the base")
    scheduler = base.scheduler
    del base  # one pipeline at a time fits into memory
    for subject in subjects:
        pipeline, folder = load_subject(args, subject, scheduler, sampling.dtype), personalized_folder(subject)
        specs = images[subject.name].personalized.all
        generate_images(pipeline, output_dir / folder, specs, sampling, device, f"images of {subject.text}")
        del pipeline


def run(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    silence_libraries()
    try:
        run_cli(evaluate, args, NAME)
    except KeyboardInterrupt:
        command = f"{NAME} {shlex.join(sys.argv[1:] if argv is None else argv)}"
        print(f"\nInterrupted. The images so far are kept; to go on: {command}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
