"""Squared drift of the weights that PEFT adapters change, with its exact gradient, without building those weights.

With W the merged weight of an adapted layer, and W_0 what it was at the snapshot, two reductions have a name:

    product  sum over layers of ||W - W_0||^2    the paper's penalty (Algorithm 1, line 9), on the weights that act
    factors  sum over factors of ||factor||^2    what the authors' released code computes for LoRA: A^2 + B^2

Each kind of adapter has one differentiable formula for ||W - W_0||^2, and autograd gives its gradient:

    LoRA, LoHa  low_rank   the change is a product P Q of thin matrices, and their r x r Gram matrices say all
    DoRA        dora       row by row, from the same P and Q and one product of the base weight with Q
    LoKr        kronecker  from norms and inner products of the two factors
    OFT         rotated    block by block, from the Gram matrix of the columns that a block mixes

Anything else is refused. Sums are taken in float32 at least, outside autocast; a difference of products in float64,
since float32 loses small changes (as it does on MPS, which has no other). Source: Kim, Park, Kim, "Preserve and
Personalize: Personalized Text-to-Image Diffusion Models without Distributional Drift", ICLR 2026, arXiv 2505.19519;
what an adapter does to its weight is PEFT's `merge`.
"""

from collections.abc import Hashable, Iterator, Mapping
from functools import cached_property

import torch
from peft.tuners.lokr.layer import LoKrLayer
from peft.tuners.oft.layer import Linear as OFTLinear
from torch import Tensor, nn

from .drift import Drift, total
from .peft_layers import MAGNITUDE, Adapter, _base_matrix, _tensors, trained_adapters

Stacks = dict[tuple[int, str], Tensor]  # by the place of an adapter in its layer, and the tensor's name

# Adapter elements in one batch of layers: 4 MiB of float32; on a GPU, where starting kernels costs, more.
CPU_BATCH_ELEMENTS, BATCH_ELEMENTS = 2**20, 2**22


def _tucker(a: Tensor, b: Tensor, core: Tensor | None) -> tuple[Tensor, Tensor]:
    """Matrices (out, r) and (r, in): a and b as they are, or a (r, out) and b (r, in) with the core of a kernel."""
    return (a, b) if core is None else (a.T, torch.einsum("ijkl,jn->inkl", core, b).flatten(1))


def _factors(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """P (out, r) and Q (r, in), whose product times the scale is what LoRA or LoHa adds to the base weight."""
    if "lora_A" in t:
        return t["lora_B"].flatten(1), t["lora_A"].flatten(1)
    if "lora_embedding_A" in t:
        return t["lora_embedding_B"], t["lora_embedding_A"]
    p1, q1 = _tucker(t["hada_w1_a"], t["hada_w1_b"], t.get("hada_t1"))
    p2, q2 = _tucker(t["hada_w2_a"], t["hada_w2_b"], t.get("hada_t2"))
    # (p1 q1) o (p2 q2) is a product of Khatri-Rao products: Hyeon-Woo et al., "FedPara", ICLR 2022, proposition 1
    return (p1[:, :, None] * p2[:, None, :]).flatten(1), (q1[:, None, :] * q2[None, :, :]).flatten(0, 1)


def _change(adapter: Adapter, start: Adapter) -> tuple[float, Tensor, Tensor]:
    """s, P and Q with s P Q = what the adapter adds to the base weight less what it added at the start."""
    if not start.factors:
        return adapter.scale, *_factors(adapter.to(adapter.device, adapter.dtype))
    (p, q), (p0, q0) = (_factors(a.to(adapter.device, adapter.wide)) for a in (adapter, start))
    p, p0 = adapter.scale * p, start.scale * p0
    # (P - P0) Q + P0 (Q - Q0); the shorter [P, -P0] [Q; Q0] cancels the digits that carry a small change
    return 1.0, torch.cat([p - p0, p0], dim=1).to(adapter.dtype), torch.cat([q, q - q0]).to(adapter.dtype)


def _sum(changes: list[tuple[float, Tensor, Tensor]]) -> tuple[float, Tensor, Tensor]:
    """s, P and Q of the sum of several changes of one weight: those of a single one as they are."""
    if len(changes) == 1:
        return changes[0]
    return 1.0, torch.cat([s * p for s, p, _ in changes], dim=1), torch.cat([q for _, _, q in changes])


def low_rank(scale: float, p: Tensor, q: Tensor) -> Tensor:
    """||s P Q||^2 = s^2 sum((P^T P) o (Q Q^T))."""
    return scale**2 * ((p.T @ p) * (q @ q.T)).sum()


def dora(adapter: Adapter, start: Adapter) -> Tensor:
    """Sum over output rows of ||m b / v - m0 b0 / v0||^2, b = w0 + s (B A)_row, v = ||b|| (DoRA, ICML 2024, eq. 5).

    With d = b - b0 that is (m - m0)^2 + m m0 (||d||^2 - (v - v0)^2) / (v v0); v - v0 = (v^2 - v0^2) / (v + v0) and
    v^2 - v0^2 = 2 <b0, d> + ||d||^2, so that no two nearly equal numbers are subtracted.
    """
    scale, p, q = _change(adapter, start)
    p, base = scale * p, _base_matrix(adapter).to(q)
    if adapter.module.lora_magnitude_vector[adapter.name].fan_in_fan_out:
        base = base.T  # to have a row for each magnitude

    def inner(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """<w0, (P Q)_row> and ||(P Q)_row||^2 for each row."""
        return (p * (base @ q.T)).sum(dim=1), (p @ (q @ q.T) * p).sum(dim=1)

    v0_squared = base.square().sum(dim=1)
    cross, d_squared = inner(p, q)
    if start.factors:
        p0, q0 = (factor.to(q) for factor in _factors(start.tensors))
        p0 = start.scale * p0
        cross_0, squared_0 = inner(p0, q0)
        v0_squared = v0_squared + 2 * cross_0 + squared_0
        cross = cross + (p0 @ (q0 @ q.T) * p).sum(dim=1)
    growth = 2 * cross + d_squared
    v, v0 = (v0_squared + growth).sqrt(), v0_squared.sqrt()
    m, m0 = (a.tensors[MAGNITUDE].flatten().to(q) for a in (adapter, start))
    return ((m - m0).square() + m * m0 * (d_squared - (growth / (v + v0)).square()) / (v * v0)).sum()


def kronecker(adapter: Adapter, start: Adapter) -> Tensor:
    """||W1 x W2 - V1 x V2||^2 = ||D1 x W2 + V1 x D2||^2, D = W - V, V the start; norms of products multiply."""

    def parts(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        if "lokr_w2" in t:
            return w1, t["lokr_w2"].flatten(1)
        left, right = _tucker(t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2"))
        return w1, left @ right

    w1, w2 = parts(adapter.to(adapter.device, adapter.wide))
    v1, v2 = parts(start.to(adapter.device, adapter.wide)) if start.factors else (torch.zeros_like(w1), w2)
    w1, v1 = adapter.scale * w1, start.scale * v1
    d1, d2 = w1 - v1, w2 - v2
    squares = d1.square().sum() * w2.square().sum() + v1.square().sum() * d2.square().sum()
    return (squares + 2 * (d1 * v1).sum() * (w2 * d2).sum()).to(adapter.dtype)


def oft_gram(adapter: Adapter) -> Tensor:
    """For each block that OFT rotates, the inner products of its columns of the base weight: (blocks, size, size)."""
    blocks = _base_matrix(adapter).unflatten(1, (-1, adapter.module.oft_R[adapter.name].block_size)).movedim(1, 0)
    return blocks.mT @ blocks


def rotated(adapter: Adapter, start: Adapter, gram: Tensor) -> Tensor:
    """Sum over blocks of tr(E G E^T) with E = R - R_0, for W = W_base R^T; a shared R meets the G of each block."""
    rotation = adapter.module.oft_R[adapter.name]
    vectors = adapter.to(adapter.device, adapter.wide)["oft_R"]
    vectors_0 = start.to(adapter.device, adapter.wide)["oft_R"] if start.factors else torch.zeros_like(vectors)
    settings = rotation.block_size, rotation.use_cayley_neumann, rotation.num_cayley_neumann_terms
    r, r0 = (rotation._cayley_batch(v, *settings) for v in (vectors, vectors_0))  # PEFT's own, not orthogonal exactly
    change = (r - r0).to(adapter.dtype)
    return (change @ gram.to(change) * change).sum()


class AdapterSnapshot:
    """How the trained adapters of a module start, to measure what they have changed since; matched by name.

    Take it before the first step, and before a checkpoint is loaded. It holds tensors only where it must: of adapters
    that do not start at zero (PiSSA, OLoRA, continued training), DoRA's magnitudes, Gram matrices for OFT.

    Args:
        module: A module with adapters, from PEFT or from diffusers' `add_adapter`. Those that are active and trained
            count; wrapping by DDP or `torch.compile` does not change their names.

    Raises:
        ValueError: No trained adapter, one without an exact formula, or anything else that is trained.
    """

    reductions = ("product", "factors")

    def __init__(self, module: nn.Module) -> None:
        layers = trained_adapters(module)
        self._shapes = _shapes(layers)
        self._starts = {(a.layer, a.name): _start(a) for adapters in layers for a in adapters}
        self._grams = {a.layer: oft_gram(a) for a, *_ in layers if isinstance(a.module, OFTLinear)}
        self._squared_norms = [_base_matrix(adapter).square().sum() for adapter, *_ in layers]

    @cached_property
    def squared_norm(self) -> float:
        """The sum over adapted layers of ||base weight||^2, what a drift is relative to."""
        return float(sum(squared_norm.item() for squared_norm in self._squared_norms))

    def drift(self, module: nn.Module, reduction: str) -> Tensor:
        """The drift as a scalar to differentiate, float32 or wider.

        Raises:
            ValueError: Adapters or shapes that are not those of the snapshot; an unknown reduction.
        """
        return total([self._value(layers, _stacked(_alike(layers)), reduction) for layers in self._groups(module)])

    @torch.no_grad()
    def drift_by_layer(self, module: nn.Module) -> dict[str, float]:
        """The `product` drift of each adapted layer, by its name.

        Raises:
            ValueError: As for `drift`.
        """
        alone = [[layer] for layers in self._groups(module) for layer in layers]
        values = [self._value(layer, _stacked(_alike(layer)), "product").item() for layer in alone]
        return {layer[0][0].layer: max(0.0, value) for layer, value in zip(alone, values, strict=True)}

    def add_gradient_(
        self, module: nn.Module, reduction: str, weight: float, scale: float = 1.0
    ) -> Drift:
        """Adds scale * weight * d(drift)/d(parameter) to each adapter parameter's `.grad` and returns the drift.

        A parameter that has no gradient yet gets one; a frozen one, or any with weight 0, is only measured. Layers of
        LoRA and LoHa that are alike are stacked, in batches; others are taken one by one.

        Args:
            weight: The paper's lambda.
            scale: Factor on the gradient alone: the loss scale, while the gradients it joins are still scaled (fp16).

        Raises:
            ValueError: As for `drift`.
        """
        values, squares = [], []
        for layers in self._groups(module):
            alike = _alike(layers)
            with torch.no_grad():  # float32: weight and scale are to reach a gradient before fp16 rounds it to zero
                leaves = _stacked(alike)
            trained = [key for key, parameters in alike.items() if parameters[0].requires_grad and weight != 0]
            with torch.enable_grad():
                value = self._value(layers, leaves | {key: leaves[key].requires_grad_() for key in trained}, reduction)
            if value.requires_grad:
                gradients = torch.autograd.grad(value, [leaves[key] for key in trained], allow_unused=True)
                for key, gradient in zip(trained, gradients, strict=True):
                    if gradient is not None:  # as for DoRA's magnitude, which is no factor
                        _add_gradient(alike[key], gradient, scale * weight)
            with torch.no_grad():
                squares.append(value.detach() if reduction == "product" else self._value(layers, leaves, "product"))
            values.append(value.detach())
        # Gram matrices can round a distance of zero to one just below.
        return Drift(total(values).clamp(min=0), total(squares).clamp(min=0))

    def _value(self, layers: list[list[Adapter]], stacks: Stacks, reduction: str) -> Tensor:
        """The drift of layers that `_groups` put together, whose tensors are in `stacks`."""
        if reduction not in self.reductions:
            raise ValueError(f"reduction must be one of {', '.join(self.reductions)}, got {reduction!r}.")
        starts = [[self._starts[a.layer, a.name] for a in adapters] for adapters in layers]
        stacks_0 = _stacked(_alike(starts))

        def of_layer(tensors: Stacks, tensors_0: Stacks) -> Tensor:
            return self._of_layer(_holding(layers[0], tensors), _holding(starts[0], tensors_0), reduction)

        with torch.autocast(layers[0][0].device.type, enabled=False):
            if len(layers) > 1:
                return torch.vmap(of_layer)(stacks, stacks_0).sum()
            return of_layer(*({key: stack[0] for key, stack in of.items()} for of in (stacks, stacks_0)))

    def _of_layer(self, adapters: list[Adapter], starts: list[Adapter], reduction: str) -> Tensor:
        """The drift of one layer, by the formula of its kind."""
        adapter, start = adapters[0], starts[0]
        if reduction == "factors":
            return torch.stack([factor.square().sum() for a in adapters for factor in a.factors]).sum()
        if isinstance(adapter.module, OFTLinear):
            return rotated(adapter, start, self._grams[adapter.layer])
        if isinstance(adapter.module, LoKrLayer):
            return kronecker(adapter, start)
        if MAGNITUDE in adapter.tensors:
            return dora(adapter, start)
        return low_rank(*_sum([_change(now, then) for now, then in zip(adapters, starts, strict=True)]))

    def _groups(self, module: nn.Module) -> Iterator[list[list[Adapter]]]:
        """The layers, if they are those of the snapshot: low-rank ones batched by shape and place, others alone."""
        layers = trained_adapters(module)
        expected, given = self._shapes, _shapes(layers)
        if expected != given:
            first = min(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
            was, shape = (None if size is None else tuple(size) for size in (expected.get(first), given.get(first)))
            raise ValueError(f"{'.'.join(first)}: expected shape {was}, got {shape} (None: no trained adapter).")
        groups: dict[Hashable, list[list[Adapter]]] = {}
        for adapters in layers:
            alone = isinstance(adapters[0].module, (OFTLinear, LoKrLayer)) or MAGNITUDE in adapters[0].tensors
            both = [*adapters, *(self._starts[a.layer, a.name] for a in adapters)]
            scales = tuple(adapter.scale for adapter in both)
            named = [(name, t) for adapter in both for name, t in adapter.tensors.items()]
            tensors = tuple((name, t.shape, t.dtype, t.device, t.requires_grad) for name, t in named)
            groups.setdefault(adapters[0].layer if alone else (scales, tensors), []).append(adapters)
        for group in groups.values():
            limit = CPU_BATCH_ELEMENTS if group[0][0].device.type == "cpu" else BATCH_ELEMENTS
            size = max(1, limit // sum(tensor.numel() for tensor in _tensors(group[0])))
            yield from (group[i : i + size] for i in range(0, len(group), size))


def _alike(layers: list[list[Adapter]]) -> dict[tuple[int, str], list[Tensor]]:
    """The tensors of layers that have the same ones, by the place of the adapter in its layer, and by name."""
    keys = [(place, name) for place, adapter in enumerate(layers[0]) for name in adapter.tensors]
    return {(place, name): [adapters[place].tensors[name] for adapters in layers] for place, name in keys}


def _stacked(alike: dict[tuple[int, str], list[Tensor]]) -> Stacks:
    """Each list as one tensor, in float32 at least, with the layers as its first dimension."""
    stacks = {}
    for key, tensors in alike.items():
        with torch.autocast(tensors[0].device.type, enabled=False):
            stacks[key] = torch.stack(tensors).to(torch.promote_types(tensors[0].dtype, torch.float32))
    return stacks


def _holding(adapters: list[Adapter], tensors: Stacks) -> list[Adapter]:
    """The adapters of one layer with other tensors."""
    return [
        adapter._replace(tensors={name: tensors[place, name] for name in adapter.tensors})
        for place, adapter in enumerate(adapters)
    ]


def _add_gradient(parameters: list[Tensor], gradient: Tensor, factor: float) -> None:
    """Adds factor * gradient, stacked, to each parameter's `.grad`; one that has none gets one."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    totals = [parameter.grad for parameter in parameters]
    if len(set(parameters)) == len(parameters):
        torch._foreach_add_(totals, gradient.unbind(), alpha=factor)
    else:  # layers that share a parameter: one after another
        for total, part in zip(totals, gradient, strict=True):
            total.add_(part, alpha=factor)


def _shapes(layers: list[list[Adapter]]) -> dict[tuple[str, str, str], torch.Size]:
    return {(a.layer, name, a.name): tensor.shape for layer in layers for a in layer for name, tensor in a.tensors.items()}


def _start(adapter: Adapter) -> Adapter:
    """What must be kept: no factors if one of them is zero, for then the adapter adds nothing; and no module."""
    at_zero = not all(factor.any() for factor in adapter.factors)
    kept = {n: t.detach().clone() for n, t in adapter.tensors.items() if n == MAGNITUDE or not at_zero}
    return adapter._replace(module=None, tensors=kept)
