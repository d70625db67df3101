"""Personalize every subject by every method, and measure what was learned and what was forgotten.

    python tests/testbed/experiment.py --output_dir testbed-results

Each run is `train_dreambooth_lipreg.py` itself, called with its flags. A finished run is kept and not done again, so the
command can be interrupted. It leaves `runs.csv` (a line for each run and checkpoint), `results.md`, `curves.png` (what each
method pays for what it learns; needs matplotlib) and `grid.png` (the same prompts and noise for every method).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from judge import Sampling, load_judge, prepare, sample, world_accuracy  # noqa: E402
from world import (  # noqa: E402
    COLOR_NAMES,
    PHOTOS,
    SUBJECTS,
    Subject,
    captioned,
    draw_scenes,
    draw_subject,
    held_out_backgrounds,
    to_images,
    with_article,
)

TOKEN = "qvx"  # the pipeline has never read it; `sks` and its like it has learned to pass over
SEED_OF_VIEWS = 10_000  # no training photo is drawn with it
SUBJECT_PICTURES = 72
IN_GRID = ("plain", "prior preservation", "sum", "outputs, class prompt", "LoRA plain", "LoRA outputs, class prompt")
SEEN = 0.5  # the share of pictures with the subject at which methods are compared


@dataclass(frozen=True)
class Method:
    """A family of runs that differ in one weight; the flags are the training script's."""

    name: str
    flags: tuple[str, ...] = ()
    weights: tuple[float, ...] = (0.0,)
    rate: float = 5e-4
    lora: bool = False
    class_prompt: bool = False

    def arguments(self, weight: float) -> list[str]:
        rank = ["--rank", "16"] if self.lora else []
        return [*rank, "--learning_rate", str(self.rate), *self.flags, "--lipreg_weight", str(weight)]


OUTPUTS = ("--lipreg_reduction", "output")
METHODS = {
    method.name: method
    for method in (
        Method("plain"),
        Method("plain, lower rate", rate=2.5e-4),
        Method(
            "prior preservation",
            ("--with_prior_preservation", "--num_class_images", "100", "--sample_batch_size", "20"),
            class_prompt=True,
        ),
        Method("sum", ("--lipreg_reduction", "sum"), (1e-4, 3e-4, 1e-3)),
        Method("tensor_mean", ("--lipreg_reduction", "tensor_mean"), (7.0, 20.0)),
        Method("outputs", OUTPUTS, (3.0,)),
        Method("outputs, class prompt", OUTPUTS, (3.0,), class_prompt=True),
        Method("LoRA plain", rate=2e-3, lora=True),
        Method("LoRA factors", ("--lipreg_reduction", "factors"), (1e-4,), rate=2e-3, lora=True),
        Method("LoRA product", ("--lipreg_reduction", "product"), (1e-5, 3e-5), rate=2e-3, lora=True),
        Method("LoRA outputs", OUTPUTS, (3.0,), rate=2e-3, lora=True),
        Method("LoRA outputs, class prompt", OUTPUTS, (3.0,), rate=2e-3, lora=True, class_prompt=True),
    )
}


@dataclass(frozen=True)
class Run:
    subject: str
    method: str
    weight: float
    seed: int

    def folder(self, output_dir: Path) -> Path:
        return output_dir / "runs" / self.subject / _label(self.method, self.weight).replace(" ", "-") / str(self.seed)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model", default=str(HERE / "pipeline"), help="The pretrained pipeline.")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=2, help="How many seeds each run is repeated with.")
    parser.add_argument("--steps", type=int, default=400, help="Updates of each run, with all five photos in each.")
    parser.add_argument("--checkpoints", type=int, default=4, help="Points along each run that are measured.")
    parser.add_argument("--prompts", type=int, default=500, help="World prompts whose pictures are judged.")
    parser.add_argument("--sampling_steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Runs at a time, one thread each.")
    return parser.parse_args()


# --- measuring


class Yardstick:
    """Fixed pictures, noise and timesteps on which every model is measured, for one subject."""

    def __init__(self, pipeline: StableDiffusionPipeline, subject: Subject, prompts: int, how: Sampling) -> None:
        self.how, self.judge, self.subject = how, load_judge(), subject
        self.number = list(SUBJECTS).index(subject.name)
        generator = torch.Generator().manual_seed(SEED_OF_VIEWS)
        self.prompts = captioned(prompts, generator)
        scenes = captioned(256, generator)
        self.world = self._noisy(
            pipeline, draw_scenes([scene for scene, _ in scenes], generator), [text for _, text in scenes], generator
        )
        self.backgrounds = backgrounds = held_out_backgrounds(subject) * 40
        views = draw_subject(subject, backgrounds, generator)
        self.subject_prompts = [self.prompt(background) for background in backgrounds[:SUBJECT_PICTURES]]
        self.views = self._noisy(pipeline, views, [self.prompt(background) for background in backgrounds], generator)
        self.base = self._predict(pipeline.unet, self.world)

    def prompt(self, background: int) -> str:
        return f"a photo of a {TOKEN} {self.subject.class_noun} on {with_article(COLOR_NAMES[background])} background"

    @staticmethod
    @torch.no_grad()
    def _noisy(
        pipeline: StableDiffusionPipeline, pictures: Tensor, captions: list[str], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Every picture at eight timesteps spread over the schedule, with its caption's states."""
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        latents = torch.cat([pipeline.vae.encode(batch).latent_dist.mean for batch in pictures.split(64)])
        latents = latents * pipeline.vae.config.scaling_factor
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = torch.cat([pipeline.text_encoder(batch)[0] for batch in tokens.split(64)])
        count = scheduler.config.num_train_timesteps
        timesteps = (torch.arange(len(pictures)) % 8 + torch.rand(len(pictures), generator=generator)) / 8 * count
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = timesteps.long()
        return {
            "noisy": scheduler.add_noise(latents, noise, timesteps),
            "noise": noise,
            "timesteps": timesteps,
            "states": states,
        }

    @staticmethod
    @torch.no_grad()
    def _predict(unet: UNet2DConditionModel, on: dict[str, Tensor]) -> Tensor:
        batches = zip(on["noisy"].split(64), on["timesteps"].split(64), on["states"].split(64), strict=True)
        return torch.cat([unet(*batch).sample for batch in batches])

    def losses(self, unet: UNet2DConditionModel) -> dict[str, float]:
        """Denoising losses on views of the subject and on the world, and the gap to the base's predictions."""
        world = self._predict(unet, self.world)
        return {
            "subject_loss": (self._predict(unet, self.views) - self.views["noise"]).square().mean().item(),
            "world_loss": (world - self.world["noise"]).square().mean().item(),
            "epsilon_gap": (world - self.base).square().mean().item(),
        }

    @torch.no_grad()
    def subject_pictures(self, pipeline: StableDiffusionPipeline) -> dict[str, float]:
        """Share of subject prompts answered with the subject, and with the background they ask for."""
        drawn = torch.cat(list(sample(pipeline, self.subject_prompts, self.how)))
        answers = self.judge(drawn)
        backgrounds = torch.tensor(self.backgrounds[: len(drawn)])
        return {
            "subject_seen": (answers["subject"].argmax(1) == self.number).float().mean().item(),
            "subject_background": (answers["background"].argmax(1) == backgrounds).float().mean().item(),
        }

    @torch.no_grad()
    def world_pictures(self, pipeline: StableDiffusionPipeline) -> dict[str, float]:
        """Share of world prompts answered rightly."""
        right = world_accuracy(pipeline, self.prompts, self.judge, self.how)
        return {f"world_{question}": share for question, share in right.items()}

    def show(self, pipeline: StableDiffusionPipeline) -> Tensor:
        """Four pictures of subject prompts and six of others, for the grid."""
        return torch.cat(list(sample(pipeline, self.shown_prompts(), self.how)))

    def shown_prompts(self) -> list[str]:
        noun = self.subject.class_noun
        others = [text for _, text in self.prompts if noun not in text][:4]
        return [*self.subject_prompts[:4], f"a photo of a {noun}", f"a green {noun} on a white background", *others]


# --- running


def train(run: Run, args: argparse.Namespace, folder: Path) -> float:
    """Run the training script in this process; return its seconds, class images included."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    import train_dreambooth_lipreg as script

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    noun = SUBJECTS[run.subject].class_noun
    flags = {
        "--pretrained_model_name_or_path": args.model,
        "--instance_data_dir": PHOTOS / run.subject,
        "--instance_prompt": f"a photo of a {TOKEN} {noun}",
        "--output_dir": folder / "model",
        "--resolution": 64,
        "--train_batch_size": 5,
        "--max_train_steps": args.steps,
        "--checkpointing_steps": args.steps // args.checkpoints,
        "--lr_scheduler": "cosine",
        "--lr_warmup_steps": 0,
        "--snr_gamma": 5,  # as the pipeline was pretrained
        "--probe_steps": 0,
        "--seed": run.seed,
    }
    method = METHODS[run.method]
    if "--with_prior_preservation" in method.flags:
        flags["--class_data_dir"] = folder / "class_images"
    if method.class_prompt:
        flags["--class_prompt"] = f"a photo of a {noun}"
    given = [str(part) for pair in flags.items() for part in pair]
    start = time.perf_counter()
    script.main(script.parse_args([*given, *method.arguments(run.weight)]))
    return time.perf_counter() - start


def _load(pipeline: StableDiffusionPipeline, folder: Path, lora: bool) -> None:
    """Put what a run left in a folder into the pipeline."""
    if lora:
        pipeline.unload_lora_weights()
        pipeline.load_lora_weights(str(folder))
    else:
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder / "unet")


def work(run: Run, args: argparse.Namespace) -> None:
    """One run from beginning to end; it leaves `result.json` and the pictures for the grid."""
    folder = run.folder(args.output_dir)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seconds = train(run, args, folder)
    pipeline = prepare(StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32))
    yardstick = Yardstick(pipeline, SUBJECTS[run.subject], args.prompts, Sampling(args.sampling_steps))
    lora = METHODS[run.method].lora
    rows = []
    for checkpoint in sorted((folder / "model").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        _load(pipeline, checkpoint, lora)
        step = int(checkpoint.name.split("-")[1])
        rows.append({"step": step, **yardstick.losses(pipeline.unet), **yardstick.subject_pictures(pipeline)})
    rows[-1] |= {"seconds": seconds, **yardstick.world_pictures(pipeline)}  # the last checkpoint is the result
    save_file({"pictures": yardstick.show(pipeline).half().contiguous()}, folder / "shown.safetensors")
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "class_images", ignore_errors=True)
    (folder / "result.json").write_text(json.dumps(rows, indent=1))


def measure_base(subject: str, args: argparse.Namespace) -> None:
    """What the pretrained pipeline scores, for comparison."""
    pipeline = prepare(StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32))
    yardstick = Yardstick(pipeline, SUBJECTS[subject], args.prompts, Sampling(args.sampling_steps))
    folder = args.output_dir / "runs" / subject / "base"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"pictures": yardstick.show(pipeline).half().contiguous()}, folder / "shown.safetensors")
    pictures = {**yardstick.subject_pictures(pipeline), **yardstick.world_pictures(pipeline)}
    row = {"step": 0, **yardstick.losses(pipeline.unet), **pictures}
    (folder / "result.json").write_text(json.dumps([row], indent=1))


def _start_worker(log: str) -> None:
    """One thread for each worker, and what it prints goes to a file."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed, so that an interrupted experiment has every method."""
    return [
        Run(subject, name, weight, seed)
        for seed, subject, name in itertools.product(range(args.seeds), args.subjects, args.methods)
        for weight in METHODS[name].weights
    ]


def run_all(runs: list[Run], args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    log = str(args.output_dir / "workers.log")
    with ProcessPoolExecutor(args.workers, context, _start_worker, (log,)) as pool:
        waiting = [
            pool.submit(measure_base, subject, args)
            for subject in args.subjects
            if not (args.output_dir / "runs" / subject / "base" / "result.json").exists()
        ]
        waiting += [
            pool.submit(work, run, args) for run in runs if not (run.folder(args.output_dir) / "result.json").exists()
        ]
        for future in tqdm(as_completed(waiting), total=len(waiting), desc="runs"):
            future.result()


# --- telling

COLUMNS = {
    "subject_loss": "subject loss",
    "subject_seen": "subject seen",
    "subject_background": "its background",
    "epsilon_gap": "epsilon gap",
    "world_loss": "world loss",
    "world_all": "world right",
    "balance": "balance",
    "seconds": "seconds",
}


def read(runs: Iterable[Run], args: argparse.Namespace) -> list[dict]:
    """A row for the base of each subject, and for every measured point of every run."""
    rows = []
    for subject in args.subjects:
        text = (args.output_dir / "runs" / subject / "base" / "result.json").read_text()
        rows += [{"subject": subject, "method": "base", "weight": 0.0, "seed": 0, **row} for row in json.loads(text)]
    for run in runs:
        path = run.folder(args.output_dir) / "result.json"
        rows += [{**vars(run), **row} for row in json.loads(path.read_text())]
    for row in rows:
        if "world_all" in row:  # the harmonic mean of what is learned and what is kept
            learned_and_kept = row["subject_seen"], row["world_all"]
            row["balance"] = statistics.harmonic_mean(learned_and_kept)
    return rows


def _label(method: str, weight: float) -> str:
    return f"{method} {weight:g}" if weight else method


def final_table(rows: list[dict], last: int) -> str:
    """Means over subjects and seeds of what every run ends with, and the standard deviation over runs."""
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    finals = [row for row in rows if row["step"] in (0, last)]
    for method, weight in dict.fromkeys((row["method"], row["weight"]) for row in finals):
        chosen = [row for row in finals if (row["method"], row["weight"]) == (method, weight)]
        cells = [_cell(column, [row[column] for row in chosen if column in row]) for column in COLUMNS]
        lines.append(f"| {_label(method, weight)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(column: str, values: list[float]) -> str:
    if not values:
        return ""
    mean, spread = statistics.mean(values), statistics.pstdev(values)
    if column == "seconds":
        return f"{statistics.median(values):.0f}"  # of runs that the machine's other work delayed, too
    if column.endswith(("seen", "background", "all", "balance")):
        return f"{mean:.1%} ± {spread:.1%}"
    return f"{mean:.4f} ± {spread:.4f}"


def points(rows: list[dict], subject: str, method: str, score: str) -> list[tuple[float, float]]:
    """The subject score and the epsilon gap at every weight and step of a method: means over seeds.

    Seeds are averaged before anything is chosen, so that no method is helped by the luck of one run. A loss counts
    with a minus sign: more is better.
    """
    sign = -1 if score.endswith("loss") else 1
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if (row["subject"], row["method"]) == (subject, method):
            groups.setdefault((row["weight"], row["step"]), []).append(row)
    return [
        (sign * statistics.mean(r[score] for r in group), statistics.mean(r["epsilon_gap"] for r in group))
        for group in groups.values()
    ]


def learned(rows: list[dict], subject: str, score: str) -> float:
    """The score at which methods are compared: half of the pictures, or nine tenths of the loss that plain can lose."""
    if score == "subject_seen":
        return SEEN
    (base, _), *_ = points(rows, subject, "base", score)
    best, _ = max(points(rows, subject, "plain", score))
    return base + 0.9 * (best - base)


def least_gap(rows: list[dict], subject: str, method: str, score: str) -> float | None:
    """The smallest epsilon gap at which a method has learned the subject; None if it never has."""
    level = learned(rows, subject, score)
    return min((gap for value, gap in points(rows, subject, method, score) if value >= level), default=None)


def matched_table(rows: list[dict], args: argparse.Namespace, score: str) -> str:
    """Epsilon gap of each method once it has learned the subject, and plain's over it."""
    lines = ["| method | " + " | ".join(args.subjects) + " |", "|---" * (len(args.subjects) + 1) + "|"]
    for method in args.methods:
        cells = []
        for subject in args.subjects:
            gap, plain = (least_gap(rows, subject, name, score) for name in (method, "plain"))
            if gap is None:
                cells.append("not reached")
            else:
                cells.append(f"{gap:.3f}" + (f" (1 / {plain / gap:.1f})" if plain and method != "plain" else ""))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_csv(rows: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_curves(rows: list[dict], args: argparse.Namespace, path: Path) -> None:
    """The least that each method has forgotten by the time it shows the subject so often; a panel for each subject."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = len(args.subjects)
    figure, axes = pyplot.subplots(1, columns, figsize=(3.4 * columns, 3.8), squeeze=False, sharey=True)
    for axis, subject in zip(axes[0], args.subjects, strict=True):
        for number, method in enumerate(args.methods):
            best: list[tuple[float, float]] = []
            for seen, gap in sorted(points(rows, subject, method, "subject_seen"), reverse=True):
                if not best or gap < best[-1][1]:
                    best.append((seen, gap))
            style = {"color": f"C{number}", "linestyle": "--" if METHODS[method].lora else "-", "marker": "."}
            axis.plot([100 * seen for seen, _ in best], [gap for _, gap in best], linewidth=1, label=method, **style)
        axis.set(title=subject, xlabel="subject seen in % of its pictures")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("epsilon gap on the world (forgotten ↑)")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def draw_grid(args: argparse.Namespace, path: Path) -> None:
    """For each subject: the photos, then the same prompts and noise for the base and methods at their middle weight."""
    blocks = [_block(subject, args) for subject in args.subjects]
    size, margin, head = 64, 130, 18
    width, height = margin + 10 * size + 20, head + len(blocks[0]) * size + 20
    sheet = Image.new("RGB", (2 * width, -(-len(blocks) // 2) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, block in enumerate(blocks):
        left, top = number % 2 * width, number // 2 * height
        pen.text((left + margin + 4, top + 3), f"prompts with {TOKEN}", fill="black")
        pen.text((left + margin + 4 * size + 4, top + 3), "prompts without", fill="black")
        for line, (name, images) in enumerate(block):
            pen.text((left + 4, top + head + line * size + 26), name, fill="black")
            for column, image in enumerate(images):
                sheet.paste(image, (left + margin + column * size, top + head + line * size))
    sheet.save(path)


def _block(subject: str, args: argparse.Namespace) -> list[tuple[str, list[Image.Image]]]:
    """The rows of one subject in the grid."""
    folder = args.output_dir / "runs" / subject / "base"
    rows = [(f"photos: {subject}", [Image.open(path) for path in sorted((PHOTOS / subject).iterdir())])]
    rows.append(("base", to_images(load_file(folder / "shown.safetensors")["pictures"].float())))
    for method in [name for name in args.methods if name in IN_GRID]:
        weights = METHODS[method].weights
        run = Run(subject, method, weights[len(weights) // 2], 0)
        pictures = load_file(run.folder(args.output_dir) / "shown.safetensors")["pictures"]
        rows.append((_label(method, run.weight), to_images(pictures.float())))
    return rows


def tell(rows: list[dict], args: argparse.Namespace) -> str:
    parts = [
        f"{args.steps} updates with all five photos in each, {args.seeds} seeds, {args.prompts} world prompts, "
        f"{args.sampling_steps} sampling steps; mean ± standard deviation over subjects and seeds, of seconds the median.",
        final_table(rows, args.steps),
    ]
    if "plain" in args.methods:
        parts += [
            "Epsilon gap, and as a part of plain fine-tuning's, where the subject is in half of its pictures: the least "
            f"over weights and {args.checkpoints} checkpoints of the mean over seeds.",
            matched_table(rows, args, "subject_seen"),
            "The same where the denoising loss on unseen views has lost nine tenths of what plain fine-tuning takes off it.",
            matched_table(rows, args, "subject_loss"),
        ]
    return "\n\n".join(parts)


def main() -> None:
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = plan(args)
    run_all(runs, args)
    rows = read(runs, args)
    write_csv(rows, args.output_dir / "runs.csv")
    text = tell(rows, args)
    (args.output_dir / "results.md").write_text(text + "\n")
    draw_grid(args, args.output_dir / "grid.png")
    draw_curves(rows, args, args.output_dir / "curves.png")
    print(text)
    print(f"Tables and pictures are in {args.output_dir}")


if __name__ == "__main__":
    main()
