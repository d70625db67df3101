"""Work done once changes nothing: images, prompts; and what did it has left memory when training begins."""

import gc
import weakref
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from support.runs import PARITY, as_photos, assert_equal_weights, load
from transformers import CLIPTokenizer

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg.dreambooth import latents, prompts
from diffusers_lipreg.dreambooth.data import DreamBoothDataset, collate
from diffusers_lipreg.dreambooth.images import PhotoTransform

SCRIPTS = {"train": train_dreambooth_lipreg, "train_sdxl": train_dreambooth_lora_lipreg_sdxl}
WEIGHTS = {"train": "unet/diffusion_pytorch_model.safetensors", "train_sdxl": "pytorch_lora_weights.safetensors"}
PRIOR = (
    *("--with_prior_preservation", "--class_data_dir", str(PARITY / "class_images"), "--class_prompt", "a dog"),
    *("--num_class_images", "3", "--center_crop"),
)


@pytest.fixture
def frozen(request, monkeypatch) -> list[dict[str, bool]]:
    """For each loss that a run computes, which of the frozen models still have their weights in memory."""
    seen: list[dict[str, bool]] = []
    for script in SCRIPTS.values():
        watch(script, seen, monkeypatch)
    return seen


def watch(script, seen: list[dict[str, bool]], monkeypatch) -> None:
    weights: dict[str, weakref.ref] = {}
    build, loss = script.Models, script.denoising_loss

    def models(*args):
        built = build(*args)
        for name in {"vae", "text_encoder", "text_encoder_2"} & vars(built).keys():
            weights[name] = weakref.ref(next(getattr(built, name).parameters()))
        return built

    def denoising_loss(*args, **named):
        if not seen:
            gc.collect()
        seen.append({name: weight() is not None for name, weight in weights.items()})
        return loss(*args, **named)

    monkeypatch.setattr(script, "Models", models)
    monkeypatch.setattr(script, "denoising_loss", denoising_loss)


@pytest.mark.parametrize("script", SCRIPTS)
def test_cached_images_train_the_same_weights(script, request, tmp_path, frozen):
    """To the last bit, with all that needs the models again: held-out crops, validation, and saving."""
    train = request.getfixturevalue(script)
    more = (*PRIOR, "--train_batch_size", "2", "--max_train_steps", "2", "--probe_steps", "2", "--keep_best")
    plain = load(train(tmp_path / "plain", *more, "--no-cache_latents") / WEIGHTS[script])
    encoders = {"text_encoder"} if script == "train" else {"text_encoder", "text_encoder_2"}
    assert frozen and all(there == {"vae": True, **dict.fromkeys(encoders, False)} for there in frozen)
    frozen.clear()
    sampling = ("--validation_prompt", "a dog", "--num_validation_images", "1")
    sampling += ("--validation_steps", "2") if script == "train" else ()
    cached = load(train(tmp_path / "cached", *more, *sampling) / WEIGHTS[script])
    assert frozen and not any(there for seen in frozen for there in seen.values())
    assert [name for name in plain if not torch.equal(plain[name], cached[name])] == []


def test_other_batch_shapes_change_no_more_than_rounding(train, tmp_path):
    """Of four photos in batches of three, the last is alone in its batch."""
    more = ("--center_crop", "--train_batch_size", "3", "--max_train_steps", "2", "--adam_epsilon", "1e-4")
    plain = load(train(tmp_path / "plain", *more, "--no-cache_latents") / WEIGHTS["train"])
    cached = load(train(tmp_path / "cached", *more, "--cache_latents") / WEIGHTS["train"])
    for name in plain:
        torch.testing.assert_close(cached[name], plain[name], rtol=0, atol=1e-5)


def test_trained_text_encoders_stay(train, train_sdxl, tmp_path, frozen):
    for run in (train, train_sdxl):
        run(
            tmp_path / run.__qualname__,
            "--train_text_encoder",
            "--center_crop",
            "--cache_latents",
            "--max_train_steps",
            "1",
        )
    assert frozen == [
        {"vae": False, "text_encoder": True},
        {"vae": False, "text_encoder": True, "text_encoder_2": True},
    ]


# --- what is cached ---------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path) -> dict[str, list[Path]]:
    sizes = {"square": (96, 96), "nearly": (200, 201), "wide": (96, 64)}
    for name, size in sizes.items():
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    return {name: [tmp_path / f"{name}.png"] for name in sizes}


def asks(cache_latents: bool | None = None, steps: int | None = 10, prior: bool = False) -> Namespace:
    return Namespace(
        cache_latents=cache_latents, max_train_steps=steps, gradient_accumulation_steps=2, train_batch_size=3,
        with_prior_preservation=prior, resolution=16,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("args", "images", "photo", "center_crop", "cached"),
    [
        (asks(), 5, "square", False, True),
        (asks(), 5, "nearly", False, True),  # 64 x 64 when resized
        (asks(), 5, "wide", False, False),
        (asks(), 5, "wide", True, True),
        (asks(False), 5, "square", False, False),
        (asks(), 60, "square", False, True),  # 10 updates of 2 batches of 3
        (asks(), 61, "square", False, False),  # it would cost more than it saves
        (asks(prior=True), 120, "square", False, True),
        (asks(True), 61, "square", False, True),
        (asks(steps=None), 1000, "square", False, True),
    ],
)
def test_images_are_cached_where_that_changes_nothing_but_time(args, images, photo, center_crop, cached, photos):
    transform = PhotoTransform(64, center_crop)
    assert latents.should_cache_latents(args, images, photos[photo], transform, has_vae=True) is cached
    assert not latents.should_cache_latents(asks(), images, photos[photo], transform, has_vae=False)


@pytest.mark.usefixtures("fresh_accelerate")
def test_each_image_is_encoded_once_in_the_shape_of_a_batch(photos, monkeypatch):
    vae = AutoencoderKL.from_pretrained(PARITY / "pipeline", subfolder="vae")
    transform = PhotoTransform(16, True)
    expected = DreamBoothDataset(as_photos([*photos["square"], *photos["wide"]]), photos["nearly"], transform)
    with torch.no_grad():
        expected = latents.encode_moments(vae, collate([expected[0], expected[1]])["pixel_values"])
    shapes, encode = [], latents.encode_moments
    monkeypatch.setattr(
        latents, "encode_moments", lambda vae, pixels: (shapes.append(len(pixels)), encode(vae, pixels))[1]
    )
    dataset = DreamBoothDataset(as_photos([*photos["square"], *photos["wide"]]), photos["nearly"] * 5, transform)
    layouts = latents.cache_latents(asks(prior=True), Accelerator(cpu=True), vae, dataset)
    assert sorted(shapes) == [4, 6, 6] and layouts.keys() == {4, 6}  # two of them to see how a batch lies in memory
    batch = collate([dataset[0], dataset[1]], layouts)["moments"]
    torch.testing.assert_close(batch, expected)
    assert (
        len(dataset) == 5
        and torch.equal(dataset[4]["instance"], batch[0])
        and torch.equal(dataset[4]["class"], batch[2])
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.sample().sum().item()


# --- compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "compiles"),
    [("train", False), *(pytest.param(script, True, marks=pytest.mark.slow) for script in SCRIPTS)],
)
def test_a_run_that_accelerate_compiles_is_saved_and_resumed_under_the_same_names(
    script, compiles, request, tmp_path, monkeypatch
):
    """With a backend that changes no arithmetic the weights are those of a plain run; the default test wraps the models
    as `torch.compile` does, and compiles nothing."""
    train, more = request.getfixturevalue(script), ("--checkpointing_steps", "1", "--probe_steps", "1")
    plain = train(tmp_path / "plain", *more)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    torch.compiler.reset()
    frames = torch._dynamo.utils.counters["frames"]
    frames.clear()
    with torch.compiler.set_stance("default" if compiles else "force_eager"):
        train(tmp_path / "compiled", *more, "--max_train_steps", "1")
        assert (frames["ok"] > 0) == compiles
        compiled = train(tmp_path / "compiled", *more, "--resume_from_checkpoint", "latest")
    assert_equal_weights(compiled / WEIGHTS[script], plain / WEIGHTS[script])


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_prompt_is_tokenized_once():
    Accelerator(cpu=True)
    tokenizer = CLIPTokenizer.from_pretrained(PARITY / "pipeline_sdxl" / "tokenizer")
    calls = []

    class Counting(type(tokenizer)):
        def __call__(self, *args, **options):
            calls.append(args)
            return super().__call__(*args, **options)

    tokenizer.__class__ = Counting
    tokenize = prompts.sdxl_tokenizer([tokenizer])
    first = tokenize(["a dog"])
    seen = len(calls)
    assert seen > 0 and torch.equal(tokenize(["a dog"])[0], first[0]) and len(calls) == seen


def test_nothing_is_prepared_for_what_is_not_measured(train, tmp_path, monkeypatch):
    seen, encode = set(), prompts.PromptEncoder.encode
    monkeypatch.setattr(
        prompts.PromptEncoder,
        "encode",
        lambda self, encoder, prompts: (seen.update(prompts), encode(self, encoder, prompts))[1],
    )
    monkeypatch.setattr("diffusers_lipreg.dreambooth.latents.held_out_batch", None)
    train(tmp_path, "--probe_steps", "0", "--max_train_steps", "1")
    assert seen == {"a photo of sks dog"}
