"""Captions: a .txt beside a photo, a metadata.jsonl, a data set's column; what has none, and what is for no photo, is said."""

import json
import os
import unicodedata
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image
from support.runs import PARITY, said

import train_dreambooth_lipreg
import train_dreambooth_lora_lipreg_sdxl
from diffusers_lipreg.dreambooth import captions
from diffusers_lipreg.errors import RunError

PROMPT = "a photo of sks dog"
COLORS = ("red", "green", "blue", "white")


@pytest.fixture
def folder(tmp_path: Path, fresh_accelerate) -> Path:
    """Four square photos, each of one color and with its name."""
    Accelerator(cpu=True)  # which logs need
    (tmp_path / "photos").mkdir()
    for color in COLORS:
        Image.new("RGB", (64, 64), color).save(tmp_path / "photos" / f"{color}.png")
    return tmp_path / "photos"


def prompts(folder: Path, column: str | None = None) -> list[str]:
    args = Namespace(instance_data_dir=str(folder), caption_column=column, instance_prompt=PROMPT)
    return captions.prompts_of_folder(args, sorted(folder.glob("*.png")))


def write_rows(folder: Path, *rows: object) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8-sig")


# What belongs to which photo


def test_a_text_beside_a_photo_is_its_caption(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (folder / "red.txt").write_text("\ufeff a red dog,\nsitting \n", encoding="utf-8")  # as Windows' editors write it
    (folder / "green.TXT").write_text("ein grüner Hund", encoding="utf-8")
    (folder / "blue.txt").write_text(" \n")
    assert prompts(folder) == [PROMPT, "ein grüner Hund", "a red dog, sitting", PROMPT]
    assert said(caplog) == ["2 of 4 photos have a caption; the others use --instance_prompt."]


def test_without_captions_nothing_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert prompts(folder) == [PROMPT] * 4
    assert caplog.messages == []


def test_rows_are_matched_by_path_whatever_its_spelling(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    name = "hündchen.png"
    (folder / "white.png").rename(folder / unicodedata.normalize("NFD", name))
    names = ("./red.png", ".\\blue.png", unicodedata.normalize("NFC", name), "x/../green.png")
    write_rows(folder, *({"file_name": name, "text": f"row {number}"} for number, name in enumerate(names)))
    assert prompts(folder, "text") == ["row 1", "row 3", "row 2", "row 0"]  # blue, green, hündchen, red
    assert said(caplog) == ["4 of 4 photos have a caption."]


def test_what_does_not_match_is_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (folder / "green.txt").write_text("from its file")
    names = ("red.png", "Blue.png", "../red.png", "red.png", "white.jpg")
    write_rows(
        folder, *({"file_name": name, "text": "a row"} for name in names), {"file_name": "green.png", "text": None}
    )
    assert prompts(folder, "text") == [PROMPT, "from its file", "a row", PROMPT]
    assert said(caplog) == [
        "4 rows of metadata.jsonl are for no photo, or for one that has a row already: Blue.png, ../red.png, red.png and 1 more.",
        "2 of 4 photos have a caption; the others use --instance_prompt.",
    ]


def test_a_metadata_file_that_is_not_asked_for_is_not_read_in_silence(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(folder, {"file_name": "red.png", "text": "a row"})
    assert prompts(folder) == [PROMPT] * 4
    assert said(caplog) == [
        f"{folder / 'metadata.jsonl'} is not read: --caption_column has to name the field that holds the captions."
    ]


# What cannot be used


@pytest.mark.parametrize("script", ["train", "train_sdxl"])
@pytest.mark.parametrize("caption", [["a", "dog"], 7, {"a": "dog"}, "half \ud83d an emoji"])
def test_a_caption_that_is_no_text_is_named_by_file_and_row(folder: Path, tmp_path, script, caption, request) -> None:
    train = request.getfixturevalue(script)
    write_rows(folder, {"file_name": "red.png", "text": "a dog"}, {"file_name": "blue.png", "text": caption})
    with pytest.raises(RunError, match=r"metadata.jsonl, line 2: the caption is no text, but [\['{7]"):
        train(tmp_path / "out", "--instance_data_dir", str(folder), "--caption_column", "text")


def test_the_same_in_a_data_set(folder: Path, tmp_path: Path, train_sdxl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    write_rows(folder, *({"file_name": f"{color}.png", "text": ["a", color]} for color in COLORS))
    with pytest.raises(RunError, match=f"^row 0 of {folder}: the caption is no text, but .'a', '(red|blue)'.\\.$"):
        train_sdxl(tmp_path / "out", "--dataset_name", str(folder), "--caption_column", "text")


@pytest.mark.parametrize("content", [b"caf\xe9", "ein Hund".encode("utf-16"), "ein Hund".encode("utf-16-le")])
def test_a_text_in_another_encoding_is_named(folder: Path, content: bytes) -> None:
    (folder / "red.txt").write_bytes(content)
    with pytest.raises(RunError, match=f"^{folder / 'red.txt'}: cannot be read as a text in UTF-8"):
        prompts(folder)


def test_what_has_the_name_of_a_caption_but_is_no_file_is_not_read(folder: Path) -> None:
    (folder / "red.txt").mkdir()
    os.mkfifo(folder / "blue.txt")  # reading it would wait for ever
    assert set(prompts(folder)) == {PROMPT}


@pytest.mark.parametrize("line", ['{"file_name": ', "[]", "7", '{"file_name": 7}', "[" * 100_000], ids=range(5))
def test_a_row_of_another_shape_is_named(folder: Path, line: str) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a\u2028dog"}\n\n' + line)
    with pytest.raises(RunError, match="metadata.jsonl, line 3: expected a JSON object with a file_name"):
        prompts(folder, "text")


# What training makes of them


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """For each loss of a run: the prompts of the batch, its pixels, and the text states that the UNet was given."""
    batches: list[tuple[list[str], torch.Tensor, torch.Tensor]] = []
    for script in (train_dreambooth_lipreg, train_dreambooth_lora_lipreg_sdxl):
        watch(script, batches, monkeypatch)
    return batches


def watch(script, batches: list, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = script.denoising_loss

    def denoising_loss(args, models, batch, embed_prompts):
        def recorded(prompts):
            embeds = embed_prompts(prompts)
            batches.append(
                (prompts, batch["pixel_values"], embeds if script is train_dreambooth_lipreg else embeds[0])
            )
            return embeds

        return loss(args, models, batch, recorded)

    monkeypatch.setattr(script, "denoising_loss", denoising_loss)


@pytest.mark.parametrize(
    ("script", "more"),
    [
        pytest.param("train", (), marks=pytest.mark.slow),
        ("train", ("--train_text_encoder",)),
        ("train", ("--pre_compute_text_embeddings",)),
        pytest.param("train_sdxl", (), marks=pytest.mark.slow),
        ("train_sdxl", ("--train_text_encoder", "--text_encoder_lr", "1e-12")),
    ],
)
def test_each_photo_is_trained_with_its_own_caption(script, more, folder: Path, tmp_path: Path, request, seen) -> None:
    """In batches of three and one, beside class images, which keep the class prompt."""
    for color in COLORS[:3]:
        (folder / f"{color}.txt").write_text(f"a {color} dog")
    prior = ("--with_prior_preservation", "--class_data_dir", str(PARITY / "class_images"), "--class_prompt", "a dog")
    request.getfixturevalue(script)(
        tmp_path / "out", "--instance_data_dir", str(folder), "--train_batch_size", "3", "--no-cache_latents",
        *prior, "--num_class_images", "3", "--max_train_steps", "2", "--learning_rate", "1e-12", *more,
    )  # fmt: skip
    of_color = {
        (255, 0, 0): "a red dog",
        (0, 128, 0): "a green dog",
        (0, 0, 255): "a blue dog",
        (255, 255, 255): PROMPT,
    }
    of_photos = [prompt for prompts, _, _ in seen for prompt in prompts[: len(prompts) // 2]]
    assert sorted(of_photos) == sorted(of_color.values())
    model = PARITY / ("pipeline" if script == "train" else "pipeline_sdxl")
    pipeline = DiffusionPipeline.from_pretrained(model, safety_checker=None)
    for prompts, pixels, states in seen:
        photos = len(prompts) // 2
        assert len(pixels) == len(prompts) and prompts[photos:] == ["a dog"] * photos
        colors = ((pixels[:photos, :, 0, 0] / 2 + 0.5) * 255).round().int().tolist()
        assert [of_color[tuple(color)] for color in colors] == prompts[:photos]
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        torch.testing.assert_close(states, pipeline.encode_prompt(prompts, **options)[0], rtol=1e-4, atol=1e-5)
