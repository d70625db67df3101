"""The SDXL script from end to end, and what it shares with the SD script's adapters (parity: test_parity.py)."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from support.runs import PARITY, ROOT, assert_equal_weights, draw, execute, flags

from diffusers_lipreg.outputs import OutputSnapshot

BASE = PARITY / "pipeline_sdxl"
LORA = "pytorch_lora_weights.safetensors"
KOHYA = "pytorch_lora_weights_kohya.safetensors"
BESIDE = {"README.md", "image_0.png", ".lipreg/manifest.json"}
OFF = ("--lipreg_weight", "0")


def merged_drift(folder: Path, model: str = "") -> float:
    """||merged - base||^2 of saved adapters, of one model or of all, in float64, from their products."""
    weights, total = load_file(folder / LORA), 0.0
    for name, down in weights.items():
        if name.startswith(model and f"{model}.") and name.endswith("down.weight"):
            up = weights[name.replace("down.weight", "up.weight")]
            total += (up.double() @ down.double()).square().sum().item()
    return total


def test_the_plain_command_is_the_papers_configuration(train_sdxl, tmp_path, logs):
    train_sdxl(tmp_path, "--max_train_steps", "3")
    first = logs[0][1]
    assert first.keys() == {"loss", "lr", "loss_drift", "drift", "drift_relative"}
    assert first["drift"] > 0  # `factors` is not zero at zero drift: A starts at random
    assert first["drift_relative"] == 0
    assert first["loss_drift"] == pytest.approx(1e-6 * first["drift"])


def test_a_huge_weight_holds_the_merged_weights(train_sdxl, tmp_path):
    more = ("--max_train_steps", "20", "--adam_weight_decay", "0", "--train_text_encoder", "--text_encoder_lr", "5e-4")
    free = train_sdxl(tmp_path / "free", *OFF, *more)
    held = train_sdxl(tmp_path / "held", "--lipreg_weight", "1e6", "--lipreg_reduction", "product", *more)
    for model in ("unet", "text_encoder", "text_encoder_2"):
        assert merged_drift(held, model=model) ** 0.5 < 0.05 * merged_drift(free, model=model) ** 0.5


def test_the_logged_drift_is_that_of_the_merged_weights(train_sdxl, tmp_path, logs):
    product = ("--lipreg_weight", "1e-3", "--lipreg_reduction", "product", "--checkpointing_steps", "3")
    out = train_sdxl(tmp_path, "--max_train_steps", "4", *product)
    assert logs[3][1]["drift"] == pytest.approx(merged_drift(out / "checkpoint-3"), rel=1e-5)


def test_adapters_and_their_optimizer_stay_in_float32(train_sdxl, tmp_path):
    out = train_sdxl(tmp_path, "--mixed_precision", "bf16", "--checkpointing_steps", "2", "--train_text_encoder")
    assert {tensor.dtype for tensor in load_file(out / LORA).values()} == {torch.float32}
    moments = torch.load(out / "checkpoint-2" / "optimizer.bin", weights_only=True)["state"].values()
    assert {state["exp_avg"].dtype for state in moments} == {torch.float32}


def test_the_checkpoint_limit_keeps_the_newest(train_sdxl, tmp_path):
    out = train_sdxl(
        tmp_path, "--max_train_steps", "4", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"
    )
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-4"]


def test_captions_of_a_folder_are_those_of_a_data_set(train_sdxl, tmp_path, monkeypatch):
    """A metadata.jsonl beside the photos means the same to --instance_data_dir as to --dataset_name."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    captions = str(shutil.copytree(PARITY / "captions", tmp_path / "captions"))
    as_folder = train_sdxl(tmp_path / "folder", "--instance_data_dir", captions, "--caption_column", "text")
    as_data_set = train_sdxl(tmp_path / "set", "--dataset_name", captions, "--caption_column", "text")
    plain = train_sdxl(tmp_path / "plain", "--instance_data_dir", captions)
    assert_equal_weights(as_folder / LORA, as_data_set / LORA)
    with pytest.raises(AssertionError):
        assert_equal_weights(as_folder / LORA, plain / LORA)


def test_prior_preservation_with_larger_batches_and_min_snr(train_sdxl, tmp_path, logs):
    train_sdxl(
        tmp_path, "--with_prior_preservation", "--class_data_dir", str(PARITY / "class_images"), "--class_prompt",
        "a photo of dog", "--num_class_images", "3", "--train_batch_size", "2", "--snr_gamma", "5",
    )  # fmt: skip
    assert all(values["loss"] > 0 for _, values in logs)


def test_validation_along_the_way_and_at_the_end_changes_no_weight(train_sdxl, tmp_path):
    plain = train_sdxl(tmp_path / "plain")
    more = ("--validation_prompt", "a dog", "--num_validation_images", "1", "--validation_epochs", "1")
    assert_equal_weights(plain / LORA, train_sdxl(tmp_path / "validated", *more) / LORA)


def test_an_edm_scheduler_and_min_snr_exclude_each_other(train_sdxl, tmp_path):
    model = shutil.copytree(BASE, tmp_path / "model")
    shutil.copytree(PARITY / "pipeline_sdxl_edm", model, dirs_exist_ok=True)
    with pytest.raises(Exception, match="--snr_gamma has no meaning"):
        train_sdxl(tmp_path / "out", "--pretrained_model_name_or_path", str(model), "--snr_gamma", "5")


@pytest.mark.parametrize(
    "more", [("--train_text_encoder",), pytest.param(("--use_dora",), marks=pytest.mark.slow)], ids=["te", "dora"]
)
def test_trained_pushed_and_loaded_elsewhere(more, train_sdxl, hub, tmp_path):
    push = ("--push_to_hub", "--hub_token", "hf_alice", "--max_train_steps", "2", "--learning_rate", "1e-2",
            "--checkpointing_steps", "2", "--validation_prompt", "a sks dog", "--num_validation_images", "1", *more)  # fmt: skip
    out = train_sdxl(tmp_path / "sks-duck", *push, "--output_kohya_format")
    files = hub.files("alice/sks-duck")
    assert files.keys() == {LORA, KOHYA, *BESIDE}
    assert not [path for path in out.rglob("*") if path.is_file() and b"hf_alice" in path.read_bytes()]
    kohya = shutil.copy(out / KOHYA, tmp_path)
    card = files["README.md"].decode()
    kind = "dora" if "--use_dora" in more else "lora"
    for line in ("- lipschitz-drift", f"- {kind}", "| lipreg_reduction | factors |", "| lipreg_weight | 1e-06 |",
                 'pipe.load_lora_weights("alice/sks-duck")', "url: image_0.png"):  # fmt: skip
        assert line in card

    train_sdxl(out, *push)
    assert hub.files("alice/sks-duck")["README.md"].decode() == card
    assert hub.files("alice/sks-duck").keys() == {LORA, *BESIDE}  # nothing stale

    loaded = draw(BASE, "alice/sks-duck")  # from the Hub, by way of an empty cache
    assert loaded == draw(BASE, out)
    if "--use_dora" not in more:  # diffusers reads kohya's LoRA, and leaves out its DoRA with a warning
        assert loaded == draw(BASE, Path(kohya).parent, KOHYA)
    assert loaded != draw(BASE)


def test_names_are_those_that_other_tools_read(train_sdxl, tmp_path):
    out = train_sdxl(tmp_path, "--train_text_encoder", "--use_dora", "--output_kohya_format")
    names = set(load_file(out / LORA))
    attention = "text_model.encoder.layers.0.self_attn.q_proj"
    for encoder in ("text_encoder", "text_encoder_2"):
        assert f"{encoder}.{attention}.lora_linear_layer.down.weight" in names
    kohya = load_file(out / KOHYA)
    for ending in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale"):
        assert f"lora_te1_{attention.replace('.', '_')}.{ending}" in kohya
        assert f"lora_te2_{attention.replace('.', '_')}.{ending}" in kohya
        assert any(name.startswith("lora_unet_down_blocks_") and name.endswith(ending) for name in kohya)
    assert all(name.count(".") <= 2 for name in kohya)
    scale = kohya[f"lora_te1_{attention.replace('.', '_')}.dora_scale"]
    assert scale.shape == (len(kohya[f"lora_te1_{attention.replace('.', '_')}.lora_up.weight"]), 1)


def test_dora_of_text_encoders_is_loaded_whole(train_sdxl, tmp_path):
    out = train_sdxl(tmp_path, "--use_dora", "--train_text_encoder", "--text_encoder_lr", "1e-1")
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE)
    pipe.load_lora_weights(out)
    saved = {name: tensor for name, tensor in load_file(out / LORA).items() if "magnitude" in name}
    for encoder in ("text_encoder", "text_encoder_2"):
        loaded = {
            name.replace("text_model.", ""): tensor
            for name, tensor in getattr(pipe, encoder).state_dict().items()
            if "magnitude" in name
        }
        assert loaded
        for name, tensor in loaded.items():
            module = name.split(".lora_magnitude_vector")[0]
            own = f"{encoder}.text_model.{module}.lora_magnitude_vector.weight"
            torch.testing.assert_close(tensor, saved[own], rtol=0, atol=0)


def test_the_base_is_not_needed_to_read_the_adapters(train_sdxl, tmp_path):
    """`load_lora_weights` on the base gives what training had: the merged change is that of the file."""
    out = train_sdxl(tmp_path, "--max_train_steps", "4", "--learning_rate", "1e-2")
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE)
    base = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(out)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = pipe.unet.state_dict()
    change = sum((fused[name] - base[name]).double().square().sum().item() for name in base)
    assert change == pytest.approx(merged_drift(out), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--train_text_encoder",),
        ("--dataset_name", str(PARITY / "captions"), "--caption_column", "text"),
        ("--train_text_encoder", "--dataset_name", str(PARITY / "captions"), "--caption_column", "text"),
        ("--do_edm_style_training",),
        ("--pretrained_model_name_or_path", "{playground}"),
    ],
    ids=["plain", "text encoder", "captions", "text encoder, captions", "EDM", "Playground"],
)
def test_through_accelerate_launch_with_checkpoints(more, tmp_path):
    playground = shutil.copytree(BASE, tmp_path / "playground")
    shutil.copytree(PARITY / "pipeline_sdxl_edm", playground, dirs_exist_ok=True)
    arguments = [
        *flags(
            tmp_path / "out", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2", pipeline="pipeline_sdxl"
        ),
        *(word.format(playground=playground) for word in more),
    ]
    if "--dataset_name" in more:
        at = arguments.index("--instance_data_dir")
        del arguments[at : at + 2]
    script = ("-m", "accelerate.commands.launch", str(ROOT / "train_dreambooth_lora_lipreg_sdxl.py"), *arguments)
    for steps, kept in (("3", ["checkpoint-2", "checkpoint-3"]), ("5", ["checkpoint-4", "checkpoint-5"])):
        ran = execute(
            *script, "--max_train_steps", steps, "--resume_from_checkpoint", "latest", env={"HF_HOME": str(tmp_path)}
        )
        assert ran.returncode == 0, ran.stderr
        assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint*")) == kept
    te = "--train_text_encoder" in more
    names = {name.split(".")[0] for name in load_file(tmp_path / "out" / LORA)}
    assert names == ({"unet", "text_encoder", "text_encoder_2"} if te else {"unet"})
    pipe = StableDiffusionXLPipeline.from_pretrained(BASE)
    pipe.load_lora_weights(tmp_path / "out")


def test_photos_smaller_than_the_resolution_are_enlarged(train_sdxl, tmp_path, logs):
    train_sdxl(tmp_path, "--resolution", "136", "--max_train_steps", "1")
    assert len(logs) == 1


# --- output drift -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--do_edm_style_training",), marks=pytest.mark.slow)], ids=["", "edm"]
)
def test_a_drift_budget_is_kept(more, train_sdxl, tmp_path, logs):
    """The flag that the other script has, with the same value; the result on disk, loaded anew, is within it."""
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n")
    out = train_sdxl(
        tmp_path / "out", "--drift_budget", "1e-3", "--probe_prompts", str(tmp_path / "prompts.txt"),
        "--max_train_steps", "4", "--learning_rate", "1e-2", "--keep_best", *more,
    )  # fmt: skip
    seen = {step: values for step, values in logs}
    assert seen[1]["lipreg_weight"] == 0 < seen[4]["lipreg_weight"]
    base = StableDiffusionXLPipeline.from_pretrained(PARITY / "pipeline_sdxl")
    recorded = OutputSnapshot.for_measuring(base, base.unet, ["a dog", "a cat"])
    base.load_lora_weights(out)
    assert 0 < recorded.measure(base).output_drift_relative <= 1.001e-3
