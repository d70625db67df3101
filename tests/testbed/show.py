"""Draw the same prompts from the same noise with several pipelines, a row for each, in one picture.

python tests/testbed/show.py tests/testbed/pipeline sks-circle --prompts "a photo of a sks circle" --output out.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from judge import Sampling, grid, prepare, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="Folders of pipelines, the pretrained one first.")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=int, default=3, help="Pictures of each prompt.")
    args = parser.parse_args()
    prompts = [prompt for prompt in args.prompts for _ in range(args.images)]
    rows = []
    for model in args.models:
        pipeline = prepare(StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32))
        rows += sample(pipeline, prompts, Sampling(batch_size=len(prompts)))
    grid(torch.cat(rows), columns=len(prompts), enlarge=2).save(args.output)
    print(f"{args.output}: a row for each of {', '.join(args.models)}; {args.images} pictures of each prompt")


if __name__ == "__main__":
    main()
