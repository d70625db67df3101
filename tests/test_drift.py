"""Squared drift and its gradient: by hand, against float64, whatever the dtype, the layout and the slices."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffusers_lipreg.drift as drift_module
from diffusers_lipreg import TeacherSnapshot
from diffusers_lipreg.drift import REDUCTIONS, add_drift_gradient_, drift

# Two tensors of different sizes. Their differences are [[1, -2], [0, 1]] and [3, -1]: ||d||^2 is 6 and 10, so
#     sum = 6 + 10 = 16                 d sum / d theta = 2 d
#     tensor_mean = 6/4 + 10/2 = 6.5    d tensor_mean / d theta = 2 d / 4 = d / 2, and 2 d / 2 = d
BY_HAND = [
    ("sum", 16.0, [[[2.0, -4.0], [0.0, 2.0]], [6.0, -2.0]]),
    ("tensor_mean", 6.5, [[[0.5, -1.0], [0.0, 0.5]], [3.0, -1.0]]),
]


def by_hand_pairs() -> list[tuple[nn.Parameter, Tensor]]:
    teachers = [torch.tensor([[4.0, 4.0], [4.0, -4.0]]), torch.tensor([-8.0, 2.0])]
    students = [torch.tensor([[5.0, 2.0], [4.0, -3.0]]), torch.tensor([-5.0, 1.0])]
    return [(nn.Parameter(student), teacher) for student, teacher in zip(students, teachers, strict=True)]


def random_pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, Tensor]:
    return nn.Parameter(torch.randn(shape).to(dtype)), torch.randn(shape).to(dtype)


def exact_gradient(parameter: Tensor, teacher: Tensor, reduction: str, weight: float) -> Tensor:
    count = parameter.numel() if reduction == "tensor_mean" else 1
    return 2 * weight * (parameter.detach().double() - teacher.double()) / count


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("reduction", "value", "gradients"), BY_HAND)
def test_value_and_gradient_by_hand(reduction, value, gradients):
    pairs = by_hand_pairs()
    loss = drift(pairs, reduction)
    loss.backward()
    assert loss.item() == value
    assert [parameter.grad.tolist() for parameter, _ in pairs] == gradients


@pytest.mark.parametrize(("reduction", "value", "gradients"), BY_HAND)
def test_in_place_gradient_by_hand(reduction, value, gradients):
    """weight times the gradient above, added to what is there already; the values carry no weight."""
    pairs = by_hand_pairs()
    pairs[1][0].grad = torch.tensor([100.0, 200.0])
    met = add_drift_gradient_(pairs, reduction, weight=10.0)
    assert (met.value.item(), met.squared_distance.item()) == (value, 16.0)
    assert torch.equal(pairs[0][0].grad, 10 * torch.tensor(gradients[0]))
    assert torch.equal(pairs[1][0].grad, 10 * torch.tensor(gradients[1]) + torch.tensor([100.0, 200.0]))


def test_scale_multiplies_the_gradient_alone():
    pairs = by_hand_pairs()
    met = add_drift_gradient_(pairs, "sum", weight=10.0, scale=1024.0)
    assert met.value.item() == 16.0
    assert pairs[1][0].grad.tolist() == [60.0 * 1024, -20.0 * 1024]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_measuring_and_weight_zero_leave_gradients_alone(reduction):
    pairs = by_hand_pairs()
    pairs[0][0].grad = torch.ones(2, 2)
    measured = add_drift_gradient_(pairs, reduction, weight=0.0)
    assert measured == add_drift_gradient_(pairs, reduction, weight=0.0)
    assert measured == (dict(sum=16.0, tensor_mean=6.5)[reduction], 16.0)
    assert torch.equal(pairs[0][0].grad, torch.ones(2, 2)) and pairs[1][0].grad is None


def test_frozen_parameters_are_only_measured():
    pairs = by_hand_pairs()
    pairs[0][0].requires_grad_(False)
    assert add_drift_gradient_(pairs, "sum", weight=10.0).value == 16
    assert pairs[0][0].grad is None and pairs[1][0].grad.tolist() == [60.0, -20.0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("slice_elements", [1, 5, 2**22])
def test_slices_change_neither_value_nor_gradient(monkeypatch, reduction, slice_elements):
    """Rows longer than a slice, a last slice that is not full, channels_last, a scalar, a tensor without elements."""
    monkeypatch.setattr(drift_module, "CPU_ELEMENTS", slice_elements)
    pairs = [random_pair(shape) for shape in [(7, 3), (13,), (2, 20), (3, 2, 2, 3), (), (0, 4)]]
    pairs[3][0].data = pairs[3][0].data.to(memory_format=torch.channels_last)
    met = add_drift_gradient_(pairs, reduction, weight=3.0)
    torch.testing.assert_close(drift(pairs, reduction), met.value, rtol=1e-6, atol=0)
    squares = torch.stack([(p.detach().double() - t.double()).square().sum() for p, t in pairs])
    counts = torch.tensor([max(1, p.numel()) if reduction == "tensor_mean" else 1 for p, _ in pairs])
    torch.testing.assert_close(met.squared_distance.double(), squares.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(met.value.double(), (squares / counts).sum(), rtol=1e-6, atol=0)
    for parameter, teacher in pairs:
        gradient = exact_gradient(parameter, teacher, reduction, 3.0).float()
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=0)
        assert parameter.grad.stride() == parameter.stride()  # the layout that autograd gives, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_memory_is_one_slice(monkeypatch, dtype):
    """Of a tensor 16 slices large, one slice in float32 is the largest thing allocated (gradients aside)."""
    monkeypatch.setattr(drift_module, "CPU_ELEMENTS", 1000)
    parameter, teacher = random_pair((160, 100), dtype)
    parameter.grad = torch.zeros_like(parameter)
    known = {tensor.untyped_storage().data_ptr() for tensor in (parameter, teacher, parameter.grad)}
    allocated = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                    allocated.append(tensor.untyped_storage().nbytes())
            return result

    with Allocations():
        add_drift_gradient_([(parameter, teacher)], "sum", weight=1.0)
    assert max(allocated) == 4 * 1000


def test_a_parameter_with_gaps_in_its_memory():
    parameter, teacher = nn.Parameter(torch.randn(6, 8)[:, ::2]), torch.randn(6, 4)
    met = add_drift_gradient_([(parameter, teacher), random_pair((5,))], "sum", weight=3.0)
    torch.testing.assert_close(parameter.grad, exact_gradient(parameter, teacher, "sum", 3.0).float())
    assert met.value > (parameter - teacher).square().sum()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_small_tensors_share_kernels(reduction):
    """A GPU starts as many kernels for 400 tensors of two sizes as for 8: launching one for each would cost more than it does."""

    class Kernels(TorchDispatchMode):
        started = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.started += function.overloadpacket not in (torch.ops.aten.view, torch.ops.aten.split_with_sizes)
            return function(*args, **(kwargs or {}))

    def kernels(number: int) -> int:
        pairs = [random_pair((3, 1 + i % 2)) for i in range(number)]
        for parameter, _ in pairs:
            parameter.grad = torch.zeros_like(parameter)
        with Kernels() as mode:
            add_drift_gradient_(pairs, reduction, weight=1.0)
        return mode.started

    assert kernels(400) == kernels(8)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_drift_far_below_the_weights_keeps_its_digits(reduction):
    """Weights of 0.02 that drifted by 1e-6, as after a step at a learning rate of 1e-6."""
    teacher = 0.02 * torch.randn(300, 300)
    parameter = nn.Parameter(teacher + 1e-6 * torch.randn(300, 300))
    exact = exact_gradient(parameter, teacher, reduction, weight=0.3)
    difference = parameter.detach().double() - teacher.double()
    value = (difference.square().mean() if reduction == "tensor_mean" else difference.square().sum()).item()

    def error(gradient: Tensor) -> float:
        return ((gradient.double() - exact).norm() / exact.norm()).item()

    loss = drift([(parameter, teacher)], reduction)
    (0.3 * loss).backward()
    assert loss.item() == pytest.approx(value, rel=1e-5) and error(parameter.grad) < 1e-5
    parameter.grad = None
    met = add_drift_gradient_([(parameter, teacher)], reduction, weight=0.3)
    assert met.value.item() == pytest.approx(value, rel=1e-5) and error(parameter.grad) < 1e-5

    factor = 0.6 / (teacher.numel() if reduction == "tensor_mean" else 1)
    assert error(factor * parameter.detach() - factor * teacher) > 1e-4  # what multiplying first would cost


def test_the_sum_over_many_equal_differences_is_exact():
    """As after the first step of Adam, whose updates all have one size: a running sum would round in one direction."""
    parameter = nn.Parameter(0.02 * torch.randn(2**21))
    teacher = parameter.detach() - 1e-5 * torch.randn(2**21).sign()
    exact = (parameter.detach().double() - teacher.double()).square().sum().item()
    met = add_drift_gradient_([(parameter, teacher)], "sum", weight=1.0)
    assert met.value.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher_dtype", [None, torch.float32])
def test_half_precision_parameters_and_gradients(dtype, teacher_dtype):
    """Differences and sums in float32; only the gradient is rounded, once, to the parameter's dtype."""
    parameter, teacher = random_pair((50, 40), dtype)
    teacher = teacher.to(teacher_dtype)
    parameter.grad = (before := torch.randn(50, 40).to(dtype)).clone()
    exact = exact_gradient(parameter, teacher, "sum", weight=0.25)
    met = add_drift_gradient_([(parameter, teacher)], "sum", weight=0.25)
    assert met.value.dtype == torch.float32
    assert met.value.item() == pytest.approx((2 * exact).square().sum().item(), rel=1e-6)
    assert torch.equal(parameter.grad, (before.double() + exact).to(dtype))

    parameter.grad = None
    (0.25 * drift([(parameter, teacher)], "sum")).backward()
    assert torch.equal(parameter.grad, exact.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_teacher_in_host_memory_gives_the_same_bits_on_a_gpu(monkeypatch, dtype):
    """Copied in many chunks, again and again, with no more device memory than a few of them."""
    monkeypatch.setattr(drift_module, "ELEMENTS", 2**18)
    module = nn.ModuleList(nn.Linear(size, 1024) for size in [1000, 7, 3000, 64, 64, 5000] * 2).to("cuda")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))
    beside, host = TeacherSnapshot(module), TeacherSnapshot(module, device="cpu")
    assert all(teacher.is_pinned() and teacher.dtype == dtype for teacher in host.state_dict().values())
    for _ in range(20):
        met, gradients = [], []
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1e-3 * torch.randn_like(parameter))
        for snapshot in (beside, host):
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            met.append(snapshot.add_gradient_(module, "sum", weight=0.5))
            assert torch.cuda.max_memory_allocated() - before < 12 * 4 * 2**18  # of 74 MB
            gradients.append([parameter.grad for parameter in module.parameters()])
        assert met[0] == met[1]
        assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
