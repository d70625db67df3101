"""Evaluate a personalized testbed pipeline with `python -m diffusers_lipreg.evaluation`, offline.

    python tests/testbed/report.py sks-circle --output_dir sks-circle-report

No CLIP or DINO is at hand here, so the encoders are small ones with random weights, made on the spot: scores from them
mean nothing. Everything that needs no encoder (images, drift, same-noise change) is what it says.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTModel
from world import HERE, PHOTOS

from diffusers_lipreg.evaluation.__main__ import run

PIPELINE = HERE / "pipeline"
TEMPLATES = (
    "a photo of a {} on a green background",
    "a photo of a {} on a red background",
    "a photo of a {} on a white background",
    "a {} in front of a cyan wall",
    "a purple {}",
    "a red {}",
)
UNRELATED = (
    "a red star on a blue background",
    "a green square on a white background",
    "a yellow heart on a cyan background",
    "a blue triangle on a red background",
    "a purple ring on a green background",
    "a white moon on a purple background",
)


def make_encoders(folder: Path) -> tuple[Path, Path]:
    """A CLIP and a ViT of one layer, with random weights."""
    torch.manual_seed(0)
    clip, dino = folder / "random-clip", folder / "random-dino"
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 32, "patch_size": 8}
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**tower, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, **image}, projection_dim=16)).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(clip)
    ViTModel(ViTConfig(**tower, **image)).save_pretrained(dino)
    return clip, dino


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("personalized", help="A pipeline or adapters that learned a subject of the testbed.")
    parser.add_argument("--subject", default="sks circle")
    parser.add_argument("--photos", type=Path, default=PHOTOS / "smiley")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    clip, dino = make_encoders(args.output_dir)
    templates, unrelated = args.output_dir / "templates.txt", args.output_dir / "unrelated.txt"
    templates.write_text("\n".join(TEMPLATES))
    unrelated.write_text("\n".join(UNRELATED))
    given = {
        "base": PIPELINE,
        "personalized": args.personalized,
        "instance_data_dir": args.photos,
        "subject": args.subject,
        "class_noun": args.subject.split()[-1],
        "templates_file": templates,
        "probe_prompts": unrelated,
        "clip": clip,
        "dino": dino,
        "guidance_scale": 4,
        "batch_size": 16,
        "output_dir": args.output_dir,
    }
    run([word for name, value in given.items() for word in (f"--{name}", str(value))])


if __name__ == "__main__":
    main()
