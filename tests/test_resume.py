"""A run that stops and goes on ends with the weights of one that did not, to the last bit; so does the official script."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from support.runs import PARITY, assert_equal_weights, load
from transformers import CLIPTextModel

from diffusers_lipreg.errors import RunError

LORA = "pytorch_lora_weights.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
PRIOR = (
    *("--with_prior_preservation", "--class_data_dir", str(PARITY / "class_images"), "--class_prompt", "a dog"),
    *("--num_class_images", "3"),
)
PRODUCT = ("--lipreg_weight", "1e-2", "--lipreg_reduction", "product")
SCHEDULE = ("--lr_scheduler", "cosine", "--lr_warmup_steps", "2")

# Four photos, two of which are not square, so that crops draw from the stream that noise draws from, too. Every update
# leaves a checkpoint; the run goes on from each of those named: in mid-epoch, one batch before its end, in the second.
VARIANTS = {
    "whole UNet": ("train", (3, 5), SCHEDULE),
    "accumulation that does not divide the epoch": ("train", (1,), ("--gradient_accumulation_steps", "3")),
    "text encoder": ("train", (3,), ("--train_text_encoder", "--gradient_accumulation_steps", "2")),
    "class images": ("train", (1,), (*PRIOR, "--train_batch_size", "2")),
    "cached images": ("train", (3,), (*PRIOR, "--train_batch_size", "2", "--center_crop", "--cache_latents")),
    "workers": ("train", (5,), ("--dataloader_num_workers", "2")),
    "SD adapters": ("train", (3,), ("--rank", "3", "--lora_alpha", "5", "--use_dora", "--train_text_encoder")),
    "SDXL": ("train_sdxl", (3,), (*PRODUCT, *SCHEDULE, "--lora_dropout", "0.5", "--gradient_accumulation_steps", "3")),
    "SDXL DoRA": ("train_sdxl", (3,), (*PRODUCT, "--use_dora", "--train_text_encoder", "--random_flip")),
    "SDXL captions": (
        "train_sdxl", (3,), ("--dataset_name", str(PARITY / "captions"), "--caption_column", "text", "--repeats", "2"),
    ),
    "SDXL class images": ("train_sdxl", (1,), (*PRIOR, "--train_batch_size", "2", "--random_flip")),
}  # fmt: skip
SLOW = ("SDXL class images",)


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in VARIANTS]
)
def test_a_resumed_run_equals_an_uninterrupted_one(variant, request, tmp_path, monkeypatch, logs):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    script, stops, more = VARIANTS[variant]
    train = partial(request.getfixturevalue(script), tmp_path / "out", "--max_train_steps", "6", *more)
    whole = results(train("--checkpointing_steps", "1"))
    assert whole
    for stop in stops:
        logs.clear()
        again = results(train("--resume_from_checkpoint", f"checkpoint-{stop}"))
        assert stop <= min(step for step, _ in logs) <= stop + 1  # it was not the whole run once more
        assert again.keys() == whole.keys()
        assert [name for name in whole if not torch.equal(again[name], whole[name])] == []


def results(output_dir: Path) -> dict[str, torch.Tensor]:
    """The weights a run trained, and removes the files, so that none is taken for another's."""
    weights = {}
    for file in (LORA, UNET, TEXT_ENCODER):
        if (output_dir / file).exists():
            weights |= {f"{file} {name}": tensor for name, tensor in load_file(output_dir / file).items()}
            (output_dir / file).unlink()
    return weights


def test_a_finished_run_trains_no_more_and_says_so(train, tmp_path, logs, caplog):
    out = train(tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "3")
    finished = load_file(out / UNET)
    logs.clear()
    with caplog.at_level("INFO"):
        for wanted in ("latest", str(out / "checkpoint-3")):
            train(out, "--max_train_steps", "3", "--resume_from_checkpoint", wanted)
            assert f"{out / 'checkpoint-3'} has all 3 updates: nothing is left to train." in caplog.text
            caplog.clear()
    assert logs == []
    assert all(torch.equal(tensor, finished[name]) for name, tensor in load_file(out / UNET).items())


@pytest.mark.parametrize("given", [None, "3"])
def test_accumulation_of_the_environment(train, tmp_path, monkeypatch, logs, given):
    """accelerate follows its variable: so do the number of updates and the epochs, and a flag that contradicts it is refused."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    steps = ("--max_train_steps", "2", *(("--gradient_accumulation_steps", given) if given else ()))
    if given == "3":
        with pytest.raises(RunError, match="--gradient_accumulation_steps is 3, but .* is 2"):
            train(tmp_path, *steps)
        return
    train(tmp_path, *steps)
    assert max(step for step, _ in logs) == 2 and len(logs) == 4
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["gradient_accumulation_steps"] == 2


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_accumulation_of_the_environment_that_cannot_be(train, tmp_path, monkeypatch, steps):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
    with pytest.raises(RunError, match=f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS .* is {steps}: it must be at least 1"):
        train(tmp_path)


@pytest.mark.parametrize("workers", [("2", "0"), ("0", "2"), ("2", "1")], ids="-".join)
def test_a_run_goes_on_with_another_number_of_workers(train, tmp_path, workers):
    options = ("--rank", "1", "--no-cache_latents", "--checkpointing_steps", "1", "--dataloader_num_workers")
    train(tmp_path, *options, workers[0], "--max_train_steps", "1")
    train(tmp_path, *options, workers[1], "--max_train_steps", "3", "--resume_from_checkpoint", "checkpoint-1")
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_checkpoint_of_adapters_loads_at_full_strength(train, tmp_path):
    out = train(tmp_path, "--rank", "4", "--lora_alpha", "16", "--checkpointing_steps", "2")
    loads = []
    for folder in (out / "checkpoint-2", out):
        pipeline = StableDiffusionPipeline.from_pretrained(PARITY / "pipeline", safety_checker=None)
        pipeline.load_lora_weights(folder)
        pipeline.fuse_lora()
        loads.append(pipeline.unet.state_dict())
    pretrained = UNet2DConditionModel.from_pretrained(PARITY / "pipeline", subfolder="unet").state_dict()
    changed = [name for name in loads[0] if name.endswith("to_q.base_layer.weight")]
    assert changed
    for name in changed:
        assert torch.equal(loads[0][name], loads[1][name])
        assert not torch.equal(loads[0][name], pretrained[name.replace(".base_layer", "")])


# To and from the official scripts, whose checkpoints are ours without the states of the data set


@pytest.mark.parametrize("script", ["train", "train_sdxl"])
def test_a_checkpoint_of_the_official_script_resumes(script, request, tmp_path, logs):
    train = request.getfixturevalue(script)
    out = train(tmp_path, "--max_train_steps", "3", "--checkpointing_steps", "3")
    for ours in ("sampler_state.pt", "regularizer_state.json", "config.yaml"):
        (out / "checkpoint-3" / ours).unlink()
    logs.clear()
    train(out, "--max_train_steps", "4", "--resume_from_checkpoint", "checkpoint-3")
    assert [step for step, _ in logs] == [4]


def official_accelerator(*models, parameters):
    """What the official scripts prepare before they load a checkpoint: models, AdamW, loader, schedule."""
    optimizer = torch.optim.AdamW(parameters, lr=1.0)
    accelerator = Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(range(4), shuffle=True)
    accelerator.prepare(*models, optimizer, loader, get_scheduler("constant", optimizer))
    return accelerator, optimizer


def assert_loaded(optimizer, folder):
    saved = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    loaded = optimizer.state_dict()["state"]
    assert saved.keys() == loaded.keys() != set()
    for number, state in saved.items():
        assert state["step"] == 2
        torch.testing.assert_close(loaded[number], state, rtol=0, atol=0)


def test_the_official_sd_script_can_read_ours(train, tmp_path):
    folder = (
        train(tmp_path, "--checkpointing_steps", "2", "--train_text_encoder", "--keep_best", "--probe_steps", "1")
        / "checkpoint-2"
    )
    unet = UNet2DConditionModel.from_pretrained(PARITY / "pipeline", subfolder="unet")
    text_encoder = CLIPTextModel.from_pretrained(PARITY / "pipeline", subfolder="text_encoder")
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    accelerator, optimizer = official_accelerator(unet, text_encoder, parameters=parameters)

    def load_models(models, input_dir):
        """As its hook does: a model's class says in which folder it lies."""
        while models:
            model = models.pop()
            name = "unet" if isinstance(model, UNet2DConditionModel) else "text_encoder"
            model.load_state_dict(type(model).from_pretrained(input_dir, subfolder=name).state_dict())

    accelerator.register_load_state_pre_hook(load_models)
    accelerator.load_state(str(folder))
    unet.save_pretrained(tmp_path / "loaded")
    assert_equal_weights(tmp_path / "loaded" / Path(UNET).name, tmp_path / UNET)
    assert_loaded(optimizer, folder)


def test_the_official_sdxl_script_can_read_ours(train_sdxl, tmp_path):
    folder = train_sdxl(tmp_path, "--checkpointing_steps", "2", "--rank", "2") / "checkpoint-2"
    unet = UNet2DConditionModel.from_pretrained(PARITY / "pipeline_sdxl", subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    accelerator, optimizer = official_accelerator(unet, parameters=parameters)

    def load_models(models, input_dir):
        weights, _ = StableDiffusionXLPipeline.lora_state_dict(input_dir)
        weights = {name.removeprefix("unet."): tensor for name, tensor in weights.items() if name.startswith("unet.")}
        assert not set_peft_model_state_dict(models.pop(), convert_unet_state_dict_to_peft(weights)).unexpected_keys

    accelerator.register_load_state_pre_hook(load_models)
    accelerator.load_state(str(folder))
    ours = sorted(float(tensor.square().sum()) for tensor in load(tmp_path / LORA).values())
    theirs = sorted(float(tensor.square().sum()) for tensor in get_peft_model_state_dict(unet).values())
    assert theirs == ours
    assert_loaded(optimizer, folder)
