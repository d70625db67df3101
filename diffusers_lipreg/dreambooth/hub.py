"""A repository on the Hub: made before training, filled with the result and its model card after."""

from __future__ import annotations

import re
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate.logging import get_logger
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (  # the second is what all of the client's errors derive from
    HfHubHTTPError,
    HTTPError,
)
from PIL import Image

from ..errors import RunError, one_line

logger = get_logger(__name__)
T = TypeVar("T")
ADAPTERS = "pytorch_lora_weights*.safetensors"
# A failed transfer of a large file comes as RuntimeError, a bad name as ValueError, no network as the other two.
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
WAITS = (2.0, 10.0)  # seconds before the second and the third attempt, where the Hub names none
LONGEST_WAIT = 60.0


def patiently(request: Callable[[], T]) -> T:
    """Makes a request up to three times, where waiting may help."""
    for wait in WAITS:
        try:
            return request()
        except HUB_ERRORS as error:
            seconds = _seconds_to_wait(error, wait)
            if seconds is None:
                raise
            logger.warning(f"The Hub does not answer as it should ({one_line(error)}): trying again in {seconds:g} s.")
            time.sleep(seconds)
    return request()


def _seconds_to_wait(error: BaseException, wait: float) -> float | None:
    """`wait`, or what the Hub says, if it is busy (409, 429), fails (5xx) or the connection broke; else `None`."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # which file it was about
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        return wait if isinstance(error, (HTTPError, ConnectionError)) else None
    if error.response.status_code not in (409, 429) and error.response.status_code < 500:
        return None
    named = error.response.headers.get("Retry-After", "")
    return min(float(named), LONGEST_WAIT) if named.isdecimal() else wait


def create_repository(args: Namespace) -> str:
    """Makes the repository, or finds it, and asks whether the token may write to it; returns its full name."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token)
    try:
        repo_id = patiently(lambda: api.create_repo(name, exist_ok=True).repo_id)
        # Where the repository can be read, create_repo passes over a token that may not write.
        patiently(lambda: api.auth_check(repo_id, write=True))
    except HUB_ERRORS as error:
        raise RunError(
            f"--push_to_hub: cannot write to {name} on {api.endpoint} ({one_line(error)}). Check --hub_token or "
            "`hf auth login`, --hub_model_id and the network, or leave --push_to_hub out and upload later."
        ) from error
    return repo_id


def ignored_files(args: Namespace) -> list[str]:
    """What in the output folder is no result: checkpoints with their optimizer states, and logs."""
    output = Path(args.output_dir).resolve()
    logs = Path(output, args.logging_dir).resolve()
    inside = [f"{logs.relative_to(output)}/*"] if logs.is_relative_to(output) else []
    return ["checkpoint-*", ".*", "*.tfevents.*", "*hparams.yml", *inside]


def upload(args: Namespace, repo_id: str) -> None:
    """Uploads the result; if that fails it stays on disk, and the message says how to upload it by hand."""
    ignored = ignored_files(args)
    try:
        patiently(
            lambda: HfApi(token=args.hub_token).upload_folder(  # it sends no large file twice
                repo_id=repo_id,
                folder_path=args.output_dir,
                commit_message="End of training",
                ignore_patterns=list(ignored),  # one of its own: the client adds to it
                delete_patterns=["image_[0-9]*.png", ADAPTERS],  # what an earlier push left and this result has not
            )
        )
    except HUB_ERRORS as error:
        excluded = [word for pattern in ignored for word in ("--exclude", pattern)]
        raise RunError(
            f"the upload to {repo_id} failed ({one_line(error)}). The result is whole in {args.output_dir}; push it "
            f"with: {shlex.join(['hf', 'upload', repo_id, args.output_dir, '.', *excluded])}"
        ) from error


def model_card(
    args: Namespace,
    repo_id: str,
    images: Sequence[Image.Image],
    *,
    license: str,
    tags: Sequence[str],
    penalty: Mapping[str, str],
    adapters: bool,
) -> ModelCard:
    """The model card of a whole pipeline, or of adapters to its base; `penalty` is a table of names and values."""
    base = args.pretrained_model_name_or_path
    on_hub = not Path(base).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None
    base_name = base if on_hub else Path(base).resolve().name
    prompt = args.validation_prompt or args.instance_prompt
    widget = [{"text": prompt, "output": {"url": f"image_{number}.png"}} for number in range(len(images))]
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        # The Hub refuses cards that name a base model it does not have, such as a local folder.
        base_model=base if on_hub else None,
        inference=True,
        instance_prompt=args.instance_prompt,
        widget=widget or None,
        tags=list(tags),
    )
    sections = [f"# DreamBooth - {repo_id}", _description(args, base_name, adapters)]
    if penalty:
        rows = "\n".join(f"| {name} | {value} |" for name, value in penalty.items())
        sections.append(
            "A penalty on the drift from the pretrained weights was part of the loss "
            "([Preserve and Personalize](https://arxiv.org/abs/2505.19519); trained with diffusers-lipreg).\n\n"
            f"| penalty | |\n|---|---|\n{rows}"
        )
    if images:
        shown = "\n".join(f"![image {number}](./image_{number}.png)" for number in range(len(images)))
        sections.append(f"Images of `{prompt}`:\n\n{shown}")
    sections.append(f"## Trigger words\n\nUse `{args.instance_prompt}` in a prompt to call for the subject.")
    load = f'pipe.load_lora_weights("{repo_id}")\n'
    codes = [_code(args, base_name, load) if adapters else _code(args, repo_id)]
    if vars(args).get("extract_lora_rank") is not None:
        codes += ["Or its extracted adapters alone, on the base:", _code(args, base_name, load)]
    sections.append("\n\n".join(["## Use", *codes]))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _code(args: Namespace, source: str, load: str = "") -> str:
    return (
        "```python\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{source}")\n{load}'
        f"image = pipe({args.instance_prompt!r}).images[0]\n```"
    )


def _description(args: Namespace, base_name: str, adapters: bool) -> str:
    what = f"This is {base_name} taught a subject"
    if adapters:
        what = f"These are LoRA adapters that teach {base_name} a subject"
    trained = "was trained, too" if args.train_text_encoder else "was not trained"
    text = f"{what}, by DreamBooth training. The text encoder {trained}."
    vae = vars(args).get("pretrained_vae_model_name_or_path")
    return text if vae is None else f"{text} The VAE in training was {vae}."


def save_card(card: ModelCard, images: Sequence[Image.Image], output_dir: str) -> None:
    """Writes README.md and the images it shows into the output folder."""
    for number, image in enumerate(images):
        image.save(Path(output_dir, f"image_{number}.png"))
    card.save(Path(output_dir, "README.md"))


def clear_stale(output_dir: str) -> None:
    """Takes the adapters that an earlier run with other flags left out of the output folder."""
    for path in Path(output_dir).glob(ADAPTERS):
        path.unlink()


def publish(args: Namespace, repo_id: str, images: Sequence[Image.Image], **card: Any) -> None:
    """Writes the model card, of the arguments that `model_card` takes, and uploads the result."""
    save_card(model_card(args, repo_id, images, **card), images, args.output_dir)
    upload(args, repo_id)
