"""The base before training: there, whole, of one commit, without code, and of a kind that the loss is for."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file
from support.loopback_hub import LoopbackHub
from support.runs import PARITY, assert_equal_weights, execute, few_sampling_steps, flags
from transformers import CLIPConfig, CLIPTokenizer, T5Config, T5EncoderModel

import train_dreambooth_lipreg as sd
import train_dreambooth_lora_lipreg_sdxl as sdxl
from diffusers_lipreg.dreambooth import optimization
from diffusers_lipreg.dreambooth.base import open_base
from diffusers_lipreg.dreambooth.models import Base
from diffusers_lipreg.errors import RunError

UNET = "unet/diffusion_pytorch_model.safetensors"
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
Look = Callable[..., Base]


@pytest.fixture
def look(fresh_accelerate) -> Look:
    """Opens a base as the script of its kind does, with further flags."""

    def look(folder: Path | str, *more: str) -> Base:
        script = sdxl if Path(folder, "text_encoder_2").exists() else sd
        args = script.parse_args(flags("out", "--pretrained_model_name_or_path", str(folder), *more))
        return open_base(args, Accelerator(cpu=True), sdxl=script is sdxl)

    return look


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def copy(folder: Path, name: str = "pipeline") -> Path:
    return Path(shutil.copytree(PARITY / name, folder / name))


def with_checker(folder: Path) -> Path:
    """A copy of the tiny pipeline that has a safety checker."""
    base = copy(folder)
    config = CLIPConfig(
        text_config=TOWER, vision_config={**TOWER, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    StableDiffusionSafetyChecker(config).save_pretrained(base / "safety_checker")
    (base / "feature_extractor").mkdir()
    processor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    (base / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(processor))
    change(
        base / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],  # as old indexes call it
    )
    return base


# Whole


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def drop_a_tensor(file: Path) -> None:
    weights = load_file(file)
    del weights["concept_embeds"]
    save_file(weights, file, metadata={"format": "pt"})


def pickle_it(file: Path) -> None:
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (Path.unlink, "safety_checker has no weights, model.safetensors."),
        (halve, "safety_checker/model.safetensors is not there or not whole"),
        (drop_a_tensor, "its safety_checker cannot be loaded (safety_checker lacks 1 weights, concept_embeds first.)"),
        (pickle_it, "safety_checker has no safetensors, but pytorch_model.bin, a pickle"),
        (
            lambda file: file.with_name("config.json").write_text("{"),
            "safety_checker/config.json is not a valid JSON file",
        ),
        (lambda file: shutil.rmtree(file.parent), "names safety_checker, which the folder does not hold"),
        (lambda file: shutil.rmtree(file.parents[1] / "feature_extractor"), "names feature_extractor, which"),
    ],
)
def test_a_part_that_only_saving_needs_is_looked_at(look: Look, tmp_path: Path, break_it, says: str) -> None:
    """By full fine-tuning, which saves it, and by adapters that draw on the way; other adapters do without."""
    base = with_checker(tmp_path)
    look(base)
    break_it(base / "safety_checker" / "model.safetensors")
    for more in ((), ("--rank", "2", "--validation_prompt", "a dog")):
        with pytest.raises(RunError, match=re.escape(says)):
            look(base, *more)
    look(base, "--rank", "2")


def shards(base: Path) -> Path:
    UNet2DConditionModel.from_pretrained(base / "unet").save_pretrained(base / "unet", max_shard_size="100KB")
    (base / UNET).unlink(missing_ok=True)
    return base / "unet" / "diffusion_pytorch_model.safetensors.index.json"


def test_all_shards_of_an_index_are_looked_at(look: Look, tmp_path: Path) -> None:
    base = copy(tmp_path)
    index = shards(base)
    look(base)
    last = sorted(base.glob("unet/*-of-*.safetensors"))[-1]
    halve(last)
    with pytest.raises(RunError, match=f"unet/{last.name} is not there or not whole"):
        look(base)
    last.unlink()
    with pytest.raises(RunError, match=f"unet/{last.name} is not there or not whole"):
        look(base)
    change(index, weight_map={"conv_in.weight": f"../../pipeline/unet/{last.name}"})
    with pytest.raises(
        RunError, match="unet/diffusion_pytorch_model.safetensors.index.json names files that are not beside"
    ):
        look(base)


def test_the_variants_that_are_there_are_named(look: Look, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(PARITY / "pipeline", dtype=torch.float16)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(RunError, match="has no weights, .*, only those of a variant: add --variant fp16"):
        look(tmp_path)
    with pytest.raises(RunError, match="only those of a variant: add --variant fp16"):
        look(tmp_path, "--variant", "ema")
    assert look(tmp_path, "--variant", "fp16").load("vae").dtype == torch.float32


def test_a_single_file_gets_the_command_that_makes_a_folder_of_it(look: Look, tmp_path: Path) -> None:
    file = tmp_path / "my model.safetensors"
    file.touch()
    with pytest.raises(RunError, match="is one file, not a folder. Make one of it: python -c ") as refused:
        look(file)
    code = f"from diffusers import DiffusionPipeline as P; P.from_single_file('{file}').save_pretrained('my model')"
    assert (
        execute("-c", "import shlex, sys; print(shlex.split(sys.argv[1])[-1])", str(refused.value)).stdout
        == f"{code}\n"
    )


# Without code, and without files elsewhere


@pytest.mark.parametrize(
    ("file", "settings", "says"),
    [
        ("model_index.json", {"_class_name": ["evil", "Evil"]}, "names no pipeline of the installed diffusers"),
        ("model_index.json", {"_class_name": "load_image"}, "names no pipeline of the installed diffusers"),
        ("model_index.json", {"unet": ["evil", "Evil"]}, "its unet is a Evil of evil"),
        ("model_index.json", {"tokenizer": ["transformers", "pipeline"]}, "its tokenizer is a pipeline of transformers"),
        ("model_index.json", {"scheduler": ["os", "PathLike"]}, "its scheduler is a PathLike of os"),
        ("text_encoder/config.json", {"attn_implementation": "evil/kernel"}, "sets attn_implementation, by which code"),
        ("unet/config.json", {"quantization_config": {"quant_method": "evil"}}, "sets quantization_config, by which code"),
        ("text_encoder/adapter_config.json", {"base_model_name_or_path": "evil/model"}, "text_encoder holds adapters"),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "{secret}"}, "tokenizer/tokenizer_config.json names a file elsewhere"),
        ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["../../secret"]}, "names a file elsewhere, ../../secret"),
        ("text_encoder/config.json", {"deep": [{"er": "../../secret"}]}, "names a file elsewhere, ../../secret"),
    ],
)  # fmt: skip
def test_nothing_of_a_base_runs_code_or_reads_files_elsewhere(
    look: Look, tmp_path: Path, file, settings, says
) -> None:
    base, secret = copy(tmp_path), tmp_path / "secret"
    secret.write_text("secret")
    for name in ("evil.py", "None.py", "unet/evil.py", "unet/diffusers.py", "tokenizer/transformers.py"):
        (base / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change(base / "tokenizer/tokenizer_config.json", name_or_path=str(secret))  # this says only where it came from
    look(base).pipeline(torch.float32)  # what no index names is not looked at
    (base / file).touch()
    (base / file).write_text((base / file).read_text() or "{}")
    change(base / file, **json.loads(json.dumps(settings).replace("{secret}", str(secret))))
    with pytest.raises(RunError, match=re.escape(says)):
        look(base)
    assert not (tmp_path / "ran").exists()


# Of a kind that the loss is for


def index(**parts: Any) -> tuple[str, dict]:
    return "model_index.json", parts


def unet(**settings: Any) -> tuple[str, dict]:
    return "unet/config.json", settings


CLASS = "_class_name"
KINDS = [  # Stable Diffusion
    (unet(in_channels=8), "UNet has in_channels 8, not 4"),  # instruct-pix2pix, Marigold
    (unet(in_channels=9), "UNet has in_channels 9, not 4"),  # inpainting
    (unet(in_channels=5), "UNet has in_channels 5, not 4"),  # depth2img
    (unet(in_channels=7, num_class_embeds=1000), "UNet has in_channels 7, not 4"),  # x4 upscaler
    (unet(out_channels=8), "UNet has out_channels 8, not 4"),  # learned variance
    (unet(num_class_embeds=1000), "UNet has num_class_embeds 1000, not None"),
    (unet(class_embed_type="projection"), "UNet has class_embed_type projection, not None"),  # unCLIP
    (unet(class_embed_type="timestep"), "UNet has class_embed_type timestep, not None"),  # an upscaler of latents
    (unet(addition_embed_type="text_image"), "UNet has addition_embed_type text_image"),  # Kandinsky
    (unet(encoder_hid_dim_type="ip_image_proj"), "UNet has encoder_hid_dim_type ip_image_proj"),
    (unet(time_cond_proj_dim=256), "UNet has time_cond_proj_dim 256, not None"),  # latent consistency models
    (unet(cross_attention_dim=1024), "UNet has text width 1024, not 32"),
    (("vae/config.json", {"latent_channels": 16}), "UNet has in_channels 4, not 16"),
    (("scheduler/scheduler_config.json", {"prediction_type": "sample"}), "The scheduler predicts sample"),
    (("text_encoder/config.json", {"architectures": ["ChatGLMModel"]}), "its text_encoder is a ChatGLMModel; supported"),
    (index(unet=[None, None], transformer=["diffusers", "FluxTransformer2DModel"]), "without a UNet"),
    (index(**{CLASS: "StableDiffusionImg2ImgPipeline"}), "StableDiffusionImg2ImgPipeline, which draws from an image, too"),
    (index(**{CLASS: "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]}), "with controlnet"),
    (index(unet=["diffusers", "UNet3DConditionModel"]), "its unet is a UNet3DConditionModel, not UNet2DConditionModel"),
    (index(vae=["diffusers", "AutoencoderTiny"]), "its vae is a AutoencoderTiny, not AutoencoderKL"),
    (index(vae=[None, None]), "it is a StableDiffusionPipeline without vae, which training needs"),
    (index(text_encoder=[None, None]), "it is a StableDiffusionPipeline without text_encoder"),
    (index(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "FlowMatchEulerDiscreteScheduler, without the betas"),
    (index(scheduler=["diffusers", "EDMEulerScheduler"]), "EDMEulerScheduler, without the betas"),
]  # fmt: skip
KINDS_OF_SDXL = [
    (index(text_encoder=[None, None], tokenizer=[None, None]), "without text_encoder, which training needs"),  # the refiner
    (unet(in_channels=9), "UNet has in_channels 9, not 4"),
    (unet(addition_embed_type=None), "UNet has addition_embed_type None, not text_time"),
    (unet(projection_class_embeddings_input_dim=72), "projection_class_embeddings_input_dim 72, not 80"),  # 5 time ids
    (index(**{CLASS: "StableDiffusionXLImg2ImgPipeline"}), "StableDiffusionXLImg2ImgPipeline, which draws from an image, too"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [("pipeline", *row) for row in KINDS] + [("pipeline_sdxl", *row) for row in KINDS_OF_SDXL],
)
def test_what_the_loss_is_not_for_is_refused(look: Look, tmp_path: Path, name: str, kind, says: str) -> None:
    base = copy(tmp_path, name)
    file, settings = kind
    change(base / file, **settings)
    for part, value in settings.items():  # as whole as the others
        if isinstance(value, list) and value[0] and not (base / part).exists():
            shutil.copytree(base / "unet", base / part)
    with pytest.raises(RunError, match=re.escape(says)):
        look(base)


def deepfloyd(folder: Path, stage: int) -> Path:
    """A tiny DeepFloyd IF: pixels, the text states of T5, and a second stage that improves an image."""
    text = T5Config(
        vocab_size=1000, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, architectures=["T5EncoderModel"]
    )
    size = {"sample_size": 8, "block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "attention_head_dim": 4}
    conditions = {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 16}
    if stage == 2:
        conditions["class_embed_type"] = "timestep"
    channels = {"in_channels": 3 * stage, "out_channels": 6}
    UNet2DConditionModel(**size, **blocks, **conditions, **channels).save_pretrained(folder / "unet")
    T5EncoderModel(text).save_pretrained(folder / "text_encoder")
    shutil.copytree(PARITY / "pipeline" / "tokenizer", folder / "tokenizer")
    shutil.copytree(PARITY / "pipeline" / "scheduler", folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "image_noising_scheduler": [None, None],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "watermarker": [None, None],
    }
    name = "IFPipeline" if stage == 1 else "IFSuperResolutionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **parts}))
    return folder


def test_deepfloyds_pixels_are_a_kind_of_their_own(look: Look, tmp_path: Path) -> None:
    """Twice the channels mean an image to improve there, and there alone."""
    assert "vae" not in look(deepfloyd(tmp_path / "first", stage=1)).classes
    second = deepfloyd(tmp_path / "second", stage=2)
    look(second, "--class_labels_conditioning", "timesteps")
    with pytest.raises(RunError, match="IFSuperResolutionPipeline: add --class_labels_conditioning timesteps"):
        look(second)
    change(second / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    with pytest.raises(RunError, match="add --tokenizer_max_length 77"):
        look(second, "--class_labels_conditioning", "timesteps")


def add_token(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<sks-dog>"])  # as textual inversion does, without the embedding
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(("name", "part"), [("pipeline", "tokenizer"), ("pipeline_sdxl", "tokenizer_2")])
def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(look: Look, tmp_path, name: str, part: str) -> None:
    base = copy(tmp_path, name)
    add_token(base / part)
    with pytest.raises(RunError, match="its tokenizer has 1001 tokens, its text encoder embeds 1000"):
        look(base)


def test_the_same_of_a_tokenizer_from_elsewhere(train, tmp_path: Path) -> None:
    add_token(copy(tmp_path) / "tokenizer")
    with pytest.raises(RunError, match="--tokenizer_name .*: its tokenizer has 1001 tokens"):
        train(tmp_path / "out", "--tokenizer_name", str(tmp_path / "pipeline" / "tokenizer"))


@pytest.mark.parametrize(
    ("file", "setting", "value", "message"),
    [
        ("vae/config.json", "scaling_factor", None, "scaling_factor None, not a number above 0"),
        ("vae/config.json", "scaling_factor", "0.18", "scaling_factor 0.18, not a number above 0"),
        ("vae/config.json", "scaling_factor", 0, "scaling_factor 0, not a number above 0"),
        ("vae/config.json", "scaling_factor", math.nan, "scaling_factor nan, not a number above 0"),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1, 0.2], "no noise schedule of 1000 betas"),
        ("scheduler/scheduler_config.json", "beta_start", math.nan, "no noise schedule of 1000 betas"),
        ("tokenizer/tokenizer_config.json", "model_max_length", -1, "no padding token, or no length of prompts"),
        ("tokenizer/tokenizer_config.json", "pad_token", None, "no padding token, or no length of prompts"),
    ],
)
def test_a_setting_that_training_would_trip_over_is_refused(
    look: Look, tmp_path: Path, file: str, setting: str, value: Any, message: str
) -> None:
    base = copy(tmp_path)
    change(base / file, **{setting: value})
    with pytest.raises(RunError, match=message):
        look(base)


# One commit, and the Hub away


@pytest.fixture
def api(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HfApi:
    """A client of the Hub, whose cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return HfApi(endpoint=hub.url, token="hf_alice")


def test_the_hub_may_change_and_go_once_training_has_begun(
    train, hub: LoopbackHub, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole result is of the commit at the start; only what it needs was fetched, and no code and no pickle."""
    source = with_checker(tmp_path)
    for name in (
        "pipeline.py",
        "unet/evil.py",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ):
        (source / name).write_text("not to be fetched")
    api.create_repo("alice/base")
    commit = api.upload_folder(repo_id="alice/base", folder_path=source).oid
    plan_steps = optimization.plan_steps

    def go_away(*args: Any) -> int:
        api.upload_folder(repo_id="alice/base", folder_path=PARITY / "vae", path_in_repo="vae")
        hub.stop()
        return plan_steps(*args)

    monkeypatch.setattr(optimization, "plan_steps", go_away)
    more = ("--validation_prompt", "a dog", "--validation_steps", "2", "--num_validation_images", "1")
    out = train(tmp_path / "out", "--pretrained_model_name_or_path", "alice/base", *more)
    fetched = {
        request.path.split(f"/{commit}/")[1] for request in hub.requests if f"/resolve/{commit}/" in request.path
    }
    assert UNET in fetched and not any(name.endswith((".py", ".bin", "fp16.safetensors")) for name in fetched)
    monkeypatch.undo()
    plain = train(tmp_path / "plain", "--pretrained_model_name_or_path", str(source))
    for file in source.rglob("*.safetensors"):
        if "fp16" not in file.name:
            assert_equal_weights(out / file.relative_to(source), plain / file.relative_to(source))
    assert str(tmp_path / "cache") not in "".join(file.read_text() for file in out.rglob("*.json"))


def test_a_pickle_on_the_hub_is_refused_before_any_weights_are_fetched(
    look: Look, hub: LoopbackHub, api: HfApi, tmp_path: Path
) -> None:
    source = with_checker(tmp_path)
    pickle_it(source / "safety_checker" / "model.safetensors")
    api.create_repo("alice/base")
    api.upload_folder(repo_id="alice/base", folder_path=source)
    with pytest.raises(
        RunError, match="alice/base: safety_checker has no safetensors, but pytorch_model.bin, a pickle"
    ):
        look("alice/base")
    assert not [
        request
        for request in hub.requests
        if request.method == "GET" and request.path.endswith((".bin", ".safetensors"))
    ]
    api.delete_file("model_index.json", repo_id="alice/base")
    with pytest.raises(RunError, match="alice/base: the repository holds no model_index.json"):
        look("alice/base")


# Lengths, types, precision


def test_a_tokenizer_without_a_longest_prompt_takes_the_text_encoders(train, tmp_path: Path) -> None:
    base = copy(tmp_path)
    config = base / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    limit = settings.pop("model_max_length")
    config.write_text(json.dumps(settings))
    assert CLIPTokenizer.from_pretrained(base / "tokenizer").model_max_length > 1e6
    more = ("--validation_prompt", "a dog", "--validation_steps", "2", "--num_validation_images", "1")
    out = train(tmp_path / "out", "--pretrained_model_name_or_path", str(base), *more)
    assert_equal_weights(out / UNET, train(tmp_path / "plain") / UNET)
    assert CLIPTokenizer.from_pretrained(out / "tokenizer").model_max_length == limit


def test_what_a_base_in_half_precision_makes_runs_as_the_card_says(
    train, hub: LoopbackHub, api: HfApi, tmp_path: Path
) -> None:
    """The whole pipeline has one type, and adapters are loaded on a base of one, by the cards' code."""
    pipeline = StableDiffusionPipeline.from_pretrained(with_checker(tmp_path), dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    api.create_repo("alice/half")
    commit = api.upload_folder(repo_id="alice/half", folder_path=tmp_path / "half").oid
    more = (
        "--pretrained_model_name_or_path",
        "alice/half",
        "--variant",
        "fp16",
        "--push_to_hub",
        "--hub_token",
        "hf_alice",
    )
    out = train(tmp_path / "whole", *more)
    parts = StableDiffusionPipeline.from_pretrained(out).components.values()  # as README loads it
    assert [part.dtype for part in parts if isinstance(part, torch.nn.Module)] == [torch.float32] * 4
    train(tmp_path / "adapters", *more, "--rank", "2")
    cards = [hub.files(f"alice/{name}")["README.md"].decode() for name in ("whole", "adapters")]
    assert all(f"alice/half (commit {commit[:12]})" in card for card in cards)
    codes = [re.search(r"```python\n(.*?)```", card, re.S)[1] for card in cards]
    for code in codes:
        names: dict[str, Any] = {}
        with few_sampling_steps():
            exec(code, names)
        assert names["image"].size == (64, 64)
