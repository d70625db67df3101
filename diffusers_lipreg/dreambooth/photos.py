"""Find instance photos and their prompts in a folder, or in a data set, which may not name files other than its own."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

import datasets
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image

from ..errors import RunError, as_run_error, one_line
from . import captions
from .data import Photo
from .images import find_instance_images, open_image, report


def find_photos(args: Namespace) -> list[Photo]:
    """Return the photos of `--instance_data_dir` or `--dataset_name`, each with its caption or `--instance_prompt`.

    Each is decoded once here; one that cannot be read is left out with a warning.
    """
    if vars(args).get("dataset_name") is None:
        images = find_instance_images(args.instance_data_dir)
        prompts = captions.prompts_of_folder(args, images)
        return [Photo(partial(open_image, path), prompt, path) for path, prompt in zip(images, prompts, strict=True)]
    rows = Rows(args)
    texts, openers, broken, transparent = [], [], [], 0
    for index in range(len(rows.rows)):
        caption, source = rows.caption(index), rows.source(index)
        try:
            transparent += open_image(source, rows.name(index)).info["was_transparent"]
        except RunError as error:
            broken.append(str(error))
        else:
            texts.append(caption)
            openers.append(partial(rows.open, index))
    report(broken, transparent)
    if not openers:
        raise RunError(f"--dataset_name {args.dataset_name}: there is no image in it that can be read.")
    return [Photo(*pair) for pair in zip(openers, captions.prompts(args, texts), strict=True)]


class Rows:
    """The rows of the split train of `--dataset_name`, whose images may only lie in the data set's own files."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        rows, self.folders = load_rows(args)
        captions.check_column(args.image_column, rows.column_names, "--image_column")
        feature = rows.features[args.image_column]
        if not isinstance(feature, datasets.Image):
            raise RunError(f"--image_column {args.image_column}: it holds no images, but {feature}.")
        columns = [args.image_column]
        if args.caption_column is not None:
            captions.check_column(args.caption_column, rows.column_names, "--caption_column")
            columns.append(args.caption_column)
        self.rows = rows.select_columns(columns).cast_column(args.image_column, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        """Return what messages call a row."""
        return f"row {index} of {self.args.dataset_name}"

    def caption(self, index: int) -> str:
        """Return the caption of a row, "" if it has none."""
        column = self.args.caption_column
        return "" if column is None else captions.check_caption(self.rows[index][column], self.name(index))

    def source(self, index: int) -> Callable[[], str | BinaryIO]:
        """Return what opens the image of a row: its bytes, a file of the data set, or a member of a zip file."""
        image = self.rows[index][self.args.image_column] or {"bytes": b""}
        if image["bytes"] is not None:
            return partial(BytesIO, image["bytes"])
        path = image["path"] or ""
        zipped = re.fullmatch("zip://(.+?)::([^:]+)", path)
        file = zipped[2] if zipped else path
        if not lies_in(self.folders, file):
            raise RunError(f"{self.name(index)} names a file elsewhere, {path}: only its own files are read.")
        return (lambda: BytesIO(ZipFile(file).read(zipped[1]))) if zipped else (lambda: file)

    def open(self, index: int) -> Image.Image:
        """Read the image of a row as RGB."""
        return open_image(self.source(index), self.name(index))


def load_rows(args: Namespace) -> tuple[datasets.Dataset, list[Path]]:
    """Load the split train of `--dataset_name`; return the folders in which its files may lie, too."""
    flag = f"--dataset_name {args.dataset_name}"
    datasets.config.HF_DATASETS_TRUST_REMOTE_CODE = False  # datasets 3 would ask whether to run a script

    def describe(error: Exception) -> str:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        return f"{flag}: cannot be loaded ({one_line(reason or error)})."

    with as_run_error(describe):  # the Hub, the builders and the readers of all formats raise anything
        builder = datasets.load_dataset_builder(args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir)
        folders = own_folders(args, builder.base_path)
        for files in (builder.config.data_files or {}).values():
            check_files(flag, files, builder.base_path, folders)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    if "train" not in splits:
        raise RunError(f"{flag}: it has no split train, but {', '.join(splits)}.")
    return splits["train"], folders


def own_folders(args: Namespace, base: str) -> list[Path]:
    """Return where the files of a data set lie: in `base`, a folder or "hf://datasets/NAME@REVISION", or downloads."""
    downloads = Path(args.cache_dir, "downloads") if args.cache_dir else Path(datasets.config.DOWNLOADED_DATASETS_PATH)
    if base.startswith("hf://"):
        repository = base.removeprefix("hf://datasets/").partition("@")[0]
        own = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="dataset"))
    else:
        own = Path(base).resolve()
        if own.parent.name == "snapshots":  # the files of a downloaded snapshot are links to others two folders above
            own = own.parents[1]
    return [own.resolve(), downloads.resolve()]


def lies_in(folders: Sequence[Path], file: str) -> bool:
    """Tell whether a file is in one of the folders, after following links."""
    try:
        path = Path(file).resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a zero byte
        return False
    return any(path.is_relative_to(folder) for folder in folders)


def check_files(flag: str, files: Sequence[str], base: str, folders: Sequence[Path]) -> None:
    """Refuse a data set whose card names files that are not its own."""
    for file in files:
        own = file.startswith(base.partition("@")[0] + "@") if base.startswith("hf://") else lies_in(folders, file)
        if not own:
            raise RunError(f"{flag}: it names a file elsewhere, {file}: only its own files are read.")
