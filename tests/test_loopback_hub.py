"""The loopback Hub, asked over real HTTP by the real client: in this process, and in one of the client's own."""

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from itertools import product
from pathlib import Path

import pytest
from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    ModelCard,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from support.loopback_hub import LoopbackHub, Request

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
    return client(hub, "hf_alice")


def client(hub: LoopbackHub, token: str | None) -> HfApi:
    return HfApi(endpoint=hub.url, token=token or False)


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read_files(folder: str | Path) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def puts(hub: LoopbackHub) -> list[Request]:
    return [request for request in hub.requests if request.method == "PUT"]


def run_with(environment: dict[str, str], function: Callable[..., None], *args: str) -> None:
    """Calls a function of this file in a process of its own."""
    code = f"import sys, {__name__}; {__name__}.{function.__name__}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# What goes up comes down


def test_snapshot_gives_the_uploaded_bytes(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    assert alice.create_repo("dog").repo_id == REPO
    commit = alice.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path / "out", FILES))
    assert hub.files(REPO) == FILES
    snapshot = alice.snapshot_download(REPO, cache_dir=tmp_path / "cache")
    assert Path(snapshot).name == commit.oid
    assert read_files(snapshot) == FILES
    assert alice.model_info(REPO).sha == commit.oid
    assert [file.rfilename for file in alice.model_info(REPO).siblings] == alice.list_repo_files(REPO) == sorted(FILES)


def test_weights_go_through_lfs_without_a_token_in_the_upload(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    alice.create_repo(REPO)
    alice.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path, FILES))
    assert [(put.token, put.body) for put in puts(hub)] == [(None, FILES["model.safetensors"])]
    assert {request.token for request in hub.requests if f"/{REPO}" in request.path} == {"hf_alice"}
    entries = {file.path: file for file in alice.list_repo_tree(REPO, recursive=True)}
    assert entries["model.safetensors"].lfs.sha256 == sha256(FILES["model.safetensors"]).hexdigest()
    assert [path for path, file in entries.items() if file.lfs] == ["model.safetensors"]


def test_ignored_patterns_stay_behind(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    files = FILES | {"checkpoint-10/optimizer.bin": b"state", "logs/events": b"log"}
    alice.create_repo(REPO)
    alice.upload_folder(
        repo_id=REPO, folder_path=write_files(tmp_path, files), ignore_patterns=["checkpoint-*/**", "logs/**"]
    )
    assert hub.files(REPO) == FILES


def test_unchanged_content_is_not_sent_again(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    folder = write_files(tmp_path, FILES)
    alice.create_repo(REPO)
    first = alice.upload_folder(repo_id=REPO, folder_path=folder)
    assert alice.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    write_files(tmp_path, {"copy.safetensors": FILES["model.safetensors"]})
    assert alice.upload_folder(repo_id=REPO, folder_path=folder).oid != first.oid
    assert len(puts(hub)) == 1
    assert hub.files(REPO)["copy.safetensors"] == FILES["model.safetensors"]


def test_an_old_revision_still_resolves(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    alice.create_repo(REPO)
    old = alice.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path / "old", FILES)).oid
    files = {"README.md": b"new", "model.safetensors": b"new weights"}
    new = alice.upload_folder(
        repo_id=REPO, folder_path=write_files(tmp_path / "new", files), delete_patterns="unet/*"
    ).oid
    assert hub.files(REPO, old) == FILES
    assert read_files(alice.snapshot_download(REPO, revision=old, cache_dir=tmp_path / "cache")) == FILES
    assert hub.files(REPO) == {"images/grüner hund 0.png": b"\x89PNG"} | files
    assert [alice.model_info(REPO, revision=revision).sha for revision in (old, "main")] == [old, new]


def test_a_folder_listing_names_files_and_folders(alice: HfApi, tmp_path: Path) -> None:
    alice.create_repo(REPO)
    alice.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path, FILES))
    assert [entry.path for entry in alice.list_repo_tree(REPO)] == ["README.md", "images", "model.safetensors", "unet"]
    assert [entry.path for entry in alice.list_repo_tree(REPO, "unet")] == ["unet/config.json", "unet/empty.bin"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(alice.list_repo_tree(REPO, "additional_chat_templates"))


# Who may do what


def test_tokens_have_names_and_roles(hub: LoopbackHub) -> None:
    for token, account in hub.accounts.items():
        user = client(hub, token).whoami()
        assert (user["name"], user["auth"]["accessToken"]["role"]) == account
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        client(hub, "hf_wrong").whoami()


@pytest.mark.parametrize(("token", "status"), [(None, 401), ("hf_wrong", 401), ("hf_reader", 403), ("hf_bob", 403)])
def test_writing_needs_the_owners_write_token(
    hub: LoopbackHub, alice: HfApi, tmp_path: Path, token: str | None, status: int
) -> None:
    api = client(hub, token)
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo(REPO)
    assert refused.value.response.status_code == status
    assert REPO not in hub.repos

    alice.create_repo(REPO)
    alice.auth_check(REPO, write=True)
    with pytest.raises(HfHubHTTPError) as refused:
        api.auth_check(REPO, write=True)
    assert refused.value.response.status_code == status
    with pytest.raises(HfHubHTTPError) as refused:
        api.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path, FILES))
    assert refused.value.response.status_code == status
    assert hub.files(REPO) == {}


@pytest.mark.parametrize(
    ("token", "visible"), [("hf_alice", True), ("hf_reader", True), ("hf_bob", False), (None, False)]
)
def test_a_private_repo_is_there_only_for_its_owner(
    hub: LoopbackHub, alice: HfApi, tmp_path: Path, token: str | None, visible: bool
) -> None:
    alice.create_repo(REPO, private=True)
    alice.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path / "out", FILES))
    api = client(hub, token)
    assert api.repo_exists(REPO) == api.file_exists(REPO, "README.md") == visible
    if visible:
        api.auth_check(REPO)
        assert api.model_info(REPO).private
        assert read_files(api.snapshot_download(REPO, cache_dir=tmp_path / "cache")) == FILES
    else:
        with pytest.raises(RepositoryNotFoundError):
            api.auth_check(REPO)
        with pytest.raises(RepositoryNotFoundError):
            api.snapshot_download(REPO, cache_dir=tmp_path / "cache")


def test_a_public_repo_needs_no_token_but_refuses_a_wrong_one(hub: LoopbackHub, alice: HfApi) -> None:
    alice.create_repo(REPO)
    assert client(hub, None).repo_exists(REPO)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        client(hub, "hf_wrong").repo_exists(REPO)
    assert refused.value.response.status_code == 401


def test_a_repo_is_created_once(hub: LoopbackHub, alice: HfApi) -> None:
    alice.create_repo(REPO)
    assert alice.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as refused:
        alice.create_repo(REPO)
    assert refused.value.response.status_code == 409
    # A reader passes too, as long as the repository is there: the client finds out only when it uploads.
    assert client(hub, "hf_reader").create_repo(REPO, exist_ok=True).repo_id == REPO


# What is missing


@pytest.mark.parametrize(
    "ask",
    [
        lambda api, cache: api.model_info("alice/none"),
        lambda api, cache: api.list_repo_files("alice/none"),
        lambda api, cache: api.hf_hub_download("alice/none", "README.md", cache_dir=cache),
        lambda api, cache: api.snapshot_download("alice/none", cache_dir=cache),
        lambda api, cache: api.upload_file(repo_id="alice/none", path_or_fileobj=b"", path_in_repo="empty"),
    ],
    ids=["info", "list", "download", "snapshot", "upload"],
)
@pytest.mark.parametrize("token", ["hf_alice", None])
def test_a_missing_repo_is_not_found(
    hub: LoopbackHub, tmp_path: Path, token: str | None, ask: Callable[[HfApi, Path], object]
) -> None:
    with pytest.raises(RepositoryNotFoundError):
        ask(client(hub, token), tmp_path)


def test_a_missing_file_or_revision_is_not_found(alice: HfApi, tmp_path: Path) -> None:
    alice.create_repo(REPO)
    assert not alice.file_exists(REPO, "犬.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        alice.hf_hub_download(REPO, "README.md", cache_dir=tmp_path)
    assert try_to_load_from_cache(REPO, "README.md", cache_dir=tmp_path) is _CACHED_NO_EXIST
    with pytest.raises(RevisionNotFoundError):
        alice.hf_hub_download(REPO, "README.md", revision="v1", cache_dir=tmp_path)
    with pytest.raises(RevisionNotFoundError):
        alice.model_info(REPO, revision="0" * 40)


def test_a_damaged_lfs_object_is_refused(hub: LoopbackHub) -> None:
    response = get_session().put(f"{hub.url}/lfs-objects/{sha256(b'weights').hexdigest()}", content=b"weigh")
    assert response.status_code == 400
    assert hub.lfs_objects == {}


def test_a_stale_parent_is_refused(hub: LoopbackHub, alice: HfApi) -> None:
    alice.create_repo(REPO)
    parent = alice.model_info(REPO).sha
    upload = {"repo_id": REPO, "path_in_repo": "a.txt", "parent_commit": parent}
    alice.upload_file(path_or_fileobj=b"one", **upload)
    with pytest.raises(HfHubHTTPError) as refused:
        alice.upload_file(path_or_fileobj=b"two", **upload)
    assert refused.value.response.status_code == 412
    assert hub.files(REPO) == {"a.txt": b"one"}


# Failing on purpose


@pytest.mark.parametrize(
    ("endpoint", "status"),
    [
        *product(["create", "preupload", "lfs_batch", "lfs_put", "commit"], [401, 403]),
        *product(["create", "commit"], [500]),  # the client would ask the others again, for 23 s
    ],
)
def test_a_chosen_endpoint_refuses_until_told_otherwise(
    hub: LoopbackHub, alice: HfApi, tmp_path: Path, endpoint: str, status: int
) -> None:
    def push() -> None:
        alice.create_repo(REPO, exist_ok=True)
        alice.upload_folder(repo_id=REPO, folder_path=write_files(tmp_path, FILES))

    hub.fail = {endpoint: status}
    with pytest.raises((HfHubHTTPError, RuntimeError)) as refused:  # the client wraps what happens to an LFS object
        push()
    error = refused.value.__cause__ if isinstance(refused.value, RuntimeError) else refused.value
    assert isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError)
    assert error.response.status_code == status
    assert (REPO in hub.repos) == (endpoint != "create")
    hub.fail = {}
    push()
    assert hub.files(REPO) == FILES


def test_a_stopped_hub_refuses_connections(hub: LoopbackHub, alice: HfApi) -> None:
    alice.create_repo(REPO)
    hub.stop()
    with pytest.raises(HTTPError, match="refused"):
        alice.model_info(REPO)


# In a process of its own


def push_and_pull_card(folder: str) -> None:
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert ModelCard.load(REPO).data.license == "mit"
    assert read_files(snapshot_download(REPO)) == FILES


def pull_nothing() -> None:
    assert not HfApi().repo_exists(REPO)


def test_the_environment_is_all_a_subprocess_needs(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_TOKEN": "hf_mine"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    folder = write_files(tmp_path / "out", FILES)
    run_with(hub.environment(tmp_path / "anonymous"), pull_nothing)
    run_with(hub.environment(tmp_path / "alice", token="hf_alice"), push_and_pull_card, str(folder))
    assert {request.token for request in hub.requests} == {None, "hf_alice"}
    assert hub.files(REPO) == FILES
    assert [path.name for path in (tmp_path / "alice" / "hub").glob("models--*")] == ["models--alice--dog"]


def push_and_pull_pipeline(folder: str) -> None:
    """A tiny Stable Diffusion and an adapter for it, saved, pushed and loaded back by name."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DiffusionPipeline,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: index for index, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[]),
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
    )
    pipeline.save_pretrained(f"{folder}/full")
    weights = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    pipeline.unet.add_adapter(LoraConfig(r=2, init_lora_weights="gaussian", target_modules=["to_q", "to_v"]))
    adapter = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(f"{folder}/lora", unet_lora_layers=adapter)
    api = HfApi()
    for name in ("full", "lora"):
        api.create_repo(f"alice/{name}")
        api.upload_folder(repo_id=f"alice/{name}", folder_path=f"{folder}/{name}")

    loaded = DiffusionPipeline.from_pretrained("alice/full")
    torch.testing.assert_close(dict(loaded.unet.state_dict()), weights, rtol=0, atol=0)
    loaded.load_lora_weights("alice/lora")
    loaded_adapter = get_peft_model_state_dict(loaded.unet, adapter_name="default_0")
    torch.testing.assert_close(loaded_adapter, adapter, rtol=0, atol=0)
    # A training script loads the parts one by one.
    assert CLIPTokenizer.from_pretrained("alice/full", subfolder="tokenizer").get_vocab() == vocabulary
    CLIPTextModel.from_pretrained("alice/full", subfolder="text_encoder")


@pytest.mark.slow  # test_train_dreambooth_lipreg.py loads by name, too
def test_diffusers_loads_a_pipeline_and_an_adapter_by_name(hub: LoopbackHub, tmp_path: Path) -> None:
    run_with(hub.environment(tmp_path / "home", token="hf_alice"), push_and_pull_pipeline, str(tmp_path / "out"))
    assert {"alice/full", "alice/lora"} == set(hub.repos)
