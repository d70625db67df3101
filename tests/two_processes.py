"""What test_two_processes.py has two processes do, in one launch: `torchrun --nproc_per_node 2 two_processes.py FOLDER`."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from conftest import flags, forget_accelerate
from torch import Tensor
from torch.nn.functional import mse_loss

import train_dreambooth_lipreg as script
from diffusers_lipreg.dreambooth import runtime

FULL = ("--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--max_train_steps", "6", "--checkpointing_steps", "1")
# Accumulation that does not divide the epoch: five photos on two processes are three batches each, one of them twice.
MANY = (*FULL, "--gradient_accumulation_steps", "2", "--train_text_encoder", "--drift_budget", "1e-3", "--keep_best")
# Adam divides by the root of its second moment, which for gradients near zero turns a rounding error into a step of
# full size; with a large epsilon an update is as smooth as the gradient.
FIXED = (*FULL[:-1], "100", "--adam_epsilon", "1e-2")


def fixed_loss(args: Namespace, models: script.Models, batch: dict, text_states: Callable, *_: object) -> Tensor:
    """The script's loss, of noise and timesteps that belong to a photo and not to a process."""
    latents = batch["moments"].chunk(2, dim=1)[0]  # the photos are squares
    noise = latents.flip(-1)
    timesteps = torch.full((len(latents),), 500)
    noisy = models.noise_scheduler.add_noise(latents, noise, timesteps)
    return mse_loss(models.unet(noisy, timesteps, text_states(len(latents)), return_dict=False)[0], noise)


class Run:
    """One training in this process: the models it ended with, and its logs as (step, values)."""

    def __init__(self, output_dir: Path, *more: str, loss: Callable | None = None) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []
        forget_accelerate()
        models, original = script.Models, (script.Models, script.denoising_loss, Accelerator.log)

        def build(*args: object) -> script.Models:
            built = models(*args)
            self.models = dict(built.trained)  # bare, before they are wrapped
            return built

        script.Models, script.denoising_loss = build, loss or script.denoising_loss
        Accelerator.log = lambda accelerator, values, step, **_: self.logs.append((step, dict(values)))
        try:
            script.main(script.parse_args(flags(output_dir, *more)))
        finally:
            script.Models, script.denoising_loss, Accelerator.log = original

    def save(self, file: Path) -> None:
        torch.save({"weights": {k: v.state_dict() for k, v in self.models.items()}, "logs": self.logs}, file)


def lost_loss(*args: object) -> Tensor:
    """The script's loss, and in the second process not a number."""
    return denoising_loss(*args) * (float("nan") if PartialState().process_index == 1 else 1)


denoising_loss = script.denoising_loss


def main(folder: Path) -> None:
    # accelerate ends torch's process group with a run; here there are several runs.
    PartialState.destroy_process_group = lambda self, group=None: None
    rank = Accelerator(cpu=True).process_index
    photos = ("--instance_data_dir", str(folder / "photos"))
    prior = ("--with_prior_preservation", "--class_data_dir", str(folder / "class"), "--class_prompt", "a dog")
    prior += ("--num_class_images", "5", "--sample_batch_size", "1")
    push = ("--push_to_hub", "--hub_model_id", "alice/dog", "--hub_token", "hf_alice")

    Run(folder / "whole", *photos, *MANY, *prior, *push).save(folder / f"whole-{rank}.pt")
    for stop in (1, 2, 3):
        more = ("--resume_from_checkpoint", str(folder / "whole" / f"checkpoint-{stop}"))
        Run(folder / "again", *photos, *MANY, *prior, *more).save(folder / f"from-{stop}-{rank}.pt")
    Run(folder / "fixed", *FIXED, "--instance_data_dir", str(folder / "squares"), loss=fixed_loss).save(
        folder / f"fixed-{rank}.pt"
    )
    more = ("--resume_from_checkpoint", str(folder / "one" / "checkpoint-3"))
    Run(folder / "two", *photos, *FULL, *more).save(folder / f"two-after-one-{rank}.pt")
    sys.argv = ["train_dreambooth_lipreg.py"]
    runtime.run(lambda _: Run(folder / "lost", *photos, loss=lost_loss), Namespace(debug=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
