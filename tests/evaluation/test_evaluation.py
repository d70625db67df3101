"""Run the command from its arguments to its reports, on tiny pipelines with tiny encoders."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from huggingface_hub import HfApi
from support.runs import PARITY, execute, load_pipeline

from diffusers_lipreg.evaluation import __main__ as command
from diffusers_lipreg.evaluation import generation, prompts, report

PHOTOS = PARITY / "instance"
Evaluate = Callable[..., dict]


@pytest.fixture
def arguments(tmp_path: Path, clip: Path, dino: Path, full: Path) -> list[str]:
    """A short evaluation of the whole pipeline; later flags override earlier ones."""
    (tmp_path / "templates").write_text("a {} here\na red {}\n")
    (tmp_path / "probe").write_text("a tree\na house\n")
    return [
        *("--base", str(PARITY / "pipeline"), "--personalized", str(full)),
        *("--templates_file", str(tmp_path / "templates"), "--probe_prompts", str(tmp_path / "probe")),
        *("--clip", str(clip), "--dino", str(dino), "--output_dir", str(tmp_path / "out")),
        *("--images_per_prompt", "2", "--num_inference_steps", "1", "--batch_size", "32"),
    ]


ONE = ["--instance_data_dir", str(PHOTOS), "--subject", "sks dog", "--class_noun", "dog"]


@pytest.fixture
def evaluate(arguments, tmp_path, monkeypatch) -> Evaluate:
    def run(*more: str) -> dict:
        monkeypatch.setattr(generation, "CLASS_IMAGES", 2)
        command.run([*arguments, *more])
        return json.loads((tmp_path / "out" / "report.json").read_text())

    return run


@pytest.fixture
def refuse(arguments, monkeypatch, capsys) -> Callable[..., str]:
    """Return the one line that the command ends with."""

    def run(*more: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command.run([*arguments, *more])
        code = stopped.value.code
        (line,) = (code if isinstance(code, str) else capsys.readouterr().err).splitlines()
        assert code not in (0, None) and "error: " in line
        return line

    return run


class Page(HTMLParser):
    """Collect the addresses and tags of a page, and count the tags that stay open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: dict[str, int] = {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in ("img", "meta", "path", "rect", "circle"):
            self.open[tag] = self.open.get(tag, 0) + 1

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        self.open[tag] -= 1


def test_one_subject_from_command_to_page(evaluate, tmp_path, capsys):
    found = evaluate(*ONE, "--scheduler", "DDPMScheduler")
    subject = found["subjects"]["sks_dog"]
    assert set(subject["scores"]) == {"personalized", "base", "real"}
    images = {"DINO tiny-dino", "CLIP-I tiny-clip"}
    columns = {*images, "CLIP-T tiny-clip"}
    columns |= {f"{kind}, {column}" for kind in ("diversity", "class resemblance") for column in images}
    assert subject["scores"]["personalized"].keys() == subject["scores"]["base"].keys() == columns
    assert subject["scores"]["personalized"] != subject["scores"]["base"]
    assert subject["scores"]["real"].keys() == images
    assert set(subject["drift"]["parameters"]) == {"unet", "text_encoder"}
    assert subject["drift"]["output"]["output_drift_percent"] > 0
    assert subject["drift"]["path_kl"]["nats"] == 0  # the only step is the last one, which adds no noise
    assert subject["unrelated_change"]["pixels"]["mean"] > 0

    assert found["flags"]["scheduler"] == "DDPMScheduler" and found["flags"]["dtype"] == "fp32"

    printed = capsys.readouterr().out
    assert "photos among themselves" in printed and f"{subject['scores']['real']['DINO tiny-dino']:.3f}" in printed
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.addresses and all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|<link", text)
    assert set(page.open.values()) == {0}
    assert page.tags.count("figure") == 5 - 1  # weights of two parts, output drift, slopes; no path-KL above zero
    shown = 4 + 2 * (2 * 2 + 2 + 2 * 2)  # photos; base and personalized: two prompts, the class, two unrelated ones
    assert page.tags.count("img") == shown


def test_adapters_of_sdxl(evaluate, sdxl_lora):
    found = evaluate(*ONE, "--base", str(PARITY / "pipeline_sdxl"), "--personalized", str(sdxl_lora))
    (subject,) = found["subjects"].values()
    assert set(subject["drift"]["parameters"]) == {"unet"}
    assert subject["drift"]["output"]["output_drift"] > 0 and subject["unrelated_change"]["pixels"]["mean"] > 0
    assert all("lora" not in name for name in subject["drift"]["parameters"]["unet"]["by_tensor"])


def test_pipelines_from_the_hub(arguments, hub, lora, tmp_path):
    """Base and adapters named by repository: the scores of the same things in folders."""
    named = push(hub, base=PARITY / "pipeline", personalized=lora)
    command.run([*arguments, *ONE, *named, "--output_dir", str(tmp_path / "elsewhere")])
    command.run([*arguments, *ONE, "--personalized", str(lora)])
    assert_same_report(tmp_path)


@pytest.mark.slow
def test_everything_from_the_hub(arguments, hub, lora, clip, dino, tmp_path):
    """The encoders, too, in a new process."""
    named = push(hub, base=PARITY / "pipeline", personalized=lora, clip=clip, dino=dino)
    words = [*arguments, *ONE, *named, "--output_dir", str(tmp_path / "elsewhere")]
    ran = execute("-m", "diffusers_lipreg.evaluation", *words, env=hub.environment(tmp_path / "home"))
    assert ran.returncode == 0, ran.stderr
    command.run([*arguments, *ONE, "--personalized", str(lora)])
    assert_same_report(tmp_path)


def push(hub, **folders) -> list[str]:
    """Push each folder to a repository of its name, and return the flags that name the repositories."""
    api, named = HfApi(endpoint=hub.url, token="hf_alice"), []
    for name, folder in folders.items():
        repository = api.create_repo(f"alice/{folder.name}").repo_id
        api.upload_folder(repo_id=repository, folder_path=folder)
        named += [f"--{name}", repository]
    return named


def assert_same_report(tmp_path) -> None:
    from_hub, from_folders = (
        json.loads((tmp_path / name / "report.json").read_text().replace("alice/", ""))["subjects"]["sks_dog"]
        for name in ("elsewhere", "out")
    )
    assert from_hub == {**from_folders, "personalized": "lora"}


def test_a_run_that_was_interrupted_goes_on(evaluate, arguments, tmp_path, monkeypatch, capsys):
    """It prints the command, then generates the missing images alone, and reports the same numbers."""
    whole = evaluate(*ONE)
    images = tmp_path / "out" / "images"
    times = {path: path.stat().st_mtime_ns for path in images.rglob("*.png")}
    lost = sorted(times)[3:9]
    for path in lost:
        path.unlink()
    monkeypatch.setattr(generation, "CLASS_IMAGES", 2)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(
            DiffusionPipeline, "set_progress_bar_config", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        command.run([*arguments, *ONE])
    assert (
        stopped.value.code == 130
        and "to go on: python -m diffusers_lipreg.evaluation --base" in capsys.readouterr().err
    )
    again = evaluate(*ONE)
    assert {path for path in times if path.stat().st_mtime_ns != times[path]} == set(lost)
    before, after = whole["subjects"]["sks_dog"], again["subjects"]["sks_dog"]
    assert after["drift"] == before["drift"]
    for side, scores in before["scores"].items():  # of images that batched sums may have rounded otherwise
        assert after["scores"][side] == pytest.approx(scores, abs=1e-4)


def test_a_long_subject(evaluate, tmp_path):
    """No file name is too long."""
    evaluate(*ONE, "--subject", "x" * 300 + " dog", "--images_per_prompt", "1")
    (folder,) = (tmp_path / "out" / "images").glob("x*")
    assert len(list(folder.glob("*.png"))) == 2 + 2 + 2


def test_the_benchmark(evaluate, tmp_path, full, lora, capsys):
    """Two subjects, one with adapters; means are those of the subjects' numbers."""
    for name, personalized in (("dog", full), ("can", lora)):
        shutil.copytree(PHOTOS, tmp_path / "data" / name)
        (tmp_path / "models" / name).parent.mkdir(exist_ok=True)
        shutil.copytree(personalized, tmp_path / "models" / name)
    found = evaluate("--dataset", str(tmp_path / "data"), "--personalized", str(tmp_path / "models" / "{}"))
    assert [subject["text"] for subject in found["subjects"].values()] == ["sks can", "sks dog"]
    for side in ("personalized", "real"):
        values = [subject["scores"][side]["DINO tiny-dino"] for subject in found["subjects"].values()]
        mean = found["mean"][side]["DINO tiny-dino"]
        assert mean["mean"] == pytest.approx(sum(values) / 2) and mean["interval"] == pytest.approx(sorted(values))
    printed = capsys.readouterr().out
    assert re.search(r"SD1.5 DreamBooth +0.6028 → 0.6394 +0.2793 → 0.2976 +0.7881 → 0.7948", printed)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<td>SDXL DreamBooth-LoRA</td><td>0.6562 → 0.6819</td>" in page and page.count("<h2>sks dog</h2>") == 1


def test_the_benchmarks_prompts_and_subjects():
    assert [len(prompts.TEMPLATES[kind]) for kind in ("live", "object")] == [25, 25]
    assert len(prompts.CLASS_NOUNS) == 30
    assert sum(noun in prompts.LIVE_NOUNS for noun in prompts.CLASS_NOUNS.values()) == 9


@pytest.mark.parametrize(
    ("text", "noun", "kind", "prompt", "of_class"),
    [
        ("sks dog", "dog", "live", "a sks dog wearing a santa hat", "a dog wearing a santa hat"),
        (
            "sks toy",
            "toy",
            "object",
            "a sks toy with the Eiffel Tower in the background",
            "a toy with the Eiffel Tower in the background",
        ),
        (
            "sks stuffed animal",
            "stuffed animal",
            "object",
            "a sks stuffed animal in the jungle",
            "a stuffed animal in the jungle",
        ),
    ],
)
def test_the_prompts_of_a_subject(arguments, text, noun, kind, prompt, of_class):
    flags = [
        "--base",
        "b",
        "--personalized",
        "p",
        "--instance_data_dir",
        "photos",
        "--subject",
        text,
        "--class_noun",
        noun,
    ]
    (subject,) = prompts.find_subjects(command.parse_args(flags))
    assert subject.templates == prompts.TEMPLATES[kind]
    assert (prompt, of_class) in zip(subject.prompts, subject.texts, strict=True)


def test_the_papers_table_is_the_papers():
    gains = [(penalty[0] - plain[0], penalty[1] - plain[1]) for plain, penalty in report.PAPER.values()]
    assert max(dino for dino, _ in gains) == pytest.approx(0.0366) and max(text for _, text in gains) == pytest.approx(
        0.0183
    )


def test_what_the_user_gets_wrong_ends_in_one_line(refuse, tmp_path, clip):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data" / "my_cat").mkdir(parents=True)
    data = ["--dataset", str(tmp_path / "data")]
    assert "--class_noun missing" in refuse(*ONE[:-2])
    assert "--subject 'sks': it does not contain the class noun 'dog'" in refuse(*ONE, "--subject", "sks")
    assert "there is no image in it" in refuse(*ONE, "--instance_data_dir", str(tmp_path / "empty"))
    assert "there is no such folder" in refuse(*ONE, "--instance_data_dir", str(tmp_path / "none"))
    assert "--dino /none: no model of transformers can be read" in refuse(*ONE, "--dino", "/none")
    assert "expected a ViT" in refuse(*ONE, "--dino", str(clip))
    assert "it is a StableDiffusionXLPipeline, but --base" in refuse(
        *ONE, "--personalized", str(PARITY / "pipeline_sdxl")
    )
    assert "error: --base /" in refuse(*ONE, "--base", str(tmp_path / "empty"))
    assert "has no class noun for my_cat" in refuse(*data, "--personalized", "models/{}")
    assert "expected {} in it" in refuse(*data)
    for name in ("empty", "none"):
        flags = ["--dataset", str(tmp_path / name), "--personalized", "models/{}"]
        assert "expected a folder of photos for each subject, found none" in refuse(*flags)
    assert "--subject is for one subject" in refuse(*data, "--subject", "sks dog")
    for name in ("Nothing", "UNet2DConditionModel"):
        assert f"--scheduler {name}: it does not fit --base" in refuse(*ONE, "--scheduler", name)
    assert "--device nothing" in refuse(*ONE, "--device", "nothing")
    assert "--subject is empty" in refuse(*ONE, "--subject", "")
    for size in ("0", "12"):
        assert f"--resolution {size}: expected a multiple of 8" in refuse(*ONE, "--resolution", size)
    assert "--guidance_scale nan: expected a finite" in refuse(*ONE, "--guidance_scale", "nan")
    assert "--seed -1: expected 0 to" in refuse(*ONE, "--seed=-1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("[]")
    assert "report.json in it is not of an evaluation" in refuse(*ONE, "--output_dir", str(tmp_path / "mine"))
    text_to_image = load_pipeline()
    parts = {**text_to_image.components, "safety_checker": None, "requires_safety_checker": False}
    StableDiffusionImg2ImgPipeline(**parts).save_pretrained(tmp_path / "img2img")
    assert "expected a text-to-image" in refuse(*ONE, "--base", str(tmp_path / "img2img"))
    assert "cannot make" in refuse(*ONE, "--num_inference_steps", "2000", "--scheduler", "DDPMScheduler")
    shutil.copytree(PARITY / "pipeline", tmp_path / "quantized")
    (tmp_path / "quantized" / "vae" / "config.json").write_text('{"quantization_config": {"quant_method": "evil"}}')
    for flag in ("--base", "--personalized"):
        assert "sets quantization_config, by which code" in refuse(*ONE, flag, str(tmp_path / "quantized"))
    (tmp_path / "templates").write_text("a dog in the snow\n")
    assert "expected one {} for the subject in each line, got 'a dog in the snow'" in refuse(*ONE)
