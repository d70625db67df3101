"""The SDXL script's photos: one original in memory at a time, and of a data set nothing but its own files."""

import gc
import json
import os
import shutil
import weakref
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate import Accelerator
from datasets import Dataset, Features, __version__, config
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet
from support.runs import PARITY, said

from diffusers_lipreg.dreambooth import data, images, photos
from diffusers_lipreg.errors import RunError


@pytest.fixture
def elsewhere(tmp_path: Path, fresh_accelerate, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A photo beside the data set's folder."""
    Accelerator(cpu=True)  # which logs need
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    (tmp_path / "set").mkdir()
    return Path(shutil.copy(PARITY / "instance" / "00.png", tmp_path / "secret.png"))


def find(folder: Path, **columns: str | None) -> list[data.Photo]:
    args = {"image_column": "image", "caption_column": None, "dataset_config_name": None, "cache_dir": None} | columns
    return photos.find_photos(Namespace(dataset_name=str(folder), instance_prompt="a dog", **args))


def write_parquet(folder: Path, *images: dict[str, object] | None) -> None:
    """Rows of an image column, as they are: `Dataset.to_parquet` would read what they name."""
    rows = Dataset.from_dict({"image": list(images)}, features=Features({"image": ImageFeature(decode=False)}))
    parquet.write_table(rows.data.table, folder / "train.parquet")


@pytest.mark.parametrize(
    "kind", ["path", "url", "file url", "zip elsewhere", "chain", "zero byte", "link", "card", "file_name"]
)
def test_a_file_elsewhere_is_not_read(kind: str, elsewhere: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.write(elsewhere, "secret.png")
    shutil.copy(PARITY / "instance" / "01.png", folder)
    paths = {
        "path": str(elsewhere),
        "url": "https://example.com/secret.png",
        "file url": f"file://{elsewhere}",
        "zip elsewhere": f"zip://secret.png::{tmp_path / 'secret.zip'}",
        "chain": f"file://{elsewhere}::{folder / '01.png'}",
        "zero byte": f"{folder}/\0",
    }
    if kind == "link":
        (folder / "00.png").symlink_to(elsewhere)
    elif kind == "card":
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {elsewhere}\n---\n")
    elif kind == "file_name":
        rows = ({"file_name": name, "text": "a dog"} for name in ("01.png", "../secret.png"))
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        (folder / "01.png").unlink()
        write_parquet(folder, {"path": "0.png", "bytes": elsewhere.read_bytes()}, {"path": paths[kind], "bytes": None})
    try:
        found = find(folder)
    except RunError as error:
        assert str(error).startswith(f"row 1 of {folder} names" if kind in paths else f"--dataset_name {folder}: ")
        assert "elsewhere" in str(error) or "file_name" in str(error)
    else:  # datasets 3 passes over links, and over rows of files that are not in the folder
        assert kind in ("link", "file_name") and len(found) == 1


@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        "bytes",
        "zip",
        pytest.param("links", marks=pytest.mark.skipif(__version__ < "4", reason="datasets 3 passes over links")),
    ],
)
def test_its_own_files_are_read(kind: str, elsewhere: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    if kind == "bytes":
        write_parquet(folder, *({"path": None, "bytes": elsewhere.read_bytes()} for _ in range(4)))
    elif kind == "zip":
        shutil.make_archive(str(folder / "photos"), "zip", PARITY / "instance")
    elif kind == "links":  # as huggingface_hub lays out what it downloads
        folder = tmp_path / "datasets--a--b" / "snapshots" / "0123"
        blobs = Path(shutil.copytree(PARITY / "instance", tmp_path / "datasets--a--b" / "blobs"))
        folder.mkdir(parents=True)
        for path in blobs.iterdir():
            (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    else:
        shutil.copytree(PARITY / "instance", folder, dirs_exist_ok=True)
    assert [photo.open().mode for photo in find(folder)] == ["RGB"] * 4


def test_the_files_of_a_data_set_on_the_hub_are_those_of_its_repository(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(photos.constants, "HF_HUB_CACHE", str(tmp_path))
    base = "hf://datasets/alice/dogs@0123"
    cache, downloads = photos.own_folders(Namespace(cache_dir=str(tmp_path / "data")), base)
    assert (cache, downloads) == (tmp_path / "datasets--alice--dogs", tmp_path / "data" / "downloads")
    photos.check_files("--dataset_name alice/dogs", [f"{base}/train/0.png"], base, [cache])
    for file in (str(cache / "0.png"), "hf://datasets/alice/dogs2@0/0.png", "https://example.com/0.png"):
        with pytest.raises(RunError, match="it names a file elsewhere"):
            photos.check_files("--dataset_name alice/dogs", [file], base, [cache])


def test_a_script_in_a_data_set_is_not_run(elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "set"
    (folder / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    shutil.copy(elsewhere, folder)
    monkeypatch.setattr("builtins.input", lambda _: "y")  # which datasets 3 asks for
    with pytest.raises(RunError, match=f"^--dataset_name {folder}: cannot be loaded"):
        find(folder)
    assert not (tmp_path / "ran").exists()


def test_rows_that_cannot_be_read_are_left_out(
    elsewhere: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "set"
    good = elsewhere.read_bytes()
    write_parquet(folder, *({"path": None, "bytes": data} for data in (b"", good, good[:99])), None)
    assert len(find(folder)) == 1
    assert [line.split(":")[0] for line in said(caplog)] == [f"Skipped row {index} of {folder}" for index in (0, 2, 3)]
    os.remove(folder / "train.parquet")
    write_parquet(folder, {"path": None, "bytes": b""})
    with pytest.raises(RunError, match="there is no image in it that can be read"):
        find(folder)


@pytest.mark.parametrize("source", ["folder", "data set"])
def test_one_original_is_in_memory_at_a_time(source: str, train_sdxl, tmp_path: Path, monkeypatch) -> None:
    """While the photos are checked, cropped in their order, and cropped once more for --keep_best."""
    alive: list[weakref.ref] = []
    most, to_rgb = 0, images.to_rgb

    def counting(source: Image.Image) -> Image.Image:
        nonlocal most
        image = to_rgb(source)
        alive.append(weakref.ref(image))
        most = max(most, sum(reference() is not None for reference in alive))
        return image

    monkeypatch.setattr(images, "to_rgb", counting)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = str(shutil.copytree(PARITY / "captions", tmp_path / "photos"))
    gc.disable()
    try:
        flag = "--instance_data_dir" if source == "folder" else "--dataset_name"
        train_sdxl(tmp_path / "out", flag, folder, "--max_train_steps", "1", "--probe_steps", "1", "--keep_best")
    finally:
        gc.enable()
    assert most == 1
    assert len(alive) == 12


def test_a_run_stops_at_a_row_that_names_a_file_elsewhere(elsewhere: Path, tmp_path: Path, train_sdxl) -> None:
    write_parquet(tmp_path / "set", {"path": str(elsewhere), "bytes": None})
    with pytest.raises(RunError, match=f"^row 0 of {tmp_path / 'set'} names a file elsewhere, {elsewhere}: "):
        train_sdxl(tmp_path / "out", "--dataset_name", str(tmp_path / "set"))
    assert not (tmp_path / "out").exists()
