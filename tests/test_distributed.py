"""Two processes with DDP take the steps of one process with the whole batch, and stay equal to the last bit."""

from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, distributed, nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from diffusers_lipreg import LipschitzDriftLoss, TeacherSnapshot
from diffusers_lipreg.probe import Denoiser, OutputProbe

STEPS, WORLD = 6, 2
ROUTES = ["in place", "autograd"]


def train(route: str, rank: int, world: int) -> dict[str, Tensor]:
    """Trains a tiny model on this rank's share of each batch; returns its weights and the drift it ended with."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    penalty = LipschitzDriftLoss(TeacherSnapshot(model), 5.0, "tensor_mean")
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
        optimizer.zero_grad()
        loss = mse_loss(wrapped(x[rank::world]), y[rank::world])
        if route == "autograd":
            loss = loss + penalty(wrapped)
        loss.backward()  # one backward: with two, DDP's ranks drift apart
        if route == "in place":
            penalty.add_gradient_(wrapped)
        clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
    return {**model.state_dict(), "drift": penalty.measure(wrapped).value}


def probe() -> Tensor:
    """What a probe of three chains, in batches of two, measures of a model that was moved."""
    model = nn.Conv2d(2, 2, 3, padding=1)
    for number, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    denoiser = Denoiser(lambda sample, timestep, prompts: model(sample), [model])
    taken = OutputProbe(denoiser, DDPMScheduler(), (2, 4, 4), prompts=["a", "b", "c"], batch_size=2)
    model.weight.data += 0.1
    return taken.measure(denoiser).differences


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    results = {route: train(route, rank, WORLD) for route in ROUTES}
    torch.save({**results, "probe": probe()}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(worker, args=(folder,), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("route", ROUTES)
def test_ranks_do_not_drift_apart(ranks, route):
    first, second = (rank[route] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("route", ROUTES)
def test_two_processes_equal_one_with_the_whole_batch(ranks, route):
    torch.testing.assert_close(ranks[0][route], train(route, rank=0, world=1), rtol=1e-6, atol=1e-6)


def test_processes_share_the_probes_and_agree_to_the_last_bit(ranks):
    first, second = (rank["probe"] for rank in ranks)
    assert first.min() > 0
    assert torch.equal(first, second) and torch.equal(first, probe())
