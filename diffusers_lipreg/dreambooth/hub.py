"""Create a repository on the Hub before training, and upload the result with its model card after it."""

from __future__ import annotations

import glob
import json
import re
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from accelerate.logging import get_logger
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError  # HTTPError is the base of all
from PIL import Image

from ..errors import as_run_error, one_line
from .output import CONFIG, MANIFEST, OutputFolder

logger = get_logger(__name__)
T = TypeVar("T")
WAITS = (2.0, 10.0)  # seconds before the second and the third attempt, unless the Hub names a time
PATIENCE = 120.0  # seconds after which no further attempt is made


def with_retries(request: Callable[[], T]) -> T:
    """Make a request up to three times if waiting may help. `hub_client` bounds how long each one takes."""
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
    """Return the Hub's Retry-After, which `hub_client` bounds, or else `wait`; `None` if waiting does not help."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client wraps errors of a file
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        return wait if isinstance(error, (HTTPError, ConnectionError)) else None
    status = error.response.status_code
    if status not in (409, 429) and status < 500:
        return None
    retry_after = error.response.headers.get("Retry-After", "")
    return float(retry_after) if retry_after.isdecimal() else wait


def create_repository(args: Namespace) -> str:
    """Create or find the repository, and return its full name."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token)
    with as_run_error(  # whatever answers at that address may cause any exception
        lambda error: (
            f"--push_to_hub: cannot write to {name} on {api.endpoint} ({_reason(error)}). Check --hub_token or "
            "`hf auth login`, --hub_model_id and the network, or leave --push_to_hub out and upload later."
        )
    ):
        repo_id = with_retries(lambda: api.create_repo(name, exist_ok=True).repo_id)
        # create_repo accepts a token that may read but not write.
        with_retries(lambda: api.auth_check(repo_id, write=True))
    return repo_id


def _reason(error: Exception) -> str:
    """Return an error in one line, with its type if its message does not explain itself."""
    if isinstance(error, (HTTPError, OSError, RuntimeError)):
        return one_line(error)
    return f"not an answer of the Hub, {type(error).__name__}: {one_line(error)}"


def uploaded_files(output: OutputFolder) -> list[str]:
    """Return the names of the result's files and of the manifest, with which the next push compares."""
    result = [name for name in output.owned() if name != CONFIG]  # it names folders and photos of this machine
    return [MANIFEST, *(name for name in result if (output.path / name).is_file())]


def stale_files(api: HfApi, repo_id: str, output: OutputFolder) -> list[str]:
    """Return the files of an earlier push that this result lacks; none if the repository has no manifest."""
    try:
        manifest = json.loads(Path(api.hf_hub_download(repo_id, MANIFEST, force_download=True)).read_text("utf-8"))
    except EntryNotFoundError:
        return []
    return sorted(set(manifest["result"]) - set(output.owned()))


def upload(args: Namespace, output: OutputFolder, repo_id: str) -> None:
    """Upload the result and delete the repository's stale files."""
    api, stale = HfApi(token=args.hub_token), list[str]()
    with as_run_error(
        lambda error: f"the upload to {repo_id} failed ({_reason(error)}). {push_advice(output, repo_id, stale)}"
    ):
        stale += with_retries(lambda: stale_files(api, repo_id, output))
        with_retries(
            lambda: api.upload_folder(  # it sends no large file twice
                repo_id=repo_id,
                folder_path=output.path,
                commit_message="End of training",
                allow_patterns=[glob.escape(name) for name in uploaded_files(output)],
                delete_patterns=[glob.escape(name) for name in stale],
            )
        )


def push_advice(output: OutputFolder, repo_id: str | None, stale: Iterable[str] = ()) -> str:
    """Say where the result is, and which command does what `upload` does, if there is a repository."""
    if repo_id is None:
        return f"The result is whole in {output.path}."
    patterns = [word for name in uploaded_files(output) for word in ("--include", glob.escape(name))]
    patterns += [word for name in stale for word in ("--delete", glob.escape(name))]
    command = shlex.join(["hf", "upload", repo_id, str(output.path), ".", *patterns])
    return f"The result is whole in {output.path}; push it with: {command}"


def model_card(
    args: Namespace,
    repo_id: str,
    images: Sequence[Image.Image],
    *,
    license: str,
    tags: Sequence[str],
    penalty: Mapping[str, str],
    commit: str | None = None,
) -> ModelCard:
    """Return the model card of the result; `penalty` is a table, `commit` that of a base on the Hub."""
    base = args.pretrained_model_name_or_path
    on_hub = not Path(base).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None
    base_name = base if on_hub else Path(base).resolve().name
    vae = vars(args).get("pretrained_vae_model_name_or_path")
    prompt = args.validation_prompt or args.instance_prompt
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=base if on_hub else None,  # the Hub refuses the name of a local folder
        inference=True,
        instance_prompt=args.instance_prompt,
        widget=[{"text": prompt, "output": {"url": f"image_{i}.png"}} for i in range(len(images))] or None,
        tags=list(tags),
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.jinja")),
        args=args,
        repo_id=repo_id,
        base=base_name,
        vae=vae and (Path(vae).resolve().name if Path(vae).exists() else vae),  # a path is private
        commit="" if commit is None else f" (commit {commit[:12]})",
        penalty=penalty,
        number_of_images=len(images),
        image_prompt=prompt,
        quoted_prompt=repr(args.instance_prompt),
    )
