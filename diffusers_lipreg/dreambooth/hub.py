"""A repository on the Hub: made before training, filled with the result and its model card after."""

from __future__ import annotations

import glob
import json
import re
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from accelerate.logging import get_logger
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (  # the last is what all of the client's errors derive from
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
)
from PIL import Image

from ..errors import RunError, as_run_error, one_line
from .output import CONFIG, MANIFEST, OutputFolder

logger = get_logger(__name__)
T = TypeVar("T")
WAITS = (2.0, 10.0)  # seconds before the second and the third attempt, where the Hub names none
LONGEST_WAIT = 60.0
PATIENCE = 120.0  # seconds after which no further attempt is made


def with_retries(request: Callable[[], T]) -> T:
    """Make a request up to three times, where waiting may help. How long one takes is bounded by `hub_client`."""
    began = time.monotonic()
    for wait in WAITS:
        try:
            return request()
        except Exception as error:
            seconds = _seconds_to_wait(error, wait)
            if seconds is None or time.monotonic() - began > PATIENCE:
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
    """Make the repository, or find it, and ask whether the token may write to it; return its full name."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token)
    try:
        repo_id = with_retries(lambda: api.create_repo(name, exist_ok=True).repo_id)
        # Where the repository can be read, create_repo passes over a token that may not write.
        with_retries(lambda: api.auth_check(repo_id, write=True))
    except Exception as error:  # whatever answers at that address, and however
        raise RunError(
            f"--push_to_hub: cannot write to {name} on {api.endpoint} ({reason(error)}). Check --hub_token or "
            "`hf auth login`, --hub_model_id and the network, or leave --push_to_hub out and upload later."
        ) from error
    return repo_id


def reason(error: Exception) -> str:
    """Return what went wrong in one line, with the kind of error where its own words do not say what it is."""
    if isinstance(error, (HTTPError, OSError, RuntimeError)):
        return one_line(error)
    return f"not an answer of the Hub, {type(error).__name__}: {one_line(error)}"


def push_advice(output: OutputFolder, repo_id: str, stale: Iterable[str] = ()) -> str:
    """Say where the result is, and which command uploads it as `upload` does, with the repository's `stale` files removed."""
    patterns = [word for name in uploaded(output) for word in ("--include", glob.escape(name))]
    patterns += [word for name in stale for word in ("--delete", glob.escape(name))]
    command = shlex.join(["hf", "upload", repo_id, str(output.path), ".", *patterns])
    return f"The result is whole in {output.path}; push it with: {command}"


def uploaded(output: OutputFolder) -> list[str]:
    """Return the names of the files that make up the result, and of the manifest, which the next push compares with.

    config.yaml is not among them: it names folders and photos of this machine.
    """
    result = [name for name in output.owned("result") if name != CONFIG]
    return [MANIFEST, *(name for name in result if (output.path / name).is_file())]


def stale_files(api: HfApi, repo_id: str, output: OutputFolder) -> list[str]:
    """Return what an earlier push uploaded and this result lacks. Without a manifest there nothing is known of it."""
    try:
        manifest = json.loads(Path(api.hf_hub_download(repo_id, MANIFEST, force_download=True)).read_text("utf-8"))
    except EntryNotFoundError:
        return []
    return sorted(set(manifest["result"]) - set(output.owned("result")))


def upload(args: Namespace, output: OutputFolder, repo_id: str) -> None:
    """Upload the result. If that fails it stays on disk, and the message says how to upload it by hand."""
    api, stale = HfApi(token=args.hub_token), list[str]()
    try:
        stale = with_retries(lambda: stale_files(api, repo_id, output))
        with_retries(
            lambda: api.upload_folder(  # it sends no large file twice
                repo_id=repo_id,
                folder_path=output.path,
                commit_message="End of training",
                allow_patterns=[glob.escape(name) for name in uploaded(output)],
                delete_patterns=[glob.escape(name) for name in stale],
            )
        )
    except Exception as error:
        advice = push_advice(output, repo_id, stale)
        raise RunError(f"the upload to {repo_id} failed ({reason(error)}). {advice}") from error


def result_is_safe(output: OutputFolder, repo_id: str | None) -> AbstractContextManager[None]:
    """Turn whatever fails in the block into one line, which says that the result is whole and how to push it."""

    def describe(error: Exception) -> str:
        advice = f"The result is whole in {output.path}." if repo_id is None else push_advice(output, repo_id)
        return f"{one_line(error)}. {advice}"

    return as_run_error(describe)


def model_card(
    args: Namespace,
    repo_id: str,
    images: Sequence[Image.Image],
    *,
    license: str,
    tags: Sequence[str],
    penalty: Mapping[str, str],
    adapters: bool,
    commit: str | None = None,
) -> ModelCard:
    """The model card of a whole pipeline, or of adapters to its base; `penalty` is a table of names and values.

    `commit` is the base's, of a base on the Hub.
    """
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
    sections = [f"# DreamBooth - {repo_id}", _description(args, base_name, adapters, commit)]
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
    """Return code that draws. It names a type, for without one diffusers loads a base in float16 partly in float32."""
    variant = f", variant={args.variant!r}" if load and args.variant else ""
    return (
        "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        'device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)\n'
        f'pipe = DiffusionPipeline.from_pretrained("{source}"{variant}, dtype=dtype)\n{load}'
        f"image = pipe.to(device)({args.instance_prompt!r}).images[0]\n```"
    )


def _description(args: Namespace, base_name: str, adapters: bool, commit: str | None) -> str:
    base = base_name if commit is None else f"{base_name} (commit {commit[:12]})"
    what = f"This is {base} taught a subject"
    if adapters:
        what = f"These are LoRA adapters that teach {base} a subject"
    trained = "was trained, too" if args.train_text_encoder else "was not trained"
    text = f"{what}, by DreamBooth training. The text encoder {trained}."
    vae = vars(args).get("pretrained_vae_model_name_or_path")
    return text if vae is None else f"{text} The VAE in training was {vae}."


def publish(
    args: Namespace,
    output: OutputFolder,
    repo_id: str,
    images: Sequence[Image.Image],
    before_upload: Callable[[str], None],
    **card: Any,
) -> None:
    """Write the model card, of the arguments that `model_card` takes, with its images, and upload the result.

    `before_upload` is told how to upload it by hand.
    """
    for number, image in enumerate(images):
        output.write_result(f"image_{number}.png", image.save)
    output.write_result("README.md", model_card(args, repo_id, images, **card).save)
    before_upload(push_advice(output, repo_id))
    upload(args, output, repo_id)
