"""The paper's two-dimensional illustration: five classes known, a sixth learned, and what becomes of the five.

    python tests/testbed/toy.py --output toy.png

Five Gaussian classes (standard deviation 0.5) stand on a pentagon of radius 3; a conditional denoiser (an MLP, 100
timesteps, cosine schedule) knows them. It is then fine-tuned on a sixth class at the origin in three ways: with nothing
against forgetting, with samples of one old class mixed in (prior preservation), and with the drift penalty. Printed is
the energy distance of samples to the truth, zero when they are distributed alike. Half a minute on one core.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from diffusers_lipreg import LipschitzDriftLoss, TeacherSnapshot  # noqa: E402

CLASSES, NEW = 5, 5
TIMESTEPS = 100


def alphas_cumprod() -> Tensor:
    """Cosine schedule (Nichol and Dhariwal 2021, equation 17)."""
    time = (torch.arange(TIMESTEPS) + 1) / TIMESTEPS
    level = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
    return (level / math.cos(0.008 / 1.008 * math.pi / 2) ** 2).clamp(1e-4, 0.9999)


SCHEDULE = alphas_cumprod()


def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
    """True points of the classes: (n, 2)."""
    angle = labels * (2 * math.pi / CLASSES)
    centre = 3 * torch.stack([angle.sin(), angle.cos()], 1) * (labels != NEW)[:, None]
    return centre + 0.5 * torch.randn(len(labels), 2, generator=generator)


class Denoiser(nn.Module):
    """Predicts the noise from a noisy point, its timestep and its class."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.label = nn.Embedding(CLASSES + 1, 32)
        self.layers = nn.Sequential(
            nn.Linear(2 + 32 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, points: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        waves = timesteps[:, None] / TIMESTEPS * math.pi * 2.0 ** torch.arange(16).sub(4)
        return self.layers(torch.cat([points, waves.sin(), waves.cos(), self.label(labels)], 1))


def denoising_loss(model: Denoiser, points: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    timesteps = torch.randint(TIMESTEPS, (len(points),), generator=generator)
    level = SCHEDULE[timesteps][:, None]
    noise = torch.randn(points.shape, generator=generator)
    return (model(level.sqrt() * points + (1 - level).sqrt() * noise, timesteps, labels) - noise).square().mean()


@torch.no_grad()
def sample(model: Denoiser, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2)."""
    points = torch.randn(len(labels), 2, generator=generator)
    for step in reversed(range(TIMESTEPS)):
        level, before = SCHEDULE[step], SCHEDULE[step - 1] if step else torch.tensor(1.0)
        alpha = level / before
        noise = model(points, torch.full((len(labels),), step), labels)
        points = (points - (1 - alpha) / (1 - level).sqrt() * noise) / alpha.sqrt()
        if step:
            variance = (1 - alpha) * (1 - before) / (1 - level)
            points = points + variance.sqrt() * torch.randn(points.shape, generator=generator)
    return points


def energy_distance(one: Tensor, other: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| (Szekely and Rizzo 2013), the last two over different points (unbiased)."""

    def within(points: Tensor) -> Tensor:
        return torch.cdist(points, points).sum() / (len(points) * (len(points) - 1))

    return (2 * torch.cdist(one, other).mean() - within(one) - within(other)).item()


def pretrain(steps: int, generator: torch.Generator) -> Denoiser:
    model = Denoiser()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        labels = torch.randint(CLASSES, (256,), generator=generator)
        optimizer.zero_grad()
        denoising_loss(model, draw(labels, generator), labels, generator).backward()
        optimizer.step()
        schedule.step()
    return model


def finetune(
    pretrained: Denoiser, steps: int, generator: torch.Generator, *, weight: float = 0, prior: Tensor | None = None
) -> Denoiser:
    """Learn the sixth class; `prior` are points of class 0 that the pretrained model drew."""
    model = copy.deepcopy(pretrained)
    drift_loss = LipschitzDriftLoss(TeacherSnapshot(model), weight, reduction="tensor_mean")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    labels = torch.full((128,), NEW)
    for _ in range(steps):
        loss = denoising_loss(model, draw(labels, generator), labels, generator) + drift_loss(model)
        if prior is not None:
            old = prior[torch.randint(len(prior), (128,), generator=generator)]
            loss = loss + denoising_loss(model, old, torch.zeros_like(labels), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def distances(model: Denoiser, count: int, seed: int) -> tuple[list[float], Tensor]:
    """Energy distance of every class, and the points it was measured on: (6, count, 2)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES + 1).repeat_interleave(count)
    drawn, truth = sample(model, labels, generator), draw(labels, generator)
    pairs = zip(drawn.split(count), truth.split(count), strict=True)
    return [energy_distance(*pair) for pair in pairs], drawn.view(CLASSES + 1, count, 2)


def plot(clouds: dict[str, Tensor], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(clouds), figsize=(3 * len(clouds), 3.5), sharex=True, sharey=True)
    for axis, (name, cloud) in zip(axes, clouds.items(), strict=True):
        for label, points in enumerate(cloud):
            if name != "pretrained" or label != NEW:
                axis.scatter(*points[:300].T, s=3, color=f"C{label}" if label != NEW else "black", linewidths=0)
        axis.set(title=name, xlim=(-5, 5), ylim=(-5, 5), aspect="equal", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Where the figure goes (needs matplotlib).")
    parser.add_argument("--pretraining_steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--weight", type=float, default=50.0, help="Of the penalty, tensor_mean; the paper's is 50.")
    parser.add_argument("--points", type=int, default=1000, help="Per class, for the distances.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pretrained = pretrain(args.pretraining_steps, generator)
    prior = sample(pretrained, torch.zeros(1000, dtype=torch.long), generator)
    models = {
        "pretrained": pretrained,
        "naive": finetune(pretrained, args.steps, generator),
        "prior preservation": finetune(pretrained, args.steps, generator, prior=prior),
        f"penalty {args.weight:g}": finetune(pretrained, args.steps, generator, weight=args.weight),
    }
    print("energy distance to the truth (0: same distribution)")
    print(f"{'':<20}" + "".join(f"{f'old {label}':>8}" for label in range(CLASSES)) + f"{'old mean':>10}{'new':>8}")
    clouds = {}
    for name, model in models.items():
        values, clouds[name] = distances(model, args.points, args.seed + 1)
        cells = "".join(f"{value:8.3f}" for value in values[:CLASSES])
        print(f"{name:<20}{cells}{sum(values[:CLASSES]) / CLASSES:10.3f}{values[NEW]:8.3f}")
    if args.output is not None:
        plot(clouds, args.output)


if __name__ == "__main__":
    main()
