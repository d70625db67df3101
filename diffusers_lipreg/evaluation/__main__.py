"""Evaluate a personalized pipeline, or adapters, against its base: scores, drift, a report with images.

    python -m diffusers_lipreg.evaluation --base stable-diffusion-v1-5/stable-diffusion-v1-5 --personalized sks-dog \
      --instance_data_dir photos --subject "sks dog" --class_noun dog --output_dir sks-dog-report

Run it again with the same arguments to go on after an interruption: images that exist are not generated again.
"""

from __future__ import annotations

import argparse
import logging
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..dreambooth.data import find_instance_images
from ..dreambooth.preflight import check_folder
from ..dreambooth.setup import DTYPES
from ..errors import OneLineParser, read_lines, run_cli
from ..loading import check_same_architecture, find_device, load_personalized, load_pipeline, silence_libraries
from ..probe import PROMPTS
from . import prompts
from .drift import DriftMeter
from .generation import Sampling, generate_images, use_scheduler
from .prompts import Subject
from .report import subject_info, summarize, table, write_report
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
    flag(
        "--personalized", required=True, help="A pipeline or LoRA adapters; with --dataset, {} is the subject's name."
    )
    flag = parser.add_argument_group("one subject").add_argument
    flag("--instance_data_dir", help="Folder with its photos.")
    flag("--subject", help='Its name in prompts, for example "sks dog".')
    flag("--class_noun", help="What it is one of, for example dog.")
    flag = parser.add_argument_group("the whole benchmark").add_argument
    flag("--dataset", help="Folder of the DreamBooth data set, with a folder of photos for each subject.")
    flag("--unique_token", default="sks", help="The token that the subjects were trained with.")
    flag = parser.add_argument_group("prompts").add_argument
    flag("--templates_file", help="Prompts in place of the benchmark's 25, one a line, {} for the subject.")
    flag("--probe_prompts", help="Prompts that have nothing to do with the subject, one a line.")
    flag = parser.add_argument_group("images").add_argument
    flag("--output_dir", default="evaluation", help="Where images and reports go.")
    flag("--images_per_prompt", type=int, default=4, help="Images of each prompt.")
    flag("--num_inference_steps", type=int, default=50, help="Denoising steps.")
    flag("--guidance_scale", type=float, default=7.5, help="Weight of classifier-free guidance.")
    flag("--resolution", type=int, help="Pixels; default: the pipeline's own.")
    flag("--scheduler", help="Scheduler class of diffusers, for example DDPMScheduler; default: the pipeline's own.")
    flag("--batch_size", type=int, default=4, help="Images generated at a time.")
    flag("--seed", type=int, default=0, help="Seed of all noise.")
    flag(
        "--dtype",
        choices=["fp32", "fp16", "bf16"],
        help="Of images; default fp16 on a GPU, else fp32. Drift is in fp32.",
    )
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
    """Measure drift, which loads every model and so finds early what does not fit; then generate, then score."""
    device = find_device(args.device)
    dtype = DTYPES[args.dtype] or (torch.float16 if device.type == "cuda" else torch.float32)
    probe_prompts = PROMPTS if args.probe_prompts is None else read_lines(args.probe_prompts, "--probe_prompts")
    subjects, output_dir = find_subjects(args), Path(args.output_dir)
    flag = "--instance_data_dir" if args.dataset is None else "--dataset"
    photos = {subject.name: find_instance_images(subject.photos, flag) for subject in subjects}
    check_folder(args.output_dir, "--output_dir")
    encoders = [DinoEncoder(model, device) for model in args.dino] + [
        ClipEncoder(model, device) for model in args.clip
    ]
    sampling = Sampling(args.num_inference_steps, args.guidance_scale, args.resolution, args.batch_size, args.seed)

    def load_base(dtype: torch.dtype) -> Any:
        pipeline = load_pipeline("--base", args.base, dtype, args.revision, args.variant, safety_checker=None)
        return use_scheduler(pipeline, args.scheduler)

    def load_subject(subject: Subject, dtype: torch.dtype) -> Any:
        pipeline = load_personalized(subject.personalized, args.base, dtype, args.revision, args.variant)
        pipeline.scheduler = type(scheduler).from_config(scheduler.config)  # its own may be another
        return pipeline

    meter = DriftMeter(load_base(torch.float32), probe_prompts, sampling, device)
    scheduler = meter.base.scheduler
    drifts = {}
    for subject in tqdm(subjects, desc="drift", unit="subject"):
        pipeline = load_subject(subject, torch.float32)
        check_same_architecture(meter.base, pipeline, subject.personalized)
        drifts[subject.name] = meter.measure(pipeline)
    del meter, pipeline

    images = {s.name: Images(output_dir, s, probe_prompts, args.images_per_prompt) for s in subjects}
    of_base = [spec for own in images.values() for spec in own.base.all]
    generate_images(load_base(dtype), output_dir / BASE, of_base, sampling, device, "images of the base")
    for subject in subjects:
        folder, specs = output_dir / personalized_folder(subject), images[subject.name].personalized.all
        generate_images(load_subject(subject, dtype), folder, specs, sampling, device, f"images of {subject.text}")

    results = {}
    for subject in tqdm(subjects, desc="scores", unit="subject"):
        scores = score_subject(subject, photos[subject.name], images[subject.name], encoders)
        results[subject.name] = {**subject_info(subject), **scores, "drift": drifts[subject.name]}
    report = summarize(args, sampling, str(dtype).removeprefix("torch."), results)
    write_report(output_dir, report, photos, images)
    print(table(report))
    print(f"{output_dir / 'report.html'} {output_dir / 'report.json'}")


def run(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    silence_libraries()
    try:
        run_cli(evaluate, args, NAME)
    except KeyboardInterrupt:
        command = shlex.join(
            ["python", "-m", "diffusers_lipreg.evaluation", *(sys.argv[1:] if argv is None else argv)]
        )
        print(f"\nInterrupted. The images so far are kept; to go on: {command}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
