"""The SD script on two processes: one model, one upload, exact resume, one message; and what one process makes of it."""

from collections.abc import Iterator
from pathlib import Path
from shutil import copy, copytree
from typing import Any

import pytest
import torch
from accelerate.commands.config import load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from support import two_processes
from support.hub_client import client_of_loopback_hub
from support.loopback_hub import LoopbackHub
from support.runs import PARITY, ROOT
from support.two_processes import FIXED, FULL, HELD, RUNS_FSDP2, Run, fixed_loss

needs_fsdp2 = pytest.mark.skipif(not RUNS_FSDP2, reason="torch without FSDP2 on CPUs, or accelerate without it")
SHARDS = [pytest.param(name, marks=needs_fsdp2) for name in ("shards", "sharded", "held-shards")]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos, of which two are not square; two squares; and a run of one process to go on from."""
    folder = tmp_path_factory.mktemp("two")
    copytree(PARITY / "instance", folder / "photos")
    copy(folder / "photos" / "01.png", folder / "photos" / "04.png")
    (folder / "squares").mkdir()
    for name in ("00.png", "01.png"):
        Image.open(PARITY / "instance" / name).convert("RGB").resize((64, 64)).save(folder / "squares" / name)
    (folder / "probes.txt").write_text("a dog\na cat\n")
    (folder / "held.txt").write_text("a tree\na house\n")
    Run(folder / "one", *FULL, "--instance_data_dir", str(folder / "photos")).save(folder / "one.pt")
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with client_of_loopback_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def exit_codes(folder: Path, hub: LoopbackHub) -> list[int]:
    """All that two processes do here, in one launch, and how they end."""
    codes = two_processes.launch(folder)
    assert (folder / "two-after-one-1.pt").exists(), (folder / "log-0").read_text()
    return codes


@pytest.fixture(scope="module")
def more_runs(folder: Path, exit_codes: list[int]) -> None:
    """Those that go on from checkpoints of the first launch and are left to the slow tests."""
    assert two_processes.launch(folder, thorough=True) == [0, 0], (folder / "log-0").read_text()


@pytest.fixture
def ranks(exit_codes: list[int], folder: Path):
    """What the two processes ended a run with, by the run's name."""
    return lambda name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)]


def assert_equal(one: dict[str, Any], other: dict[str, Any], **tolerance: float) -> None:
    for model, weights in one["weights"].items():
        torch.testing.assert_close(other["weights"][model], weights, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("run", ["whole", "fixed", "held", "two-after-one", "sdxl", *SHARDS])
def test_the_processes_end_with_one_model(ranks, run: str) -> None:
    assert_equal(*ranks(run))


def assert_resumed_exactly(ranks, run: str, stop: int) -> None:
    for whole, again in zip(ranks(run), ranks(f"{run}-from-{stop}"), strict=True):
        assert again["logs"][0][0] in (stop, stop + 1)
        assert again["logs"][-1] == whole["logs"][-1]
        assert_equal(whole, again)


def test_a_resumed_run_equals_an_uninterrupted_one(ranks) -> None:
    """In mid-epoch, where a photo that both have seen comes again."""
    assert_resumed_exactly(ranks, "whole", 1)
    assert_resumed_exactly(ranks, "held", 1)


@pytest.mark.slow
@pytest.mark.usefixtures("more_runs")
@pytest.mark.parametrize(("run", "stop"), [("whole", 2), ("sdxl", 1), pytest.param("sharded", 1, marks=needs_fsdp2)])
def test_other_resumed_runs_equal_uninterrupted_ones(ranks, run: str, stop: int) -> None:
    """At the epoch's end, adapters, and shards."""
    assert_resumed_exactly(ranks, run, stop)


@needs_fsdp2
def test_shards_take_the_steps_of_whole_models(ranks) -> None:
    """FSDP2 leaves each process about half of the weights, and both make what DDP does of them; but for rounding."""
    for whole, shards in zip(ranks("fixed"), ranks("shards"), strict=True):
        assert_equal(whole, shards, rtol=1e-5, atol=1e-6)
        assert 0.4 < shards["held"] / whole["held"] < 0.6
        for key in ("drift", "drift_relative"):
            expected = [values[key] for _, values in whole["logs"]]
            assert [values[key] for _, values in shards["logs"]] == pytest.approx(expected, rel=1e-5)
    first, second = ([values["drift"] for _, values in run["logs"]] for run in ranks("shards"))
    assert first == second


@needs_fsdp2
def test_shards_are_saved_as_a_whole_model_is(ranks, folder: Path) -> None:
    weights = ranks("sharded")[0]["weights"]["unet"]
    saved = load_file(folder / "sharded" / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
    for file in ("model_index.json", "unet/config.json"):
        assert (folder / "sharded" / file).read_text() == (folder / "whole" / file).read_text()
    best = load_file(folder / "sharded" / "checkpoint-best" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {k: v.shape for k, v in best.items()} == {k: v.shape for k, v in saved.items()}
    assert {"optimizer.bin", "random_states_1.pkl"} <= {
        p.name for p in (folder / "sharded" / "checkpoint-2").iterdir()
    }


def test_the_configuration_files_are_those_of_accelerate() -> None:
    """Of which the runs on shards use what concerns FSDP; all start two processes."""
    for name, kind in {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "zero2.yaml": "DEEPSPEED"}.items():
        loaded = load_config_from_file(str(ROOT / "tests" / "accelerate" / name))
        assert (loaded.distributed_type, loaded.num_processes) == (kind, 2)


def test_two_processes_equal_one_with_the_whole_batch(ranks, folder: Path) -> None:
    """But for the order of sums: the mean of two gradients is not rounded as the gradient of two photos' mean."""
    photos = ("--instance_data_dir", str(folder / "squares"), "--train_batch_size", "2")
    Run(folder / "fixed alone", *FIXED, *photos, loss=fixed_loss).save(folder / "fixed-alone.pt")
    alone = torch.load(folder / "fixed-alone.pt", weights_only=False)
    two = ranks("fixed")[0]
    assert_equal(alone, two, rtol=1e-5, atol=1e-6)
    start = torch.nn.utils.parameters_to_vector(two["weights"]["unet"].values())
    end = torch.nn.utils.parameters_to_vector(ranks("whole")[0]["weights"]["unet"].values())
    assert not torch.allclose(start, end, rtol=1e-5, atol=1e-6)
    assert [values["drift"] for _, values in two["logs"]] == pytest.approx(
        [values["drift"] for _, values in alone["logs"]], rel=1e-3
    )


def test_two_processes_hold_outputs_as_one_with_the_whole_batch(ranks, folder: Path) -> None:
    """Each process replays its own points: the one replays as many as the two together, in the same order."""
    photos = ("--instance_data_dir", str(folder / "squares"), "--train_batch_size", "2")
    Run(folder / "held alone", *HELD, str(folder / "held.txt"), *photos, loss=fixed_loss).save(
        folder / "held-alone.pt"
    )
    alone = torch.load(folder / "held-alone.pt", weights_only=False)
    for name in ("held", *(["held-shards"] if RUNS_FSDP2 else [])):
        two = ranks(name)[0]
        assert_equal(alone, two, rtol=1e-5, atol=1e-6)
        drifts = [[values["drift"] for _, values in run["logs"]] for run in (alone, two)]
        assert drifts[1] == pytest.approx(drifts[0], rel=1e-3, abs=1e-12) and drifts[0][-1] > 1e-8
    start, end = (
        torch.nn.utils.parameters_to_vector(ranks(n)[0]["weights"]["unet"].values()) for n in ("fixed", "held")
    )
    assert not torch.allclose(start, end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processes", ["two after one", "one after two"])
def test_another_number_of_processes_goes_on(ranks, folder: Path, caplog, processes: str) -> None:
    """With the updates, the optimizer and the schedule of the run; the photos are shuffled anew."""
    whole = dict(torch.load(folder / "one.pt", weights_only=False)["logs"])
    if processes == "two after one":
        logs = ranks("two-after-one")[0]["logs"]
    else:
        ranks("whole")
        more = ("--resume_from_checkpoint", str(folder / "two-after-one" / "checkpoint-3"))
        logs = Run(folder / "one again", *FULL, "--instance_data_dir", str(folder / "photos"), *more).logs
        assert "checkpoint-3 is of 2 processes, not 1: the photos are shuffled anew." in caplog.text
    assert [step for step, _ in logs] == ([3, 4] if processes == "two after one" else [4])
    assert [values["lr"] for _, values in logs] == pytest.approx([whole[step]["lr"] for step, _ in logs])


def test_class_images_are_shared_out(ranks, folder: Path) -> None:
    ranks("whole")
    numbers, pixels = zip(*(path.stem.split("-") for path in sorted((folder / "class").iterdir())), strict=True)
    assert numbers == ("0", "1", "2") and len(set(pixels)) == 3


def test_one_process_pushes(ranks, hub: LoopbackHub) -> None:
    ranks("whole")
    asked = [request.path for request in hub.requests]
    assert len([path for path in asked if path.endswith("/commit/main")]) == 1
    assert asked.count("/api/repos/create") == 1
    assert "unet/diffusion_pytorch_model.safetensors" in hub.files("alice/dog")


def test_every_process_leaves_its_random_state(ranks, folder: Path) -> None:
    ranks("whole")
    names = {path.name for path in (folder / "whole" / "checkpoint-2").iterdir()}
    assert {"random_states_0.pkl", "random_states_1.pkl", "sampler_state.pt"} <= names


def test_a_failure_of_one_process_ends_all_with_one_message(exit_codes, folder: Path) -> None:
    assert exit_codes == [1, 1]
    logs = (folder / "log-0").read_text() + (folder / "log-1").read_text()
    (line,) = [line for line in logs.splitlines() if "error: the loss" in line]
    assert "train_dreambooth_lipreg.py: error: the loss is nan in the step after update 0" in line
    assert not (folder / "lost" / "unet").exists()
