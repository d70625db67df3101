"""TeacherSnapshot: a copy by name, the same names under every wrapper, and an error instead of a wrong pair."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from diffusers_lipreg import LipschitzDriftLoss, TeacherSnapshot
from diffusers_lipreg.snapshot import rounding_error


class Model(nn.Module):
    """Six trainable parameters, one frozen, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.head = nn.Linear(4, 2)


TRAINABLE = ["layer.weight", "layer.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names in the same order, the same bits once they are float32 (zeros and ones are kept in float16)."""
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor.float().view(torch.int32), theirs[name].float().view(torch.int32)), name


@torch.no_grad()
def move_(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter))


def test_the_teacher_is_a_detached_copy_of_what_trains(model):
    start = weights(model)
    snapshot = TeacherSnapshot(model)
    LipschitzDriftLoss(snapshot, 1.0, "sum")(model).backward()
    move_(model)
    teacher = snapshot.state_dict()
    assert_same(teacher, {name: start[name] for name in TRAINABLE})
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in teacher.values())


def test_names_choose_parameters_frozen_ones_too(model):
    snapshot = TeacherSnapshot(model, names=iter(["frozen.weight", "head.bias"]))
    assert list(snapshot.state_dict()) == ["frozen.weight", "head.bias"]
    model.layer.requires_grad_(False)  # named parameters are held whatever else trains
    assert [parameter is model.head.bias for parameter, _ in snapshot.pairs(model)] == [False, True]


def test_dtype_and_device_are_those_asked_for(model):
    rounded = TeacherSnapshot(model, dtype=torch.bfloat16).state_dict()
    assert {tensor.dtype for tensor in rounded.values()} == {torch.bfloat16}
    assert torch.equal(rounded["head.weight"], model.head.weight.bfloat16())
    stored = TeacherSnapshot(model, device="meta").state_dict()
    assert {tensor.device.type for tensor in stored.values()} == {"meta"}


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1.0), (torch.float16, 1.0), (torch.bfloat16, 1e20)])
def test_the_teacher_takes_no_more_memory_than_its_values_need(model, dtype, scale):
    """A model that was stored in a half-precision type is kept in that type, also where it was loaded in float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((scale * (parameter + 1 / 3)).to(dtype))
    start = weights(model)
    teacher = TeacherSnapshot(model).state_dict()
    assert {tensor.dtype for tensor in teacher.values()} == {dtype}
    assert_same(teacher, {name: start[name] for name in TRAINABLE})


def test_stored_weights_are_held_as_they_are(model, tmp_path):
    """A checkpoint in float16, mapped from its file: no copy, and the same drift as that of a copy."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    save_file({name: tensor.half() for name, tensor in weights(model).items()}, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    mapped, copied = TeacherSnapshot(model, state_dict=stored), TeacherSnapshot(model)
    assert all(tensor is stored[name] for name, tensor in mapped.state_dict().items())
    move_(model)
    assert torch.equal(mapped.drift(model, "sum"), copied.drift(model, "sum"))


@pytest.mark.parametrize("change", [None, torch.zeros(3), torch.full((2,), 0.5)])
def test_stored_weights_of_another_model_are_an_error(model, change):
    stored = {**weights(model), "head.bias": change}
    if change is None:
        del stored["head.bias"]
    with pytest.raises(ValueError, match="head.bias: state_dict does not have the module's weights"):
        TeacherSnapshot(model, state_dict=stored)


def test_stored_weights_have_a_type_and_a_place_of_their_own(model):
    for option in ({"dtype": torch.float16}, {"device": "cpu"}):
        with pytest.raises(ValueError, match="held as they are"):
            TeacherSnapshot(model, state_dict=weights(model), **option)


def test_stored_weights_that_training_would_round_are_not_the_modules(model):
    with pytest.raises(ValueError, match="does not have the module's weights"):
        TeacherSnapshot(deepcopy(model).half(), state_dict=weights(model))


def test_rounding_error_by_hand():
    """bfloat16 has 8 significant bits: next to 1 its numbers are 1/128 apart. Off by 1/512, 0, 0 and -1/256."""
    tensor = torch.tensor([[1 + 1 / 512, 1.0], [-2.0, 2 + 3 / 256]])
    assert rounding_error(tensor, torch.float32) == 0
    assert rounding_error(tensor, torch.bfloat16) == pytest.approx((((1 / 512) ** 2 + (1 / 256) ** 2) / 4) ** 0.5)
    assert rounding_error(torch.tensor([1e5]), torch.float16) == float("inf")


@pytest.mark.parametrize("unknown", ["head.weigth", "norm.running_mean", "head"])
def test_unknown_names_are_an_error(model, unknown):
    with pytest.raises(ValueError, match=f"no parameter named {unknown}; it has frozen.weight, .* and 4 more"):
        TeacherSnapshot(model, names=["head.weight", unknown])


def test_nothing_to_copy_is_an_error(model):
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        TeacherSnapshot(model.requires_grad_(False))
    with pytest.raises(ValueError, match="nothing to copy"):
        TeacherSnapshot(model, names=[])


def test_tied_parameters_count_once():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    snapshot = TeacherSnapshot(module)
    module[0].weight.data += 1.0
    assert LipschitzDriftLoss(snapshot, 1.0, "sum")(module).item() == pytest.approx(4)


def test_pairs_match_by_name_not_by_order(model):
    reordered = Model()
    layer = reordered.layer
    del reordered.layer
    reordered.layer = layer  # now the last one
    assert [name for name, _ in reordered.named_parameters()][-1] == "layer.bias"
    assert_pairs(TeacherSnapshot(model), reordered, model)


def assert_pairs(snapshot: TeacherSnapshot, module: nn.Module, bare: Model) -> None:
    """`module`'s own parameters, each beside a copy of the one with its name in `bare`."""
    inner = next(part for part in module.modules() if isinstance(part, Model))
    pairs = list(snapshot.pairs(module))
    assert len(pairs) == len(TRAINABLE)
    for name, (parameter, teacher) in zip(TRAINABLE, pairs, strict=True):
        layer, attribute = name.split(".")
        assert parameter is getattr(getattr(inner, layer), attribute)
        assert torch.equal(teacher, bare.get_parameter(name))


def without_bias(model: Model) -> None:
    model.head = nn.Linear(4, 2, bias=False)


def wider(model: Model) -> None:
    model.head = nn.Linear(4, 3)


def frozen_later(model: Model) -> None:
    model.layer.bias.requires_grad_(False)


def unfrozen_later(model: Model) -> None:
    model.frozen.requires_grad_(True)


def moved_away(model: Model) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_bias, "knows head.bias, the module does not"),
        (wider, r"head.weight: expected shape \(2, 4\), got \(3, 4\)"),
        (frozen_later, r"without a teacher: \[\]; with one, but not trainable: \[layer.bias\]"),
        (unfrozen_later, r"without a teacher: \[frozen.weight\]; with one, but not trainable: \[\]"),
        (moved_away, "layer.weight: expected on cpu, got it on meta"),
    ],
)
def test_a_module_that_does_not_fit_is_an_error(model, change, message):
    penalty = LipschitzDriftLoss(TeacherSnapshot(model), 1.0, "sum")
    change(model)
    for use in (penalty, penalty.add_gradient_, penalty.measure):
        with pytest.raises(ValueError, match=message):
            use(model)


def test_a_snapshot_with_a_device_of_its_own_lets_the_module_move(model):
    snapshot = TeacherSnapshot(model, device="cpu")
    assert len(list(snapshot.pairs(model.to("meta")))) == len(TRAINABLE)


def compile_layer(module: Model) -> Model:
    module.layer = torch.compile(module.layer, backend="eager")
    return module


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "bare": lambda module: module,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "compile": compiled,
    "compile of a layer": compile_layer,
    "compile of DDP": lambda module: compiled(DistributedDataParallel(module)),
    "DDP of compile": lambda module: DistributedDataParallel(compiled(compile_layer(module))),
}


@pytest.fixture
def process_group(tmp_path: Path, monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_change_neither_names_nor_pairs(process_group, model, wrap: Callable):
    before_wrapping = TeacherSnapshot(model)
    bare = deepcopy(model)
    wrapped = wrap(model)
    after_wrapping = TeacherSnapshot(wrapped)
    assert_same(after_wrapping.state_dict(), before_wrapping.state_dict())
    for snapshot in (before_wrapping, after_wrapping):
        assert_pairs(snapshot, wrapped, bare)
        assert_pairs(snapshot, bare, bare)
    assert list(TeacherSnapshot(wrapped, names=["layer.bias"]).state_dict()) == ["layer.bias"]


def test_stored_weights_are_no_teacher_of_shards(process_group, model):
    stored = weights(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="layer.weight is sharded: the whole tensors of a state_dict"):
        TeacherSnapshot(model, state_dict=stored)


def test_another_snapshot_from_the_state_dict_of_one(model):
    snapshot = TeacherSnapshot(model)
    start = weights(model)
    assert snapshot.squared_norm == pytest.approx(
        sum(start[name].double().square().sum().item() for name in TRAINABLE)
    )
    other = TeacherSnapshot(model, state_dict=snapshot.state_dict())
    assert_same(other.state_dict(), snapshot.state_dict())
    assert other.squared_norm == snapshot.squared_norm


def test_a_module_with_adapters_is_for_the_other_snapshot():
    """Its own layers may be held beside them, by name."""
    module = inject_adapter_in_model(
        LoraConfig(r=1, target_modules=["0"]), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    )
    with pytest.raises(ValueError, match=r"^0\.lora_A\.default\.weight is part of an adapter: use AdapterSnapshot\.$"):
        TeacherSnapshot(module)
    assert list(TeacherSnapshot(module, names=["1.weight"]).state_dict()) == ["1.weight"]


def test_dtype_must_be_floating_point():
    with pytest.raises(ValueError, match="floating-point dtype, got torch.int8"):
        TeacherSnapshot(nn.Linear(1, 1), dtype=torch.int8)
