"""What the user gets wrong ends in one line that says so, with nothing written; what can go on goes on."""

import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, ignore_patterns
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from huggingface_hub import HfApi, close_session, constants
from PIL import Image
from safetensors.torch import load_file, save_file
from support.loopback_hub import OTHER, PORTAL, STALL, LoopbackHub
from support.runs import PARITY, command, flags, forget_accelerate

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg import hub_client
from diffusers_lipreg.dreambooth import images, preflight, prior
from diffusers_lipreg.dreambooth.output import CONFIG, MANIFEST
from diffusers_lipreg.errors import RunError, run_cli

SCRIPTS = {"sd": train_dreambooth_lipreg, "sdxl": train_dreambooth_lora_lipreg_sdxl}
PIPELINES = {"sd": "pipeline", "sdxl": "pipeline_sdxl"}
SCRIPT = "train_dreambooth_lipreg.py"
UNET = "unet/diffusion_pytorch_model.safetensors"
PHOTO = PARITY / "instance" / "00.png"
Run = Callable[..., str]


def arguments(script: str, out: Path, more: list[str]) -> list[str]:
    """A short run of the script; a data set takes the place of the folder of photos."""
    words = flags(out, pipeline=PIPELINES[script])
    if "--dataset_name" in more:
        at = words.index("--instance_data_dir")
        del words[at : at + 2]
    return words + more


class Things:
    """What a case needs, made in a folder when the case asks for it by name, for the script that it is about."""

    def __init__(self, folder: Path, script: str) -> None:
        self.folder, self.script = folder, script

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            getattr(self, name)(path)
        return path

    def captions(self, path: Path) -> None:
        copytree(PARITY / "captions", path)

    def photos(self, path: Path) -> None:
        copytree(PARITY / "instance", path)

    def class_images(self, path: Path) -> None:
        copytree(PARITY / "class_images", path)

    def wide_class_images(self, path: Path) -> None:
        path.mkdir()
        Image.new("RGB", (96, 64)).save(path / "0.png")

    # folders of photos

    def missing(self, path: Path) -> None:
        pass

    def empty(self, path: Path) -> None:
        path.mkdir()

    def zero_bytes(self, path: Path) -> None:
        write(path / "photo.png", b"")

    def truncated(self, path: Path) -> None:
        write(path / "photo.png", PHOTO.read_bytes()[:3000])

    def text(self, path: Path) -> None:
        write(path / "photo.jpg", b"not a photo")

    def folder_named_jpg(self, path: Path) -> None:
        copytree(PARITY / "instance", path / "photo.jpg")

    def loop(self, path: Path) -> None:
        path.mkdir()
        Path(path, "photo.png").symlink_to("photo.png")

    def strip(self, path: Path) -> None:
        path.mkdir()
        Image.new("RGB", (20_000, 10)).save(path / "photo.png")

    def garbled_captions(self, path: Path) -> None:
        write(Path(copytree(PARITY / "instance", path), "metadata.jsonl"), b'{"file_name": ')

    def nameless_captions(self, path: Path) -> None:
        write(Path(copytree(PARITY / "instance", path), "metadata.jsonl"), b'{"text": "a dog"}')

    # pipelines

    def no_index(self, path: Path) -> None:
        self.pipeline(path, "model_index.json")

    def no_unet(self, path: Path) -> None:
        self.pipeline(path, "unet")

    def no_text_encoder(self, path: Path) -> None:
        self.pipeline(path, "text_encoder")

    def no_scheduler(self, path: Path) -> None:
        self.pipeline(path, "scheduler")

    def no_tokenizer(self, path: Path) -> None:
        self.pipeline(path, "tokenizer")

    def damaged_index(self, path: Path) -> None:
        write(self.pipeline(path) / "model_index.json", b'{"_class_name": "Stable')

    def unknown_class(self, path: Path) -> None:
        index = self.pipeline(path) / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"tokenizer": ["transformers", "NoTokenizer"]}))

    def damaged_config(self, path: Path) -> None:
        write(self.pipeline(path) / "unet" / "config.json", b"{")

    def other_shapes(self, path: Path) -> None:
        weights = load_file(self.pipeline(path) / UNET)
        weights["conv_in.weight"] = weights["conv_in.weight"][:, :2].contiguous()
        save_file(weights, path / UNET)

    def other_shapes_of_text(self, path: Path) -> None:
        file = self.pipeline(path) / "text_encoder" / "model.safetensors"
        save_file({name: tensor[:2].contiguous() for name, tensor in load_file(file).items()}, file)

    def weight_missing(self, path: Path) -> None:
        weights = load_file(self.pipeline(path) / UNET)
        del weights["conv_in.weight"]
        save_file(weights, path / UNET)

    def cut_weights(self, path: Path) -> None:
        write(self.pipeline(path) / UNET, (PARITY / "pipeline" / UNET).read_bytes()[:1000])

    def cut_weights_of_text(self, path: Path) -> None:
        write(self.pipeline(path) / "text_encoder" / "model.safetensors", b"cut off")

    def pickled(self, path: Path) -> None:
        file = self.pipeline(path) / UNET
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()

    def pickled_vae(self, path: Path) -> None:
        file = self.pipeline(path) / "vae" / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()

    def edits_images(self, path: Path) -> None:
        config = self.pipeline(path) / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 8}))

    def half_a_download(self, path: Path) -> None:
        index = self.pipeline(path) / "model_index.json"
        checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
        index.write_text(json.dumps(json.loads(index.read_text()) | {"safety_checker": checker}))
        write(path / "safety_checker" / "config.json", b"{}")

    def pickled_checker(self, path: Path) -> None:
        self.half_a_download(path)
        torch.save({}, path / "safety_checker" / "pytorch_model.bin")

    def only_a_variant(self, path: Path) -> None:
        file = self.pipeline(path) / UNET
        file.rename(file.with_suffix(".fp16.safetensors"))

    def single_file(self, path: Path) -> None:
        write(path, b"")

    def code_of_its_own(self, path: Path) -> None:
        index = self.pipeline(path) / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["evil", "Evil"]}))
        write(path / "unet" / "evil.py", b"raise SystemExit('it ran')")

    def nosy_tokenizer(self, path: Path) -> None:
        copytree(PARITY / "pipeline" / "tokenizer", path)
        config = path / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_file": str(PHOTO)}))

    def tokenizer_with_a_kernel(self, path: Path) -> None:
        copytree(PARITY / "pipeline" / "tokenizer", path)
        write(path / "config.json", b'{"attn_implementation": "evil/kernel"}')

    def predicts_samples(self, path: Path) -> None:
        config = self.pipeline(path) / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))

    def pipeline(self, path: Path, without: str = "") -> Path:
        return Path(copytree(PARITY / PIPELINES[self.script], path, ignore=ignore_patterns(without)))

    # output folders

    def a_file(self, path: Path) -> None:
        path.write_text("precious")

    def without_checkpoints(self, path: Path) -> None:
        (path / "checkpoint-best").mkdir(parents=True)

    def with_others(self, path: Path) -> None:
        (path / "checkpoint-4").mkdir(parents=True)

    def with_adapters(self, path: Path) -> None:
        write(path / "pytorch_lora_weights.safetensors", b"of another program")

    def with_notes_on_the_unet(self, path: Path) -> None:
        write(path / "unet" / "notes.txt", b"precious")

    def with_a_linked_unet(self, path: Path) -> None:
        path.mkdir()
        Path(path, "unet").symlink_to(self["photos"])

    def with_a_card(self, path: Path) -> None:
        write(path / "README.md", b"precious")

    def with_an_image(self, path: Path) -> None:
        write(path / "image_0.png", b"precious")

    def claims_other_files(self, path: Path) -> None:
        write(path / ".lipreg" / "manifest.json", b'{"result": ["../precious"]}')

    def with_a_broken_manifest(self, path: Path) -> None:
        write(path / ".lipreg" / "manifest.json", b'["README.md"]')

    def link_to_photos(self, path: Path) -> None:
        path.symlink_to(self["photos"])

    def foreign(self, path: Path) -> None:
        write(path / "checkpoint-4" / "pytorch_model.bin", b"of another program")


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class Mistake(NamedTuple):
    """Flags that end a run, with {things} in them; what the line says; and how early it is said."""

    code: int
    flags: str
    says: str
    scripts: str = "sd sdxl"
    loads: bool = False  # whether a model has to be loaded to see it


PRIOR = "--with_prior_preservation --class_prompt dog --class_data_dir"
VALIDATION = "--validation_prompt dog"
NO_IMAGE = "there is no image in it that can be read"
MODEL = "--pretrained_model_name_or_path"
RESUME = "--max_train_steps 9 --resume_from_checkpoint"
BF16 = "--lipreg_teacher_dtype bf16"
MISTAKES = [
    # photos
    Mistake(1, "--instance_data_dir {missing}", "--instance_data_dir {missing}: there is no such folder"),
    Mistake(1, "--instance_data_dir {a_file}", "--instance_data_dir {a_file}: there is no such folder"),
    Mistake(1, "--instance_data_dir {empty}", NO_IMAGE),
    Mistake(1, "--instance_data_dir {zero_bytes}", NO_IMAGE),
    Mistake(1, "--instance_data_dir {truncated}", NO_IMAGE),
    Mistake(1, "--instance_data_dir {text}", NO_IMAGE),
    Mistake(1, "--instance_data_dir {folder_named_jpg}", NO_IMAGE),
    Mistake(1, "--instance_data_dir {loop}", NO_IMAGE),
    Mistake(1, "--instance_data_dir {strip}", NO_IMAGE),
    Mistake(1, "--instance_data_dir 'photos\n\x1b[2J犬'", "--instance_data_dir photos\\n\\x1b[2J犬: there is no such"),
    Mistake(1, "--instance_data_dir {photos} --caption_column text", "metadata.jsonl", "sdxl"),
    Mistake(1, "--instance_data_dir {captions} --caption_column caption", "there are file_name, text", "sdxl"),
    Mistake(
        1, "--instance_data_dir {garbled_captions} --caption_column text", "a JSON object with a file_name", "sdxl"
    ),
    Mistake(
        1, "--instance_data_dir {nameless_captions} --caption_column text", "a JSON object with a file_name", "sdxl"
    ),
    Mistake(1, "--dataset_name {captions} --caption_column caption", "there are image, text", "sdxl"),
    Mistake(1, "--dataset_name {captions} --image_column photo", "there are image, text", "sdxl"),
    Mistake(1, "--dataset_name {captions} --image_column text", "it holds no images", "sdxl"),
    Mistake(1, "--dataset_name {empty}", "--dataset_name {empty}: cannot be loaded", "sdxl"),
    # prompts, and other texts
    Mistake(2, "--hub_token 'hf_secret\n'", "--hub_token holds a character that no token has"),
    Mistake(2, "--instance_prompt 'a \udcff dog'", "--instance_prompt is not valid UTF-8: a \\udcff dog"),
    # numbers and flags; those with choices, and what excludes what: tests/dreambooth/test_arguments.py has the whole list
    *(
        Mistake(2, f"--{name} {number}", f"--{name} must be at least 1, got {number}")
        for name in ("resolution", "train_batch_size", "max_train_steps", "gradient_accumulation_steps", "rank")
        for number in (0, -4)
    ),
    Mistake(2, "--learning_rate 0", "--learning_rate must be above 0"),
    Mistake(
        2,
        "--learning_rate=-1e-4",
        "--learning_rate must be a finite number, 0 or more, that float32 can hold, got -0.0001",
    ),
    Mistake(
        2, "--learning_rate nan", "--learning_rate must be a finite number, 0 or more, that float32 can hold, got nan"
    ),
    Mistake(
        2,
        "--learning_rate 1e39",
        "--learning_rate must be a finite number, 0 or more, that float32 can hold, got 1e+39",
    ),
    Mistake(
        2, "--lipreg_weight -1", "--lipreg_weight must be a finite number, 0 or more, that float32 can hold, got -1.0"
    ),
    Mistake(
        2, "--lipreg_weight inf", "--lipreg_weight must be a finite number, 0 or more, that float32 can hold, got inf"
    ),
    Mistake(2, "--lipreg_reduction mean", "--lipreg_reduction: invalid choice: 'mean'"),
    Mistake(2, "--lipreg_reduction product", "--lipreg_reduction product needs a --lipreg_weight", "sdxl"),
    Mistake(2, "--lipreg_reduction product --lipreg_weight 1", "product is not for full fine-tuning", "sd"),
    Mistake(2, "--rank 2 --lipreg_reduction sum --lipreg_weight 1", "sum is not for --rank", "sd"),
    Mistake(2, "--rank 2 --lipreg_teacher_device disk", "adapters need no teacher"),
    Mistake(2, "--lipreg_teacher_device disk --lipreg_teacher_dtype fp16", "which keeps the file's type", "sd"),
    Mistake(2, "--rank 2 --extract_lora_rank 2", "--extract_lora_rank is for full fine-tuning", "sd"),
    Mistake(2, "--lora_alpha 4", "--lora_alpha is about adapters: it needs --rank", "sd"),
    Mistake(2, "--use_dora", "--use_dora is about adapters: it needs --rank", "sd"),
    Mistake(2, "--repeats 0", "--repeats must be at least 1, got 0", "sdxl"),
    Mistake(2, "--dataset_name x --instance_data_dir y", "only one of --dataset_name and --instance_data_dir", "sdxl"),
    Mistake(2, "--do_edm_style_training --snr_gamma 5", "exclude each other", "sdxl"),
    Mistake(2, "--train_text_encoder --pre_compute_text_embeddings", "exclude each other", "sd"),
    Mistake(2, "--with_prior_preservation --class_prompt dog", "needs --class_data_dir"),
    Mistake(2, f"{PRIOR} {{class_images}} --num_class_images 0", "--num_class_images must be at least 1, got 0"),
    Mistake(2, f"{VALIDATION} --num_validation_images 0", "--num_validation_images must be at least 1, got 0"),
    Mistake(2, "--adam_beta1 1", "--adam_beta1 must be below 1, got 1.0"),
    Mistake(2, "--dataloader_num_workers -1", "--dataloader_num_workers must be 0 or more, got -1"),
    Mistake(2, "--seed -1", "--seed must be from 0 to 4294967295, got -1"),
    Mistake(2, "--seed 4294967296", "--seed must be from 0 to 4294967295, got 4294967296"),
    Mistake(1, "--lipreg_teacher_device attic", "--lipreg_teacher_device attic: ", "sd"),
    Mistake(1, f"--validation_images {{missing}} {VALIDATION}", "--validation_images {missing}: ", "sd"),
    Mistake(1, "--resolution 4", "--resolution 4: the VAE makes one latent of 8 x 8 pixels"),
    Mistake(1, "--cache_latents", "is no square, and cropped at random whenever it is seen. Add --center_crop", "sd"),
    Mistake(1, f"--cache_latents {PRIOR} {{wide_class_images}} --num_class_images 1", "Add --center_crop", "sdxl"),
    # paths
    Mistake(2, "--output_dir ''", "--output_dir is empty"),
    Mistake(2, "--instance_data_dir ''", "--instance_data_dir is empty"),
    Mistake(2, "--output_dir 'a\udcff'", "--output_dir is not valid UTF-8: a\\udcff"),
    Mistake(1, "--output_dir {a_file}", "--output_dir {a_file}: cannot be written to (Not a directory)"),
    Mistake(1, "--output_dir {a_file}/deeper/still", "--output_dir {a_file}/deeper/still: cannot be written to"),
    Mistake(1, f"--output_dir {'x' * 300}", "cannot be written to (File name too long)"),
    Mistake(1, "--logging_dir /dev/null", "--logging_dir"),
    Mistake(1, f"{PRIOR} {{a_file}}", "--class_data_dir {a_file}: cannot be written to (Not a directory)"),
    Mistake(1, f"{PRIOR} /dev/null/dogs", "--class_data_dir /dev/null/dogs: cannot be written to"),
    # folders that overlap
    Mistake(
        1,
        "--output_dir {photos} --instance_data_dir {photos}",
        "--output_dir {photos} is --instance_data_dir {photos}: ",
    ),
    Mistake(
        1,
        "--output_dir {photos}/new --instance_data_dir {photos}",
        "is inside of --instance_data_dir {photos}: name a",
    ),
    Mistake(1, "--output_dir {link_to_photos}/new --instance_data_dir {photos}", "is inside of --instance_data_dir"),
    Mistake(
        1, f"--output_dir {{pipeline}} {MODEL} {{pipeline}}", f"--output_dir {{pipeline}} is {MODEL} {{pipeline}}: "
    ),
    Mistake(1, f"--output_dir {{pipeline}} {MODEL} {{pipeline}} --extract_lora_rank 2", f"is {MODEL}", "sd"),
    Mistake(1, "--output_dir {captions} --dataset_name {captions}", "is --dataset_name {captions}: ", "sdxl"),
    Mistake(1, f"--output_dir {{class_images}} {PRIOR} {{class_images}}", "is --class_data_dir {class_images}: "),
    Mistake(1, f"--output_dir {{missing}}/new {PRIOR} {{missing}}", "is inside of --class_data_dir {missing}: "),
    Mistake(
        1, f"{PRIOR} {{photos}} --instance_data_dir {{photos}}", "--class_data_dir {photos} is --instance_data_dir"
    ),
    Mistake(1, f"{PRIOR} {{captions}}/new --dataset_name {{captions}}", "is inside of --dataset_name", "sdxl"),
    Mistake(1, "--logging_dir {photos} --instance_data_dir {photos}", "--logging_dir {photos} is --instance_data_dir"),
    # files of the user in the way of a result
    Mistake(1, "--output_dir {pipeline}", "model_index.json is needed for the result, but stands there", "sd"),
    Mistake(1, "--output_dir {with_adapters} --rank 2", "pytorch_lora_weights.safetensors is needed for the result"),
    Mistake(
        1, "--output_dir {with_adapters} --extract_lora_rank 2", "pytorch_lora_weights.safetensors is needed", "sd"
    ),
    Mistake(1, "--output_dir {with_notes_on_the_unet}", "unet/notes.txt is needed for the result", "sd"),
    Mistake(1, "--output_dir {with_a_linked_unet}", "unet is needed for the result", "sd"),
    Mistake(1, "--output_dir {with_a_card} --rank 2 --push_to_hub", "README.md is needed for the result"),
    Mistake(
        1,
        f"--output_dir {{with_an_image}} --rank 2 --push_to_hub {VALIDATION}",
        "image_0.png is needed for the result",
    ),
    Mistake(
        1,
        "--output_dir {claims_other_files}",
        "manifest.json: cannot be read ('../precious' is outside of the folder)",
    ),
    Mistake(1, "--output_dir {with_a_broken_manifest}", "manifest.json: cannot be read ("),
    # models
    Mistake(1, f"{MODEL} {{missing}}", f"{MODEL} {{missing}}: no such folder"),
    Mistake(1, f"{MODEL} {{no_index}}", "the folder holds no model_index.json"),
    Mistake(1, f"{MODEL} {{damaged_index}}", "model_index.json is not a valid JSON file"),
    Mistake(1, f"{MODEL} {{unknown_class}}", "its tokenizer is a NoTokenizer of transformers, which the installed"),
    Mistake(1, f"{MODEL} {PARITY / 'pipeline_sdxl'}", "use train_dreambooth_lora_lipreg_sdxl.py", "sd"),
    Mistake(1, f"{MODEL} {PARITY / 'pipeline'}", "use train_dreambooth_lipreg.py", "sdxl"),
    *(
        Mistake(1, f"{MODEL} {{no_{part}}}", f"its model_index.json names {part}, which the folder does not hold")
        for part in ("unet", "text_encoder", "scheduler", "tokenizer")
    ),
    Mistake(1, f"{MODEL} {{pickled}}", "unet has no safetensors, but diffusion_pytorch_model.bin, a pickle"),
    Mistake(1, f"{MODEL} {{pickled_vae}}", "vae has no safetensors, but diffusion_pytorch_model.bin, a pickle"),
    Mistake(1, f"{MODEL} {{damaged_config}}", "config.json is not a valid JSON file"),
    Mistake(1, f"{MODEL} {{other_shapes}}", "{other_shapes}: Cannot load because conv_in.weight expected", loads=True),
    Mistake(1, f"{MODEL} {{other_shapes_of_text}}", f"{MODEL} {{other_shapes_of_text}}: ", loads=True),
    Mistake(1, f"{MODEL} {{weight_missing}}", "unet lacks 1 weights, conv_in.weight first", loads=True),
    Mistake(1, f"{MODEL} {{cut_weights}}", "unet/diffusion_pytorch_model.safetensors is not there or not whole"),
    Mistake(1, f"{MODEL} {{cut_weights_of_text}}", "text_encoder/model.safetensors is not there or not whole"),
    Mistake(1, f"{MODEL} {{half_a_download}}", "safety_checker has no weights, model.safetensors", "sd"),
    Mistake(
        1, f"{MODEL} {{pickled_checker}}", "safety_checker has no safetensors, but pytorch_model.bin, a pickle", "sd"
    ),
    Mistake(1, f"{MODEL} {{edits_images}}", "whose UNet has in_channels 8, not 4. Start from a text-to-image model"),
    Mistake(1, f"{MODEL} {{only_a_variant}}", "only those of a variant: add --variant fp16"),
    Mistake(1, f"{MODEL} {{single_file}}", "{single_file} is one file, not a folder. Make one of it: python -c"),
    Mistake(1, f"{MODEL} {{code_of_its_own}}", "Code that comes with a model is not run"),
    Mistake(
        1,
        "--mixed_precision fp16",
        "mixed precision fp16 is for GPUs, and this run is on a CPU: add --mixed_precision no",
    ),
    Mistake(1, f"{MODEL} {{predicts_samples}}", "The scheduler predicts sample; supported: epsilon"),
    Mistake(1, "--variant fp16", "--variant fp16: no part has weight files of this variant"),
    Mistake(1, "--tokenizer_name {missing}", "--tokenizer_name {missing}", "sd", loads=True),
    Mistake(
        1, "--tokenizer_name {nosy_tokenizer}", "nosy_tokenizer/tokenizer_config.json names a file elsewhere", "sd"
    ),
    Mistake(1, "--tokenizer_name {tokenizer_with_a_kernel}", "config.json sets attn_implementation, by which", "sd"),
    Mistake(1, "--tokenizer_max_length 500", "--tokenizer_max_length 500: the text encoder takes", "sd"),
    Mistake(
        1,
        "--pretrained_vae_model_name_or_path {empty}",
        "_vae_model_name_or_path {empty}: empty has no config.json",
        "sdxl",
    ),
    Mistake(1, f"{BF16} --learning_rate 2e-6", "--lipreg_teacher_dtype bf16: ", "sd", loads=True),
    Mistake(
        1,
        f"{BF16} --learning_rate 2e-6",
        "more than 0.1 of an update's step at a learning rate of 2e-06",
        "sd",
        loads=True,
    ),
    # checkpoints
    Mistake(
        1, f"--output_dir {{with_others}} {RESUME} checkpoint-5", "there is no such checkpoint; {with_others} has ch"
    ),
    Mistake(1, f"--output_dir {{without_checkpoints}} {RESUME} checkpoint-best", "{without_checkpoints} has none"),
    Mistake(1, f"--output_dir {{foreign}} {RESUME} latest", "checkpoint-4 is not whole: "),
    # what is not installed
    *(
        Mistake(1, flag, f"{flag} needs {package}: pip install {package}", scripts)
        for package, flag, scripts in (
            ("bitsandbytes", "--use_8bit_adam", "sd sdxl"),
            ("xformers", "--enable_xformers_memory_efficient_attention", "sd sdxl"),
            ("prodigyopt", "--optimizer prodigy", "sdxl"),
        )
        if find_spec(package) is None
    ),
]
CASES = [(script, mistake) for mistake in MISTAKES for script in mistake.scripts.split()]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def stopped(fresh_accelerate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs a script in this process to the mistake that has to stop it: exit code and line, for it is one."""

    def stopped(script: str, words: list[str]) -> tuple[int, str]:
        forget_accelerate()
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{SCRIPTS[script].__name__}.py"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_cli(SCRIPTS[script].main, SCRIPTS[script].parse_args(words))
        code = end.value.code
        # Python prints an exit code that is a text, and exits with 1; argparse prints by itself and exits with 2.
        (line,) = (code if isinstance(code, str) else capsys.readouterr().err).splitlines()
        assert line.startswith(f"{SCRIPTS[script].__name__}.py: error: ")
        return (1, line) if isinstance(code, str) else (code, line)

    return stopped


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("a model was loaded first")

    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "Models", load)
    monkeypatch.setattr(prior, "sample_class_images", load)


@pytest.fixture
def run(stopped, out: Path) -> Run:
    """The line with which the SD script stops."""
    return lambda *more: stopped("sd", arguments("sd", out, list(more)))[1]


@pytest.fixture
def refuse(run: Run, nothing_loads: None) -> Run:
    """As `run`, and no model may be loaded before."""
    return run


def tree(folder: Path) -> dict[str, str | None]:
    """All that is in a folder, and the digests of its files."""
    return {str(path): digest(path.read_bytes()) if path.is_file() else None for path in folder.rglob("*")}


def digest(content: bytes) -> str:
    """Short, so that a test that fails can be read."""
    return hashlib.sha256(content).hexdigest()[:8]


@pytest.mark.parametrize(("script", "mistake"), CASES, ids=[f"{s} {m.flags[:60]!a}" for s, m in CASES])
def test_a_mistake_ends_in_one_line(request, stopped, tmp_path: Path, script: str, mistake: Mistake) -> None:
    if not mistake.loads:
        request.getfixturevalue("nothing_loads")
    things = Things(tmp_path, script)
    more = [word.format_map(things) for word in shlex.split(mistake.flags)]
    says = mistake.says.format_map(things)
    before = tree(tmp_path)
    code, line = stopped(script, arguments(script, tmp_path / "out", more))
    assert code == mistake.code
    assert says in line
    assert line.isprintable()
    assert "hf_secret" not in line
    assert tree(tmp_path) == before


def test_a_disk_that_is_too_small(run: Run, train, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each weight and its two moments take four bytes; without a checkpoint on the way, the weights are enough."""
    needed = 12 * sum(tensor.numel() for tensor in load_file(PARITY / "pipeline" / UNET).values())
    usage = shutil.disk_usage(out.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    line = run("--checkpointing_steps", "2")
    assert f"a checkpoint takes {needed:,} bytes, there are {needed - 1:,} free" in line
    assert not out.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed // 3))
    train(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    train(out, "--checkpointing_steps", "2")
    written = sum(file.stat().st_size for file in (out / "checkpoint-2").rglob("*"))
    assert written == pytest.approx(needed, rel=0.1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_would_lose_the_penalty_is_refused(stopped, nothing_loads, out, monkeypatch, script) -> None:
    """DeepSpeed updates inside backward, before the penalty's gradient is there."""
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    code, line = stopped(script, arguments(script, out, []))
    assert code == 1 and "configuration asks for DEEPSPEED: choose DDP" in line
    assert not out.exists()


FSDP = {"FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


@pytest.mark.parametrize(
    ("script", "flags", "environment", "message"),
    [
        ("sd", [], {"FSDP_VERSION": "1"}, "fsdp_version: 2."),
        ("sd", [], {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type: FULL_STATE_DICT."),
        ("sd", [], {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading: false."),
        ("sd", [], {"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params: false."),
        ("sd", [], {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
        ("sd", [], {"ACCELERATE_DYNAMO_BACKEND": "inductor"}, "dynamo_backend: no."),
        ("sd", ["--rank", "4"], {}, "not with adapters"),
        ("sd", ["--train_text_encoder"], {}, "not with --train_text_encoder"),
        ("sd", ["--lipreg_teacher_device", "cpu"], {}, "not with --lipreg_teacher_device"),
        ("sdxl", [], {}, "not with adapters"),
    ],
)
@pytest.mark.skipif(not hasattr(FullyShardedDataParallelPlugin, "fsdp_version"), reason="accelerate without FSDP2")
def test_what_is_not_made_for_shards_is_refused(
    stopped, nothing_loads, out, monkeypatch, script, flags, environment, message
) -> None:
    for name, value in (FSDP | environment).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    monkeypatch.setattr(AcceleratorState, "fsdp_plugin", plugin, raising=False)
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    code, line = stopped(script, arguments(script, out, flags))
    assert code == 1 and "FSDP" in line and message in line
    assert not out.exists()


def test_there_are_enough_cases() -> None:
    assert len({mistake.flags for mistake in MISTAKES}) >= 40
    assert len(CASES) >= 120


def test_debug_shows_where(run: Run, out: Path, tmp_path: Path) -> None:
    more = ["--instance_data_dir", str(tmp_path / "photos")]
    run(*more)
    with pytest.raises(RunError, match="there is no such folder"):
        run(*more, "--debug")


# What is odd but good


def odd_photos(folder: Path) -> Path:
    """Every kind of photo there is, and five that cannot be used."""
    things = Things(folder, "sd")
    for broken in ("zero_bytes", "truncated", "strip"):
        next(things[broken].iterdir()).rename(folder / f"{broken}.png")
    things["folder_named_jpg"].joinpath("photo.jpg").rename(folder / "folder.jpg")
    next(things["loop"].iterdir()).rename(folder / "loop.png")
    for mode in ("L", "RGBA", "P", "CMYK", "I;16"):
        Image.new(mode, (80, 64)).save(folder / f"{mode}.tif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 64)).save(folder / "turned.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    frames = [Image.new("P", (80, 64), color) for color in (0, 1)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_odd_photos_prompts_and_paths_go_on(script: str, request, tmp_path: Path, caplog) -> None:
    """Five photos are passed over, three of them with a warning, and a prompt that is too long is warned of."""
    train = request.getfixturevalue({"sd": "train", "sdxl": "train_sdxl"}[script])
    (tmp_path / "Bilder von 犬").mkdir()
    photos = odd_photos(tmp_path / "Bilder von 犬")
    names = ("../outside.png", "/outside.png", "dot.png")
    rows = [{"file_name": name, "text": "../../outside"} for name in names]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    captions = ("--caption_column", "text") if script == "sdxl" else ()
    before = tree(tmp_path)
    out = tmp_path / "ein neuer Ordner" / "犬 \n 2"
    train(out, "--instance_data_dir", str(photos), *captions, "--instance_prompt", f"👩‍🚀 犬 \u202e {script} " * 100)
    for name in ("zero_bytes.png", "truncated.png", "strip.png"):
        assert f"Skipped {photos / name}: not an image that can be read" in caplog.text
    assert "20000 x 10 pixels, one side more than 100 times the other" in caplog.text
    assert re.search(r"The text encoder reads \d+ tokens; this prompt has \d+ and is cut", caplog.text)
    assert len(images.list_images(photos)) == 8
    assert list(out.rglob("*.safetensors"))
    written = tree(tmp_path).keys() - before.keys()
    assert all(Path(path).is_relative_to(out) or path == str(out.parent) for path in written)


def test_sixteen_bits_a_pixel_are_not_cut_off(tmp_path: Path) -> None:
    gray = np.linspace(0, 2**16 - 1, 64).astype(np.uint16)
    Image.fromarray(np.tile(gray, (64, 1))).save(tmp_path / "photo.png")
    opened = np.asarray(images.open_image(tmp_path / "photo.png"))
    assert (opened == (gray[None, :, None] >> 8)).all()


def test_an_empty_prompt_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="--instance_prompt is empty"):
        train_dreambooth_lipreg.parse_args(flags("out", "--instance_prompt", ""))


# What may not be read or written, and what may not be run


@contextmanager
def nobodys_rights() -> Iterator[None]:
    """For what root may do and others may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("folder", ["locked", "locked/new"])
def test_an_output_folder_that_may_not_be_written_to(folder: str) -> None:
    with TemporaryDirectory() as parent:  # not below tmp_path, which others cannot reach
        os.chmod(parent, 0o755)
        Path(parent, "locked").mkdir(mode=0o555)
        output = Path(parent, folder)
        with nobodys_rights(), pytest.raises(RunError) as refused:
            preflight.check_folder(str(output), "--output_dir")
        assert str(refused.value) == f"--output_dir {output}: cannot be written to (Permission denied)."
        assert list(Path(parent, "locked").iterdir()) == []


@pytest.mark.usefixtures("fresh_accelerate")
def test_photos_that_may_not_be_read(caplog: pytest.LogCaptureFixture) -> None:
    Accelerator(cpu=True)  # which logs need
    with TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        photo = Path(copytree(PARITY / "instance", Path(parent, "photos")), "00.png")
        photo.chmod(0)
        with nobodys_rights():
            assert len(images.find_instance_images(photo.parent)) == 3
        assert f"Skipped {photo}: not an image that can be read (PermissionError" in caplog.text
        photo.parent.chmod(0)
        with nobodys_rights(), pytest.raises(RunError, match=r"cannot be read \(Permission denied\)"):
            images.find_instance_images(photo.parent)


class Malicious:
    """Pickled, it makes a file wherever it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.mark.parametrize(
    "more",
    [("--rank", "1"), pytest.param(("--train_text_encoder", "--drift_budget", "0.01"), marks=pytest.mark.slow)],
    ids=["adapters", "whole"],
)
def test_a_checkpoint_runs_no_code(
    run: Run, train: Callable[..., Path], out: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """None of its files, with the list of their sizes and without; nor one that accelerate would look for."""
    checkpoint = train(out, *more, "--checkpointing_steps", "1", "--max_train_steps", "1") / "checkpoint-1"
    torch.save(Malicious(tmp_path / "malicious"), tmp_path / "archive")
    pickled, archive = pickle.dumps(Malicious(tmp_path / "malicious")), (tmp_path / "archive").read_bytes()
    # config.json is not read (test_checkpoints.py), and config.yaml is no pickle (test_run_config.py).
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name[:7] != "config."]
    resume = (*more, "--max_train_steps", "2", "--resume_from_checkpoint", "checkpoint-1")

    def attack(file: Path, content: bytes) -> str:
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        line = run(*resume)
        file.unlink() if before is None else file.write_bytes(before)
        return line

    assert f"checkpoint-1 is not whole: {files[0].name} missing or cut off" in attack(files[0], pickled)
    (checkpoint / "config.yaml").unlink()  # as the official script leaves it
    for file in [*files, checkpoint / "custom_checkpoint_0.pkl"]:
        assert "checkpoint-1 is not whole" in attack(file, pickled), file
        if file.suffix in (".bin", ".pkl", ".pt"):  # which torch.load reads
            assert "checkpoint-1 is not whole" in attack(file, archive), file
    assert not (tmp_path / "malicious").exists()


@pytest.mark.parametrize("more", [("--rank", "3"), ("--train_text_encoder",)])
def test_a_checkpoint_of_other_flags(run: Run, train: Callable[..., Path], out: Path, more: tuple[str, ...]) -> None:
    train(out, "--rank", "2", "--checkpointing_steps", "2")
    before = tree(out)
    line = run("--rank", "2", *more, "--max_train_steps", "4", "--resume_from_checkpoint", "latest")
    assert f"{out / 'checkpoint-2'} does not fit: {more[0]} was" in line
    holder = out / ".lipreg" / "holder"  # who had the lock
    assert tree(out) == before | {str(holder): digest(holder.read_bytes())}


# The Hub

TOKEN, READER = "hf_alice", "hf_reader"
PUSH = ["--push_to_hub", "--hub_model_id", "alice/dog", "--hub_token"]


@pytest.mark.parametrize("offline", [False, True])
def test_a_model_that_the_hub_does_not_have(
    refuse: Run, out: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    close_session()
    line = refuse("--pretrained_model_name_or_path", "nobody/nothing")
    assert "--pretrained_model_name_or_path nobody/nothing: no such folder, and not on the Hub" in line
    assert bool(hub.requests) is not offline
    assert not out.exists()


@pytest.mark.parametrize(
    ("token", "fail", "reason"),
    [
        ("hf_unknown", {}, "401"),
        (READER, {}, "403"),
        (TOKEN, {"create": 401}, "401"),
        (TOKEN, {"create": 403}, "403"),
        (TOKEN, {"create": 500}, "500"),
        (TOKEN, {"auth_check": 403}, "403"),
    ],
)
def test_a_hub_that_refuses_at_the_start(
    refuse: Run, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, token: str, fail: dict[str, int], reason: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail = fail
    line = refuse(*PUSH, token)
    assert f"--push_to_hub: cannot write to alice/dog on {hub.url}" in line
    assert reason in line
    assert "--hub_token" in line
    assert token not in line


def test_a_reader_finds_out_at_the_start_though_the_repository_is_there(refuse: Run, hub: LoopbackHub) -> None:
    HfApi(endpoint=hub.url, token=TOKEN).create_repo("alice/dog")
    line = refuse(*PUSH, READER)
    assert "--push_to_hub: cannot write to alice/dog" in line
    assert "403" in line


def test_a_hub_that_is_not_there(refuse: Run, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.stop()
    line = refuse(*PUSH, TOKEN)
    assert f"--push_to_hub: cannot write to alice/dog on {hub.url}" in line
    assert "Connection refused" in line


@pytest.mark.parametrize("answer", [STALL, PORTAL, OTHER])
@pytest.mark.parametrize("model", ["alice/model", str(PARITY / "pipeline")], ids=["download", "upload"])
def test_a_hub_that_does_not_answer_as_one(
    refuse: Run, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, model: str, answer: int
) -> None:
    """Nothing waits for ever, neither for the model nor for the repository."""
    monkeypatch.setattr(hub_client, "ANSWER", 0.2)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail = dict.fromkeys(["create", "info", "tree", "resolve"], answer)
    began = time.monotonic()
    line = refuse("--pretrained_model_name_or_path", model, *PUSH, TOKEN)
    assert ("--pretrained_model_name_or_path alice/model: " if "alice" in model else "--push_to_hub: ") in line
    assert time.monotonic() - began < 20


def test_a_download_that_stalls_in_the_middle(run: Run, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index comes, and then nothing more does."""
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("alice/model")
    api.upload_folder(repo_id="alice/model", folder_path=PARITY / "pipeline")
    monkeypatch.setattr(hub_client, "ANSWER", 0.2)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail = {"resolve": [0] * 6 + [STALL] * 99}
    assert "--pretrained_model_name_or_path alice/model: " in run("--pretrained_model_name_or_path", "alice/model")


def test_a_name_that_no_repository_can_have(refuse: Run, hub: LoopbackHub) -> None:
    line = refuse("--push_to_hub", "--hub_model_id", "alice/my dog")
    assert "--push_to_hub: cannot write to alice/my dog" in line
    assert "--hub_model_id" in line
    assert not hub.requests


def test_a_refused_commit_loses_nothing(train: Run, hub: LoopbackHub, tmp_path: Path, out: Path) -> None:
    """As a user sees it, in a process of its own."""
    hub.fail = {"commit": 403}
    environment = hub.environment(tmp_path / "home")
    done = command(out, *PUSH, TOKEN, "--checkpointing_steps", "2", env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert line.startswith(f"{SCRIPT}: error: the upload to alice/dog failed (403 Forbidden")
    assert hub.files("alice/dog") == {}

    # Nothing else is lost, and the token is nowhere.
    plain = train(tmp_path / "plain", "--checkpointing_steps", "2")
    kept = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert kept.keys() >= {Path("README.md"), Path("checkpoint-2", "optimizer.bin")}
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert kept[weights] == Path(plain, weights).read_bytes()
    assert TOKEN not in done.stderr + done.stdout
    assert [path for path, content in kept.items() if TOKEN.encode() in content] == []

    # The command in the message finishes the job.
    hub.fail = {}
    push = shlex.split(line.partition(" push it with: ")[2])
    assert push[:2] == ["hf", "upload"]
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment |= {"HF_TOKEN": TOKEN, "PATH": binaries}
    subprocess.run(push, env=environment, check=True, capture_output=True)
    others = ("checkpoint-2", "logs", ".lipreg", CONFIG)  # the last names folders of this machine
    expected = {path.as_posix(): content for path, content in kept.items() if path.parts[0] not in others}
    expected[MANIFEST] = (out / MANIFEST).read_bytes()
    pushed = hub.files("alice/dog")
    assert {path: digest(content) for path, content in pushed.items()} == {
        path: digest(content) for path, content in expected.items()
    }


def test_the_command_in_the_message_survives_any_folder_name(run: Run, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.fail = {"commit": 403}
    folder = tmp_path / "alice's dog"
    command = run(*PUSH, TOKEN, "--output_dir", str(folder)).partition(" push it with: ")[2]
    assert shlex.split(command)[3] == str(folder)


def test_a_cached_model_trains_offline(
    train: Run, hub: LoopbackHub, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("alice/model")
    first = api.upload_folder(repo_id="alice/model", folder_path=PARITY / "pipeline").oid
    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(PARITY / "pipeline" / UNET).items()}
    save_file(weights, tmp_path / "others.safetensors")
    api.upload_file(repo_id="alice/model", path_in_repo=UNET, path_or_fileobj=tmp_path / "others.safetensors")
    more = ("--revision", first, "--lipreg_teacher_device", "disk")  # straight from the cache
    train(out, "--pretrained_model_name_or_path", "alice/model", *more)  # which fills the cache
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    hub.requests.clear()
    train(out, "--pretrained_model_name_or_path", "alice/model", *more)
    assert not hub.requests


# In the middle of a run


def test_a_loss_that_is_not_a_number_stops_the_run(run: Run, out: Path) -> None:
    line = run("--learning_rate", "1e30", "--max_train_steps", "5")
    assert "the loss is nan in the step after update 1, at a learning rate of 1e+30" in line
    assert "Start anew --learning_rate 1e+29." in line
    assert not (out / "unet").exists()


@pytest.mark.parametrize("gradient", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_a_number_stops_the_run(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch, gradient: float
) -> None:
    """In the third update, before the weights change: the last checkpoint with other weights is named."""
    backward, calls = Accelerator.backward, []

    def lost(self: Accelerator, loss: torch.Tensor) -> None:
        calls.append(loss)
        backward(self, loss * (gradient if len(calls) == 3 else 1))

    monkeypatch.setattr(Accelerator, "backward", lost)
    line = run("--max_train_steps", "5", "--checkpointing_steps", "1")
    assert re.search(r"the gradient is (nan|inf) in the step after update 2", line)
    assert "Start --resume_from_checkpoint checkpoint-1 --learning_rate 5e-05." in line
    assert len(calls) == 3 and not (out / "unet").exists()
