"""Pretrain the testbed's Stable Diffusion pipeline from nothing, on pictures of the small world.

    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 tests/testbed/pretrain.py --output_dir testbed-pretraining

Four stages: VAE, text encoder, latents of the training pictures, UNet. Each leaves a file in the output folder and is
not done again; within a stage an interrupted run goes on from its last checkpoint. At the end `output_dir/pipeline`
holds what `StableDiffusionPipeline.save_pretrained` writes, in float16.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from world import (
    COLOR_NAMES,
    FULL_CAPTIONS,
    PARTIAL_CAPTIONS,
    RARE_TOKENS,
    SCENES,
    SHAPE_NAMES,
    SIZE,
    Scene,
    caption_templates,
    draw_clutter,
    draw_scenes,
)

TRAINING_SCENES = [scene for scene in SCENES if not scene.held_out]
CHANNELS = 8  # of the latents; with Stable Diffusion's four, details of a few pixels are lost
TOKENS = 24  # the longest caption has 14, with both ends


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where stages, checkpoints and pipeline go.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=6000)
    parser.add_argument("--text_steps", type=int, default=1500)
    parser.add_argument("--unet_steps", type=int, default=5000)
    parser.add_argument("--pictures", type=int, default=49152, help="Pictures whose latents the UNet learns from.")
    parser.add_argument("--vae_batch", type=int, default=32, help="Pictures per update, over all processes.")
    parser.add_argument("--unet_batch", type=int, default=96, help="Latents per update, over all processes.")
    parser.add_argument("--unet_lr", type=float, default=1e-3)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="bf16")
    return parser.parse_args()


class Loop:
    """The updates of one stage: one optimizer, warm-up and cosine decay, a progress bar, atomic checkpoints.

    Iterating yields the number of the update and a generator that depends on seed, process and update only, so that
    an interrupted stage goes on as if nothing had happened.
    """

    def __init__(
        self, accelerator: Accelerator, args: argparse.Namespace, name: str, model: nn.Module, steps: int, lr: float
    ) -> None:
        self.accelerator, self.args, self.name, self.steps = accelerator, args, name, steps
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        # The schedule counts updates, not processes times updates, so accelerate must not step it for each process.
        self.schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(self.schedule)
        self.checkpoint = args.output_dir / f"{name}-checkpoint"

    def __iter__(self) -> Iterator[tuple[int, torch.Generator]]:
        done = self._resume()
        self.bar = tqdm(
            total=self.steps, initial=done, desc=self.name, disable=not self.accelerator.is_main_process, mininterval=5
        )
        for step in range(done, self.steps):
            yield step, self._generator(step)
            if (step + 1) % self.args.checkpointing_steps == 0:
                self._save(step + 1)
        self.bar.close()
        self.accelerator.free_memory()
        self.accelerator._custom_objects.clear()

    def _generator(self, step: int) -> torch.Generator:
        seed = (self.args.seed * 1_000_003 + step) * self.accelerator.num_processes + self.accelerator.process_index
        return torch.Generator().manual_seed(seed)

    def update(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

    def _save(self, done: int) -> None:
        partial = self.checkpoint.with_suffix(".partial")
        self.accelerator.save_state(str(partial))
        if self.accelerator.is_main_process:
            (partial / "done.json").write_text(json.dumps(done))
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            partial.rename(self.checkpoint)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        if not self.checkpoint.exists():
            return 0
        self.accelerator.load_state(str(self.checkpoint))
        return json.loads((self.checkpoint / "done.json").read_text())


def stage(accelerator: Accelerator, done: Path, work: Callable[[], None]) -> None:
    """Do the work unless what it leaves is there."""
    if not done.exists():
        work()
    accelerator.wait_for_everyone()


def draw(sample: list, generator: torch.Generator, count: int) -> list:
    return [sample[i] for i in torch.randint(len(sample), (count,), generator=generator).tolist()]


# --- the VAE: half of its pictures show the world, half clutter of any color, so that it can show subjects, too


class Reconstruction(nn.Module):
    """A VAE whose one forward pass gives reconstruction and divergence, as training in several processes wants it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(pictures).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.kl()


def train_vae(accelerator: Accelerator, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,  # with few channels each, groups would take the colors out of flat pictures
        latent_channels=CHANNELS,
    )
    with torch.no_grad():
        vae.quant_conv.bias[CHANNELS:] = -6  # latents start with little noise: the log-variances' half of the output
    loop = Loop(accelerator, args, "vae", Reconstruction(vae), args.vae_steps, lr=2e-3)
    count = args.vae_batch // accelerator.num_processes
    for step, generator in loop:
        world = draw_scenes(draw(TRAINING_SCENES, generator, count // 2), generator)
        pictures = torch.cat([world, draw_clutter(count - len(world), generator)]).to(accelerator.device)
        if step < args.vae_steps * 9 // 10:  # colors and edges are learned on quarters of the pictures, faster
            top, left = torch.randint(SIZE // 2 + 1, (2,), generator=generator).tolist()
            pictures = pictures[:, :, top : top + SIZE // 2, left : left + SIZE // 2]
        reconstruction, divergence = loop.model(pictures)
        error = reconstruction.float() - pictures
        # Squares leave the plateau of gray reconstructions sooner, absolute differences give sharper edges.
        distance = error.square().mean() + error.abs().mean()
        per_number = divergence.mean() / (CHANNELS * pictures[0, 0].numel() / 64)
        loop.update(distance + 2e-4 * per_number)
    if accelerator.is_main_process:
        vae.save_pretrained(args.output_dir / "vae")


# --- the text encoder: CLIP's, with a vocabulary of this world, taught to say what a caption speaks of


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, with merges that make every word of the world and every rare token one token.

    They are made here, not trained: training breaks ties differently from run to run, and then a resumed stage, or
    another process, would read the captions with another vocabulary.
    """
    templates = " ".join((*FULL_CAPTIONS, *PARTIAL_CAPTIONS)).format(
        shape="", color="", background="", a_color="a", a_background="an"
    )
    words = sorted({*templates.replace(",", " ").split(), *RARE_TOKENS, *SHAPE_NAMES, *COLOR_NAMES})
    merges: list[tuple[str, str]] = []
    for word in words:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            parts = merged(parts, pair)
        while len(parts) > 1:  # what the words before have not merged is merged from the left
            merges.append((parts[0], parts[1]))
            parts = merged(parts, merges[-1])
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)
    for word in words:
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"the tokenizer splits {word!r} into {tokenizer.tokenize(word)}")
    return tokenizer


def merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts with every occurrence of the pair joined."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def spoken_of(scene: Scene, template: str) -> list[int]:
    """The attributes that a caption in this phrasing names; one more class each for what it leaves open."""
    return [
        scene.shape,
        scene.color if "color}" in template else len(COLOR_NAMES),
        scene.background if "background}" in template else len(COLOR_NAMES),
    ]


class Reader(nn.Module):
    """A text encoder with one linear head for each attribute on its pooled output."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        classes = (len(SHAPE_NAMES), len(COLOR_NAMES) + 1, len(COLOR_NAMES) + 1)
        self.heads = nn.ModuleList(nn.Linear(text_encoder.config.hidden_size, count) for count in classes)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        pooled = self.text_encoder(tokens).pooler_output
        return [head(pooled) for head in self.heads]


def train_text_encoder(accelerator: Accelerator, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    text_encoder = CLIPTextModel(config)
    loop = Loop(accelerator, args, "text", Reader(text_encoder), args.text_steps, lr=1e-3)
    for _, generator in loop:
        scenes = draw(TRAINING_SCENES, generator, 64)
        templates = caption_templates(generator, len(scenes))
        captions = [scene.caption(template) for scene, template in zip(scenes, templates, strict=True)]
        answers = torch.tensor([spoken_of(*pair) for pair in zip(scenes, templates, strict=True)])
        logits = loop.model(tokenize(tokenizer, captions).to(accelerator.device))
        answers = answers.to(accelerator.device)
        loop.update(sum(F.cross_entropy(logit.float(), answers[:, i]) for i, logit in enumerate(logits)))
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir / "tokenizer")
        text_encoder.save_pretrained(args.output_dir / "text_encoder")


# --- the UNet: learns on latents and text states computed once


@torch.no_grad()
def encode_pictures(accelerator: Accelerator, args: argparse.Namespace) -> None:
    """Draw the training pictures and keep their latents, posterior means and standard deviations: each process a share."""
    vae = AutoencoderKL.from_pretrained(args.output_dir / "vae").to(accelerator.device).eval()
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + accelerator.process_index)
    share = args.pictures // accelerator.num_processes
    scenes, means, deviations = [], [], []
    for _ in tqdm(range(0, share, 64), desc="latents", disable=not accelerator.is_main_process, mininterval=5):
        batch = draw(TRAINING_SCENES, generator, 64)
        with accelerator.autocast():
            posterior = vae.encode(draw_scenes(batch, generator).to(accelerator.device)).latent_dist
        scenes += [[scene.shape, scene.color, scene.background] for scene in batch]
        means.append(posterior.mean.float().cpu())
        deviations.append(posterior.std.float().cpu())
    latents = {"scene": torch.tensor(scenes), "mean": torch.cat(means), "std": torch.cat(deviations)}
    latents = {key: value.contiguous() for key, value in latents.items()}
    save_file(latents, args.output_dir / f"latents-{accelerator.process_index}.safetensors")


@torch.no_grad()
def encode_captions(output_dir: Path, captions: list[str]) -> Tensor:
    """The text encoder's states of captions: (n, tokens, width)."""
    tokenizer = CLIPTokenizer.from_pretrained(output_dir / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(output_dir / "text_encoder").eval()
    return torch.cat([text_encoder(tokens)[0] for tokens in tokenize(tokenizer, captions).split(256)])


class Captions:
    """The states of every caption that pretraining may draw, computed once."""

    def __init__(self, output_dir: Path) -> None:
        rare = [
            t.replace("{shape}", f"{r} {{shape}}") for t in (*FULL_CAPTIONS, *PARTIAL_CAPTIONS) for r in RARE_TOKENS
        ]
        texts = {scene.caption(t) for t in (*FULL_CAPTIONS, *PARTIAL_CAPTIONS, *rare) for scene in TRAINING_SCENES}
        self.rows = {text: row for row, text in enumerate(["", *sorted(texts)])}
        self.states = encode_captions(output_dir, list(self.rows))

    def draw(self, scenes: list[Scene], generator: torch.Generator) -> Tensor:
        """A caption's states for each scene; one in ten stays empty, for classifier-free guidance."""
        templates = caption_templates(generator, len(scenes))
        texts = [scene.caption(template) for scene, template in zip(scenes, templates, strict=True)]
        kept = torch.rand(len(texts), generator=generator) >= 0.1
        return self.states[[self.rows[text] if keep else 0 for text, keep in zip(texts, kept.tolist(), strict=True)]]


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(96, 112),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_scheduler() -> DDPMScheduler:
    """Stable Diffusion 1.5's schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def train_unet(accelerator: Accelerator, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    shares = [load_file(path) for path in sorted(args.output_dir.glob("latents-*.safetensors"))]
    scene, mean, std = (torch.cat([share[key] for share in shares]) for key in ("scene", "mean", "std"))
    scenes = [Scene(*row) for row in scene.tolist()]
    scale = 1 / mean.std().item()
    captions, scheduler, unet = Captions(args.output_dir), make_scheduler(), make_unet()
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    loop = Loop(accelerator, args, "unet", unet, args.unet_steps, lr=args.unet_lr)
    accelerator.register_for_checkpointing(ema)
    ema.to(accelerator.device)
    count = args.unet_batch // accelerator.num_processes
    for _, generator in loop:
        rows = torch.randint(len(scenes), (count,), generator=generator)
        latents = scale * (mean[rows] + std[rows] * torch.randn(mean[rows].shape, generator=generator))
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(1000, (count,), generator=generator)
        states = captions.draw([scenes[row] for row in rows.tolist()], generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        noisy, timesteps, states, noise = (x.to(accelerator.device) for x in (noisy, timesteps, states, noise))
        prediction = loop.model(noisy, timesteps, states, return_dict=False)[0]
        error = (prediction.float() - noise).square().mean((1, 2, 3))
        # Min-SNR weights (Hang et al. 2023): what is nearly clean already says little about shapes and colors.
        snr = compute_snr(scheduler, timesteps)
        loop.update((error * snr.clamp(max=5) / snr).mean())
        ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    if accelerator.is_main_process:
        unet.save_pretrained(args.output_dir / "unet")
        (args.output_dir / "scaling_factor.json").write_text(json.dumps(scale))


def assemble(output_dir: Path) -> StableDiffusionPipeline:
    """Put the stages together as a pipeline."""
    vae = AutoencoderKL.from_pretrained(output_dir / "vae")
    vae.register_to_config(scaling_factor=json.loads((output_dir / "scaling_factor.json").read_text()))
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(output_dir / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(output_dir / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(output_dir / "unet"),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision, step_scheduler_with_optimizer=False)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, work in (
        ("vae", train_vae),
        ("text_encoder", train_text_encoder),
        (f"latents-{accelerator.process_index}.safetensors", encode_pictures),
        ("scaling_factor.json", train_unet),
    ):
        stage(accelerator, args.output_dir / name, lambda work=work: work(accelerator, args))
    if accelerator.is_main_process:
        assemble(args.output_dir).to(torch.float16).save_pretrained(args.output_dir / "pipeline")
        print(f"The pipeline is in {args.output_dir / 'pipeline'}")


if __name__ == "__main__":
    main()
