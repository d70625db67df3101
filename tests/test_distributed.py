"""Two processes take the steps of one with the whole batch: with DDP, equal to the last bit; with FSDP2, half each."""

from itertools import product
from pathlib import Path

import pytest
import torch
from support.pipelines import family
from support.runs import HAS_FSDP2
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from diffusers_lipreg import LipschitzDriftLoss, OutputSnapshot, TeacherSnapshot

STEPS, WORLD = 6, 2
ROUTES = ["in place", "autograd"]
WRAPPERS = {"DDP": DistributedDataParallel, **({"FSDP2": fully_shard} if HAS_FSDP2 else {})}


def train(route: str, wrapper: str, rank: int, world: int) -> dict[str, Tensor]:
    """Trains a tiny model on this rank's share of each batch; returns its weights and the drift it ended with."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    wrapped = WRAPPERS[wrapper](model) if world > 1 else model
    snapshot = TeacherSnapshot(wrapped)
    penalty = LipschitzDriftLoss(snapshot, 5.0, "tensor_mean")
    assert penalty.measure(wrapped).value == 0
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
        optimizer.zero_grad()
        # Before the model runs: from then until its backward FSDP2 keeps the last layers whole.
        loss = penalty(wrapped) if route == "autograd" else 0.0
        loss = loss + mse_loss(wrapped(x[rank::world]), y[rank::world])
        loss.backward()  # one backward: with two, DDP's ranks drift apart
        if route == "in place":
            penalty.add_gradient_(wrapped)
        clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    norm = torch.tensor(snapshot.squared_norm)
    return {**weights, "norm": norm, **penalty.measure(wrapped)._asdict(), "loss": penalty(wrapped).detach()}


def hold_outputs(route: str, wrapper: str, rank: int, world: int) -> dict[str, Tensor]:
    """Trains a tiny UNet, held by four points of an update on all processes together, as `train` does."""
    pipeline, unet, _ = family("SD1.5")
    options = {"prompts": ["a dog", "a cat"], "chains": 2, "points": 9, "steps": (4, 6), "batch_size": 4 // world}
    snapshot = OutputSnapshot(pipeline, unet, **options)
    wrapped = WRAPPERS[wrapper](unet) if world > 1 else unet
    penalty = LipschitzDriftLoss(snapshot, 30.0, "output")
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(4):
        x, y = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
        states, timesteps = torch.randn(4, 77, 32, generator=generator), torch.tensor([0, 300, 600, 999])
        mine = slice(rank, None, world)
        optimizer.zero_grad()
        loss = penalty(wrapped) if route == "autograd" else 0.0
        loss = loss + mse_loss(wrapped(x[mine], timesteps[mine], states[mine], return_dict=False)[0], y[mine])
        loss.backward()
        if route == "in place":
            values.append(penalty.add_gradient_(wrapped).value)
        clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in unet.named_parameters()}
    return {**weights, "values": torch.tensor(values), "reading": snapshot.measure(wrapped).squared_error}


def reading(shard: bool = False) -> Tensor:
    """What a recording of three points measures of a UNet that was moved."""
    pipeline, unet, _ = family("SD1.5")
    snapshot = OutputSnapshot(pipeline, unet, prompts=["a dog", "a cat", "the sea"], points=3, steps=(2, 4))
    if shard:
        fully_shard(unet)
    with torch.no_grad():
        unet.conv_in.weight.add_(0.1)
    return snapshot.measure(unet).squared_error


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    results = {case: train(*case, rank, WORLD) for case in product(ROUTES, WRAPPERS)}
    results |= {("outputs", *case): hold_outputs(*case, rank, WORLD) for case in product(ROUTES, WRAPPERS)}
    readings = {"reading": reading(), "shards": reading(shard=HAS_FSDP2)}
    torch.save({**results, **readings}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.start_processes(worker, args=(folder,), nprocs=WORLD, start_method="fork")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("case", [*product(ROUTES, WRAPPERS), *product(["outputs"], ROUTES, WRAPPERS)])
def test_ranks_do_not_drift_apart(ranks, case):
    first, second = (rank[case] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", ["reading", "shards"])
def test_processes_share_the_points_and_agree_to_the_last_bit(ranks, case):
    """Three points for two processes: who has none left joins in, and weights are shards again when they change."""
    first, second = (rank[case] for rank in ranks)
    assert first.min() > 0
    assert torch.equal(first, second) and torch.equal(first, reading())


@pytest.mark.parametrize("case", list(product(ROUTES, WRAPPERS)))
def test_two_processes_equal_one_with_the_whole_batch(ranks, case):
    """But for the order of sums."""
    alone = train(*case, rank=0, world=1)
    assert 0 < alone["squared_distance"] < alone["norm"]
    torch.testing.assert_close(alone["loss"], 5 * alone["value"])  # two routes, and two orders of sums
    torch.testing.assert_close(ranks[0][case], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", list(product(ROUTES, WRAPPERS)))
def test_two_processes_hold_outputs_as_one_does_with_twice_the_points(ranks, case):
    alone = hold_outputs(*case, rank=0, world=1)
    assert alone["reading"].min() > 0
    torch.testing.assert_close(ranks[0][("outputs", *case)], alone, rtol=1e-4, atol=1e-6)
