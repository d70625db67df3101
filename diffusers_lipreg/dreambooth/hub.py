"""A repository on the Hub: made before training, filled with the result and its model card after."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError  # what huggingface_hub's own errors and those of its client derive from
from PIL import Image

from .arguments import RunError

# A failed transfer of a large file comes as RuntimeError, a bad name as ValueError, no network as the other two.
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)


def one_line(error: Exception) -> str:
    """An error's message without line breaks, request ids and advice behind the first sentence's worth."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def create_repository(args: Namespace) -> str:
    """Makes the repository, or finds it, and asks whether the token may write to it; returns its full name."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token)
    try:
        repo_id = api.create_repo(name, exist_ok=True).repo_id
        # Where the repository can be read, create_repo passes over a token that may not write.
        api.auth_check(repo_id, write=True)
    except HUB_ERRORS as error:
        raise RunError(
            f"--push_to_hub: cannot write to {name} on {api.endpoint} ({one_line(error)}). Check --hub_token or "
            "`hf auth login`, --hub_model_id and the network, or leave --push_to_hub out and upload later."
        ) from error
    return repo_id


def ignored_files(args: Namespace) -> list[str]:
    """What in the output folder is no result: checkpoints with their optimizer states, and logs."""
    return ["checkpoint-*", ".*", f"{Path(args.logging_dir)}/*"]


def upload(args: Namespace, repo_id: str) -> None:
    """Uploads the result; if that fails it stays on disk, and the message says how to upload it by hand."""
    ignored = ignored_files(args)
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, commit_message="End of training", ignore_patterns=ignored
        )
    except HUB_ERRORS as error:
        exclude = " ".join(f"--exclude '{pattern}'" for pattern in ignored)
        raise RunError(
            f"the upload to {repo_id} failed ({one_line(error)}). The result is whole in {args.output_dir}; push it "
            f"with: hf upload {repo_id} '{args.output_dir}' . {exclude}"
        ) from error


def model_card(
    args: Namespace, repo_id: str, penalty: Mapping[str, str], tags: Sequence[str], images: Sequence[Image.Image]
) -> ModelCard:
    """The model card, with `penalty` as a table of names and values."""
    base = args.pretrained_model_name_or_path
    on_hub = not Path(base).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None
    data = ModelCardData(
        license="creativeml-openrail-m",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        # The Hub refuses cards that name a base model it does not have, such as a local folder.
        base_model=base if on_hub else None,
        inference=True,
        instance_prompt=args.instance_prompt,
        tags=list(tags),
    )
    text_encoder = "was trained, too" if args.train_text_encoder else "was not trained"
    lines = [
        f"# DreamBooth - {repo_id}",
        "",
        f"This is {base if on_hub else Path(base).name} taught a subject by DreamBooth training: the photos' prompt was "
        f"`{args.instance_prompt}`. The text encoder {text_encoder}.",
        "",
    ]
    if penalty:
        lines += [
            "A penalty on the drift of the parameters from the pretrained ones kept what the model knew before "
            "([Preserve and Personalize](https://arxiv.org/abs/2505.19519); trained with diffusers-lipreg).",
            "",
            "| penalty | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in penalty.items()),
            "",
        ]
    if images:
        lines += [f"Images of `{args.validation_prompt}`:", ""]
        lines += [f"![image {number}](./image_{number}.png)" for number in range(len(images))]
        lines += [""]
    lines += [
        "```python",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{repo_id}")',
        f'image = pipe("{args.instance_prompt}").images[0]',
        "```",
        "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines))


def save_card(card: ModelCard, images: Sequence[Image.Image], output_dir: str) -> None:
    """Writes README.md and the images it shows into the output folder."""
    for number, image in enumerate(images):
        image.save(Path(output_dir, f"image_{number}.png"))
    card.save(Path(output_dir, "README.md"))
