"""The loopback Hub answers the real client as our uploads and downloads rely on; test_hub.py has it fail on purpose."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from support.loopback_hub import LoopbackHub

REPO = "alice/dog"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A dog\n",
    "model.safetensors": bytes(range(256)) * 64,
    "unet/config.json": b"{}",
    "unet/empty.bin": b"",
    "images/grüner hund 0.png": b"\x89PNG",
}


@pytest.fixture
def alice(hub: LoopbackHub) -> HfApi:
    """A client that may write, and has created the repository."""
    api = HfApi(endpoint=hub.url, token="hf_alice")
    assert api.create_repo("dog").repo_id == REPO
    return api


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "out", FILES)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read_files(folder: str | Path) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_goes_up_comes_down(hub: LoopbackHub, alice: HfApi, folder: Path, tmp_path: Path) -> None:
    """Weights go through LFS, once. Every revision stays, and a second upload may delete files."""
    old = alice.upload_folder(repo_id=REPO, folder_path=folder).oid
    puts = [(request.token, request.body) for request in hub.requests if request.method == "PUT"]
    assert puts == [(None, FILES["model.safetensors"])]
    assert alice.upload_folder(repo_id=REPO, folder_path=folder).oid == old
    write_files(folder, {"README.md": b"new"})
    new = alice.upload_folder(repo_id=REPO, folder_path=folder, ignore_patterns="unet/*", delete_patterns="unet/*").oid
    assert len([request for request in hub.requests if request.method == "PUT"]) == 1
    images = {path: FILES[path] for path in ("model.safetensors", "images/grüner hund 0.png")}
    assert hub.files(REPO) == images | {"README.md": b"new"}
    anonymous = HfApi(endpoint=hub.url, token=False)
    for revision, files in ((old, FILES), (new, hub.files(REPO)), ("main", hub.files(REPO))):
        snapshot = anonymous.snapshot_download(REPO, revision=revision, cache_dir=tmp_path / "cache")
        assert read_files(snapshot) == files
        assert anonymous.list_repo_files(REPO, revision=revision) == sorted(files)


@pytest.mark.parametrize(("token", "status"), [(False, 401), ("hf_wrong", 401), ("hf_reader", 403), ("hf_bob", 403)])
def test_writing_needs_the_owners_write_token(
    hub: LoopbackHub, alice: HfApi, folder: Path, token: str | bool, status: int
) -> None:
    api = HfApi(endpoint=hub.url, token=token)
    for write in (
        lambda: api.create_repo("alice/cat"),
        lambda: api.auth_check(REPO, write=True),
        lambda: api.upload_folder(repo_id=REPO, folder_path=folder),
    ):
        with pytest.raises(HfHubHTTPError) as refused:
            write()
        assert refused.value.response.status_code == status
    assert hub.repos.keys() == {REPO} and hub.files(REPO) == {}
    assert alice.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_what_is_missing_is_not_found(alice: HfApi, folder: Path) -> None:
    for ask in (alice.model_info, alice.snapshot_download):
        with pytest.raises(RepositoryNotFoundError):
            ask("alice/none")
    with pytest.raises(RepositoryNotFoundError):
        alice.upload_folder(repo_id="alice/none", folder_path=folder)
    with pytest.raises(RemoteEntryNotFoundError):
        alice.hf_hub_download(REPO, "README.md")
    with pytest.raises(RevisionNotFoundError):
        alice.hf_hub_download(REPO, "README.md", revision="v1")


def test_the_environment_is_all_a_subprocess_needs(
    hub: LoopbackHub, alice: HfApi, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_mine", "http_proxy": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)
    code = f"from huggingface_hub import HfApi; HfApi().upload_folder(repo_id='{REPO}', folder_path={str(folder)!r})"
    environment = hub.environment(tmp_path / "home", token="hf_alice")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert hub.files(REPO) == FILES
