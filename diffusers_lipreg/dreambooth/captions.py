"""Read captions of photos: a .txt beside each, the rows of a metadata.jsonl, or a column of a data set."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

from accelerate.logging import get_logger

from ..errors import RunError, as_run_error, one_line, printable

logger = get_logger(__name__)
METADATA = "metadata.jsonl"


def prompts_of_folder(args: Namespace, images: Sequence[Path]) -> list[str]:
    """Return the prompt of each image of `--instance_data_dir`: its caption, or else `--instance_prompt`.

    A caption is what `--caption_column` holds in the folder's metadata.jsonl, or else the text of the image's .txt.
    """
    metadata = Path(args.instance_data_dir, METADATA)
    texts = caption_files(images, sorted(metadata.parent.iterdir()))
    captions = {image: " ".join(read_file(text).split()) for image, text in texts.items()}
    if args.caption_column is not None:
        rows = read_rows(metadata, args.caption_column, images)
        captions |= {image: caption for image, caption in rows.items() if caption}
    elif metadata.is_file():
        logger.warning(f"{metadata} is not read: --caption_column has to name the field that holds the captions.")
    return prompts(args, [captions.get(image, "") for image in images])


def prompts(args: Namespace, captions: Sequence[str]) -> list[str]:
    """Return the captions with `--instance_prompt` in place of empty ones, and log how many there are."""
    present = sum(map(bool, captions))
    if present or args.caption_column is not None:
        rest = "" if present == len(captions) else "; the others use --instance_prompt"
        logger.info(f"{present:,} of {len(captions):,} photos have a caption{rest}.")
    return [caption or args.instance_prompt for caption in captions]


def caption_files(images: Iterable[Path], files: Iterable[Path]) -> dict[Path, Path]:
    """Return the .txt of each image that has one among the files: of the same name but for the suffix."""
    texts = {normalized(file.stem): file for file in files if file.suffix.lower() == ".txt" and file.is_file()}
    return {image: texts[name] for image in images if (name := normalized(image.stem)) in texts}


def normalized(name: str) -> str:
    """Return one spelling for a path, whose accents, slashes and ./ may be written in several ways."""
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def read_rows(metadata: Path, column: str, images: Iterable[Path]) -> dict[Path, str]:
    """Read the captions of images from a metadata.jsonl, "" where a row has none; warn of rows that match no image."""
    if not metadata.is_file():
        raise RunError(f"--caption_column {column}: there is no {metadata} to take captions from.")
    unclaimed = {normalized(image.name): image for image in images}
    captions, unmatched, columns = {}, [], set()
    for number, line in enumerate(read_file(metadata).split("\n"), 1):  # splitlines would also split at U+2028
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            row = json.loads(line)
            name = row["file_name"] + ""
            columns |= row.keys()
        except Exception as error:  # a line may hold JSON of any shape
            raise RunError(f"{where}: expected a JSON object with a file_name ({error!r}).") from error
        caption = check_caption(row.get(column), where)
        if image := unclaimed.pop(normalized(name), None):
            captions[image] = caption
        else:
            unmatched.append(name)
    check_column(column, sorted(columns), "--caption_column")
    if unmatched:
        rest = f"are for no photo, or for one that has a row already: {abbreviate(unmatched)}."
        logger.warning(printable(f"{len(unmatched):,} rows of {METADATA} {rest}"))
    return captions


def check_column(column: str, columns: Sequence[str], flag: str) -> None:
    """Refuse a column that is not there."""
    if column not in columns:
        raise RunError(f"{flag} {column}: there is no such column; there are {', '.join(columns)}.")


def check_caption(caption: object, where: str) -> str:
    """Return a caption, "" if it is None or blank. Refuse what is no text; `where` is its file and row."""
    try:
        text = "" if caption is None else caption.encode().decode()  # type: ignore[attr-defined]
    except (AttributeError, UnicodeError) as error:  # half of a surrogate pair is no text, either
        raise RunError(f"{where}: the caption is no text, but {caption!r:.100}.") from error
    return text if text.strip() else ""


def read_file(file: Path) -> str:
    """Read a file of UTF-8, with or without a byte order mark."""
    with as_run_error(lambda error: f"{file}: cannot be read as a text in UTF-8 ({one_line(error)})."):
        text = file.read_text(encoding="utf-8-sig")
        if "\0" in text:  # UTF-16 of Latin letters passes for UTF-8
            raise ValueError("it holds zero bytes")
        return text


def abbreviate(names: Sequence[str]) -> str:
    """Join the first three names, and say how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
