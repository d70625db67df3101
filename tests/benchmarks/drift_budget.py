"""Does a run end at its drift budget, and what does measuring cost? On the testbed, with the training script itself.

    python tests/benchmarks/drift_budget.py --output_dir budget-results --compare

prints what the runs end with and what measuring costs, and keeps every finished run in the folder, so it can be
interrupted. Kinds of run: `full`, the whole UNet at 2e-4; `lora`, rank 8 at 1e-3. A ratio is the final relative output
drift over the budget, on the run's own probes (eight world captions); "free" is the final drift without a penalty. The
subject's loss is the denoising loss on 280 unseen views. `--compare` adds runs of fixed weights: what the best of them
would have at the drift of a run with a budget is read off between its neighbors, linear in the logarithm of drift;
and draws `budgets.png`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("ACCELERATE_USE_CPU", "true")
HERE = Path(__file__).resolve().parent
TESTBED = HERE.parent / "testbed"
sys.path[:0] = [str(HERE.parent.parent), str(TESTBED)]

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from experiment import TOKEN, Yardstick  # noqa: E402
from judge import Sampling  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from world import PHOTOS, SUBJECTS  # noqa: E402

import train_dreambooth_lipreg as script  # noqa: E402
from diffusers_lipreg.budget import measurement_steps  # noqa: E402
from diffusers_lipreg.outputs import OutputSnapshot  # noqa: E402

CAPTIONS = [
    "a photo of a red circle on a blue background", "a green star on a white background", "a picture of a heart",
    "a yellow square", "a blue triangle on a red background", "a purple circle", "a photo of a white star",
    "an orange square on a green background",
]  # fmt: skip
KINDS = {"full": ["--learning_rate", "2e-4"], "lora": ["--learning_rate", "1e-3", "--rank", "8"]}
REDUCTION = {"full": "sum", "lora": "product"}
PROBE_STEPS = script.build_parser().get_default("probe_steps")
WEIGHTS = {"full": (0.01, 0.05, 0.2, 1, 4, 20), "lora": (0.0003, 0.002, 0.01, 0.04, 0.2)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.001, 0.003, 0.01, 0.03, 0.1])
    parser.add_argument("--compare", action="store_true", help="With fixed weights, too.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--cost_steps", type=int, default=60, help="Length of the run that measures the cost; 0: none."
    )
    return parser.parse_args()


def run(args: argparse.Namespace, subject: str, kind: str, *more: str, steps: int) -> dict:
    """One run of the script; what it logged at the end, its seconds, and the loss on unseen views."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    folder, noun = args.output_dir / f"model-{kind}", SUBJECTS[subject].class_noun
    prompts = args.output_dir / "prompts.txt"
    prompts.write_text("\n".join(CAPTIONS))
    flags = {
        "--pretrained_model_name_or_path": TESTBED / "pipeline", "--instance_data_dir": PHOTOS / subject,
        "--instance_prompt": f"a photo of a {TOKEN} {noun}", "--output_dir": folder, "--resolution": 64, "--seed": 0,
        "--train_batch_size": 4, "--max_train_steps": steps, "--lr_warmup_steps": 0, "--probe_prompts": prompts,
        "--checkpointing_steps": 10**9,
    }  # fmt: skip
    logs: list[dict] = []
    log, Accelerator.log = Accelerator.log, lambda self, values, step, **_: logs.append(dict(values))
    start = time.process_time()
    try:
        script.main(script.parse_args([*(str(part) for pair in flags.items() for part in pair), *KINDS[kind], *more]))
    finally:
        Accelerator.log = log
    seconds = time.process_time() - start
    path = [values["output_drift_percent"] / 100 for values in logs if "output_drift" in values]
    return {
        "seconds": seconds,
        "path": path,
        "weight": logs[-1].get("lipreg_weight"),
        **on_disk(args, folder, subject, kind),
    }


def on_disk(args: argparse.Namespace, folder: Path, subject: str, kind: str) -> dict:
    """The drift and the subject's loss of what the run left, in a pipeline that is loaded anew."""
    pipeline = StableDiffusionPipeline.from_pretrained(TESTBED / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    recorded = OutputSnapshot.for_measuring(pipeline, pipeline.unet, CAPTIONS)
    yardstick = Yardstick(pipeline, SUBJECTS[subject], 1, Sampling(1))
    if kind == "lora":
        pipeline.load_lora_weights(str(folder))
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    reading = recorded.measure(pipeline)
    losses = yardstick.losses(pipeline.unet)
    shutil.rmtree(folder)
    return {"drift": reading.output_drift_relative, "se": reading.standard_error, **losses}


def kept(args: argparse.Namespace, name: str, subject: str, kind: str, more: tuple[str, ...], steps: int) -> dict:
    """The result of that name, from a run that is made if it is not there yet."""
    path = args.output_dir / f"{name}-{steps}.json"
    if not path.exists():
        path.write_text(json.dumps(run(args, subject, kind, *more, steps=steps)))
    return json.loads(path.read_text())


class Case(NamedTuple):
    """The runs of one subject in one kind."""

    free: dict
    budgets: dict[float, dict]
    weights: dict[float, dict]

    def loss_at(self, drift: float) -> float | None:
        """The subject's loss of fixed weights at a drift; None outside what was run."""
        points = sorted((run["drift"], run["subject_loss"]) for run in (self.free, *self.weights.values()))
        for (low, loss), (high, next_loss) in itertools.pairwise(points):
            if low <= drift <= high:
                share = math.log(drift / low) / math.log(high / low)
                return loss + share * (next_loss - loss)
        return None


def collect(args: argparse.Namespace) -> dict[tuple[str, str], Case]:
    cases = {}
    for kind, subject in itertools.product(args.kinds, args.subjects):
        made = partial(kept, args, subject=subject, kind=kind, steps=args.steps)
        name, weights = f"{kind}-{subject}", WEIGHTS[kind] if args.compare else ()
        cases[kind, subject] = Case(
            made(f"{name}-free", more=("--lipreg_weight", "0")),
            {b: made(f"{name}-{b:g}", more=("--drift_budget", str(b))) for b in args.budgets},
            {
                w: made(
                    f"{name}-weight-{w:g}", more=("--lipreg_weight", str(w), "--lipreg_reduction", REDUCTION[kind])
                )
                for w in weights
            },
        )
    return cases


def every_run(cases: dict[tuple[str, str], Case]) -> list[str]:
    lines = [
        "| run | subject | asked for | final drift | ratio | highest on the way | loss on unseen views |",
        "|---" * 7 + "|",
    ]
    for (kind, subject), case in cases.items():
        start = f"| {kind} | {subject} |"
        lines.append(f"{start} nothing | {case.free['drift']:.5f} | | | {case.free['subject_loss']:.4f} |")
        for budget, run in case.budgets.items():
            ratio = run["drift"] / budget
            held = ratio <= 1.1 and (ratio >= 0.5 or case.free["drift"] < budget)
            ratios = f"{ratio:.2f}{'' if held else ' (missed)'} | {max(run['path']) / budget:.2f}"
            lines.append(f"{start} {budget:g} | {run['drift']:.5f} | {ratios} | {run['subject_loss']:.4f} |")
        for weight, run in case.weights.items():
            lines.append(f"{start} weight {weight:g} | {run['drift']:.5f} | | | {run['subject_loss']:.4f} |")
    return lines


def summary(args: argparse.Namespace, cases: dict[tuple[str, str], Case]) -> list[str]:
    """By budget, over the subjects: the ratios of those it bound, and losses beside those of fixed weights."""
    lines = [
        "| run | budget | bound | final drift / budget | loss on unseen views | fixed weight, same drift |",
        "|---" * 6 + "|",
    ]
    for kind, budget in itertools.product(args.kinds, args.budgets):
        of_kind = [case for (name, _), case in cases.items() if name == kind]
        bound = [case for case in of_kind if case.free["drift"] > budget]
        runs = [case.budgets[budget] for case in bound]
        ratios = [run["drift"] / budget for run in runs]
        span = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        fixed = [case.loss_at(run["drift"]) for case, run in zip(bound, runs, strict=True)]
        pairs = [(run["subject_loss"], loss) for run, loss in zip(runs, fixed, strict=True) if loss is not None]
        losses = " | ".join(f"{sum(column) / len(pairs):.4f}" for column in zip(*pairs, strict=True)) or " | "
        lines.append(f"| {kind} | {budget:g} | {len(bound)} of {len(of_kind)} | {span} | {losses} |")
    return lines


def draw(args: argparse.Namespace, cases: dict[tuple[str, str], Case]) -> None:
    """The subject's loss over drift: a curve of fixed weights for each subject, and the runs with budgets on it."""
    from matplotlib import pyplot as plt  # the extra `plots`

    figure, panels = plt.subplots(
        1, len(args.kinds), figsize=(5.5 * len(args.kinds), 4), squeeze=False, layout="constrained"
    )
    for panel, kind in zip(panels[0], args.kinds, strict=True):
        for number, subject in enumerate(args.subjects):
            case, color = cases[kind, subject], f"C{number}"
            curve = sorted((run["drift"], run["subject_loss"]) for run in (case.free, *case.weights.values()))
            panel.plot(
                *zip(*curve, strict=True), color=color, linewidth=1, marker=".", label=subject.replace("_", " ")
            )
            points = [(run["drift"], run["subject_loss"]) for run in case.budgets.values()]
            panel.scatter(*zip(*points, strict=True), color=color, marker="D", s=28, zorder=3)
        for budget in args.budgets:
            panel.axvline(budget, color="0.8", linewidth=0.8, zorder=0)
        panel.set(
            xscale="log",
            title={"full": "whole UNet", "lora": "LoRA, rank 8"}[kind],
            xlabel="relative output drift at the end",
        )
    panels[0][0].set_ylabel("denoising loss on unseen views of the subject")
    panels[0][0].scatter([], [], color="0.3", marker="D", s=28, label="with a drift budget (gray lines)")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(args.output_dir / "budgets.png", dpi=110)


def cost(args: argparse.Namespace) -> list[str]:
    """Processor seconds of updates and of measuring, and what share of a run measuring is."""
    short, long = (
        kept(args, "cost", "smiley", "full", ("--probe_steps", "0"), n)["seconds"] for n in (10, args.cost_steps)
    )
    update = (long - short) / (args.cost_steps - 10)
    pipeline = StableDiffusionPipeline.from_pretrained(TESTBED / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    marks = [time.process_time()]
    recorded = OutputSnapshot.for_measuring(pipeline, pipeline.unet, CAPTIONS)
    marks.append(time.process_time())
    for _ in range(5):
        recorded.measure(pipeline.unet)
    marks.append(time.process_time())
    take, measure = marks[1] - marks[0], (marks[2] - marks[1]) / 5
    encoding, cached, *probing = sd15()
    return [
        "| | updates | recording | once measured | default | with a budget |", "|---" * 6 + "|",
        shares("testbed, batch 4", 400, update, take, measure, "s"), shares("testbed, batch 4", 1000, update, take, measure, "s"),
        shares("SD1.5, batch 1, 512 pixels, counted", 1000, encoding + cached, *probing, "TFLOP"),
        shares("the same with cached images, counted", 1000, cached, *probing, "TFLOP"),
    ]  # fmt: skip


def shares(name: str, steps: int, update: float, take: float, measure: float, unit: str) -> str:
    default = take + measure * math.ceil(steps / PROBE_STEPS)
    budget = take + measure * (len(measurement_steps(steps) | set(range(PROBE_STEPS, steps, PROBE_STEPS))) + 1)
    costs = f"{steps} of {update:.3g} {unit} | {take:.3g} {unit} | {measure:.3g} {unit}"
    return f"| {name} | {costs} | {default / (steps * update):.1%} | {budget / (steps * update):.1%} |"


def sd15() -> tuple[float, float, float, float]:
    """1e12 floating-point operations of encoding an image, of an update, of recording (16 steps in the mean) and of measuring; counted."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        channels, blocks = (128, 256, 512, 512), ["DownEncoderBlock2D"] * 4
        vae = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=blocks,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
        )
        with FlopCounterMode(display=False) as encoding:
            vae.encode(torch.empty(1, 3, 512, 512))
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768))
        with FlopCounterMode(display=False) as both:
            unet(torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)).sample.sum().backward()
    row = forward.get_total_flops() / 1e12
    return encoding.get_total_flops() / 1e12, both.get_total_flops() / 1e12, 8 * 16 * row, 8 * 4 * row


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    cases = collect(args)
    print("\n".join([*every_run(cases), "", *summary(args, cases), ""]))
    if args.compare:
        draw(args, cases)
    if args.cost_steps:
        print("\n".join(cost(args)))


if __name__ == "__main__":
    main()
