"""A small classifier of the world's pictures: shape, color, background, and which subject, if any.

    python tests/testbed/judge.py train                    # four minutes on a core; writes judge.safetensors
    python tests/testbed/judge.py score MODEL [--grid PNG]  # 500 captions kept from pretraining

It has seen unlimited pictures of the world and of the subjects, which no pipeline has, so it can tell what one drew.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from world import (
    COLORS,
    HERE,
    SCENES,
    SHAPE_NAMES,
    SUBJECTS,
    Scene,
    captioned,
    draw_clutter,
    draw_scenes,
    draw_subject,
    to_images,
)

WEIGHTS = HERE / "judge.safetensors"
NO_SUBJECT = len(SUBJECTS)
UNJUDGED = -100  # cross_entropy's mark of an answer that does not count


class Judge(nn.Module):
    """Three strided convolutions and one more, then a linear head for each question."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        layers = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        answers = {"shape": 8, "color": 8, "background": 8, "subject": len(SUBJECTS) + 1}
        self.heads = nn.ModuleDict({question: nn.Linear(64 * 16, count) for question, count in answers.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits for each question, of pictures (n, 3, 64, 64) in [-1, 1]."""
        features = self.features(pictures)
        return {question: head(features) for question, head in self.heads.items()}


def load_judge(path: Path = WEIGHTS) -> Judge:
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, strict=False)
    return judge.eval()


def _worn(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures blurred and noisy to a random degree, as decoders leave them."""
    size = int(torch.randint(28, 65, (), generator=generator))
    blurred = F.interpolate(F.interpolate(pictures, size=size, mode="area"), size=64, mode="bilinear")
    amount = 0.15 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return blurred + amount * torch.randn(pictures.shape, generator=generator)


def _lesson(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """One batch: scenes, scenes that share a subject's shape and color, every subject, and clutter."""
    plain_subjects = {(subject.class_noun, subject.color) for subject in SUBJECTS.values()}
    near_misses = [s for s in SCENES if (SHAPE_NAMES[s.shape], list(COLORS.values())[s.color]) in plain_subjects]
    scenes = [SCENES[i] for i in torch.randint(len(SCENES), (48,), generator=generator).tolist()]
    scenes += [near_misses[i] for i in torch.randint(len(near_misses), (16,), generator=generator).tolist()]
    pictures = [draw_scenes(scenes, generator)]
    rows = [(s.shape, s.color, s.background, NO_SUBJECT) for s in scenes]
    for number, subject in enumerate(SUBJECTS.values()):
        backgrounds = torch.randint(8, (8,), generator=generator).tolist()
        pictures.append(draw_subject(subject, backgrounds, generator))
        shape = SHAPE_NAMES.index(subject.class_noun)
        rows += [(shape, UNJUDGED, background, number) for background in backgrounds]
    pictures.append(draw_clutter(8, generator))
    rows += [(UNJUDGED, UNJUDGED, UNJUDGED, NO_SUBJECT)] * 8
    answers = dict(zip(("shape", "color", "background", "subject"), torch.tensor(rows).T, strict=True))
    return _worn(torch.cat(pictures), generator), answers


def train(steps: int, path: Path) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in (bar := tqdm(range(steps), desc="judge", mininterval=2)):
        pictures, answers = _lesson(generator)
        loss = sum(F.cross_entropy(logits, answers[question]) for question, logits in judge(pictures).items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    weights = {k: v.half().contiguous() for k, v in judge.state_dict().items() if "num_batches" not in k}
    save_file(weights, path)
    print(f"{path}; right on fresh pictures: {_self_test(load_judge(path))}")


@torch.no_grad()
def _self_test(judge: Judge) -> dict[str, float]:
    pictures, answers = _lesson(torch.Generator().manual_seed(1))
    right = {}
    for question, logits in judge(pictures).items():
        judged = answers[question] != UNJUDGED
        right[question] = round((logits.argmax(1) == answers[question])[judged].float().mean().item(), 3)
    return right


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn for judging: the same for every pipeline, with noise that depends on the seed only."""

    steps: int = 25
    guidance_scale: float = 4.0
    batch_size: int = 100
    seed: int = 0


def prepare(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """The pipeline with a fast deterministic sampler and without its progress bar."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample(pipeline: StableDiffusionPipeline, prompts: list[str], how: Sampling) -> Iterator[Tensor]:
    """Draw one picture for each prompt, in batches of (n, 3, 64, 64) in [-1, 1]."""
    unet = pipeline.unet
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    noise = torch.randn(len(prompts), *shape, generator=torch.Generator().manual_seed(how.seed))
    for start in range(0, len(prompts), how.batch_size):
        batch = slice(start, start + how.batch_size)
        pictures = pipeline(
            prompts[batch],
            latents=noise[batch].to(pipeline.device, unet.dtype),
            num_inference_steps=how.steps,
            guidance_scale=how.guidance_scale,
            output_type="pt",
        ).images
        yield pictures.float().cpu() * 2 - 1


@torch.no_grad()
def world_accuracy(
    pipeline: StableDiffusionPipeline, captions: list[tuple[Scene, str]], judge: Judge, how: Sampling
) -> dict[str, float]:
    """Shares of captions whose picture has the right shape, color, background, and all three."""
    logits = [judge(pictures) for pictures in sample(pipeline, [text for _, text in captions], how)]
    right = {}
    for question in ("shape", "color", "background"):
        answers = torch.tensor([getattr(scene, question) for scene, _ in captions])
        right[question] = torch.cat([batch[question] for batch in logits]).argmax(1) == answers
    right["all"] = right["shape"] & right["color"] & right["background"]
    return {question: hits.float().mean().item() for question, hits in right.items()}


def grid(pictures: Tensor, columns: int, enlarge: int = 1) -> Image.Image:
    """Pictures side by side, row by row."""
    images = to_images(pictures)
    size = images[0].width * enlarge
    sheet = Image.new("RGB", (columns * size, -(-len(images) // columns) * size), "white")
    for index, image in enumerate(images):
        sheet.paste(
            image.resize((size, size), Image.Resampling.NEAREST), (index % columns * size, index // columns * size)
        )
    return sheet


def score(args: argparse.Namespace) -> None:
    pipeline = prepare(StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32))
    how = Sampling(steps=args.steps, guidance_scale=args.guidance_scale)
    captions = captioned(args.captions, torch.Generator().manual_seed(7), held_out=True)
    scores = world_accuracy(pipeline, captions, load_judge(), how)
    print(f"{args.model}: {len(captions)} held-out captions, {how.steps} steps, guidance {how.guidance_scale}")
    for question, share in scores.items():
        print(f"{question:>10} {share:.1%}")
    if args.grid is not None:
        prompts = [text for _, text in captions[:64]]
        grid(torch.cat(list(sample(pipeline, prompts, how))), columns=8, enlarge=2).save(args.grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--steps", type=int, default=1500)
    training.add_argument("--output", type=Path, default=WEIGHTS)
    training.set_defaults(work=lambda args: train(args.steps, args.output))
    scoring = commands.add_parser("score")
    scoring.add_argument("model")
    scoring.add_argument("--captions", type=int, default=500)
    scoring.add_argument("--steps", type=int, default=25)
    scoring.add_argument("--guidance_scale", type=float, default=4.0)
    scoring.add_argument("--grid", type=Path, default=None)
    scoring.set_defaults(work=score)
    args = parser.parse_args()
    args.work(args)


if __name__ == "__main__":
    main()
